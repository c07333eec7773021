"""What a report is made of: the values of a run, or of the cells of a grid, in one tidy form."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from statistics import fmean
from typing import Any

from rect_lightning.reports.intervals import mean_and_interval

SEED = "seed"
"""The axis that is averaged over."""
_MAIN_SCORES = ("exact", "option", "f1", "rougeL")
_EDITING_SCORES = ("score/probability", "efficacy/exact", "efficacy/token")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One value, where it was measured, and its 95 % interval where it has one."""

    cell: tuple[str, ...] = ()
    """A value for each axis of the results."""
    edits: int | None = None
    source: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    """Of how many records it is the mean."""
    unparseable: float | None = None
    seeds: int = 1
    """Of how many seeds it is the mean; the interval is between seeds where there are several in the results."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """A run, which has no axes, or a grid."""

    title: str
    subtitle: str = ""
    axes: tuple[str, ...] = ()
    rows: tuple[Row, ...]
    seeds: int = 1
    """How many seeds there are, of which a value is the mean of some or all."""
    left_out: int = 0
    """How many cells are left out because they are not done."""
    changes: dict[str, Any] = field(default_factory=dict)
    """``relative_change.json``."""
    keep: float | None = None
    """The share that RECT kept."""
    samples: tuple[dict[str, str], ...] = ()
    configuration: dict[str, str] = field(default_factory=dict)
    """Files by name, as they are."""
    provenance: dict[str, str] = field(default_factory=dict)

    def of(self, source: str, name: str | None = None) -> list[Row]:
        """The rows of a source, or of one name in it, in their order."""
        return [row for row in self.rows if row.source == source and name in (None, row.name)]

    def names(self, source: str) -> list[str]:
        """The names in a source, in the order in which they come."""
        return list(dict.fromkeys(row.name for row in self.of(source)))

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """The cells, in the order in which they come."""
        return list(dict.fromkeys(row.cell for row in self.rows))

    @property
    def main_scores(self) -> list[str]:
        """Of each task the score that stands for the ability, the published one if there is no other; perplexity last."""
        tasks: dict[str, list[str]] = {}
        for name in self.names("task"):
            tasks.setdefault(name.split("/")[0], []).append(name)
        standard = ([name for name in names if "paper" not in name.split("/")] or names for names in tasks.values())
        main = [_first(names, _MAIN_SCORES) for names in standard]
        return sorted(main, key=lower_is_better)

    @property
    def editing_score(self) -> str | None:
        """The metric of the edits that stands for all: the harmonic mean where there is one."""
        names = self.names("after")
        return next((score for score in _EDITING_SCORES if score in names), None)


def lower_is_better(name: str) -> bool:
    """Whether a score is of a kind that harm makes larger."""
    return name.startswith("perplexity")


def with_abilities_kept(results: Results) -> Results:
    """Results with a row ``kept``, ``ability`` for each cell: the mean over the tasks of the share that is left of each.

    The share is the main score after the most edits over the one at 0 edits, or its inverse for perplexity. Tasks of which
    the clean model can do nothing are left out. Where no task was measured, it is that of the perplexity before and after.
    """
    kept = []
    for cell in results.cells:
        rows = [row for row in results.rows if row.cell == cell]
        pairs = [_ends([r for r in rows if r.source == "task" and r.name == name]) for name in results.main_scores]
        if not any(pairs):
            before = {r.name: r for r in rows if r.source == "before" and lower_is_better(r.name)}
            pairs = [(before[r.name], r) for r in rows if r.source == "after" and r.name in before]
        shares = [_share(*pair) for pair in pairs if pair and pair[0].value > 0]
        if shares:
            kept.append(Row(cell=cell, source="kept", name="ability", value=fmean(shares), n=len(shares)))
    return replace(results, rows=(*results.rows, *kept))


def _ends(rows: Sequence[Row]) -> tuple[Row, Row] | None:
    rows = sorted(rows, key=lambda row: row.edits or 0)
    return (rows[0], rows[-1]) if rows and rows[0].edits == 0 and rows[-1].edits else None


def mean_over_edits(rows: Sequence[Row]) -> float:
    """The mean over all edits of values that are each of one operation, of ``n`` edits or one."""
    counts = [row.n or 1 for row in rows]
    return sum(row.value * n for row, n in zip(rows, counts, strict=True)) / sum(counts)


def _share(before: Row, after: Row) -> float:
    return before.value / after.value if lower_is_better(after.name) else after.value / before.value


def mean_over_seeds(results: Results) -> Results:
    """Results without the axis `SEED`: means over the seeds, with t intervals between them where there are two or more.

    Means of perplexities are geometric. Intervals of shares stay between 0 and 1.
    """
    if SEED not in results.axes:
        return results
    at = results.axes.index(SEED)
    seeds = len({row.cell[at] for row in results.rows})
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.rows:
        cell = (*row.cell[:at], *row.cell[at + 1 :])
        groups.setdefault((cell, row.edits, row.source, row.name), []).append(replace(row, cell=cell))
    axes = (*results.axes[:at], *results.axes[at + 1 :])
    if seeds == 1:
        return replace(results, axes=axes, rows=tuple(row for rows in groups.values() for row in rows))
    shares = _shares(results.rows)
    return replace(results, axes=axes, seeds=seeds, rows=tuple(_mean(rows, shares) for rows in groups.values()))


def _shares(rows: Iterable[Row]) -> set[tuple[str, str]]:
    """Sources and names of what lies between 0 and 1 everywhere."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row.source, row.name), []).append(row.value)
    measured = {key: values for key, values in found.items() if key[0] not in ("cost", "regulariser", "kept")}
    return {key for key, values in measured.items() if min(values) >= 0 and max(values) <= 1}


def _mean(rows: Sequence[Row], shares: Collection[tuple[str, str]]) -> Row:
    first, values = rows[0], [row.value for row in rows]
    share = (first.source, first.name) in shares
    least = 0.0 if share or first.source == "kept" else -inf  # an ability may have grown, but not be less than none
    mean, low, high = mean_and_interval(
        values, ratio=lower_is_better(first.name), low=least, high=1.0 if share else inf
    )
    unparseable = [row.unparseable for row in rows if row.unparseable is not None]
    return replace(
        first, value=mean, low=low, high=high, seeds=len(rows), unparseable=fmean(unparseable) if unparseable else None
    )


def _first(names: Iterable[str], endings: Sequence[str]) -> str:
    """The name whose last part comes first among the endings, or the first name."""
    names = list(names)
    return min(names, key=lambda name: endings.index(e) if (e := name.split("/")[-1]) in endings else len(endings))
