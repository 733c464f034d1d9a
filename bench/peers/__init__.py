"""The implementations that are compared: ours beside textbook PyTorch, FlexAttention, timm and transformers.

One file per kind of work. A peer's adapter does what its users do, no more: the library's own layer with the
library's own data movement, and the same weights.
"""
