"""What `kernels.accelerate` makes of the Swin blocks of timm, torchvision and transformers. base.py says how."""
