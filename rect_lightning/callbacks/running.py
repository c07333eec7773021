"""Something to go on from while a long run is under way."""

import contextlib
import logging
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

_log = logging.getLogger(__name__)


class RunningCheckpoint(ModelCheckpoint):
    """Write ``running.ckpt`` after the first edit operation, from time to time, before measuring, and when a run is broken off.

    Lightning's ``ModelCheckpoint`` ignores its own ``train_time_interval`` under manual optimisation.

    Args:
        train_time_interval: At most one checkpoint in that time; what is lost if a run is killed is that and an operation.
        dirpath: The folder; by default ``checkpoints`` in the run folder.
    """

    def __init__(self, train_time_interval: timedelta = timedelta(minutes=10), dirpath: str | None = None) -> None:
        super().__init__(dirpath=dirpath, train_time_interval=train_time_interval)
        self.seconds = train_time_interval.total_seconds()
        self._saved = 0.0  # when
        self._step = 0  # what

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first operation is saved at once, so that there is something to go on from."""
        self._saved, self._step = -math.inf, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if it is time."""
        # processes save together, and their clocks differ
        if trainer.strategy.broadcast(time.monotonic() - self._saved >= self.seconds):
            self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before a fit measures edits, which may take long; a validation that training waits for would be left out."""
        if pl_module.automatic_optimization:
            return
        if trainer.state.fn == "fit" and trainer.global_step > self._step:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was done until a failure or Ctrl-C; where that fails too, the first error is the one to be told.

        Not among several processes, since the others may know nothing of the failure and would be waited for.
        """
        if trainer.state.fn == "fit" and trainer.global_step > self._step and trainer.world_size == 1:
            with contextlib.suppress(Exception):
                self._save(trainer)
                _log.info("What was done until then is in %s; go on with --ckpt_path last, or this.", self._path)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self._path)
            self._saved, self._step = time.monotonic(), trainer.global_step

    @property
    def _path(self) -> Path:
        return Path(str(self.dirpath)) / "running.ckpt"
