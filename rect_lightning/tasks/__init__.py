"""What a model is able to do besides the edits: one file a task, with its data, its prompt and its two scores."""

import difflib

from rect_lightning.tasks.boolq import BoolQ
from rect_lightning.tasks.choice import Choice
from rect_lightning.tasks.conll2003 import CoNLL2003
from rect_lightning.tasks.custom import Generation, MultipleChoice
from rect_lightning.tasks.gsm8k import GSM8K
from rect_lightning.tasks.mutual import MuTual
from rect_lightning.tasks.nq import NQ
from rect_lightning.tasks.rte import RTE
from rect_lightning.tasks.samsum import SAMSum
from rect_lightning.tasks.scores import Ratio, Score
from rect_lightning.tasks.sst2 import SST2
from rect_lightning.tasks.task import Output, PromptTask, Task, TaskResult, measure
from rect_lightning.tasks.text import Perplexity

__all__ = [
    "GSM8K",
    "NQ",
    "RTE",
    "SST2",
    "BoolQ",
    "Choice",
    "CoNLL2003",
    "Generation",
    "MuTual",
    "MultipleChoice",
    "Output",
    "Perplexity",
    "PromptTask",
    "Ratio",
    "SAMSum",
    "Score",
    "Task",
    "TaskResult",
    "measure",
    "named",
]


def named(name: str) -> Task:
    """One of the tasks that come with this package, with its own data set.

    Raises:
        ValueError: There is none of that name.
    """
    own = (GSM8K, RTE, NQ, BoolQ, MuTual, SAMSum, CoNLL2003, SST2, Perplexity)
    tasks = {task.name: task for task in own}
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(tasks)}."
        raise ValueError(f"There is no task {name!r}; {hint} A task of your own is given by its class_path.")
    return tasks[name]()
