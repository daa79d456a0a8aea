"""Compare routers and plain LoRA on the same data, with the same budget and seeds: `ldmole compare`."""
