"""What a label is. One file for each task; `find_task` chooses.

Other code asks the task's object what depends on the task. The recipe alone compares names: it loads
no task, and checks which keys a task takes.
"""

from lora_sentiment.tasks.multi_label import MultiLabel
from lora_sentiment.tasks.regression import Regression
from lora_sentiment.tasks.single_label import SingleLabel
from lora_sentiment.tasks.task import Task

__all__ = ["SINGLE_LABEL", "TASKS", "Task", "find_task", "find_task_of"]

SINGLE_LABEL = SingleLabel()
TASKS: tuple[Task, ...] = (SINGLE_LABEL, MultiLabel(), Regression())


def find_task(name: str) -> Task:
    """Return the task of a value of `data.task`."""
    return next(task for task in TASKS if task.name == name)


def find_task_of(problem_type: object) -> Task | None:
    """Return the task of a `problem_type` of transformers; None stands for single labels.

    Returns:
        None for a type that this package does not know.
    """
    if problem_type is None:
        return SINGLE_LABEL
    for task in TASKS:
        if task.problem_type == problem_type:
            return task
    return None
