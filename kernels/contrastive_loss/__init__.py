"""The contrastive losses of image-text pairs: reference.py is the definition, eager.py works in chunks, op.py has the
public function."""
