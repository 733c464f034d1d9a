"""Training steps of whole models on one device: `python -m bench.steps`."""
