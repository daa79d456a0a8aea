"""What a training step needs before anybody runs it: memory, what goes over the wire, FLOPs, and which configuration to take.

Nothing here joins a process group, needs a device or allocates a weight; only `measure` starts ranks, to check the rest.
"""
