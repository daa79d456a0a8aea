"""Evaluation on held-out rows, with any ZeRO stage and expert-parallel size."""
