"""What edits cost: a model's abilities before any edit, and after every so many of them."""

# No `from __future__ import annotations`: the command line reads the types of the constructor.

import csv
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.table import Table

from rect_lightning.callbacks.regulariser import Regulariser
from rect_lightning.data.request import EditRequest
from rect_lightning.durable import whole_file
from rect_lightning.metrics import EditMetrics
from rect_lightning.progress import console
from rect_lightning.tasks import Score, Task, TaskResult, measure, named

COLUMNS = ("edits", "task", "score", "value", "low", "high", "n", "unparseable")


class SideEffects(Callback):
    """Measure abilities at 0, n, 2n … edits during a fit, and whether the edits so far still hold.

    0 edits is the clean model. A batch that crosses a multiple of n is measured after its operation, at the number of edits
    that were made then. Every score is logged as ``side/<score>``, the metrics of all edits so far as ``side/edits/<metric>``,
    with ``side/edits`` for how many there are; all of them gather in ``side_effects.csv`` in the run folder, one row a score
    with its 95 % interval, number of records and share of unparseable outputs. A resumed fit goes on with that table.

    Args:
        tasks: Names of tasks, such as gsm8k, or tasks given by their class_path and init_args.
        every_n_edits: Measure each time that so many more requests have been edited.
        limit: Ask the first so many records of each task; null for all.
        scoring: The published prompts and rules (paper), correct ones (standard), or both.
        precision: fp32, or bf16 for a copy of the weights in bf16, which is faster where the hardware knows bf16.
        tokens_per_batch: Tokens of a batch with what is written after its prompts; more takes more memory.
        stop_below: End the fit early when an ability falls below this share of what it was at 0 edits, by the task's main
            score (for perplexity its inverse); null never does.

    Raises:
        ValueError: There is no task or no such task, or a number is out of range.
    """

    def __init__(
        self,
        tasks: list[str | Task],
        *,
        every_n_edits: int,
        limit: int | None = 100,
        scoring: Literal["paper", "standard", "both"] = "both",
        precision: Literal["fp32", "bf16"] = "fp32",
        tokens_per_batch: int = 8192,
        stop_below: float | None = None,
    ) -> None:
        for name, value in (("every_n_edits", every_n_edits), ("limit", limit), ("tokens_per_batch", tokens_per_batch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if stop_below is not None and not 0 < stop_below <= 1:
            raise ValueError(f"stop_below is a share of an ability, above 0 and at most 1; got {stop_below}.")
        self.tasks = [named(task) if isinstance(task, str) else task for task in tasks]
        if not self.tasks or len({task.name for task in self.tasks}) < len(self.tasks):
            raise ValueError("SideEffects needs at least one task, and each name once.")
        self.every_n_edits, self.limit, self.stop_below = every_n_edits, limit, stop_below
        self.options: dict[str, Any] = {
            "limit": limit,
            "scoring": scoring,
            "precision": precision,
            "tokens_per_batch": tokens_per_batch,
        }
        self.rows: list[dict[str, Any]] = []
        self.abilities: dict[str, float] = {}
        self.measured = -1  # at how many edits
        self._requests: dict[str, EditRequest] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, read the tasks' data, before the model is loaded, and stand behind the regularisers.

        Some of these act when a batch ends, and what they leave is what is to be measured.

        Raises:
            TypeError: The module is no editor.
            ValueError: The editor is in single mode, in which edits do not pile up.
        """
        if stage != "fit":
            return
        if not hasattr(pl_module, "clean_weights"):
            raise TypeError(f"SideEffects measures an editor's model, and {type(pl_module).__name__} is none.")
        if pl_module.mode != "sequential":
            raise ValueError(
                "SideEffects measures how edits pile up, but in single mode each is taken back: set model.mode to sequential."
            )
        for task in self.tasks:
            task.prepare(self.limit)
        _move_behind_regularisers(self, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the clean model, if a resumed fit does not know it yet."""
        editor: Any = pl_module
        data = getattr(trainer, "datamodule", None)
        self._requests = {request.id: request for request in getattr(data, "requests", [])}
        if self.measured < 0:
            self._measure(trainer, editor, edits=0)
        self._measure_if_due(trainer, editor)  # what was resumed may have been broken off while it measured

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, where this operation crossed a multiple of n."""
        self._requests |= {request.id: request for request in batch}
        self._measure_if_due(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show each score of the tasks before any edit and after the last that was measured."""
        if trainer.is_global_zero and self.measured > 0:
            console(trainer, pl_module).print(abilities_table(self.rows))

    def _measure_if_due(self, trainer: Trainer, editor: Any) -> None:
        edits = len(editor.done)
        if edits // self.every_n_edits > self.measured // self.every_n_edits:
            self._measure(trainer, editor, edits=edits)

    def _measure(self, trainer: Trainer, editor: Any, *, edits: int) -> None:
        with torch.autocast(editor.device.type, enabled=False):
            results = [self._result(editor, task) if edits else self._of_clean(editor, task) for task in self.tasks]
            metrics, counts = self._edit_metrics(editor) if edits else ({}, {})
        rows = [_row(edits, result, name) for result in results for name in result.scores]
        rows += [
            dict.fromkeys(COLUMNS)
            | {"edits": edits, "task": "edits", "score": name, "value": value, "n": counts.get(name)}
            for name, value in metrics.items()
        ]
        self.rows += rows
        self.measured = edits
        values = {f"side/{name}": score.value for result in results for name, score in result.scores.items()}
        values |= {f"side/edits/{name}": value for name, value in metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics({"side/edits": edits, **values}, step=trainer.global_step)
        self._write(trainer)
        self._stop(trainer, results, edits)

    def _result(self, editor: Any, task: Task) -> TaskResult:
        options: dict[str, Any] = {"processes": editor.processes, "show_progress": editor.show_progress, **self.options}
        return replace(measure(editor.model, task, **options), outputs=())  # nobody reads these here

    def _of_clean(self, editor: Any, task: Task) -> TaskResult:
        told = task.told(self.limit)
        asked = None if told is None else {**told, "how": self.options}
        result: TaskResult = editor.of_clean(asked, partial(self._result, editor, task), [TaskResult, Score])
        return result

    def _edit_metrics(self, editor: Any) -> tuple[dict[str, float], dict[str, int]]:
        """The metrics of all edits so far, as the model stands now, and of how many requests each is the mean."""
        requests = [self._requests[i] for i in editor.done if i in self._requests]

        def scores(mine: Sequence[EditRequest]) -> list[Any]:
            return list(zip(editor.scored.now(editor, mine), editor.scored.clean(editor, mine), strict=True))

        editor.scored.begin(editor)
        pairs = editor.processes.collect(requests, scores)
        metrics = EditMetrics(sync_on_compute=False)  # each process has all of them
        metrics.update([after for after, _ in pairs], [clean for _, clean in pairs])
        return {name: float(value) for name, value in metrics.compute().items()}, metrics.counts()

    def _write(self, trainer: Trainer) -> None:
        folder = trainer.log_dir  # all processes have to ask
        if folder is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with (
            whole_file(Path(folder) / "side_effects.csv") as path,
            path.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(self.rows)

    def _stop(self, trainer: Trainer, results: Sequence[TaskResult], edits: int) -> None:
        if edits == 0:
            self.abilities = {result.task: result.ability for result in results}
        for result in results:
            before = self.abilities.get(result.task, 0.0)
            if self.stop_below is not None and result.ability < self.stop_below * before:
                trainer.should_stop = True
                rank_zero_info(
                    f"After {edits} edits {result.main} has come to {result.ability / before:.0%} of the ability before them, "
                    f"below stop_below={self.stop_below:.0%}: the fit ends here."
                )

    def state_dict(self) -> dict[str, Any]:
        """What has been measured."""
        return {"rows": self.rows, "abilities": self.abilities, "measured": self.measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self.rows, self.abilities = list(state_dict["rows"]), dict(state_dict["abilities"])
        self.measured = state_dict["measured"]


def _move_behind_regularisers(callback: Callback, trainer: Any) -> None:
    others = [other for other in trainer.callbacks if other is not callback]
    last = max((i for i, other in enumerate(others, 1) if isinstance(other, Regulariser)), default=0)
    if trainer.callbacks.index(callback) < last:
        # a new list, since Lightning is going through the old one
        trainer.callbacks = [*others[:last], callback, *others[last:]]


def abilities_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Scores of tasks at the first and the last number of edits among the rows, with 95 % intervals."""
    rows = [row for row in rows if row["task"] != "edits"]
    first, last = rows[0]["edits"], rows[-1]["edits"]
    values = {
        (row["score"], row["edits"]): f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for row in rows
    }
    table = Table(title="Abilities, with 95 % intervals; more in side_effects.csv")
    table.add_column("score")
    for edits in (first, last):
        table.add_column(f"{edits} edits", justify="right")
    table.add_column("records", justify="right")
    for row in rows:
        if row["edits"] == last:
            table.add_row(
                row["score"], values.get((row["score"], first), ""), values[row["score"], last], str(row["n"])
            )
    return table


def _row(edits: int, result: TaskResult, name: str) -> dict[str, Any]:
    score = result.scores[name]
    return {
        "edits": edits,
        "task": result.task,
        "score": name,
        "value": score.value,
        "low": score.low,
        "high": score.high,
        "n": result.n,
        "unparseable": result.unparseable,
    }
