"""Which figures results have."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import isfinite, log10
from statistics import fmean

from rect_lightning.reports.figures import Figure, Mark, Panel, Series
from rect_lightning.reports.results import Results, Row, lower_is_better

_METRICS = ("efficacy", "generalisation", "locality")
_REFERENCE = -1


class Grouping:
    """Which axis tells the series of a figure apart, and which tell figures or panels apart.

    Of editor and regulariser it is the one with more levels.

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
        self.groups = list(dict.fromkeys(self.group(cell) for cell in results.cells))

    def label(self, cell: Sequence[str]) -> str:
        """The series that a cell is of."""
        return " · ".join(cell[i] for i in self.inner) or "after"

    def group(self, cell: Sequence[str]) -> str:
        """The group that a cell is of; empty where there is but one."""
        return " · ".join(_told(self.axes[i], cell[i]) for i in self.outer)

    def suffix(self, group: str) -> str:
        """What tells a group's figures apart in their names."""
        return str(self.groups.index(group) + 1) if len(self.groups) > 1 else ""

    def split(self, rows: Iterable[Row], group: str) -> list[tuple[str, int, list[Row]]]:
        """Label, style and rows of each series of a group."""
        found = [row for row in rows if self.group(row.cell) == group]
        sorted_out = [[row for row in found if self.label(row.cell) == label] for label in self.labels]
        return [(label, i, own) for i, (label, own) in enumerate(zip(self.labels, sorted_out, strict=True)) if own]


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


def interval_note(results: Results) -> str:
    """What an interval in these results means."""
    if results.seeds > 1:
        return f"Values are means over {results.seeds} seeds, with 95 % t intervals of the mean."
    return "Intervals are 95 % and speak of the choice of records alone."


def _seed_note(results: Results) -> str:
    return interval_note(results) if results.seeds > 1 else ""


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
                series.append(
                    Series(
                        label=label,
                        style=style,
                        x=(edited.value,),
                        y=(kept.value,),
                        low=(kept.low,),
                        high=(kept.high,),
                        x_low=(edited.low,),
                        x_high=(edited.high,),
                    )
                )
        if series:
            title = group or "Editing against ability"
            panels.append(
                Panel(kind="points", title=title, x_label=score, y_label="ability kept", series=tuple(series))
            )
    tasks = ", ".join(name.split("/")[0] for name in results.main_scores) or "perplexity"
    return Figure(
        name="score-and-ability",
        section="Trade-off",
        title="How well the edits took, and what is left of the model's abilities",
        caption=f"Further right the edits took better, higher up more of the model's abilities is left. Ability kept is the "
        f"mean share of {tasks} that is left after the edits (of perplexity, its inverse); what the clean model cannot do "
        f"at all is left out. {_seed_note(results)}".strip(),
        panels=tuple(panels),
    )


def _editing(results: Results, by: Grouping, group: str) -> list[Figure]:
    made = []
    for kind, told in (
        ("probability", "The wanted answer is likelier than the other one"),
        ("exact", "Every token of the answer is the likeliest"),
    ):
        panels = []
        for metric in _METRICS:
            name = f"{metric}/{kind}"
            before = [row for row in results.of("before", name) if by.group(row.cell) == group]
            series = [_bar("before", _REFERENCE, before[0])] if before else []
            series += [
                _bar(label, style, rows[-1]) for label, style, rows in by.split(results.of("after", name), group)
            ]
            if len(series) > len(before[:1]):
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
        made.append(
            Figure(
                name=_slug("editing", kind, by.suffix(group)),
                section="Editing",
                title=_titled("Did the edits take?" if kind == "probability" else "Word for word", group),
                caption=f"{told}: after the prompt (efficacy), after its paraphrases (generalisation), and for neighbours "
                f"that should not change (locality).{requests} {_seed_note(results)}".strip(),
                panels=tuple(panels),
            )
        )
    return made


def _bar(label: str, style: int, row: Row) -> Series:
    return Series(label=label, style=style, x=(0,), y=(row.value,), low=(row.low,), high=(row.high,))


# Curves --------------------------------------------------------------------------------------------------------------


def _abilities(results: Results, by: Grouping, group: str) -> Figure:
    return Figure(
        name=_slug("main-scores", by.suffix(group)),
        section="Abilities",
        title=_titled("What the edits cost", group),
        caption="The model's abilities, by the main score of each task, against the number of edits made; 0 edits is the "
        f"clean model. Perplexity is better the lower it is. {interval_note(results)}",
        panels=_curves(results, by, group, "task", results.main_scores),
    )


def _further_scores(results: Results, by: Grouping, group: str) -> Figure:
    main = results.main_scores
    return Figure(
        name=_slug("further-scores", by.suffix(group)),
        section="Abilities",
        title=_titled("The same tasks by other scores", group),
        caption="Scores whose name ends in paper follow the published prompts and rules with their faults, and are never mixed "
        f"with the others. {interval_note(results)}",
        panels=_curves(results, by, group, "task", [name for name in results.names("task") if name not in main]),
    )


def _edits_hold(results: Results, by: Grouping, group: str) -> Figure:
    names = [name for name in results.names("edits") if name.endswith("/probability")]
    return Figure(
        name=_slug("edits-hold", by.suffix(group)),
        section="Editing",
        title=_titled("Do earlier edits hold?", group),
        caption=f"All edits made so far, measured again as they pile up. {_seed_note(results)}".strip(),
        panels=_curves(results, by, group, "edits", names),
    )


def _curves(results: Results, by: Grouping, group: str, source: str, names: Sequence[str]) -> tuple[Panel, ...]:
    """A panel a score, where there are two numbers of edits or more."""
    panels = []
    for name in names:
        series = [_line(label, style, rows) for label, style, rows in by.split(results.of(source, name), group)]
        series = [line for line in series if line.x]
        if max((len(line.x) for line in series), default=0) > 1:
            values = [y for line in series for y in line.y]
            harm, log = lower_is_better(name), max(values) > 20 * min(values) > 0
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
    rows = sorted(
        (row for row in rows if row.edits is not None and isfinite(row.value)), key=lambda row: row.edits or 0
    )
    return Series(
        label=label,
        style=style,
        x=tuple(float(row.edits or 0) for row in rows),
        y=tuple(row.value for row in rows),
        low=tuple(row.low for row in rows),
        high=tuple(row.high for row in rows),
    )


# Weights -------------------------------------------------------------------------------------------------------------

_CHANGE = re.compile(r"(?:change/)?(\d+)/above_([\d.]+)")


def _shares_above(results: Results) -> dict[str, dict[int, list[Row]]]:
    """By threshold and layer, the shares of entries whose relative change is above the threshold."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in results.of("change"):
        if match := _CHANGE.fullmatch(row.name):
            found.setdefault(match[2], {}).setdefault(int(match[1]), []).append(row)
    return found


def _growth(results: Results, by: Grouping, group: str) -> Figure | None:
    """How far the weights are from the clean ones, as edits pile up: one line a layer, or a regulariser where there are any."""
    if not results.piles_up:
        return None
    panels = []
    for threshold, layers in _shares_above(results).items():
        told = {"x_label": "edits", "y_label": f"share of entries with δ > {threshold}", "share": True}
        if by.inner:
            rows = _mean_over_layers(layers.values())
            series = [_line(label, style, own) for label, style, own in by.split(rows, group)]
            panels.append(_lines(f"δ > {threshold}", series, told))
        else:
            series = [_line(f"layer {n}", i, rows) for i, (n, rows) in enumerate(sorted(layers.items()))]
            panels.append(_lines(f"δ > {threshold}", series, told))
    return Figure(
        name=_slug("growth", by.suffix(group)),
        section="Weights",
        title=_titled("How far the weights have moved", group),
        caption="The share of the edited weights' entries whose relative change since the clean model, |ΔW/W|, is above δ.",
        panels=tuple(panel for panel in panels if max((len(s.x) for s in panel.series), default=0) > 1),
    )


def _mean_over_layers(layers: Iterable[Sequence[Row]]) -> list[Row]:
    """All layers' weights are of one size, so the mean is the share of all their entries."""
    found: dict[tuple[tuple[str, ...], int | None], list[Row]] = {}
    for row in itertools.chain.from_iterable(layers):
        found.setdefault((row.cell, row.edits), []).append(row)
    return [replace(rows[0], value=fmean(row.value for row in rows)) for rows in found.values()]


def _lines(title: str, series: Iterable[Series], told: dict) -> Panel:
    return Panel(kind="lines", title=title, series=tuple(series), **told)


def _layers(results: Results, by: Grouping, group: str) -> Figure | None:
    """Of a grid, a row a series and a column a layer."""
    if not by.inner:
        return None
    panels = []
    for threshold, layers in _shares_above(results).items():
        own = {layer: rows for layer, rows in sorted(layers.items()) if any(by.group(r.cell) == group for r in rows)}
        last = [
            (label, column, max(rows, key=lambda row: row.edits or 0).value)
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
    return Figure(
        name=_slug("layers", by.suffix(group)),
        section="Weights",
        title=_titled("Where the weights have changed", group),
        caption="After the last edit: the share of each layer's entries whose relative change δ = |ΔW/W| since the clean model "
        "is above the threshold.",
        panels=tuple(panels),
    )


def _distribution(results: Results) -> Figure | None:
    """Of a run with several edited layers, layers by δ in steps of half a decade."""
    layers = results.changes.get("layers", [])
    if len(layers) < 2:
        return None
    edges, width = _edges(results), 5
    first, last = _extent(results, width)
    ticks = tuple(f"{10 ** edges[i]:.0e}" for i in range(first, last, width))
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
