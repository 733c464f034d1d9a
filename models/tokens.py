"""Special token ids. They are the same in every tokenizer that `python -m dataload.tokenizer` trains; a
test holds both equal."""

PAD, UNK, BOS, EOS, MASK = 0, 1, 2, 3, 4
SPECIAL = 5
"""Ids below are special tokens."""
IGNORE = -100
"""Target of a position that is not predicted."""
