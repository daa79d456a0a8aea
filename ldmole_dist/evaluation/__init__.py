"""Evaluation on held-out rows, under every ZeRO stage and expert-parallel size."""
