"""The user's cache folder, and entries in it that are either whole or absent."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_MANIFEST = "complete.json"
_log = logging.getLogger("rect_lightning")


def cache_dir() -> Path:
    """The folder of everything that is worth keeping between runs.

    ``$RECT_LIGHTNING_CACHE``, else ``$XDG_CACHE_HOME/rect_lightning``, else ``~/.cache/rect_lightning``. It need not
    exist.
    """
    if own := os.environ.get("RECT_LIGHTNING_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rect_lightning"


def cached_folder(path: Path, build: Callable[[Path], None]) -> Path:
    """The folder ``path``, built on first use.

    ``build`` fills an empty sibling folder, which takes its final name in one rename, so a run that is killed or runs
    out of disk leaves no half-written entry. A file lock makes other processes wait and then share the result. An
    entry whose files have gone missing or changed length is built anew, and what a killed run of the same entry left
    is removed.

    Args:
        path: Where the folder is, or will be.
        build: Writes the files into the folder that it is given.

    Returns:
        ``path``.
    """
    if _is_complete(path):  # without the lock, so that a cache that cannot be written to can still be read
        return path

    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        _log.info("Waiting for %s, which another process is making.", path)
        held = lock.acquire()
    with held:
        if _is_complete(path):
            return path
        try:
            _remove(partial)  # we hold the lock: whoever was writing this is dead
            partial.mkdir()
            build(partial)
            _write_manifest(partial)
            _remove(path)
            partial.rename(path)
        except OSError as error:
            error.add_note(f"This was while writing {path}. Set RECT_LIGHTNING_CACHE to keep the cache elsewhere.")
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _sizes(folder: Path) -> dict[str, int]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != _MANIFEST)
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _write_manifest(folder: Path) -> None:
    """Record the files' lengths once their content has reached the disk."""
    sizes = _sizes(folder)
    for name in sizes:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    (folder / _MANIFEST).write_text(json.dumps(sizes, indent=2))


def _is_complete(folder: Path) -> bool:
    try:
        expected = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return bool(expected == _sizes(folder))
