"""LD-MoLE adapters composed of existing LoRA adapters."""
