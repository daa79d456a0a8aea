"""The nine tasks of the paper by name, in the columns that their data sets have on the hub. docs/tasks.md lists them."""

from ldmole_dist.data.tasks.choice import CHOICE
from ldmole_dist.data.tasks.glue import GLUE
from ldmole_dist.data.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (*CHOICE, *GLUE)}
