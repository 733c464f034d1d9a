"""Cross-entropy of a linear layer's outputs that never holds all of them. `op.py` has the public function, `reference.py`
the definition."""
