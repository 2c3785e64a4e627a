"""What a label is. One file for each task; `find_task` chooses.

Nothing outside of this folder asks which task it has: it asks the task's object.
"""

from lora_sentiment.tasks.single_label import SingleLabel
from lora_sentiment.tasks.task import Task

__all__ = ["SINGLE_LABEL", "Task", "find_task"]

SINGLE_LABEL = SingleLabel()
_TASKS: dict[str, Task] = {task.name: task for task in (SINGLE_LABEL,)}


def find_task(name: str) -> Task:
    """Return the task of a value of `data.task`."""
    return _TASKS[name]
