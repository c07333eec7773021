"""Run folders: which checkpoint `--ckpt_path last` means."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rect_lightning.checkpoint_io import read_checkpoint


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
    newest, *older = sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if (ailment := _ailment(newest)) is None:
        return newest
    whole = next((path for path in older if _ailment(path) is None), None)
    hint = "No older one is whole." if whole is None else f"The next older one is whole: --ckpt_path {whole}"
    raise ValueError(f"The newest checkpoint cannot be used. {ailment} {hint}")


def _ailment(path: Path) -> str | None:
    try:
        read_checkpoint(path)
    except (OSError, ValueError) as error:
        return str(error)
    return None
