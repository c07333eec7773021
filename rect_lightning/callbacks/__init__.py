"""Regularisers of an update, and what is done around a run, as Lightning callbacks."""

from importlib import import_module
from typing import Any

from rect_lightning.callbacks.pca import PCA
from rect_lightning.callbacks.random import Random
from rect_lightning.callbacks.rect import RECT
from rect_lightning.callbacks.shrink import Shrink

__all__ = ["PCA", "RECT", "Random", "Shrink", "SideEffects"]


def __getattr__(name: str) -> Any:
    """`SideEffects`, imported when it is first asked for: regularisers need none of what it needs."""
    if name != "SideEffects":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("rect_lightning.callbacks.side_effects").SideEffects
