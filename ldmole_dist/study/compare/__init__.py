"""The comparison of routers and plain LoRA with the same data, budget and seeds: `ldmole compare`."""
