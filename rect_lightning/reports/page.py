"""A run or a grid as one HTML page that needs nothing else."""

# No `from __future__ import annotations`: the command line reads the types of the command.

import base64
import hashlib
import importlib.util
import logging
import re
from dataclasses import dataclass, replace
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Any

from rect_lightning import __version__
from rect_lightning.durable import whole_file
from rect_lightning.metrics.definitions import DEFINITIONS
from rect_lightning.reports import draw, palette
from rect_lightning.reports.content import PERPLEXITY
from rect_lightning.reports.content import figures as figures_of
from rect_lightning.reports.figures import Figure
from rect_lightning.reports.reading import read
from rect_lightning.reports.results import Results, Row, lower_is_better, mean_over_edits
from rect_lightning.reports.series import seeds_told

_log = logging.getLogger(__name__)

_HEADLINES = {
    "efficacy/probability": "Efficacy",
    "generalisation/probability": "Generalisation",
    "locality/probability": "Locality",
}


def report(path: Path, *, output: Path | None = None, figures: Path | None = None) -> None:
    """Turn a run folder, or a grid's folder with a table.csv, into one HTML page that needs no network and no other file.

    Args:
        path: The folder.
        output: The page; by default report.html in the folder.
        figures: A folder for each figure as SVG, PNG and PDF, for papers.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is of another kind, holds no value, or a file in it is broken.
        ImportError: What draws the figures is not installed.
    """
    path, output = Path(path), Path(path) / "report.html" if output is None else Path(output)
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"A report needs {' and '.join(missing)}: pip install 'rect_lightning[report]'")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file in it, such as {output / 'report.html'}.")
    if figures is not None and Path(figures).is_file():
        raise ValueError(f"--figures {figures} is a file: name a folder.")
    results = read(path)
    with whole_file(output) as partial:
        partial.write_text(html(results), encoding="utf-8")
    _log.info("Report: %s", output)
    if figures is not None:
        for figure in figures_of(results):
            for file in draw.save(figure, Path(figures)):
                _log.info("Figure: %s", file)


def html(results: Results) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "exact": repr, "unbroken": _unbroken}
    script = (here / "page.js").read_text(encoding="utf-8")
    sections = [
        (section, [_Drawn.of(figure) for figure in own])
        for section, own in groupby(figures_of(results), key=lambda figure: figure.section)
    ]
    return environment.get_template("page.html").render(
        results=results,
        light=palette.LIGHT,
        dark=palette.DARK,
        style=(here / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        headlines=_headlines(results),
        metrics=_metrics(results),
        cells=_cells(results),
        sections=sections,
        version=__version__,
    )


def number(value: float | None) -> str:
    """A value to read: three decimals, none from 1000 on."""
    if value is None:
        return ""
    if not isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def _unbroken(text: str) -> str:
    """Markup of a text that breaks no line within ``|ΔW/W|``."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"\|[^| ]+\|", r'<span class="unbroken">\g<0></span>', str(escape(text))))


@dataclass(frozen=True)
class _Drawn:
    """A figure with its panels as SVG."""

    figure: Figure
    panels: list[str]

    @classmethod
    def of(cls, figure: Figure) -> "_Drawn":
        described = f"{figure.caption} The data are in the table below the figure."
        names = [f"{figure.name}-panel-{i}" for i in range(1, len(figure.panels) + 1)]
        svgs = [
            draw.inline_svg(panel, name=name, description=described)
            for panel, name in zip(figure.panels, names, strict=True)
        ]
        return cls(figure, svgs)

    @property
    def rows(self) -> list[Any]:
        return [row for panel in self.figure.panels for row in panel.rows()]

    @property
    def intervals(self) -> bool:
        return any(row[4] is not None for row in self.rows)

    @property
    def seeds(self) -> bool:
        return any((row[6] or 1) > 1 for row in self.rows)


# Tables --------------------------------------------------------------------------------------------------------------


def _headlines(results: Results) -> list[tuple[str, Row | None, Row]]:
    """Of a run, the numbers to see first: name, before, after."""
    if results.axes:
        return []
    names = dict(_HEADLINES) | {name: "Perplexity" for name in results.names("after") if lower_is_better(name)}
    return [
        (told, _only(results, "before", name), row)
        for name, told in names.items()
        if (row := _only(results, "after", name))
    ]


def _metrics(results: Results) -> list[tuple[str, str, Row | None, Row]]:
    """Of a run, each metric: name, definition, before, after."""
    if results.axes:
        return []
    return [(row.name, _definition(row.name), _only(results, "before", row.name), row) for row in results.of("after")]


def _definition(name: str) -> str:
    return PERPLEXITY if lower_is_better(name) else DEFINITIONS.get(name, "")


def _only(results: Results, source: str, name: str) -> Row | None:
    return next(iter(results.of(source, name)), None)


def _cells(results: Results) -> dict[str, Any]:
    """Of a grid, a row a cell with a value for each column, and before them one of the clean model where it is another."""
    if not results.axes:
        return {"columns": []}
    columns = [("after", name) for name in results.names("after")]
    columns += [("task", name) for name in results.main_scores]
    columns += [("kept", name) for name in results.names("kept")] + [("cost", name) for name in results.names("cost")]
    found: dict[tuple[Any, ...], list[Row]] = {}
    # of several numbers of edits, the most; but costs are of each operation
    for row in sorted(results.rows, key=lambda row: row.edits or 0):
        found.setdefault((row.cell, row.source, row.name), []).append(row)
    last = {key: _cost(rows) if key[1] == "cost" else rows[-1] for key, rows in found.items()}
    clean = {(cell, "after", name): rows[0] for (cell, source, name), rows in found.items() if source == "before"}
    clean |= {key: rows[0] for key, rows in found.items() if key[1] == "task" and rows[0].edits == 0}
    lines: list[tuple[tuple[str, ...], list[Row | None]]] = []
    shown: list[str] = []
    for cell in results.cells:
        before, after = ([of.get((cell, *column)) for column in columns] for of in (clean, last))
        if (told := [number(row.value if row else None) for row in before]) != shown and any(told):
            lines.append(((), before))
            shown = told
        lines.append((cell, after))
    names = [_unit(name) if source != "kept" else "ability kept" for source, name in columns]
    headings = [
        f"{name}, as a task" if names.count(name) > 1 and source == "task" else name
        for name, (source, _) in zip(names, columns, strict=True)
    ]
    note = seeds_told(row.seeds for row in last.values()) if results.seeds > 1 else ""
    if any(lower_is_better(name) for name in headings):
        note += f" {PERPLEXITY}"
    return {"columns": headings, "lines": lines, "note": note}


def _cost(rows: list[Row]) -> Row:
    """The mean over all edits; of memory in GB."""
    scale = 1 if _unit(rows[0].name) == rows[0].name else 1e-9
    return replace(rows[-1], value=mean_over_edits(rows) * scale, low=None, high=None)


def _unit(name: str) -> str:
    return f"{name}, GB" if name.startswith("peak_memory/") else name
