"""Regularisers of an update, and what is done around a run, as Lightning callbacks."""

from typing import Any

from rect_lightning.callbacks.rect import RECT

__all__ = ["RECT", "SideEffects"]


def __getattr__(name: str) -> Any:
    """`SideEffects`, imported when it is first asked for: `RECT` needs none of what it needs."""
    if name != "SideEffects":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rect_lightning.callbacks.side_effects import SideEffects

    return SideEffects
