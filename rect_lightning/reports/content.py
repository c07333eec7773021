"""Which figures results have."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf, isfinite, log10
from statistics import fmean

from rect_lightning.reports.figures import BEFORE, NONE, Figure, Mark, Panel, Series
from rect_lightning.reports.results import Results, Row, lower_is_better

_METRICS = ("efficacy", "generalisation", "locality")
PERPLEXITY = "Perplexity, e to the power of the mean loss a token of a text, is better the lower it is."


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
        slugs = {_slug(each) for each in self.groups}
        told_apart = len(slugs) == len(self.groups) and "" not in slugs
        return "" if len(self.groups) == 1 else group if told_apart else str(self.groups.index(group) + 1)

    def split(self, rows: Iterable[Row], group: str) -> list[tuple[str, int, list[Row]]]:
        """Label, style and rows of each series of a group."""
        found = [row for row in rows if self.group(row.cell) == group]
        sorted_out = {label: [row for row in found if self.label(row.cell) == label] for label in self.labels}
        return [(label, self.styles[label], own) for label, own in sorted_out.items() if own]


def figures(results: Results) -> list[Figure]:
    """All figures for which there are data, in the order in which they are read."""
    by = Grouping(results)
    made: list[Figure | None] = [_trade_off(results, by)]
    for group in by.groups:
        made += [*_editing(results, by, group), _edits_hold(results, by, group)]
    for group in by.groups:
        made += [_abilities(results, by, group), _further_scores(results, by, group)]
    for group in by.groups:
        made += [_growth(results, by, group), _layers(results, by, group)]
    made += [_distribution(results), _histograms(results)]
    return [figure for figure in made if figure is not None and figure.panels]


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


def _noted(caption: str, results: Results, panels: Sequence[Panel]) -> str:
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


def _series(label: str, style: int, rows: Sequence[Row], x: Iterable[float]) -> Series:
    return Series(
        label=label,
        style=style,
        x=tuple(x),
        y=tuple(row.value for row in rows),
        low=tuple(row.low for row in rows),
        high=tuple(row.high for row in rows),
        seeds=tuple(row.seeds for row in rows),
    )


# Editing -------------------------------------------------------------------------------------------------------------


def _trade_off(results: Results, by: Grouping) -> Figure | None:
    score = results.editing_score
    if score is None or len(results.cells) < 2 or not results.of("kept"):
        return None
    panels = []
    for group in by.groups:
        series = []
        for label, style, rows in by.split(results.of("after", score), group):
            kept = next((row for row in results.of("kept") if row.cell == rows[0].cell), None)
            if kept is not None:
                edited = rows[-1]
                point = _series(label, style, [kept], [edited.value])
                series.append(replace(point, x_low=(edited.low,), x_high=(edited.high,)))
        if series:
            title = group or "Editing against ability"
            panels.append(
                Panel(kind="points", title=title, x_label=score, y_label="ability kept", series=tuple(series))
            )
    series = [one for panel in panels for one in panel.series]
    x_range = _range(v for one in series for v in (*one.x, *one.x_low, *one.x_high))
    y_range = _range(v for one in series for v in (*one.y, *one.low, *one.high))
    panels = [replace(panel, x_range=x_range, y_range=y_range) for panel in panels]
    tasks = ", ".join(name.split("/")[0] for name in results.main_scores) or "perplexity"
    caption = (
        f"To the right, {score}: how well the edits took. Up: how much of the model's abilities is left, the mean share of "
        f"{tasks} that is left after the edits (of perplexity, its inverse); what the clean model cannot do at all is left "
        "out. The best place is at the upper right."
    )
    return Figure(
        name="score-and-ability",
        section="Trade-off",
        title="How well the edits took, and what is left of the model's abilities",
        caption=_noted(caption, results, panels),
        panels=tuple(panels),
    )


def _range(values: Iterable[float | None]) -> tuple[float, float] | None:
    finite = [value for value in values if value is not None and isfinite(value)]
    return (min(finite), max(finite)) if finite else None


def _editing(results: Results, by: Grouping, group: str) -> list[Figure]:
    made = []
    for kind, told in (
        ("probability", "The wanted answer is likelier than the other one"),
        ("exact", "Every token of the answer is the likeliest"),
    ):
        panels = []
        for metric in _METRICS:
            name = f"{metric}/{kind}"
            after = by.split(results.of("after", name), group)
            clean = {label: rows[-1:] for label, _, rows in by.split(results.of("before", name), group)}
            series: list[Series] = []
            shown = inf
            for label, style, rows in after:
                if label in clean and abs(clean[label][0].value - shown) >= 1e-3:
                    series.append(_series("before", BEFORE, clean[label], [0]))
                    shown = clean[label][0].value
                series.append(_series(label, style, rows[-1:], [0]))
            if after:
                panels.append(
                    Panel(
                        kind="bars",
                        title=metric.capitalize(),
                        x_label="",
                        y_label=name,
                        series=tuple(series),
                        share=True,
                    )
                )
        counts = {row.n for row in results.of("after", f"efficacy/{kind}") if row.n}
        requests = f" {min(counts)} requests." if len(counts) == 1 else ""
        caption = (
            f"{told}: after the prompt (efficacy), after its paraphrases (generalisation), and for neighbours that should "
            f"not change (locality).{requests} What stands below “before” began there."
        )
        made.append(
            Figure(
                name=_slug("editing", kind, by.suffix(group)),
                section="Editing",
                title=_titled("Did the edits take?" if kind == "probability" else "Word for word", group),
                caption=_noted(caption, results, panels),
                panels=tuple(panels),
            )
        )
    return made


# Curves --------------------------------------------------------------------------------------------------------------


def _abilities(results: Results, by: Grouping, group: str) -> Figure:
    panels = _curves(results, by, group, "task", results.main_scores)
    perplexity = f" {PERPLEXITY}" * any(lower_is_better(panel.title) for panel in panels)
    caption = (
        "The model's abilities, by the main score of each task, against the number of edits made; 0 edits is the clean model."
        f"{perplexity}"
    )
    return Figure(
        name=_slug("main-scores", by.suffix(group)),
        section="Abilities",
        title=_titled("What the edits cost", group),
        caption=_noted(caption, results, panels),
        panels=panels,
    )


def _further_scores(results: Results, by: Grouping, group: str) -> Figure:
    main = results.main_scores
    panels = _curves(results, by, group, "task", [name for name in results.names("task") if name not in main])
    caption = (
        "Scores whose name ends in paper follow the published prompts and rules with their faults, and are never mixed with "
        "the others."
    )
    return Figure(
        name=_slug("further-scores", by.suffix(group)),
        section="Abilities",
        title=_titled("The same tasks by other scores", group),
        caption=_noted(caption, results, panels),
        panels=panels,
    )


def _edits_hold(results: Results, by: Grouping, group: str) -> Figure:
    names = [name for name in results.names("edits") if name.endswith("/probability")]
    panels = _curves(results, by, group, "edits", names)
    return Figure(
        name=_slug("edits-hold", by.suffix(group)),
        section="Editing",
        title=_titled("All edits so far", group),
        caption=_noted(
            "All edits made so far, measured again as they pile up: each point has earlier ones and new ones in it.",
            results,
            panels,
        ),
        panels=panels,
    )


def _curves(results: Results, by: Grouping, group: str, source: str, names: Sequence[str]) -> tuple[Panel, ...]:
    """A panel a score, where there are two numbers of edits or more."""
    panels = []
    for name in names:
        series = [_line(label, style, rows) for label, style, rows in by.split(results.of(source, name), group)]
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


def _line(label: str, style: int, rows: Iterable[Row]) -> Series:
    found = {row.edits: row for row in rows if row.edits is not None and isfinite(row.value)}
    return _series(label, style, [found[edits] for edits in sorted(found)], map(float, sorted(found)))


# Weights -------------------------------------------------------------------------------------------------------------

_CHANGE = re.compile(r"(\d+)/above_([\d.]+)")


def _shares_above(rows: Iterable[Row]) -> dict[str, dict[int, list[Row]]]:
    """By threshold and layer, the shares of entries whose relative change is above the threshold."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        if match := _CHANGE.fullmatch(row.name):
            found.setdefault(match[2], {}).setdefault(int(match[1]), []).append(row)
    return found


def _growth(results: Results, by: Grouping, group: str) -> Figure:
    """How far the weights are from the clean ones, as edits pile up: one line a layer, or a regulariser where there are any."""
    panels = []
    for threshold, layers in _shares_above(results.of("change")).items():
        told = {"x_label": "edits", "y_label": f"share of entries with δ > {threshold}", "share": True}
        if by.inner:
            rows = _mean_over_layers(layers.values())
            series = [_line(label, style, own) for label, style, own in by.split(rows, group)]
            panels.append(_lines(f"δ > {threshold}", series, told))
        else:
            series = [_line(f"layer {n}", i, rows) for i, (n, rows) in enumerate(sorted(layers.items()))]
            panels.append(_lines(f"δ > {threshold}", series, told))
    panels = [panel for panel in panels if max((len(s.x) for s in panel.series), default=0) > 1]
    caption = (
        "The share of the edited weights' entries whose relative change since the clean model, |ΔW/W|, is above δ."
    )
    return Figure(
        name=_slug("growth", by.suffix(group)),
        section="Weights",
        title=_titled("How far the weights have moved", group),
        caption=_noted(caption, results, panels),
        panels=tuple(panels),
    )


def _mean_over_layers(layers: Iterable[Sequence[Row]]) -> list[Row]:
    """All layers' weights are of one size, so the mean is the share of all their entries."""
    found: dict[tuple[tuple[str, ...], int | None], list[Row]] = {}
    for row in itertools.chain.from_iterable(layers):
        found.setdefault((row.cell, row.edits), []).append(row)
    means = [replace(rows[0], value=fmean(row.value for row in rows)) for rows in found.values()]
    single = all(len(rows) == 1 for rows in found.values())
    return means if single else [replace(row, low=None, high=None) for row in means]  # layers vary together


def _lines(title: str, series: Iterable[Series], told: dict) -> Panel:
    return Panel(kind="lines", title=title, series=tuple(series), **told)


def _layers(results: Results, by: Grouping, group: str) -> Figure | None:
    """Of a grid, a row a series and a column a layer."""
    if not by.inner:
        return None
    panels = []
    for threshold, layers in _shares_above([*results.of("change"), *results.of("alone")]).items():
        own = {layer: rows for layer, rows in sorted(layers.items()) if any(by.group(r.cell) == group for r in rows)}
        last = [
            (label, column, _in_the_end(rows))
            for column, layer_rows in enumerate(own.values())
            for label, _, rows in by.split(layer_rows, group)
        ]
        series = [
            Series(label=label, style=0, x=tuple(float(x) for n, x, _ in last if n == label),
                   y=tuple(y for n, _, y in last if n == label))
            for label in by.labels if any(n == label for n, *_ in last)
        ]  # fmt: skip
        if series:
            panels.append(
                Panel(
                    kind="heat",
                    title=f"δ > {threshold}",
                    x_label="layer",
                    y_label="share of entries",
                    ticks=tuple(map(str, own)),
                    series=tuple(series),
                    percent=True,
                )
            )
    alone = (
        " Each edit made from the clean model, nothing piles up: there is no curve, and the mean over the edits is shown."
        if any(by.group(row.cell) == group for row in results.of("alone"))
        else ""
    )
    return Figure(
        name=_slug("layers", by.suffix(group)),
        section="Weights",
        title=_titled("Where the weights have changed", group),
        caption="After the last edit: the share of each layer's entries whose relative change δ = |ΔW/W| since the clean model "
        f"is above the threshold.{alone}",
        panels=tuple(panels),
    )


def _in_the_end(rows: Sequence[Row]) -> float:
    if rows[0].source == "alone":
        return fmean(row.value for row in rows)
    return max(rows, key=lambda row: row.edits or 0).value


def _distribution(results: Results) -> Figure | None:
    """Of a run with several edited layers, layers by δ in steps of half a decade."""
    layers = results.changes.get("layers", [])
    if len(layers) < 2:
        return None
    edges, width = _edges(results), 5
    first, last = _extent(results, width)
    ticks = tuple(f"{float(f'{10 ** edges[i]:.0e}'):g}" for i in range(first, last, width))
    series = [
        Series(
            label=f"layer {layer['layer']}",
            style=0,
            x=tuple(float(i) for i in range(len(ticks))),
            y=tuple(sum(layer["counts"][i : i + width]) / layer["entries"] for i in range(first, last, width)),
        )
        for layer in layers
    ]
    panel = Panel(
        kind="heat", title="Relative change by layer", x_label="δ = |ΔW/W|, from", y_label="share of entries", ticks=ticks,
        series=tuple(series), percent=True,
    )  # fmt: skip
    return Figure(
        name="distribution",
        section="Weights",
        title="Where the weights have changed",
        caption="How the relative changes since the clean model spread over each edited weight's entries, in steps of half a "
        "decade. Entries that did not change at all are not shown.",
        panels=(panel,),
    )


def _histograms(results: Results) -> Figure | None:
    layers = results.changes.get("layers", [])
    if not layers:
        return None
    edges = _edges(results)
    first, last = _extent(results, 1)
    keep = f"{results.keep or 0.4:g}"
    panels = []
    for layer in layers:
        threshold = layer["thresholds"].get(keep)
        marks = (
            (Mark(x=log10(threshold), label=f"top {_percent(float(keep))}: δ ≥ {threshold:.2g}"),) if threshold else ()
        )
        counts = tuple(count / layer["entries"] for count in layer["counts"][first:last])
        panels.append(
            Panel(
                kind="steps",
                title=f"Layer {layer['layer']}, {_percent(layer['zero'] / layer['entries'])} unchanged",
                x_label="δ = |ΔW/W|",
                y_label="share of entries",
                marks=marks,
                log_x=True,
                percent=True,
                series=(Series(label=f"layer {layer['layer']}", style=0, x=tuple(edges[first : last + 1]), y=counts),),
            )
        )
    kept = (
        f"RECT kept the top {_percent(results.keep)} of each update, compared with the weight just before it"
        if results.keep
        else "RECT would keep the top 40\N{NARROW NO-BREAK SPACE}%"
    )
    return Figure(
        name="histogram",
        section="Weights",
        title="How large the changes are",
        caption=f"Entries of each edited weight by the relative change since the clean model, ten bins a decade. {kept}; "
        "the line marks where that share of the change shown begins.",
        panels=tuple(panels),
    )


def _edges(results: Results) -> list[float]:
    low, high, bins = (results.changes[key] for key in ("log10_low", "log10_high", "bins"))
    return [low + (high - low) * i / bins for i in range(bins + 1)]


def _extent(results: Results, width: int) -> tuple[int, int]:
    """The first and last bin of interest, in whole groups of this width: all but the 0.1 % farthest out on each side."""
    counts = [sum(bins) for bins in zip(*(layer["counts"] for layer in results.changes["layers"]), strict=True)]
    few = sum(counts) / 1000
    inside = [i for i in range(len(counts)) if sum(counts[: i + 1]) > few and sum(counts[i:]) > few]
    first, last = (inside[0], inside[-1]) if inside else (0, len(counts) - 1)
    return first // width * width, min(len(counts), (last // width + 1) * width)


# Names ---------------------------------------------------------------------------------------------------------------


def _told(axis: str, level: str) -> str:
    """A level that does not speak for itself, with its axis."""
    if level == "none":
        return f"no {axis}"
    return f"{axis} {level}" if re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", level) else level


def _titled(title: str, group: str) -> str:
    return f"{title} {group}" if group and title.endswith("?") else f"{title}: {group}" if group else title


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NARROW NO-BREAK SPACE}%"


def _slug(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")
