"""Regularisers of an update, and what is done around a run, as Lightning callbacks."""

from importlib import import_module
from typing import Any

from rect_lightning.callbacks.frobenius_norm import FrobeniusNorm
from rect_lightning.callbacks.pca import PCA
from rect_lightning.callbacks.prune import PRUNE
from rect_lightning.callbacks.random import Random
from rect_lightning.callbacks.rect import RECT
from rect_lightning.callbacks.shrink import Shrink
from rect_lightning.callbacks.sphere import SPHERE

__all__ = ["PCA", "PRUNE", "RECT", "SPHERE", "FrobeniusNorm", "NullSpace", "Random", "Shrink", "SideEffects"]

_LATER = {"NullSpace": "null_space", "SideEffects": "side_effects"}


def __getattr__(name: str) -> Any:
    """Callbacks that are imported when they are first asked for, since the others need none of what they need."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rect_lightning.callbacks.{_LATER[name]}"), name)
