"""The LD-MoLE method of the paper (arXiv 2509.25684) in plain PyTorch: no torch.distributed, DeepSpeed or transformers."""
