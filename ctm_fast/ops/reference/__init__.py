"""Every op in plain PyTorch, float32 inside, as the papers write it: what the kernels are checked against."""
