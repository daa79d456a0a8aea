"""Checkpoints that can be loaded under any topology, and export of the portable adapter.

The topology is the ZeRO stage, ep_size and the number of ranks. A checkpoint is a folder `checkpoints/step_N` (N has eight
digits) with these files:

- `rank_R.safetensors` for each rank R (five digits): its shard of the optimizer state, as flat ranges of the full parameters,
  and its random states.
- `adapter_config.json`: the adapter's PEFT config.
- `manifest.json`: written last; lists every other file with its size and SHA-256.

Frozen weights are not saved.
"""
