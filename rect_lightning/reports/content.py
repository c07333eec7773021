"""Which figures results have, and those of edits and abilities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import inf, isfinite

from rect_lightning.reports.figures import BEFORE, Figure, Panel, Series
from rect_lightning.reports.results import Results, lower_is_better
from rect_lightning.reports.series import Grouping, curves, noted, series_of, slug, titled
from rect_lightning.reports.weights import distribution, growth, histograms, layers_in_the_end

_METRICS = ("efficacy", "generalisation", "locality")
PERPLEXITY = "Perplexity, e to the power of the mean loss a token of a text, is better the lower it is."


def figures(results: Results) -> list[Figure]:
    """All figures for which there are data, in the order in which they are read."""
    by = Grouping(results)
    made: list[Figure | None] = [_trade_off(results, by)]
    for group in by.groups:
        made += [*_editing(results, by, group), _edits_hold(results, by, group)]
    for group in by.groups:
        made += [_abilities(results, by, group), _further_scores(results, by, group)]
    for group in by.groups:
        made += [growth(results, by, group), layers_in_the_end(results, by, group)]
    made += [distribution(results), histograms(results)]
    return [figure for figure in made if figure is not None and figure.panels]


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
                point = series_of(label, style, [kept], [edited.value])
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
        caption=noted(caption, results, panels),
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
                    series.append(series_of("before", BEFORE, clean[label], [0]))
                    shown = clean[label][0].value
                series.append(series_of(label, style, rows[-1:], [0]))
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
                name=slug("editing", kind, by.suffix(group)),
                section="Editing",
                title=titled("Did the edits take?" if kind == "probability" else "Word for word", group),
                caption=noted(caption, results, panels),
                panels=tuple(panels),
            )
        )
    return made


def _abilities(results: Results, by: Grouping, group: str) -> Figure:
    panels = curves(results, by, group, "task", results.main_scores)
    perplexity = f" {PERPLEXITY}" * any(lower_is_better(panel.title) for panel in panels)
    caption = (
        "The model's abilities, by the main score of each task, against the number of edits made; 0 edits is the clean model."
        f"{perplexity}"
    )
    return Figure(
        name=slug("main-scores", by.suffix(group)),
        section="Abilities",
        title=titled("What the edits cost", group),
        caption=noted(caption, results, panels),
        panels=panels,
    )


def _further_scores(results: Results, by: Grouping, group: str) -> Figure:
    main = results.main_scores
    panels = curves(results, by, group, "task", [name for name in results.names("task") if name not in main])
    caption = (
        "Scores whose name ends in paper follow the published prompts and rules with their faults, and are never mixed with "
        "the others."
    )
    return Figure(
        name=slug("further-scores", by.suffix(group)),
        section="Abilities",
        title=titled("The same tasks by other scores", group),
        caption=noted(caption, results, panels),
        panels=panels,
    )


def _edits_hold(results: Results, by: Grouping, group: str) -> Figure:
    names = [name for name in results.names("edits") if name.endswith("/probability")]
    panels = curves(results, by, group, "edits", names)
    return Figure(
        name=slug("edits-hold", by.suffix(group)),
        section="Editing",
        title=titled("All edits so far", group),
        caption=noted(
            "All edits made so far, measured again as they pile up: each point has earlier ones and new ones in it.",
            results,
            panels,
        ),
        panels=panels,
    )
