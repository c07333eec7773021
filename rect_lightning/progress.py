"""Progress bars, one look for all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, show: bool, unit: str = "it", total: int | None = None) -> tqdm[T]:
    """Iterate with a progress bar, shown only for what takes longer than a second."""
    return tqdm(items, desc=description, unit=unit, total=total, disable=not show, leave=False, delay=1.0)
