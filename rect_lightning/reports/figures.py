"""A figure as a description, which knows nothing of how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NONE, BEFORE = -1, -2
"""Styles of what others are compared with: that without what they have, and the clean model."""
_BANDS = 4
"""The most lines whose intervals can be told apart."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """What is drawn in one style."""

    label: str
    style: int
    """Number of its colour, marker and dash; one label has one in all figures. Or `NONE` or `BEFORE`."""
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float | None, ...] = ()
    """Of y, one each or nothing."""
    high: tuple[float | None, ...] = ()
    x_low: tuple[float | None, ...] = ()
    x_high: tuple[float | None, ...] = ()
    seeds: tuple[int, ...] = ()
    """Of how many seeds each y is the mean, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A vertical line that is named."""

    x: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Kinds: lines, with bands for intervals where they are few; points, each named; bars, one horizontal bar a series, of
    length y; steps, a histogram whose bins begin at x and end with the next x, the last of which only ends one; heat, a row of
    cells a series, at 0, 1, 2 …, the darker the larger y is.
    """

    kind: Literal["lines", "points", "bars", "steps", "heat"]
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    ticks: tuple[str, ...] = ()
    """Names of x = 0, 1, 2 …; without, x is a number."""
    marks: tuple[Mark, ...] = ()
    log_x: bool = False
    """x is a power of ten: 2 stands for 100."""
    log_y: bool = False
    share: bool = False
    """y is a share, and the axis shows all of 0 to 1."""
    percent: bool = False
    """y is told in per cent."""
    x_range: tuple[float, float] | None = None
    """The least and the largest x, of points and intervals, that the axis has room for; None for those of its own series."""
    y_range: tuple[float, float] | None = None
    """The same of y."""

    @property
    def bare(self) -> bool:
        """Whether it has more lines than intervals could be drawn of."""
        return self.kind == "lines" and len(self.series) > _BANDS

    def rows(self) -> list[tuple[str, str, str | float, float, float | None, float | None, int | None]]:
        """The data: panel, series, x, y, y's interval and number of seeds."""
        return [
            (
                self.title,
                s.label,
                self.ticks[int(x)] if self.ticks else x,
                y,
                _at(s.low, i),
                _at(s.high, i),
                s.seeds[i] if s.seeds else None,
            )
            for s in self.series
            for i, (x, y) in enumerate(zip(s.x, s.y, strict=False))  # steps have one more edge than bins
        ]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels that belong together."""

    name: str
    """For files and anchors: letters, digits and hyphens."""
    section: str
    """The part of the page that it belongs to."""
    title: str
    caption: str
    """What is shown, how it was measured, what an interval means."""
    panels: tuple[Panel, ...]

    @property
    def value_name(self) -> str:
        """What y is in a table over all panels."""
        names = {panel.y_label for panel in self.panels}
        return names.pop() or "value" if len(names) == 1 else "value"

    @property
    def wide(self) -> bool:
        """Whether its panels deserve more room than others."""
        return any(panel.kind in ("points", "heat") for panel in self.panels)


def _at(values: tuple[float | None, ...], i: int) -> float | None:
    return values[i] if values else None
