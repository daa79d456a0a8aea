"""`ldmole plan`: estimate memory, traffic and FLOPs of a training step from a config, and recommend a configuration.

No estimate joins a process group, needs a device or allocates a weight.
"""
