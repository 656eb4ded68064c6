"""Row kernels: `torch.py` is the definition and the default."""
