"""Edit facts in language models, and keep their abilities: model editing as PyTorch Lightning training."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_edited"]


def __getattr__(name: str) -> Any:
    """`load_edited`, imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rect_lightning import reuse

    return getattr(reuse, name)
