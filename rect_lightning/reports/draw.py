"""Drawing figures with matplotlib: SVG for the page, SVG, PNG and PDF for papers."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from html import escape
from math import inf
from pathlib import Path
from typing import Any

from rect_lightning.durable import whole_file
from rect_lightning.reports.figures import BEFORE, Figure, Panel, Series
from rect_lightning.reports.palette import LIGHT, SERIES, series_colour

WIDTH = 310.0
"""Of a panel, in points: as wide as a phone, so that its text is legible there."""
_SMALL, _TEXT = 10.5, 11.5
_MARKERS = ("o", "s", "^", "D", "v", "P")  # as many as dashes and colours, of which each round pairs others
_DASHES = ("-", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (6, 1.5, 1.4, 1.5)), (0, (3, 1.2, 1, 1.2, 1, 1.2)), (0, (9, 2)))
_RC = {
    "svg.fonttype": "none",  # text stays text
    "pdf.fonttype": 42,
    "text.parse_math": False,  # names may hold a dollar
    "axes.unicode_minus": True,
    "font.size": _TEXT,
}


def inline_svg(panel: Panel, *, name: str, description: str) -> str:
    """A panel as SVG for an HTML page: in the colours of the page's variables, named and described for screen readers.

    Args:
        panel: What to draw.
        name: Prefix of its ids, which have to be the only ones in the page.
        description: What a reader who cannot see it should know.
    """
    svg = _render([panel], "svg", columns=1, salt=name).decode("utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()  # type: ignore[union-attr]
    head = (
        f'<svg class="panel" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-labelledby="{name}-title {name}-desc" '
        "style=\"stroke-linejoin: round; font-family: system-ui, -apple-system, 'Segoe UI', sans-serif\">"
        f'<title id="{name}-title">{escape(panel.title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    svg = head + re.sub(r"^<svg.*?>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\sid="|url\(#|href="#)(?!' + re.escape(name) + ")", rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*", _font, svg)
    for colour, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{colour}, {value})")
    return re.sub(r"\n\s*", "\n", svg)


def save(figure: Figure, folder: Path) -> list[Path]:
    """Write a figure as SVG, PNG (300 dots an inch) and PDF.

    Raises:
        OSError: The disk is full.
    """
    paths = [folder / f"{figure.name}.{kind}" for kind in ("svg", "png", "pdf")]
    for path in paths:
        content = _render(figure.panels, path.suffix[1:], columns=min(3, len(figure.panels)), salt=figure.name)
        with whole_file(path) as partial:
            partial.write_bytes(content)
    return paths


def _font(match: re.Match[str]) -> str:
    return f"font-size: {match[2]}px; font-weight: {match[1] or 400}"


# The frame -----------------------------------------------------------------------------------------------------------


def _matplotlib() -> Any:
    """Matplotlib, whose absence has a remedy."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(
            "Figures are drawn with matplotlib, which is not installed: pip install '.[report]'"
        ) from error
    return mpl


def _render(panels: Sequence[Panel], kind: str, *, columns: int, salt: str) -> bytes:
    mpl = _matplotlib()
    context: AbstractContextManager[None] = mpl.rc_context({**_RC, "svg.hashsalt": salt})
    with context:
        from matplotlib.figure import Figure as Canvas

        rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
        heights = [max(map(_height, row)) for row in rows]
        total = sum(heights)
        canvas = Canvas(figsize=(WIDTH * columns / 72, total / 72), facecolor="none")
        top = total
        for row, height in zip(rows, heights, strict=True):
            for column, panel in enumerate(row):
                _draw(canvas, panel, left=column * WIDTH, top=top, size=(WIDTH * columns, total))
            top -= height
        out = io.BytesIO()
        undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        ground = "white" if kind == "png" else "none"
        canvas.savefig(out, format=kind, dpi=300, metadata=undated.get(kind), facecolor=ground)
        return out.getvalue()


def _height(panel: Panel) -> float:
    rows = len(panel.series)
    return {"bars": 56 + 25 * rows, "heat": 86 + 24 * rows}.get(panel.kind, 238)


def _draw(canvas: Any, panel: Panel, *, left: float, top: float, size: tuple[float, float]) -> None:
    """A panel into the rectangle whose upper left corner is given, in points from the canvas's lower left."""
    height = _height(panel)
    inset = {"lines": 42.0, "points": 42.0, "steps": 42.0}.get(panel.kind, _label_width(panel.series) + 12)
    above, below = 44.0, {"bars": 10.0}.get(panel.kind, 40.0)
    right = 14.0
    if panel.kind == "points" or (panel.kind == "lines" and len(panel.series) > 1):
        right = _label_width(panel.series) + 26
    elif panel.kind == "bars":
        right = 44.0
    box = (left + inset, top - height + below, WIDTH - inset - right, height - above - below)
    axes = canvas.add_axes((box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]), facecolor="none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["muted"])
    axes.tick_params(length=0, labelsize=_SMALL, labelcolor=LIGHT["muted"], pad=5)
    draw = {"lines": _lines, "points": _points, "bars": _bars, "steps": _steps, "heat": _heat}[panel.kind]
    draw(axes, panel)
    at = {"xycoords": "axes points", "annotation_clip": False}
    bold = {"fontsize": _title_size(panel.title), "weight": "bold", "color": LIGHT["ink"]}
    axes.annotate(panel.title, (-inset + 4, box[3] + 28), **at, **bold)
    axes.annotate(panel.y_label, (-inset + 4, box[3] + 13), **at, fontsize=_SMALL, color=LIGHT["muted"])
    if panel.x_label:
        axes.annotate(panel.x_label, (box[2], -34), **at, fontsize=_SMALL, color=LIGHT["muted"], ha="right")


def _label_width(series: Iterable[Series]) -> float:
    return min(130.0, max(_text_width(line) for s in series for line in _wrapped(s.label).splitlines()))


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 20)[:3]) or label


def _text_width(text: str) -> float:
    return 0.56 * _SMALL * len(text) + 6


def _title_size(title: str) -> float:
    """The size at which a long title does not run into the next panel."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    size = _TEXT + 1
    if not title.strip():
        return size
    width = TextPath((0, 0), title, size=size, prop=FontProperties(weight="bold")).get_extents().width
    return float(size * min(1, 0.95 * (WIDTH - 4) / width))  # small letters are drawn a little wider


def _style(series: Series) -> dict[str, Any]:
    return {"color": LIGHT[series_colour(series.style)]}


def _marker(style: int) -> str:
    return _MARKERS[_turn(style) % len(_MARKERS)]


def _dash(style: int) -> Any:
    return _DASHES[_turn(style) % len(_DASHES)]


def _turn(style: int) -> int:
    """One on in each round of the colours."""
    return max(0, style + style // SERIES)


def _grid(axes: Any, which: str = "y") -> None:
    axes.grid(axis=which, color=LIGHT["rule"], linewidth=0.8)
    axes.set_axisbelow(True)


def _percent(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}\N{NARROW NO-BREAK SPACE}%"))


# The kinds -----------------------------------------------------------------------------------------------------------


def _lines(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    _grid(axes)
    for series in panel.series:
        if not panel.bare and any(low is not None for low in series.low):
            low, high = (
                [y if v is None else v for v, y in zip(vs, series.y, strict=True)] for vs in (series.low, series.high)
            )
            axes.fill_between(series.x, low, high, alpha=0.13, linewidth=0, **_style(series))
        axes.plot(
            series.x, series.y, linestyle=_dash(series.style), linewidth=1.8, marker=_marker(series.style),
            markevery=-(-len(series.x) // 12), markersize=5, markeredgecolor=LIGHT["paper"], markeredgewidth=0.9, clip_on=False,
            zorder=3, **_style(series),
        )  # fmt: skip
    if panel.log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=7))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.minorticks_off()
    elif panel.share:
        axes.set_ylim(0, 1)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(panel.series) > 1:
        _name_ends(axes, panel.series)


def _name_ends(axes: Any, series: Sequence[Series]) -> None:
    """Right of the axes each series' marker and name, at the height of its end, moved apart where they would overlap."""
    axes.get_ylim()  # settles limits that are still automatic
    width, height = axes.get_window_extent().size * 72 / axes.figure.dpi
    place = axes.transData + axes.transAxes.inverted()
    ends = sorted(((place.transform((s.x[-1], s.y[-1]))[1], s) for s in series), key=lambda end: end[0])
    gap = 13.0 * max(len(_wrapped(s.label).splitlines()) for s in series) / height
    for (_, s), y in zip(ends, _apart([y for y, _ in ends], gap, 1.0), strict=True):
        axes.plot(
            1 + 11 / width,
            y,
            marker=_marker(s.style),
            markersize=5,
            clip_on=False,
            transform=axes.transAxes,
            **_style(s),
        )
        axes.annotate(
            _wrapped(s.label), (1 + 18 / width, y), xycoords="axes fraction", va="center", fontsize=_SMALL,
            annotation_clip=False, **_style(s),
        )  # fmt: skip


def _apart(places: Sequence[float], gap: float, room: float) -> list[float]:
    """Ascending places with at least this gap between them, moved as little as a push from below and one from above do."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    limit = max(room, gap * (len(places) - 1))
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def _points(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    _grid(axes, "both")
    for s in panel.series:
        axes.errorbar(
            s.x, s.y, yerr=_reach(s.y, s.low, s.high), xerr=_reach(s.x, s.x_low, s.x_high), fmt=_marker(s.style),
            markersize=8, elinewidth=1, markeredgecolor=LIGHT["paper"], markeredgewidth=1, zorder=3, clip_on=False, **_style(s),
        )  # fmt: skip
    axes.margins(0.16)
    if panel.x_range and panel.y_range:  # the panels of a figure are compared, so they show the same
        axes.update_datalim(list(zip(panel.x_range, panel.y_range, strict=True)))
        axes.autoscale_view()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    _name_ends(axes, panel.series)


def _reach(middle: Sequence[float], low: Sequence[float | None], high: Sequence[float | None]) -> Any:
    """Distances to both ends of each interval, as matplotlib wants them; none where there is none."""
    if any(value is None for value in (*low, *high)) or not low:
        return None
    return [
        [max(0.0, m - (v or 0.0)) for m, v in zip(middle, low, strict=True)],
        [max(0.0, (v or 0.0) - m) for m, v in zip(middle, high, strict=True)],
    ]


def _bars(axes: Any, panel: Panel) -> None:
    rows = range(len(panel.series))
    for row, s in zip(rows, panel.series, strict=True):
        axes.barh(row, s.y, height=0.56, xerr=_reach(s.y, s.low, s.high), error_kw={"elinewidth": 1.2, "ecolor": LIGHT["ink"]},
                  alpha=0.45 if s.style == BEFORE else 1, **_style(s))  # fmt: skip
        end = min(max([*s.y, *(v for v in s.high if v is not None), 0]), 1 if panel.share else inf)
        axes.annotate(f"{s.y[0]:.2f}", (end, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=_SMALL,
                      color=LIGHT["ink"], annotation_clip=False)  # fmt: skip
    axes.set_yticks(rows, [_wrapped(s.label) for s in panel.series], color=LIGHT["ink"])
    axes.set_ylim(len(panel.series) - 0.5, -0.5)
    axes.set_xlim(0, 1 if panel.share else None)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.axvline(0, color=LIGHT["muted"], linewidth=0.8)


def _steps(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    _grid(axes)
    for s in panel.series:
        axes.stairs(s.y, s.x, fill=True, alpha=0.3, **_style(s))
        axes.stairs(s.y, s.x, linewidth=1.3, **_style(s))
    axes.margins(x=0)
    axes.set_ylim(0, max(max(s.y) for s in panel.series) * 1.18)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if panel.log_x:
        axes.xaxis.set_major_formatter(lambda value, _: f"{10**value:g}")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if panel.percent:
        _percent(axes.yaxis)
    low, high = axes.get_xlim()
    for mark in panel.marks:
        axes.axvline(mark.x, color=LIGHT["ink"], linewidth=1.1, linestyle=(0, (3, 2)))
        left = mark.x > (low + high) / 2
        axes.annotate(mark.label, (mark.x, 1), xycoords=("data", "axes fraction"), xytext=(-5 if left else 5, -3),
                      textcoords="offset points", ha="right" if left else "left", va="top", fontsize=_SMALL,
                      color=LIGHT["ink"])  # fmt: skip


def _heat(axes: Any, panel: Panel) -> None:
    from matplotlib.patches import Rectangle

    most = max((y for s in panel.series for y in s.y), default=0) or 1
    few = len(panel.ticks) <= 6
    for row, s in enumerate(panel.series):
        for x, y in zip(s.x, s.y, strict=True):
            axes.add_patch(
                Rectangle(
                    (x - 0.48, row - 0.46),
                    0.96,
                    0.92,
                    facecolor=LIGHT["accent"],
                    alpha=0.05 + (0.45 if few else 0.9) * y / most,
                )
            )
            if few:
                axes.annotate(
                    f"{100 * y:.0f}\N{NARROW NO-BREAK SPACE}%",
                    (x, row),
                    ha="center",
                    va="center",
                    fontsize=_SMALL,
                    color=LIGHT["ink"],
                )
    axes.set_xlim(-0.5, len(panel.ticks) - 0.5)
    axes.set_ylim(len(panel.series) - 0.5, -0.5)
    axes.set_yticks(range(len(panel.series)), [s.label for s in panel.series], color=LIGHT["ink"])
    every = 1 if few else -(-len(panel.ticks) // 5)
    axes.set_xticks(range(0, len(panel.ticks), every), panel.ticks[::every])
    axes.spines["bottom"].set_visible(False)
