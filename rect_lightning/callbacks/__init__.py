"""Regularisers of an update, and what is done around a run, as Lightning callbacks."""

from rect_lightning.callbacks.rect import RECT

__all__ = ["RECT"]
