"""Run folders: which checkpoint `--ckpt_path last` means."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rect_lightning.checkpoint_io import read_checkpoint

if TYPE_CHECKING:
    from jsonargparse import Namespace

_log = logging.getLogger(__name__)


def last_checkpoint(folders: Iterable[Path]) -> Path:
    """The newest checkpoint in these folders and all below them, by the time at which it was written.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The newest is broken. The message names the next older one that is whole.
    """
    folders = list(folders)
    found = {path for folder in folders for path in folder.rglob("*.ckpt")}
    if not found:
        where = " nor in ".join(str(folder.resolve()) for folder in folders)
        raise FileNotFoundError(
            f"There is no checkpoint to go on from in {where}. Leave --ckpt_path out to begin anew, or name a file."
        )
    newest, *older = sorted(found, key=_written, reverse=True)
    for run in {path.parent for folder in folders for path in folder.rglob("config.yaml")}:
        if _written(run / "config.yaml") > _written(newest) and not list(run.rglob("*.ckpt")):
            _log.warning("%s is newer than the checkpoint that is taken, but has none.", run)
    if (ailment := _ailment(newest)) is None:
        return newest
    whole = next((path for path in older if _ailment(path) is None), None)
    hint = "No older one is whole." if whole is None else f"The next older one is whole: --ckpt_path {whole}"
    raise ValueError(f"The newest checkpoint cannot be used. {ailment} {hint}")


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns


def of_run(path: Path) -> Path:
    """A checkpoint, or of a run folder the one of its edited model.

    Raises:
        FileNotFoundError: The run folder has none.
    """
    if not (path / "config.yaml").is_file():
        return path
    last = path / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise FileNotFoundError(
            f"The run folder {path} has no checkpoints/last.ckpt: single mode leaves none, and a run that was broken off has "
            "at most a running.ckpt."
        )
    return last


def _ailment(path: Path) -> str | None:
    try:
        read_checkpoint(path)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def checkpoint_file(asked: str, trainer: Namespace) -> str:
    """The file that ``--ckpt_path`` means, once it is known to be whole; what is no file is left to Lightning."""
    if asked == "last":
        found = last_checkpoint(_run_folders(trainer))
        _log.info("--ckpt_path last: %s", found)
        return str(found)
    if "://" not in asked and ":" not in asked and asked not in ("best", "hpc"):
        read_checkpoint(asked)
    return asked


def _run_folders(trainer: Namespace) -> list[Path]:
    """Where the runs of a configuration leave their checkpoints."""
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    options = [thing.get("init_args", {}) for thing in (*loggers, *callbacks) if hasattr(thing, "class_path")]
    named = [Path(value) for o in options for value in (o.get("save_dir"), o.get("dirpath")) if value]
    root = Path(trainer.default_root_dir or ".")
    return list(dict.fromkeys(named)) or [root / "lightning_logs", root / "checkpoints"]
