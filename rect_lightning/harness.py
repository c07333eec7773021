"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on an edited model."""

# No `from __future__ import annotations`: the command line reads the types of the command.

import difflib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from rect_lightning.durable import whole_file
from rect_lightning.reuse import load_pair

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def lm_eval(
    model: Path,
    *,
    tasks: str,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | Literal["auto"] = 8,
    clean: bool = True,
    base: str | None = None,
    device: str | None = None,
    output: Path | None = None,
) -> None:
    """Measure an edited model with lm-evaluation-harness, and the clean one beside it.

    Prints a table with the harness's scores and standard errors.

    Args:
        model: A run folder or its checkpoint, a patch, or a Hugging Face folder. A folder that no patch was applied to has no
            clean model to compare with.
        tasks: Names of the harness's tasks, groups or tags, patterns such as arc_*, or YAML files; comma-separated.
        include_path: A folder of task files, whose names `tasks` may use too.
        limit: Ask the first so many records of each task; all if not given.
        num_fewshot: Solved records before each question; each task's own number if not given.
        batch_size: Rows of a batch, or auto for as many as the memory holds.
        clean: Whether to measure the clean model as well.
        base: The base model's name or folder, if it is not where it was during the run.
        device: Where to run; the accelerator if there is one.
        output: A new JSON file for all that the harness says of both models, its configuration of each task included.

    Raises:
        ModuleNotFoundError: The harness is not installed.
        FileNotFoundError: There is no such model or file.
        FileExistsError: There is something at `output`.
        ValueError: There is no such task, a number is out of range, or the model is damaged, foreign or of another base.
        RuntimeError: The harness cannot make a task of a file, or get its data.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}.")
    if output is not None and output.exists():
        raise FileExistsError(f"{output} exists already and is left as it is: name a new one.")
    if not model.exists():
        raise FileNotFoundError(f"There is no checkpoint, patch or folder {model}.")
    names, manager = find_tasks(tasks.split(","), include_path)
    pair = load_pair(model, base=base)
    if device is None and torch.accelerator.is_available():
        device = str(torch.accelerator.current_accelerator())
    torch.nn.Module.to(pair.network, device or "cpu")
    run = partial(evaluate, manager=manager, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    results = {}
    if clean and not pair.clean:
        _log.info("%s has no patch, so there is no clean model to compare it with.", model)
    elif clean:
        with pair.clean_weights():
            results["before"] = run(pair.network, pair.tokenizer, names)
    results["after"] = run(pair.network, pair.tokenizer, names)
    Console().print(_table(results, title=str(model)))
    if output is not None:
        from lm_eval.utils import handle_non_serializable

        told = json.dumps(
            {"model": str(model)} | results, indent=2, ensure_ascii=False, default=handle_non_serializable
        )
        with whole_file(output) as path:
            path.write_text(told + "\n", encoding="utf-8")


def find_tasks(tasks: Sequence[str], include_path: Path | None = None) -> "tuple[list[str], TaskManager]":
    """The tasks that these names, patterns and files mean, once the harness has read them and has their data.

    Args:
        tasks: Names of tasks, groups or tags, patterns, or YAML files.
        include_path: A folder of task files that may be named too.

    Raises:
        ModuleNotFoundError: The harness is not installed.
        FileNotFoundError: There is no such file or folder.
        ValueError: There is no such task.
        RuntimeError: The harness cannot make a task of it, or get its data.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ModuleNotFoundError(
            "This is done with lm-evaluation-harness: pip install 'rect_lightning[lm-eval]'."
        ) from error

    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"include_path: there is no folder {include_path}.")
    wanted = [task.strip() for task in tasks if task.strip()]
    files = [task for task in wanted if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"There is no file {file}.")
    found: dict[str, list[str]] = {}
    # reading the harness's own 14,000 tasks takes seconds, and is left out where none of them is asked for
    for defaults in (False, True):
        manager = TaskManager(include_path=str(include_path) if include_path else None, include_defaults=defaults)
        found = {task: [task] if task in files else manager.match_tasks([task]) for task in wanted}
        if all(found.values()):
            break
    for task in (task for task in wanted if not found[task]):
        near = difflib.get_close_matches(task, manager.all_tasks, n=3)
        hint = (
            f"Near it are {', '.join(near)}." if near else "`lm-eval ls tasks` lists them; a file's name ends in .yaml."
        )
        raise ValueError(f"There is no task {task!r} in lm-evaluation-harness. {hint}")
    names = list(dict.fromkeys(name for task in wanted for name in found[task]))
    if not names:
        raise ValueError("No task is named.")
    for name in names:
        try:
            manager.load([name])
        except Exception as error:  # whatever a task's own code and the data set's come up with
            said = str(error).strip().partition("\n")[0]
            raise RuntimeError(f"The task {name} cannot be made ready. {type(error).__name__}: {said}") from error
    return names, manager


def evaluate(
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    tasks: list[str],
    *,
    manager: "TaskManager",
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | Literal["auto"] = 8,
) -> dict[str, Any]:
    """What the harness says of a model as it stands; see `lm_eval.simple_evaluate`.

    Args:
        network: The model, in eval mode.
        tokenizer: Its tokenizer; None for the one at ``network.name_or_path``.
        tasks: Names or files, from `find_tasks`.
        manager: What knows them, from there too.
        limit: As for `lm_eval`.
        num_fewshot: As for `lm_eval`.
        batch_size: As for `lm_eval`.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    said = simple_evaluate(
        model=HFLM(pretrained=network, tokenizer=tokenizer, batch_size=batch_size),
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        log_samples=False,
    )
    kept = ("results", "groups", "n-samples", "n-shot", "higher_is_better", "versions", "configs", "lm_eval_version")
    return {key: said[key] for key in kept if key in said}


def _table(results: Mapping[str, Mapping[str, Any]], *, title: str) -> Table:
    """Each score of each task, side by side."""
    table = Table(title=title)
    for column in ("task", "score"):
        table.add_column(column)
    for column in (*results, "records"):
        table.add_column(column, justify="right")
    counts = results["after"].get("n-samples", {})
    for task, scores in results["after"]["results"].items():
        for name, score in _scores(scores):
            cells = [_shown(column["results"][task], name) for column in results.values()]
            table.add_row(task, score, *cells, str(counts.get(task, {}).get("effective", "")))
    return table


def _scores(scores: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of the scores, without those of the standard errors, and what they are called."""
    for key, value in scores.items():
        metric, _, filtered = key.partition(",")
        if isinstance(value, int | float) and filtered and not metric.endswith("_stderr"):
            yield key, metric if filtered == "none" else f"{metric}, {filtered}"


def _shown(scores: Mapping[str, Any], key: str) -> str:
    metric, _, filtered = key.partition(",")
    error = scores.get(f"{metric}_stderr,{filtered}")
    return f"{scores[key]:.3f}" + (f" ± {error:.3f}" if isinstance(error, float) else "")
