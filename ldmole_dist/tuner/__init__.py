"""LD-MoLE as a PEFT method: its config, tuner and layer, and the input groups of a backbone."""

# Importing PEFT may register LD-MoLE with it (model/peft_registration.py), which imports the modules of this package. PEFT is
# therefore imported here, before any of them, so that registration never meets a partly initialized one.
import peft as _peft  # noqa: F401
