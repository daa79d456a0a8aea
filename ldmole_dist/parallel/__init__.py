"""Expert parallelism: placement of experts on ranks, and exchange of tokens and experts. Plain torch.distributed."""
