"""Routers and plain LoRA on the same data with the same budget and the same seeds: `launch/compare_routers.py`."""
