"""What a user reads after a run, and the files it leaves."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from rich.text import Text

from rect_lightning.callbacks.regulariser import Regulariser
from rect_lightning.progress import console


class Summary(Callback):
    """After a run print the metrics before and after and a few raw continuations, and write them to the run folder.

    ``metrics.json`` holds ``{"before": {name: value}, "after": {name: value}}``, ``requests.json`` the same of
    each request, ``samples.json`` the continuations and ``provenance.json`` what the edited weights come from.
    ``relative_change.json`` says how far the entries of each edited weight are from the clean model; single mode, which puts
    them back, leaves none.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        self._report(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report where validation is all there is."""
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        self._report(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start collecting."""
        self.predictions: list[dict[str, str]] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the continuations."""
        self.predictions += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the continuations side by side, and write them to ``predictions.json``."""
        folder = trainer.log_dir  # all processes have to ask
        if not trainer.is_global_zero:
            return
        out = console(trainer, pl_module)
        out.print(samples_table(self.predictions))
        if folder is not None:
            self._write(Path(folder), {"predictions.json": self.predictions})
            out.print(f"Run folder: {folder}", soft_wrap=True)

    def _write(self, folder: Path, files: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _report(self, trainer: Trainer, pl_module: Any) -> None:
        if not hasattr(pl_module, "measurement"):
            return  # no editor
        results, folder = pl_module.results, trainer.log_dir  # all processes have to ask for the folder
        if not trainer.is_global_zero or not results["after"]:
            return
        samples = pl_module.measurement.samples
        if folder is not None:
            files = {
                "metrics.json": results,
                "requests.json": pl_module.measurement.requests,
                "samples.json": samples,
                "provenance.json": pl_module.provenance(),
            }
            if changes := pl_module.relative_changes():
                files["relative_change.json"] = changes
            self._write(Path(folder), files)
        out = console(trainer, pl_module)
        out.print(metrics_table(results, requests_of(pl_module.measurement.requests), title(trainer, pl_module)))
        out.print(samples_table(samples))
        if folder is not None:
            out.print(f"Run folder: {folder}", soft_wrap=True)


def title(trainer: Trainer, pl_module: Any) -> str:
    """What was done: "32 edits by MEMIT in 1 operation, with RECT"."""
    regularisers = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, Regulariser)]  # type: ignore[attr-defined]
    return describe(len(pl_module.done), pl_module.operations, pl_module.method, pl_module.mode, regularisers)


def describe(edits: int, operations: int, method: str, mode: str, regularisers: Sequence[str]) -> str:
    """What was done, in a line, as in `title`."""
    done = f"{edits} edit{'s' * (edits != 1)} by {method}"
    made = f"in {operations} operation{'s' * (operations != 1)}, {mode}"
    return f"{done} {made}" + (f", with {', '.join(regularisers)}" if regularisers else "")


def requests_of(each: list[dict[str, Any]]) -> Counter[str]:
    """How many requests each metric is the mean of; the score is a mean of means."""
    return Counter(name for request in each for name in request["after"] if not name.startswith("score/"))


def metrics_table(results: dict[str, dict[str, float]], requests: Mapping[str, int], title: str) -> Table:
    """Each metric before and after, and the number of requests that it is the mean of."""
    table = Table(title=title)
    table.add_column("metric")
    for column in ("before", "after", "requests"):
        table.add_column(column, justify="right")
    for name, after in results["after"].items():
        before = results["before"].get(name)
        count = requests.get(name)
        table.add_row(
            name, "" if before is None else f"{before:.3f}", f"{after:.3f}", "" if count is None else str(count)
        )
    return table


def samples_table(samples: list[dict[str, str]]) -> Table:
    """Raw continuations side by side, of requests or of prompts."""
    table = Table(title="Greedy continuations", show_lines=True)
    for column in ("prompt → new target" if samples and "request" in samples[0] else "prompt", "before", "after"):
        table.add_column(column, ratio=1, overflow="fold")
    for sample in samples:
        texts = (sample.get("request", sample["prompt"]), sample["before"], sample["after"])
        table.add_row(*(Text(" ".join(text.split())) for text in texts))  # as Text: brackets in it are no markup
    return table
