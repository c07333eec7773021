"""What a result was made with."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    packages = ("rect_lightning", "torch", "lightning", "transformers", "tokenizers", "torchmetrics", "seqeval")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


@cache
def source_digest() -> str:
    """The SHA-256 of this package's code, as 64 hex digits: as it was when this process first asked.

    What changes on disk later is not what runs here, so ask early.
    """
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def options(made: object) -> dict[str, Any]:
    """The constructor's options of an object that keeps them under their own names, in plain values."""
    constructors = [vars(cls)["__init__"] for cls in type(made).__mro__ if "__init__" in vars(cls)]
    names = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    return {name: _plain(getattr(made, name)) for name in sorted(names - {"self"}) if name in vars(made)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
