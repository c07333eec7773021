"""Files and folders that are either whole or as they were before, whatever stops their writer."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file beside its place, and put it there in one step once its content has reached the disk.

    The file that was there stays if anything fails. What a killed writer of the same file left is overwritten.

    Args:
        path: The file; its folder is made.

    Yields:
        Where to write.

    Raises:
        OSError: The disk is full.
    """
    partial = path.with_name(path.name + PARTIAL)
    with _telling_of_a_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _sync(partial)
            partial.chmod(_mode())
            os.replace(partial, path)
            _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Fill a new folder beside its place, and put it there in one step once all of it has reached the disk.

    Args:
        path: The folder, which must not exist or be empty.

    Yields:
        Where to write.

    Raises:
        FileExistsError: There is something already.
        OSError: The disk is full.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already and is left as it is: name a new folder.")
    path = path.resolve()  # "." has no name to put another beside
    partial = path.with_name(path.name + PARTIAL)
    with _telling_of_a_full_disk(path):
        shutil.rmtree(partial, ignore_errors=True)  # of a killed writer
        partial.mkdir(parents=True)
        try:
            yield partial
            for inside in (*partial.rglob("*"), partial):
                _sync(inside)
                if inside.is_file():
                    inside.chmod(_mode())
            os.replace(partial, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _mode() -> int:
    """What new files are meant to be readable by; safetensors makes them private."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


@contextmanager
def _telling_of_a_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise OSError(
            f"There is no room for {path}: the disk, or its quota, is full. What was there before is as it was; make room "
            "and run the same again, or write elsewhere."
        ) from error


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says so: safetensors and torch wrap the system's."""
    if error is None:
        return False
    told = getattr(error, "errno", None) in _FULL or any(os.strerror(code) in str(error) for code in _FULL)
    return told or _is_full(error.__cause__ or error.__context__)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
