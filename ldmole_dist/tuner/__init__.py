"""LD-MoLE as a PEFT method: its config, its model, its layer, and the input groups of a backbone."""
