"""LD-MoLE as a PEFT method: its config, tuner and layer, and the input groups of a backbone.

Importing this package registers the method with PEFT.
"""

from ldmole_dist.tuner.register import register

register()
