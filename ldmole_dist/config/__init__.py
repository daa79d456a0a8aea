"""The configuration of a run: one YAML file, checked against dataclasses, with overrides `a.b=c` from the command line.

If keys are unknown or missing, or values have a wrong type or are out of range, loading raises one `UserError` that lists them.
"""

from ldmole_dist.config.checks import accumulation_steps, check_ep_size, check_parallelism
from ldmole_dist.config.load import dump_config, load_config, make_config, plain_config
from ldmole_dist.config.schema import (
    TASK_CLASSES,
    Adapter,
    Backbone,
    Config,
    Data,
    Optimisation,
    Parallelism,
    Run,
    Source,
)

__all__ = [
    "TASK_CLASSES",
    "Adapter",
    "Backbone",
    "Config",
    "Data",
    "Optimisation",
    "Parallelism",
    "Run",
    "Source",
    "accumulation_steps",
    "check_ep_size",
    "check_parallelism",
    "dump_config",
    "load_config",
    "make_config",
    "plain_config",
]
