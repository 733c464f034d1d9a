"""Every Triton kernel compiled for GPUs that need not be here, and its machine code held to what the kernel promises."""
