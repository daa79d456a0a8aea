"""Checkpoints that fit any topology, resuming from them, and the portable adapter.

A checkpoint is a folder `checkpoints/step_N`: `rank_R.safetensors` with what rank R kept of the optimizer state, in stretches
of the flattened whole parameters, and its random states; `adapter_config.json`; `manifest.json`, which names every file with
its size and hash and is written last. Frozen weights are not in it.
"""
