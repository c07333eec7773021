"""Progress bars, one look for all, and what is shown below them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from rich.console import Console

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, show: bool, unit: str = "it", total: int | None = None) -> tqdm[T]:
    """Iterate with a progress bar, shown only for what takes longer than a second."""
    return tqdm(items, desc=description, unit=unit, total=total, disable=not show, leave=False, delay=1.0)


def console(trainer: Trainer, pl_module: LightningModule) -> Console:
    """A console to show results on at the end of a run, below the Trainer's progress bar, which is ended first.

    Else the bar would be drawn once more when the Trainer ends it, below the results.
    """
    from rich.console import Console

    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.teardown(trainer, pl_module, str(trainer.state.stage))
    return Console()
