"""The notebooks: their code runs, here on a tiny model, and what they show is fit to be read by others."""

import json
import re
from pathlib import Path

import pytest

from rect_lightning.models import Source
from tests.editors.test_base import moments, opinionated
from tests.test_end_to_end import cached_model  # noqa: F401 - a fixture
from tests.test_reuse import save

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
if not NOTEBOOKS:
    pytest.skip("not a checkout", allow_module_level=True)


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def run(name, folder, patch, **parameters):
    """Run the code cells in a folder, with other values for the variables of the parameters cell; all the variables."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    patch.chdir(folder)
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # set by the cells, and taken back with the fixture
        patch.setenv(variable, "0")
    (path,) = [path for path in NOTEBOOKS if path.stem == name]
    names: dict = {}
    for cell in cells(path):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                assert parameters.keys() <= names.keys()
                names.update(parameters)
    matplotlib.pyplot.close("all")
    return names


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("RECT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return Source(name=str(save(tmp_path / "base", opinionated("llama"))))


def test_first_edit(base, tmp_path, monkeypatch, capsys):
    names = run("first_edit", tmp_path, monkeypatch, base=base, layers=[1, 2], moments=moments(tmp_path))
    assert names["changed"] == 2 * round(0.4 * names["editor"].clean[1].numel())
    assert names["same"]
    assert capsys.readouterr().out.count("after:") == 12


def test_rect_and_side_effects(base, tmp_path, monkeypatch):
    names = run("rect_and_side_effects", tmp_path, monkeypatch, base=base, layer=1, edits=4, every=2, questions=3)
    assert int(names["kept"].sum()) == round(0.4 * names["W"].numel())
    curves = [names["curve"](name, "perplexity/prose") for name in names["series_of"]]
    assert [[row["edits"] for row in rows] for rows in curves] == [[0, 2, 4]] * 2
    (plain, rect) = ([row["value"] for row in rows] for rows in curves)
    assert plain[0] == rect[0], "both start from the clean model"
    assert plain[1:] != rect[1:]
    assert {row["n"] for row in names["curve"]("ROME", "other_facts/option")} == {3}


@pytest.mark.slow
def test_first_edit_of_the_real_model(cached_model, tmp_path, monkeypatch):  # noqa: F811
    after = run("first_edit", tmp_path, monkeypatch)["editor"].results["after"]
    assert after["efficacy/exact"] >= 0.75
    assert after["generalisation/probability"] >= 0.75
    assert after["locality/probability"] >= 0.5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_whole_and_of_no_machine(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)], "run from top to bottom"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    for output in outputs:
        assert output["output_type"] in ("stream", "execute_result", "display_data"), "an error"
        assert output.get("name") != "stderr", output
        shown = json.dumps({k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")})
        text = "".join(output.get("text", "")) + shown
        assert not re.search(r"(?<![\w.])(/[\w.-]+){2,}|[A-Z]:\\|site-packages|it/s", text), text
