"""`ldmole plan`: estimate memory, traffic and FLOPs of a training step from a backbone's config, and recommend a configuration.

The estimates need no GPU, no process group and no weights.
"""
