"""Captions and answers from the shell: `python -m train.generate`."""
