"""How checkpoints of editors get to the disk and back: whole, checked, and without executing anything."""

from __future__ import annotations

import errno
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

from rect_lightning.durable import whole_file
from rect_lightning.models.fingerprint import content_digest

_log = logging.getLogger(__name__)

KEY = "rect_lightning"
"""Where a checkpoint tells what it is the edit of."""


class EditCheckpointIO(TorchCheckpointIO):
    """Lightning's own way of keeping checkpoints, made safe.

    A checkpoint is written beside its place and takes it in one step, so a reader finds the old or the new one, and the
    old one stays if the disk is full. An editor's carries the SHA-256 of its content, which loading checks: torch's
    reader does not check the sums that its archives hold. One that another writer has left without is read all the same,
    with a warning. Loading never unpickles objects, whatever it is asked, so saving refuses them.

    Paths that are not local go through fsspec, as Lightning does it. Other modules' checkpoints are kept unchanged.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: The disk is full; the file that was there stays.
            ValueError: An editor's holds other than tensors and plain values; the file that was there stays.
        """
        if KEY in checkpoint:
            checkpoint = checkpoint | {KEY: checkpoint[KEY] | {"sha256": _digest(checkpoint)}}
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(Path(path)) as partial:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
            if KEY in checkpoint and not _is_plain(partial):
                raise ValueError(f"{path} is not written: {_object(checkpoint)}, which would never be loaded again.")

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, an editor's or another module's.

        Raises:
            FileNotFoundError: There is none.
            IsADirectoryError: It is a folder.
            ValueError: It is truncated, damaged, or holds other than tensors and plain values.
        """
        return _read(path, map_location)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read an editor's checkpoint.

    Raises:
        FileNotFoundError: There is none.
        IsADirectoryError: It is a folder.
        ValueError: It is truncated, damaged or foreign.
    """
    checkpoint = _read(path, "cpu")
    if KEY not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of an editor: it names no base model.{_others(path)}")
    return checkpoint


def read_edits(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that holds edited weights.

    Raises:
        FileNotFoundError: There is none.
        IsADirectoryError: It is a folder.
        ValueError: It is truncated, damaged or foreign, or holds a hypernetwork.
    """
    checkpoint = read_checkpoint(path)
    if "hypernetwork" in checkpoint[KEY]:
        raise ValueError(
            f"{path} holds a hypernetwork, which makes edits, and no edited weights: edit by MEND with it first."
        )
    return checkpoint


def _is_plain(file: Any) -> bool:
    """Whether a file of torch's holds nothing but what can be loaded again."""
    try:
        torch.load(file, weights_only=True, mmap=isinstance(file, Path))
    except pickle.UnpicklingError:
        return False
    return True


def _object(content: Any, where: tuple[str, ...] = ()) -> str:
    """Which entry of a content cannot be loaded again."""
    for key, value in content.items() if isinstance(content, dict) else ():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        if not _is_plain(buffer):
            return _object(value, (*where, str(key)))
    return f"{' → '.join(where)} is a {type(content).__name__}" if where else "it holds an object"


def _digest(checkpoint: dict[str, Any]) -> str:
    return content_digest(checkpoint | {KEY: {k: v for k, v in checkpoint[KEY].items() if k != "sha256"}})


def _read(path: Any, map_location: Any) -> dict[str, Any]:
    files = get_filesystem(path)
    if not files.exists(str(path)):
        raise FileNotFoundError(f"There is no checkpoint {path}.{_others(path)}")
    if files.isdir(str(path)):
        within = sorted(file.name for file in Path(path).glob("*.ckpt"))
        such = f", such as {within[-1]}" if within else ""
        raise IsADirectoryError(f"{path} is a folder: name a checkpoint in it{such}.")
    try:
        with files.open(str(path), "rb") as file:
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # torch has a dozen for a damaged file, a seek to nowhere among them
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(
            f"{path} cannot be read: it is truncated or damaged, no checkpoint at all, or holds Python objects besides "
            f"tensors and plain values, which are never loaded.{_others(path)}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(KEY, {}), dict):
        raise ValueError(f"{path} is not a checkpoint of an editor, nor of any Lightning module.{_others(path)}")
    # an editor leaves a place for the sum, so in files of this package it is never just missing
    if KEY in checkpoint and checkpoint[KEY].get("sha256", "") is None:
        _log.warning("%s carries no checksum, since a plugin wrote it: damage in it would go unnoticed.", path)
    elif KEY in checkpoint and checkpoint[KEY].get("sha256") != _digest(checkpoint):
        raise ValueError(
            f"{path} is damaged: its content does not have the checksum that was written with it.{_others(path)}"
        )
    return checkpoint


def _others(path: Any) -> str:
    """The other checkpoints beside one that cannot be used."""
    path = Path(path)
    names = sorted(other.name for other in path.parent.glob("*.ckpt") if other != path)
    return f" Beside it: {', '.join(names)}." if names else ""
