"""What a grid's YAML means, and what is refused before anything starts."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from rect_lightning.experiments import Grid
from rect_lightning.experiments.checking import check
from rect_lightning.experiments.reading import read_mapping
from rect_lightning.shipped import configs_folder
from rect_lightning.tasks import named
from tests.editors.test_base import RECORDS

GRID = """
name: my grid
base: base.yaml
common: {model: {init_args: {search: {steps: 3}}}}
axes:
  editor:
    without C: {model: {init_args: {moments: null}}}
    ROME:
  regulariser:
    none:
    RECT: {trainer: {callbacks: {class_path: rect_lightning.callbacks.RECT, init_args: {keep: 0.5}}}}
  seed:
    0: {seed_everything: 0, data: {offset: 0}}
    1: {seed_everything: 1, data: {offset: 1}}
"""
BASE = """
seed_everything: 7
model:
  class_path: rect_lightning.editors.ROME
  init_args: {base: {name: nowhere}, layers: [1], search: {steps: 20, lr: 0.5}, moments: {tokens: 800}}
data: {path: facts.jsonl}
trainer:
  logger: false
  callbacks: [{class_path: rect_lightning.callbacks.summary.Summary}]
ckpt_path: null
"""
SIDE = {"class_path": "rect_lightning.callbacks.SideEffects", "init_args": {"tasks": ["sst2"], "every_n_edits": 2}}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return tmp_path


def only(grid, **levels):
    (cell,) = grid.cells({axis: [level] for axis, level in levels.items()})
    return cell


def test_cells_are_all_combinations_in_order():
    cells = Grid.load("grid.yaml").cells()
    assert [cell.folder.as_posix() for cell in cells] == [
        f"runs/my-grid/{editor}_{regulariser}_seed-{seed}"
        for editor in ("without-C", "ROME") for regulariser in ("none", "RECT") for seed in (0, 1)
    ]  # fmt: skip
    assert cells[2].levels == {"editor": "without C", "regulariser": "RECT", "seed": "0"}


def test_levels_are_laid_over_the_common_part_over_the_base():
    config = only(Grid.load("grid.yaml"), editor="without C", regulariser="none", seed="1").config
    options = config["model"]["init_args"]
    assert options == {
        "base": {"name": "nowhere"}, "layers": [1], "search": {"steps": 3, "lr": 0.5}, "moments": None,
    }  # fmt: skip
    assert (config["seed_everything"], config["data"]) == (1, {"path": "facts.jsonl", "offset": 1})
    assert "logger" not in config["trainer"]
    assert "ckpt_path" not in config


def test_a_level_s_base_is_laid_under_the_common_part(here):
    (here / "other.yaml").write_text(
        "{model: {class_path: Other, init_args: {search: {steps: 9, lr: 0.1}}}, trainer: {callbacks: [{class_path: Own}]}}"
    )
    overlay = "axes: {editor: {ROME: {base: other.yaml, model: {init_args: {moments: null}}}}}"
    grid = Grid.load("grid.yaml", overlay)
    config = only(grid, editor="ROME", regulariser="RECT", seed="0").config
    assert config["model"]["class_path"] == "Other"
    assert config["model"]["init_args"]["search"] == {"steps": 3, "lr": 0.1}, (
        "over the grid's base, under the common part"
    )
    assert config["model"]["init_args"]["moments"] is None, "the level's own part is laid over"
    assert [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]] == ["RECT"]
    assert "base" not in config
    without = only(grid, editor="without C", regulariser="none", seed="0").config
    assert without["model"]["class_path"] == "rect_lightning.editors.ROME"
    assert without["trainer"]["callbacks"] == []
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.yaml here"):
        Grid.load("grid.yaml", "axes: {editor: {ROME: {base: nowhere.yaml}}}")


def test_cells_share_nothing():
    first, second, *_ = Grid.load("grid.yaml").cells()
    first.config["model"]["init_args"]["search"]["steps"] = 99
    assert second.config["model"]["init_args"]["search"]["steps"] == 3


def test_a_base_of_another_class_leaves_nothing_of_the_model_and_callbacks_below(here):
    """An option, or a callback, of one method has no place in another's configuration."""
    other = "model: {class_path: rect_lightning.editors.UltraEdit, init_args: {layers: [2]}}"
    (here / "other.yaml").write_text(other)
    grid = Grid.load("{name: g, base: base.yaml, axes: {editor: {ROME: {}, UltraEdit: {base: other.yaml}}}}")
    rome, ultraedit = (cell.config for cell in grid.cells())
    assert ultraedit["model"]["init_args"] == {"layers": [2]}
    assert ultraedit["trainer"]["callbacks"] == []
    assert rome["trainer"]["callbacks"] == [{"class_path": "rect_lightning.callbacks.summary.Summary"}]
    assert {key: ultraedit[key] for key in ultraedit if key not in ("model", "trainer")} == {
        key: rome[key] for key in rome if key not in ("model", "trainer")
    }
    both = Grid.load("{name: g, base: [base.yaml, other.yaml], axes: {editor: {UltraEdit: {}}}}")
    assert both.cells()[0].config == ultraedit


def test_callbacks_of_levels_are_added_to_the_common_ones_and_the_base_s_are_left_out():
    def names(*overlays, regulariser="RECT"):
        cell = only(Grid.load("grid.yaml", *overlays), editor="ROME", regulariser=regulariser, seed="0")
        return [callback["class_path"].rpartition(".")[2] for callback in cell.config["trainer"]["callbacks"]]

    common = yaml.safe_dump({"common": {"trainer": {"callbacks": [SIDE]}}})
    assert names() == ["RECT"]
    assert names(regulariser="none") == [], "where any level names callbacks, no cell has the base's"
    assert names(common) == ["SideEffects", "RECT"]
    assert names(common, regulariser="none") == ["SideEffects"]
    assert names("common: {trainer: {callbacks: []}}", regulariser="none") == []
    assert names(common, "axes: {seed: {0: {trainer: {callbacks: [{class_path: LearningRateMonitor}]}}}}") == [
        "SideEffects", "RECT", "LearningRateMonitor",
    ]  # fmt: skip


def test_a_grid_laid_over_a_grid(here):
    (here / "mine.yaml").write_text("output: elsewhere\naxes: {seed: {2: {data: {offset: 2}}}}")
    grid = Grid.load("grid.yaml", "mine.yaml")
    assert list(grid.axes["seed"]) == ["0", "1", "2"]
    assert only(grid, editor="ROME", regulariser="none", seed="2").folder.as_posix() == "elsewhere/ROME_none_seed-2"


def test_skipped_and_chosen_cells():
    grid = Grid.load("grid.yaml", "skip: [{editor: ROME, seed: [1]}, {regulariser: RECT, seed: 0}]")
    names = {cell.name for cell in grid.cells()}
    assert names == {"without-C_none_seed-0", "without-C_none_seed-1", "without-C_RECT_seed-1", "ROME_none_seed-0"}
    assert {cell.name for cell in grid.cells({"seed": ["1"]})} == {"without-C_none_seed-1", "without-C_RECT_seed-1"}


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("axis: {}", "no key 'axis'; did you mean axes"),
        ("axes: {more: {}}", "at least one level each; empty: .'more'"),
        ("axes: {more: [1, 2]}", "the axis more has to be a mapping"),
        ("axes: {more: {a: 3}}", "more: a has to be a mapping"),
        ("axes: {more: {no: {}}}", "reads the name of a level of more as False: put it in quotes"),
        ("axes: {edits: {10: {}}}", "columns of its own called edits"),
        ("axes: {more: {RECT 40: {}, rect-40: {}}}", "share a folder: without-c_none_seed-0_rect-40"),
        ("axes: {more: {'?!': {}}}", "no letter or number"),
        ("axes: {more: {a: {}, a: {}}}", "a stands twice"),
        ("skip: [{editr: ROME}]", "skip: there is no axis 'editr'"),
        ("skip: [{editor: MEMIT}]", "skip: editor has no level 'MEMIT', but without C, ROME"),
        ("skip: [{seed: [0, 1]}]", "skip leaves no cell"),
        ("{base: nowhere.yaml}", "no file nowhere.yaml here"),
        ("nowhere.yaml", "no file nowhere.yaml here, nor .* paper_smollm2.yaml"),
        ("a: [", "a: \\["),
        ("just words", "no mapping"),
    ],
)
def test_what_is_no_grid_is_refused(overlay, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Grid.load("grid.yaml", overlay)


def test_a_grid_needs_a_name_and_axes():
    with pytest.raises(ValueError, match="no axes and no name"):
        Grid.load("{base: base.yaml}")


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("axes: {seed: {1: {data: {ofset: 1}}}}", "ofset"),
        ("axes: {seed: {1: {data: {offset: 50}}}}", "without-C_none_seed-1: facts.jsonl has 4 requests, too few"),
        ("axes: {seed: {1: {data: {path: missing.jsonl}}}}", "missing.jsonl is not there"),
        ("axes: {regulariser: {RECT: {trainer: {callbacks: {class_path: rect_lightning.callbacks.RCT}}}}}", "RCT"),
        (
            "axes: {regulariser: {RECT: {trainer: {callbacks: {class_path: rect_lightning.callbacks.RECT, "
            "init_args: {keep: 2}}}}}}",
            "without-C_RECT_seed-0 and 3 more: .*keep",
        ),
        ("common: {trainr: {max_epochs: 1}}", "trainr"),
        ("common: {model: {init_args: {key: nothing}}}", "nothing"),
        (
            yaml.safe_dump({"common": {"model": {"init_args": {"mode": "single"}}, "trainer": {"callbacks": SIDE}}}),
            "pile",
        ),
    ],
)
def test_a_wrong_configuration_is_found_before_anything_starts(overlay, message):
    with pytest.raises(ValueError, match=f"(?s)Nothing was started.*{message}"):
        check(Grid.load("grid.yaml", overlay).cells())


def test_right_configurations_pass_and_load_no_model(monkeypatch):
    monkeypatch.setattr("rect_lightning.models.Source.load", lambda *_: 1 / 0)
    grid = Grid.load(
        "grid.yaml", yaml.safe_dump({"common": {"trainer": {"callbacks": [{"class_path": "RichModelSummary"}]}}})
    )
    check(cells := grid.cells())
    assert cells == grid.cells(), "parsing changes no configuration"


@pytest.mark.parametrize("path", sorted((configs_folder() / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_experiments(path):
    """Found by name, and right but for the files, which are replaced; one cell a level is enough."""
    grid = Grid.load(path.name)
    assert grid.name == path.stem
    opening = path.read_text(encoding="utf-8")
    assert f"python -m rect_lightning experiment --config {path.name}" in opening
    assert f"{len(grid.cells())} run" in opening
    seen, chosen = set(), []
    for cell in grid.cells():
        if new := {*cell.levels.items()} - seen:
            seen |= new
            cell.config["data"] |= {"path": "facts", "format": "auto", "split": None, "offset": 0, "limit": 1}
            cell.config["model"]["init_args"].pop("prose", None)
            for callback in cell.config["trainer"]["callbacks"]:
                for task in callback["init_args"].get("tasks", []):
                    named(task) if isinstance(task, str) else built(task)
                    callback["init_args"]["tasks"] = ["perplexity"]
            chosen.append(cell)
    assert len(chosen) >= 4
    check(chosen)


def built(described):
    """An object by its class_path and init_args."""
    module, _, name = described["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**described["init_args"])


def test_the_paper_s_grid():
    grid = Grid.load("paper_smollm2.yaml")
    cells = grid.cells()
    assert len(cells) == 2 * 3 * (8 + 2 + 2)
    for cell in cells:
        options = cell.config["model"]["init_args"]
        assert (options["moments"] is not None) == (cell.levels["editor"] == "ROME")
        assert (options.get("key") == "mean") == (cell.levels["editor"] == "R-ROME")
        side, *regularisers = cell.config["trainer"]["callbacks"]
        assert side["class_path"].endswith("SideEffects")
        assert [r["class_path"].rpartition(".")[2] for r in regularisers] == [
            name for name in (cell.levels["regulariser"].split()[0],) if name != "none"
        ]
        assert cell.config["data"]["offset"] == 50 * int(cell.levels["seed"])


def test_single_edits_are_made_as_those_that_pile_up():
    piled_up = Grid.load("paper_smollm2.yaml").cells()
    cells = Grid.load("paper_smollm2_single.yaml").cells()
    assert len(cells) == 2 * 3 * (8 + 3)
    assert {cell.config["model"]["init_args"]["mode"] for cell in cells} == {"single"}

    def made(cell):
        options = {k: v for k, v in cell.config["model"]["init_args"].items() if k not in ("mode", "reuse_values")}
        callbacks = [c for c in cell.config["trainer"]["callbacks"] if "SideEffects" not in c["class_path"]]
        return options, cell.config["data"], callbacks, cell.config["seed_everything"]

    found = {tuple(cell.levels.values()): made(cell) for cell in cells}
    both = [cell for cell in piled_up if tuple(cell.levels.values()) in found]
    assert len(both) == len(cells) - 2 * 3, "all but ROME under RECT 20"
    assert all(found[tuple(cell.levels.values())] == made(cell) for cell in both)


def test_the_comparison_of_editors():
    """Each with its own hyper-parameters, on the same records, in the combinations that it can make."""
    cells = Grid.load("comparison_smollm2.yaml").cells()
    combinations = {tuple(cell.levels.values()) for cell in cells}
    assert ("ROME", "10", "one by one", "RECT 40") in combinations
    assert ("MEMIT", "100", "one batch", "none") in combinations
    for cell in cells:
        editor, requests, protocol, regulariser = cell.levels.values()
        size, data = cell.config["data"]["batch_size"], cell.config["data"]
        own = read_mapping(str(configs_folder() / f"{editor.lower()}_smollm2.yaml"))["model"]
        options = cell.config["model"]["init_args"]
        assert cell.config["model"]["class_path"] == own["class_path"]
        assert {key for key in options if options[key] != own["init_args"].get(key)} <= {"mode", "reuse_clean", "wild"}
        assert (options["mode"], data["limit"]) == (
            ("single", 10) if requests == "1" else ("sequential", int(requests))
        )
        assert size == {"one by one": 1, "batches of 10": 10, "one batch": 100}[protocol]
        names = [callback["class_path"].rpartition(".")[2] for callback in cell.config["trainer"]["callbacks"]]
        assert names == (["SideEffects"] if requests != "1" else []) + (["RECT"] if regulariser != "none" else [])
        assert size == 1 or editor != "ROME"
        assert protocol != "batches of 10" or editor == "UltraEdit"


@pytest.mark.parametrize("name", ["comparison_smollm2.yaml", "regularise_smollm2.yaml"])
def test_no_two_editors_of_a_grid_are_one(name):
    """EMMET with a ridge as large as MEMIT's weight of the moments makes the same updates."""
    options = {cell.levels["editor"]: cell.config["model"]["init_args"] for cell in Grid.load(name).cells()}
    assert options["EMMET"]["ridge"] != options["MEMIT"]["moments_weight"]


def test_the_documentation_s_grid():
    docs = Path(__file__).resolve().parents[2] / "docs" / "experiments.md"
    grid = Grid.load(re.search(r"```yaml\n(.*?)```", docs.read_text(encoding="utf-8"), re.DOTALL)[1])
    cells = grid.cells()
    assert len(cells) == 7
    assert cells[0].folder.as_posix() == "runs/keep/ROME_none_seed-0"
    check(cells[-1:])
