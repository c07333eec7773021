"""A report against the files that it is of."""

import csv
import importlib.util
import re
import shutil
from dataclasses import replace
from statistics import fmean

import pytest

from rect_lightning import __version__, reports
from rect_lightning.experiments.grid import COLUMNS
from rect_lightning.reports import draw
from rect_lightning.reports.content import _range, figures
from rect_lightning.reports.figures import NONE, Panel, Series
from rect_lightning.reports.palette import DARK, LIGHT, series_colour
from rect_lightning.reports.reading import read
from tests.reports.samples import PROMPT, RESULTS, grid_rows, write_grid, write_run

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("run"))
    reports.report(folder)
    return folder


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = write_grid(tmp_path_factory.mktemp("grid"))
    reports.report(folder)
    return folder


def text(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def data(html):
    return {float(value) for value in re.findall(r'<data value="([^"]+)">', html)}


def test_a_run_s_page_has_the_values_of_its_files(run):
    html = text(run)
    assert "<h1>8 edits by MEMIT in 2 operations, sequential, with RECT</h1>" in html
    wanted = {value for values in RESULTS.values() for value in values.values()}
    with (run / "side_effects.csv").open() as file:
        wanted |= {float(line[key]) for line in csv.DictReader(file) for key in ("value", "low", "high") if line[key]}
    assert wanted <= data(html)
    assert {0.11, 0.21, 0.12, 0.22} <= data(html), "of metrics.csv"
    assert "top 40\N{NARROW NO-BREAK SPACE}%: δ ≥ 0.0013" in html
    sections = re.findall(r"<h2[^>]*>([^<]+)", html)
    assert sections == ["Summary", "Editing", "Abilities", "Weights", "Continuations", "Origin"]


def test_what_a_file_holds_is_no_markup(run):
    html = text(run)
    assert html.count("<script>") == 1, "the page's own"
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in html
    assert "{{ 7 * 7 }}" in html
    assert "&lt;b&gt;now&lt;/b&gt;" in html
    assert PROMPT not in html


def test_axes_values_are_no_markup_either(tmp_path):
    evil = "</svg><script>alert(1)</script> $\\frac{1}{2}$ <b>"
    rows = [(*row[:1], evil if row[1] == "none" else row[1], *row[2:]) for row in grid_rows(seeds=(0,))]
    reports.report(write_grid(tmp_path, rows))
    assert text(tmp_path).count("<script>") == 1
    assert "<b>" not in text(tmp_path)


def test_a_grid_is_averaged_over_seeds(grid):
    rows = [r for r in grid_rows() if r[:2] == ("ROME", "RECT 40") and r[4:6] == ("after", "efficacy/probability")]
    values = [row[6] for row in rows]
    assert len(values) == 3
    results = read(grid)
    assert results.axes == ("editor", "regulariser")
    [mean] = [row for row in results.of("after", "efficacy/probability") if row.cell == ("ROME", "RECT 40")]
    assert mean.value == pytest.approx(fmean(values))
    assert mean.high - mean.low == pytest.approx(
        2 * 4.302653 * (sum((v - fmean(values)) ** 2 for v in values) / 6) ** 0.5
    )
    assert mean.value in data(text(grid))
    assert "means over 3 seeds" in text(grid)
    assert "under way" not in text(grid)
    assert "95 % t intervals" in text(grid)


def test_ability_kept_is_the_mean_share_of_main_scores(tmp_path):
    def row(seed, edits, name, value):
        return "RECT", seed, edits, "task", name, value, "", "", "", ""

    rows = [
        row(0, 0, "a/paper", 0.1), row(0, 8, "a/paper", 0.1), row(0, 0, "a/exact", 0.5), row(0, 8, "a/exact", 0.4),
        ("RECT", 0, 8, "after", "efficacy/exact", 1.0, "", "", "", ""),
        row(0, 0, "b/option", 0.0), row(0, 8, "b/option", 0.3), row(0, 0, "perplexity/x", 20), row(0, 8, "perplexity/x", 40),
    ]  # fmt: skip
    columns = ["regulariser", "seed", "edits", "source", "name", "value", "low", "high", "n", "unparseable"]
    [kept] = read(write_grid(tmp_path, rows, columns)).of("kept")
    assert kept.value == pytest.approx((0.4 / 0.5 + 20 / 40) / 2)
    assert kept.n == 2


def test_the_trade_off_has_a_point_a_regulariser(grid):
    figure = figures(read(grid))[0]
    assert figure.name == "score-and-ability"
    assert [panel.title for panel in figure.panels] == ["ROME", "MEMIT"]
    assert [series.label for series in figure.panels[0].series] == ["none", "RECT 40", "RECT 20", "Random 40"]


def test_figures_are_named_by_what_they_show(grid, tmp_path):
    names = {figure.name for figure in figures(read(grid))}
    assert {"main-scores-rome", "main-scores-memit"} <= names
    unspoken = [(("√", *row[1:]) if row[0] == "ROME" else row) for row in grid_rows()]
    write_grid(tmp_path, unspoken)
    names = {figure.name for figure in figures(read(tmp_path))}
    assert {"main-scores-1", "main-scores-2"} <= names


def compared():
    """Rows of a grid of more editors than regularisers, of two sizes, with layers and costs."""
    for editor, score in (("ROME", 0.7), ("MEMIT", 0.8), ("KN", 0.4)):
        for requests in ("10", "100"):
            for regulariser in ("none", "RECT 40"):
                cell, n = (editor, requests, regulariser), int(requests)
                for source, edits, value in (("before", 0, 0.2 + n / 1000), ("after", n, score)):
                    yield *cell, edits, source, "score/probability", value, "", "", n, ""
                    yield *cell, edits, source, "perplexity/prose", 20 / (1 - edits / 200), "", "", "", ""
                for layer in range(9) if editor == "KN" else (6, 7):
                    for edits in (n // 2, n):
                        yield *cell, edits, "change", f"{layer}/above_0.077", edits / 200 + layer / 100, "", "", "", ""
                yield *cell, 2, "cost", "seconds_per_edit", 3.0, "", "", 2, ""
                yield *cell, 3, "cost", "seconds_per_edit", 9.7, "", "", 1, ""
                yield *cell, n, "cost", "peak_memory/host", 1.75e9, "", "", "", ""


def test_a_comparison_of_editors_has_a_point_an_editor(tmp_path):
    columns = [
        "editor",
        "requests",
        "regulariser",
        "edits",
        "source",
        "name",
        "value",
        "low",
        "high",
        "n",
        "unparseable",
    ]
    reports.report(write_grid(tmp_path, compared(), columns))
    made = {figure.name: figure for figure in figures(read(tmp_path))}
    trade_off = made["score-and-ability"]
    assert [panel.title for panel in trade_off.panels] == [
        "requests 10 · no regulariser", "requests 10 · RECT 40", "requests 100 · no regulariser", "requests 100 · RECT 40",
    ]  # fmt: skip
    assert [series.label for series in trade_off.panels[2].series] == ["ROME", "MEMIT", "KN"]
    assert [(*series.x, *series.y) for series in trade_off.panels[2].series] == [(0.7, 0.5), (0.8, 0.5), (0.4, 0.5)]
    points = [(series.x[0], series.y[0]) for panel in trade_off.panels for series in panel.series]
    x_range, y_range = ((min(values), max(values)) for values in zip(*points, strict=True))
    assert {(panel.x_range, panel.y_range) for panel in trade_off.panels} == {(x_range, y_range)}
    [growth] = made["growth-requests-100-no-regulariser"].panels
    assert [s.y for s in growth.series] == [pytest.approx((0.315, 0.565))] * 2 + [pytest.approx((0.29, 0.54))]
    [layers] = made["layers-requests-100-no-regulariser"].panels
    assert layers.ticks == tuple("012345678")
    assert [(series.label, series.x[0]) for series in layers.series] == [("ROME", 6), ("MEMIT", 6), ("KN", 0)]
    html = text(tmp_path)
    assert "peak_memory/host, GB" in html
    assert {1.75, 15.7 / 3} <= data(html), "GB; seconds are the mean over all edits"
    summary = html[: html.index("</table>")]
    assert summary.count('<tr class="before">') == 6, "one where the requests are others than those of the row above"
    clean = re.findall(r'<tr class="before">.*?<data value="[^"]+">([^<]+)', summary)
    assert clean == ["0.210", "0.300"] * 3


def test_what_was_not_measured_is_left_out(run, tmp_path):
    for name in ("config.yaml", "metrics.json"):
        shutil.copy(run / name, tmp_path)
    reports.report(tmp_path)
    assert re.findall(r"<h2[^>]*>([^<]+)", text(tmp_path)) == ["Summary", "Editing", "Origin"]
    assert "nan" not in text(tmp_path)


def test_the_same_files_make_the_same_page(run):
    before = text(run)
    reports.report(run)
    assert text(run) == before


def test_figures_for_papers(run, tmp_path):
    reports.report(run, output=tmp_path / "page.html", figures=tmp_path / "figures")
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {figure.name for figure in figures(read(run))}
    for name in names:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert "var(--" not in (tmp_path / "figures" / f"{name}.svg").read_text()


def test_ids_are_unique_and_what_refers_to_them_is_there(run, grid):
    for html in (text(run), text(grid)):
        ids = re.findall(r'\sid="([^"]+)"', html)
        assert len(ids) == len(set(ids))
        named = (
            re.findall(r'(?:href="#|url\(#|for=")([^")]+)', html)
            + " ".join(re.findall(r'aria-labelledby="([^"]+)"', html)).split()
        )
        assert set(named) <= set(ids)


def test_a_page_asks_for_nothing(run):
    html = text(run)
    assert "default-src 'none'" in html
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', html)
    assert not re.findall(r"@import|url\((?!#)", html)


def test_colours_can_be_read():
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for colours in (LIGHT, DARK):
        for name in ("ink", "muted", "accent", "reference", *(series_colour(i) for i in range(6))):
            for ground in ("paper", "panel"):
                dark, bright = sorted((light(colours[name]), light(colours[ground])))
                assert (bright + 0.05) / (dark + 0.05) >= 4.5, (name, ground)
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT), "each is replaced by its own variable"


def rows_of(cell, values, *, edits=10, source="task", name="a/exact", low="", high=""):
    """A line a seed."""
    return [(*cell, seed, edits, source, name, value, low, high, 5, "") for seed, value in enumerate(values)]


AXES = ["regulariser", "seed", *COLUMNS]


def test_cells_under_way_are_left_out(tmp_path):
    rows = [
        *rows_of(("none",), (0.5, 0.9), edits=5),
        *rows_of(("none",), (1.0,), source="after", name="efficacy/exact"),
    ]
    results = read(write_grid(tmp_path, rows, AXES))
    [row] = results.of("task")
    assert (row.value, results.left_out) == (0.5, 1)
    reports.report(tmp_path)
    assert "1 cell that is under way or failed is left out" in text(tmp_path)
    with pytest.raises(ValueError, match=r"no cell in it is done, 2 are under way or have failed"):
        read(write_grid(tmp_path, rows[:2], AXES))


def test_a_mean_tells_of_how_many_seeds_it_is_and_of_one_has_no_interval(tmp_path):
    rows = [
        line
        for cell, seeds in (("none", 3), ("RECT", 1))
        for edits in (0, 10)
        for line in [
            *rows_of((cell,), (0.5, 0.6, 0.4)[:seeds], edits=edits, low=0.1, high=0.9),
            *rows_of((cell,), (0.5, 0.6, 0.4)[:seeds], source="after", name="efficacy/exact"),
        ]
    ]
    results = read(write_grid(tmp_path, rows, AXES))
    none, rect = (next(row for row in results.of("task") if row.cell == (cell,)) for cell in ("none", "RECT"))
    assert (none.seeds, rect.seeds) == (3, 1)
    assert (rect.low, rect.high) == (None, None), "the interval was of the records"
    assert none.low == pytest.approx(0.5 - 4.302653 * 0.1 / 3**0.5)
    figure = next(figure for figure in figures(results) if figure.name == "main-scores")
    assert [series.seeds for series in figure.panels[0].series] == [(3, 3), (1, 1)]
    assert "means over 1 to 3 seeds" in figure.caption
    one = read(write_grid(tmp_path, [row for row in rows if row[1] == 0], AXES))
    assert {(row.low, row.high) for row in one.of("task")} == {(0.1, 0.9)}
    assert any("speak of the choice of records" in figure.caption for figure in figures(one))


def test_intervals_are_possible_values(tmp_path):
    rows = [
        *rows_of(("none",), (0.9, 1.0, 1.0), source="after", name="efficacy/exact"),
        *rows_of(("none",), (0.3, 0.3, 0.1 + 0.2), source="after", name="locality/exact"),
        *rows_of(("none",), (10.0, 100.0, 1000.0), name="perplexity/prose"),
    ]
    results = read(write_grid(tmp_path, rows, AXES))
    [efficacy], [locality] = results.of("after", "efficacy/exact"), results.of("after", "locality/exact")
    assert efficacy.high == 1
    assert 0 < efficacy.low < efficacy.value
    assert (locality.low, locality.high) == (None, None), "an interval without width"
    [perplexity] = results.of("task")
    assert perplexity.value == pytest.approx(100)
    reach = 4.302653 / 3**0.5  # decades
    assert (perplexity.low, perplexity.high) == pytest.approx((10 ** (2 - reach), 10 ** (2 + reach)))


@pytest.mark.parametrize(
    ("clean", "labels"), [(0.1, ["before", "none", "RECT"]), (0.5, ["before", "none", "before", "RECT"])]
)
def test_each_bar_stands_below_what_it_began_with(tmp_path, clean, labels):
    rows = [
        (cell, edits, source, "efficacy/exact", value, "", "", 5, "")
        for cell, before in (("none", 0.1), ("RECT", clean))
        for edits, source, value in ((0, "before", before), (9, "after", 0.9))
    ]
    made = {figure.name: figure for figure in figures(read(write_grid(tmp_path, rows, ["regulariser", *COLUMNS])))}
    assert [series.label for series in made["editing-exact"].panels[0].series] == labels


def test_single_mode_has_no_growth(tmp_path):
    rows = [
        (cell, edits, source, "6/above_0.077", value, "", "", "", "")
        for cell, source in (("none", "alone"), ("RECT", "alone"))
        for edits, value in ((1, 0.2), (2, 0.4))
    ]
    rows += [(cell, 2, "after", "efficacy/exact", 1.0, "", "", "", "") for cell in ("none", "RECT")]
    made = {figure.name: figure for figure in figures(read(write_grid(tmp_path, rows, ["regulariser", *COLUMNS])))}
    assert "growth" not in made
    assert [series.y for series in made["layers"].panels[0].series] == [pytest.approx((0.3,))] * 2
    assert "nothing piles up" in made["layers"].caption


def test_nine_regularisers_are_told_apart(tmp_path):
    names = ["none", *(f"RECT {i}" for i in range(9))]
    rows = [(n, e, "task", "perplexity/prose", 3.0 * 10**e, 2.0, 9.0, 5, "") for n in names for e in (0, 2, 4)]
    rows += [(n, 4, "after", "perplexity/prose", 3e4, "", "", "", "") for n in names]
    results = read(write_grid(tmp_path, rows, ["regulariser", *COLUMNS]))
    figure = next(figure for figure in figures(results) if figure.name == "main-scores")
    [panel] = figure.panels
    styles = [series.style for series in panel.series]
    assert styles[0] == NONE
    assert series_colour(NONE) == "reference"
    assert len({(series_colour(style), draw._dash(style)) for style in styles}) == 10
    assert len({(series_colour(style), draw._marker(style)) for style in styles}) == 10
    assert panel.bare
    svg = draw.inline_svg(panel, name="x", description="")
    assert "PolyCollection" not in svg
    assert "FillBetween" not in svg
    assert "stand in the data" in figure.caption
    assert "mathdefault" not in svg
    assert ">10,000<" in svg
    few = draw.inline_svg(replace(panel, series=panel.series[:4]), name="x", description="")
    assert "PolyCollection" in few or "FillBetween" in few
    reports.report(tmp_path)
    headings = re.findall(r'<th scope="col"[^>]*>([^<]*)', text(tmp_path).split("</thead>")[0])
    assert len(headings) == len(set(headings))
    assert sum(heading.startswith("perplexity/prose") for heading in headings) == 2
    assert "the mean loss a token" in text(tmp_path)


def drawn(panel):
    """A panel's axes, on a canvas of its size."""
    from matplotlib.figure import Figure

    height = draw._height(panel)
    canvas = Figure(figsize=(draw.WIDTH / 72, height / 72), dpi=300)
    draw._draw(canvas, panel, left=0, top=height, size=(draw.WIDTH, height))
    return canvas.axes[0]


def test_bars_keep_their_numbers_within_the_panel():
    bar = Series(label="none", style=NONE, x=(0,), y=(0.93,), low=(0.5,), high=(1.4,))
    axes = drawn(Panel(kind="bars", title="", x_label="", y_label="", series=(bar,), share=True))
    [number] = [told for told in axes.texts if told.get_text() == "0.93"]
    assert number.get_window_extent().x1 <= axes.figure.bbox.x1


@pytest.mark.parametrize("title", ["batches", "batches of 10 " * 8, "ROME WITHOUT C " * 6])
def test_a_title_ends_within_its_panel(title):
    point = Series(label="MEMIT", style=0, x=(0.5,), y=(1,))
    axes = drawn(Panel(kind="points", title=title, x_label="", y_label="", series=(point,)))
    [told] = [told for told in axes.texts if told.get_text() == title]
    assert told.get_window_extent().x1 <= axes.figure.bbox.x1


def test_panels_with_one_range_show_the_same():
    bare = Series(label="MEMIT", style=0, x=(0.5,), y=(1,))
    wide = replace(bare, low=(0.2,), high=(1.1,), x_low=(0.3,), x_high=(0.9,))
    options = {
        "kind": "points",
        "title": "",
        "x_label": "",
        "y_label": "",
        "x_range": (0.3, 0.9),
        "y_range": (0.2, 1.1),
    }
    first, second = (drawn(Panel(**options, series=(series,))) for series in (bare, wide))
    assert first.get_xlim() == pytest.approx(second.get_xlim())
    assert first.get_ylim() == pytest.approx(second.get_ylim())
    assert first.get_ylim()[0] < 0.2


def test_the_range_of_a_trade_off_has_room_for_intervals_and_none_for_what_is_no_number():
    assert _range([0.5, None, float("inf"), 0.2, float("nan"), 0.9]) == (0.2, 0.9)
    assert _range([None]) is None


@pytest.mark.parametrize("columns", [4, 7, 13, 24])
def test_a_heat_map_has_few_ticks(columns):
    from matplotlib.figure import Figure

    ticks = tuple(map(str, range(columns)))
    row = Series(label="none", style=0, x=tuple(map(float, range(columns))), y=(0.1,) * columns)
    panel = Panel(kind="heat", title="", x_label="", y_label="", series=(row,), ticks=ticks)
    canvas = Figure()
    draw._draw(canvas, panel, left=0, top=100, size=(draw.WIDTH, 100))
    labels = [label.get_text() for label in canvas.axes[0].get_xticklabels()]
    assert 3 <= len(labels) <= 6
    assert set(labels) <= {*ticks}


def test_a_resumed_run_has_the_operations_of_both_parts(tmp_path):
    write_run(tmp_path)
    header, first, second, after = (tmp_path / "metrics.csv").read_text().splitlines()
    (tmp_path / "metrics.1.csv").write_text(f"{header}\n{first}\n")
    (tmp_path / "metrics.csv").write_text(f"{header}\n{second}\n{after}\n")
    assert [row.edits for row in read(tmp_path).of("change", "6/above_0.077")] == [4, 8]


def test_a_page_without_metrics_has_no_summary(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "side_effects.csv").write_text(
        "edits,task,score,value,low,high,n,unparseable\n0,a,a/exact,1,,,3,\n4,a,a/exact,0.5,,,3,\n"
    )
    reports.report(tmp_path)
    assert re.findall(r"<h2[^>]*>([^<]+)", text(tmp_path)) == ["Abilities", "Origin"]
    assert "#summary" not in text(tmp_path)
    assert f"Made by rect_lightning {__version__}." in text(tmp_path)


def test_a_grid_s_page_has_its_configuration(tmp_path):
    (write_grid(tmp_path) / "grid.yaml").write_text("name: keep\n")
    reports.report(tmp_path)
    assert "<code>name: keep\n</code>" in text(tmp_path)
    assert '<span class="unbroken">|ΔW/W|</span>' in text(tmp_path)


# What is refused -----------------------------------------------------------------------------------------------------


def test_folders_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        reports.report(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"neither a run folder.*config\.yaml.*table\.csv"):
        reports.report(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ValueError, match="nothing to report"):
        reports.report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["metrics.json", "provenance.json", "relative_change.json", "samples.json"])
def test_a_broken_file_is_named_and_an_old_page_stays(tmp_path, name):
    write_run(tmp_path)
    (tmp_path / "report.html").write_text("old")
    (tmp_path / name).write_text((tmp_path / name).read_text()[:-5])
    with pytest.raises(ValueError, match=rf"{name} is broken"):
        reports.report(tmp_path)
    assert text(tmp_path) == "old"


def test_a_broken_table_is_told_by_line(tmp_path):
    lines = [list(row) for row in grid_rows(seeds=(0,))]
    lines[3][6] = "much"
    with pytest.raises(ValueError, match=r"table\.csv, line 5: value should be a number and is 'much'"):
        read(write_grid(tmp_path, lines))
    with pytest.raises(ValueError, match="the last columns should be edits, source"):
        read(write_grid(tmp_path, [], ["editor", "value"]))


def test_a_folder_as_output_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        reports.report(run, output=tmp_path)


def test_what_is_missing_names_the_extra(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"jinja2 and matplotlib: pip install 'rect_lightning\[report\]'"):
        reports.report(run)
