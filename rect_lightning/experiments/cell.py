"""One cell of a grid: its folder, and what has become of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock

from rect_lightning.durable import whole_file
from rect_lightning.experiments.reading import written

State = Literal["new", "begun", "failed", "done", "changed"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of levels, which is one run in a folder of its own."""

    levels: Mapping[str, str]
    """Axis to level."""
    config: dict[str, Any]
    """The configuration of its `fit`."""
    output: Path
    """The folder of its folder."""

    @property
    def name(self) -> str:
        """The levels as the name of a folder, such as ``ROME_RECT-40_seed-0``; a number says of what."""
        return "_".join(slug(f"{axis} {level}" if _is_number(level) else level) for axis, level in self.levels.items())

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output / self.name

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.folder / "cell.log"

    @property
    def failure(self) -> Path:
        """Why the run failed, in a line, until it is started again."""
        return self.folder / "failed"

    def lock(self) -> FileLock:
        """Held by the process that does the work."""
        return lock_of(self.folder)

    def state(self) -> State:
        """new, begun (and broken off or under way), failed, done, or changed: not new, but of another configuration."""
        if not (config := self.folder / "cell.yaml").is_file():
            return "new"
        if yaml.safe_load(config.read_text(encoding="utf-8")) != self.config:
            return "changed"
        if (self.folder / "cell.json").is_file():
            return "done"
        return "failed" if self.failure.is_file() else "begun"

    def prepare(self) -> None:
        """Make the folder ready to begin in, and empty where it was of another configuration; the lock is to be held."""
        if self.state() == "changed":
            shutil.rmtree(self.folder)
        self.failure.unlink(missing_ok=True)
        if self.state() == "new":
            with whole_file(self.folder / "cell.yaml") as path:
                path.write_text(written(self.config), encoding="utf-8")


def lock_of(folder: Path) -> FileLock:
    """The lock of a cell's folder, beside all cells' folders: one may be removed and made anew under its lock."""
    locks = folder.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{folder.name}.lock")


def slug(name: str) -> str:
    """A name as part of a path, with dashes for what is neither a letter, a number nor one of ``._+``.

    Raises:
        ValueError: Nothing is left.
    """
    found = re.sub(r"[^\w.+]+", "-", name).strip("-.")
    if not found:
        raise ValueError(f"{name!r} has no letter or number to name a folder by.")
    return found


def _is_number(level: str) -> bool:
    return re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", level) is not None
