"""Figures of how far the edited weights are from the clean ones."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import log10
from statistics import fmean

from rect_lightning.reports.figures import Figure, Mark, Panel, Series
from rect_lightning.reports.results import Results, Row
from rect_lightning.reports.series import Grouping, line_of, noted, slug, titled

_CHANGE = re.compile(r"(\d+)/above_([\d.]+)")


def _shares_above(rows: Iterable[Row]) -> dict[str, dict[int, list[Row]]]:
    """By threshold and layer, the shares of entries whose relative change is above the threshold."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        if match := _CHANGE.fullmatch(row.name):
            found.setdefault(match[2], {}).setdefault(int(match[1]), []).append(row)
    return found


def growth(results: Results, by: Grouping, group: str) -> Figure:
    """How far the weights are from the clean ones, as edits pile up: one line a layer, or a regulariser where there are any."""
    panels = []
    for threshold, layers in _shares_above(results.of("change")).items():
        told = {"x_label": "edits", "y_label": f"share of entries with δ > {threshold}", "share": True}
        if by.inner:
            rows = _mean_over_layers(layers.values())
            series = [line_of(label, style, own) for label, style, own in by.split(rows, group)]
            panels.append(_lines(f"δ > {threshold}", series, told))
        else:
            series = [line_of(f"layer {n}", i, rows) for i, (n, rows) in enumerate(sorted(layers.items()))]
            panels.append(_lines(f"δ > {threshold}", series, told))
    panels = [panel for panel in panels if max((len(s.x) for s in panel.series), default=0) > 1]
    caption = (
        "The share of the edited weights' entries whose relative change since the clean model, |ΔW/W|, is above δ."
    )
    return Figure(
        name=slug("growth", by.suffix(group)),
        section="Weights",
        title=titled("How far the weights have moved", group),
        caption=noted(caption, results, panels),
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


def layers_in_the_end(results: Results, by: Grouping, group: str) -> Figure | None:
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
        name=slug("layers", by.suffix(group)),
        section="Weights",
        title=titled("Where the weights have changed", group),
        caption="After the last edit: the share of each layer's entries whose relative change δ = |ΔW/W| since the clean model "
        f"is above the threshold.{alone}",
        panels=tuple(panels),
    )


def _in_the_end(rows: Sequence[Row]) -> float:
    if rows[0].source == "alone":
        return fmean(row.value for row in rows)
    return max(rows, key=lambda row: row.edits or 0).value


def distribution(results: Results) -> Figure | None:
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


def histograms(results: Results) -> Figure | None:
    """Of a run, a panel a layer: its entries by δ."""
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


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NARROW NO-BREAK SPACE}%"
