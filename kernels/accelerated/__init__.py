"""What `kernels.accelerate` makes of the Swin blocks of timm, torchvision and transformers, and of Perceiver's attention.

base.py says how.
"""
