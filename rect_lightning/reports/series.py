"""What figures have in common: series told apart by an axis, names and captions that follow from the axes and seeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import isfinite

from rect_lightning.reports.figures import NONE, Panel, Series
from rect_lightning.reports.results import Results, Row, lower_is_better


class Grouping:
    """Which axis tells the series of a figure apart, and which tell figures or panels apart.

    Of editor and regulariser it is the one with more levels, and of two with as many the regulariser.

    Args:
        results: A run, or a grid averaged over seeds.
    """

    def __init__(self, results: Results) -> None:
        self.axes = results.axes
        levels = [len({cell[i] for cell in results.cells}) for i in range(len(results.axes))]
        varies = [i for i, count in enumerate(levels) if count > 1]
        methods = [i for i in varies if results.axes[i] in ("editor", "regulariser")]
        self.inner = [max(methods, key=lambda i: (levels[i], results.axes[i]))] if methods else varies[-1:]
        self.outer = [i for i in varies if i not in self.inner]
        self.axis = results.axes[self.inner[0]] if self.inner else ""
        self.labels = list(dict.fromkeys(self.label(cell) for cell in results.cells))
        others = [label for label in self.labels if label != "none"]
        self.styles = {label: others.index(label) if label in others else NONE for label in self.labels}
        self.groups = list(dict.fromkeys(self.group(cell) for cell in results.cells))

    def label(self, cell: Sequence[str]) -> str:
        """The series that a cell is of."""
        return " · ".join(cell[i] for i in self.inner) or "after"

    def group(self, cell: Sequence[str]) -> str:
        """The group that a cell is of; empty where there is but one."""
        return " · ".join(_told(self.axes[i], cell[i]) for i in self.outer)

    def suffix(self, group: str) -> str:
        """What tells a group's figures apart in their names: its levels, or a number where letters do not tell these apart."""
        slugs = {slug(each) for each in self.groups}
        told_apart = len(slugs) == len(self.groups) and "" not in slugs
        return "" if len(self.groups) == 1 else group if told_apart else str(self.groups.index(group) + 1)

    def split(self, rows: Iterable[Row], group: str) -> list[tuple[str, int, list[Row]]]:
        """Label, style and rows of each series of a group."""
        found = [row for row in rows if self.group(row.cell) == group]
        sorted_out = {label: [row for row in found if self.label(row.cell) == label] for label in self.labels}
        return [(label, self.styles[label], own) for label, own in sorted_out.items() if own]


def series_of(label: str, style: int, rows: Sequence[Row], x: Iterable[float]) -> Series:
    """Rows as the points of a series, at these places."""
    return Series(
        label=label,
        style=style,
        x=tuple(x),
        y=tuple(row.value for row in rows),
        low=tuple(row.low for row in rows),
        high=tuple(row.high for row in rows),
        seeds=tuple(row.seeds for row in rows),
    )


def line_of(label: str, style: int, rows: Iterable[Row]) -> Series:
    """Rows by their number of edits; what is no number is left out."""
    found = {row.edits: row for row in rows if row.edits is not None and isfinite(row.value)}
    return series_of(label, style, [found[edits] for edits in sorted(found)], map(float, sorted(found)))


def curves(results: Results, by: Grouping, group: str, source: str, names: Sequence[str]) -> tuple[Panel, ...]:
    """A panel a score, where there are two numbers of edits or more."""
    panels = []
    for name in names:
        series = [line_of(label, style, rows) for label, style, rows in by.split(results.of(source, name), group)]
        series = [line for line in series if line.x]
        if max((len(line.x) for line in series), default=0) > 1:
            values = [y for line in series for y in line.y]
            harm, log = lower_is_better(name), max(values) > 5 * min(values) > 0
            hint = ("lower is better" + ", log scale" * log) if harm else ""
            panels.append(
                Panel(
                    kind="lines",
                    title=name,
                    x_label="edits",
                    y_label=hint,
                    series=tuple(series),
                    log_y=harm and log,
                    share=not harm and all(0 <= y <= 1 for y in values),
                )
            )
    return tuple(panels)


def seeds_told(counts: Iterable[int]) -> str:
    """What values are means of, and what their intervals mean, given the number of seeds of each."""
    counts = sorted(counts)
    least, most = counts[0], counts[-1]
    if most == 1:
        return "Values are of one seed each, so there are no intervals."
    number, rest = (f"{most}", "") if least == most else (f"{least} to {most}", " where there are two seeds or more")
    return (
        f"Values are means over {number} seeds, with 95 % t intervals of the mean{rest}; of perplexity, both are taken of the "
        "logarithm."
    )


def noted(caption: str, results: Results, panels: Sequence[Panel]) -> str:
    """A caption, and what its values and intervals are."""
    series = [s for panel in panels for s in panel.series]
    bounded = any(v is not None for s in series for v in (*s.low, *s.x_low))
    counts = [n for s in series for n in s.seeds]
    if results.seeds > 1 and counts:
        caption += f" {seeds_told(counts)}"
    elif bounded:
        caption += " Intervals are 95 % and speak of the choice of records alone."
    if bounded and any(panel.bare for panel in panels):
        caption += " Where there are more than four lines, intervals stand in the data alone."
    return caption


def titled(title: str, group: str) -> str:
    """A title, and the group that a figure is of."""
    return f"{title} {group}" if group and title.endswith("?") else f"{title}: {group}" if group else title


def slug(*parts: str) -> str:
    """A figure's name, of lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _told(axis: str, level: str) -> str:
    """A level that does not speak for itself, with its axis."""
    if level == "none":
        return f"no {axis}"
    return f"{axis} {level}" if re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", level) else level
