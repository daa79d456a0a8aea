"""The nine tasks of the paper, by name; see docs/tasks.md. Records have the columns of the data sets on the Hub."""

from ldmole_dist.data.tasks.choice import CHOICE
from ldmole_dist.data.tasks.glue import GLUE
from ldmole_dist.data.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (*CHOICE, *GLUE)}
