"""Abilities during a fit: when they are measured, on which weights, and what is done about them."""

from __future__ import annotations

import csv
import json
import logging
import re

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger

from rect_lightning.callbacks import PRUNE, FrobeniusNorm, SideEffects
from rect_lightning.metrics import EditMetrics, evaluate
from rect_lightning.tasks import Generation, Perplexity, Task, TaskResult, measure
from rect_lightning.tasks.scores import Score
from tests.editors.test_base import PROSE, facts, fit, identical, memit, rome, state, trainer


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Without a logger the table goes to the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tasks(tmp_path):
    """A question and a text, the same for every run."""
    (tmp_path / "told.jsonl").write_text("".join(json.dumps({"q": q, "a": "it"}) + "\n" for q in ("I think so", "You")))
    (tmp_path / "prose.txt").write_text(PROSE[:600])
    told = Generation(name="told", path=str(tmp_path / "told.jsonl"), prompt="{q}", answer="a", max_new_tokens=4)
    return [told, Perplexity(path=str(tmp_path / "prose.txt"), context=64)]


class Ability(Task):
    """What it is told to be, one value a measurement."""

    name = "given"

    def __init__(self, values):
        self.values, self.weights = iter(values), []

    def prepare(self, limit=None):
        pass

    def run(self, adapter, how):
        self.weights.append(adapter.weight(1).detach().clone())
        value = next(self.values)
        score = Score(value=value, low=0.0, high=1.0)
        return TaskResult(task="given", scores={"given/exact": score}, n=2, unparseable=0.5, main="given/exact")


class Break(Callback):
    """Ends a fit after so many operations, as a kill would after a checkpoint."""

    def __init__(self, folder, after):
        self.path, self.after = folder / "broken.ckpt", after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.operations == self.after:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("broken off")


def table(folder):
    (path,) = folder.rglob("side_effects.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("batch_size", "every", "expected"), [(1, 2, [0, 2, 4]), (2, 1, [0, 2, 4]), (3, 2, [0, 3, 4]), (1, 5, [0])]
)
def test_when_it_is_measured(tmp_path, batch_size, every, expected):
    side = SideEffects([Ability([1.0] * 9)], every_n_edits=every)
    fit(memit(tmp_path), facts(tmp_path, batch_size=batch_size), side)
    assert [row["edits"] for row in side.rows if row["task"] == "given"] == expected


@pytest.mark.parametrize("first", [True, False])
def test_it_sees_what_regularisers_leave_in_the_end(tmp_path, first):
    """Also those that act when a batch ends, and come after it in the list."""
    ability = Ability([1.0] * 3)
    side, editor = SideEffects([ability], every_n_edits=2), memit(tmp_path)
    regularisers = [PRUNE(base=1.5), FrobeniusNorm(0.05, every_n_steps=3)]
    callbacks = [side, *regularisers] if first else [regularisers[0], side, regularisers[1]]
    run = fit(editor, facts(tmp_path, batch_size=2), *callbacks)
    assert [c for c in run.callbacks if c in callbacks] == [*regularisers, side]
    torch.testing.assert_close(ability.weights[-1], editor.model.weight(1).detach(), rtol=0, atol=0)


def test_abilities_are_shown_in_the_end(tmp_path, capsys):
    side = SideEffects([Ability([0.75, 0.5, 0.25])], every_n_edits=2)
    fit(memit(tmp_path), facts(tmp_path, batch_size=2), side)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "given/exact" in line]
    assert re.findall(r"[\d.]+", row) == ["0.750", "0.000", "1.000", "0.250", "0.000", "1.000", "2"]
    fit(memit(tmp_path), facts(tmp_path, batch_size=2), SideEffects([Ability([1.0])], every_n_edits=9))
    assert "given/exact" not in capsys.readouterr().out


def test_zero_edits_is_the_clean_model_and_later_ones_the_edited(tmp_path):
    class Weights(Callback):
        def __init__(self):
            self.after = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.after.append(pl_module.model.weight(1).detach().clone())

    ability, weights, editor = Ability([1.0] * 9), Weights(), memit(tmp_path)
    fit(editor, facts(tmp_path, batch_size=2), weights, SideEffects([ability], every_n_edits=2))
    assert identical(dict(enumerate(ability.weights)), dict(enumerate([editor.clean[1], *weights.after])))
    assert not torch.equal(ability.weights[0], ability.weights[1])


def test_the_table_and_the_log(tmp_path, tasks):
    editor, data = memit(tmp_path), facts(tmp_path, batch_size=2)
    side = SideEffects(tasks, every_n_edits=4, limit=2)
    run = trainer(side, logger=CSVLogger(tmp_path, name="run"))
    run.fit(editor, datamodule=data)
    rows = table(tmp_path)
    assert [*rows[0]] == ["edits", "task", "score", "value", "low", "high", "n", "unparseable"]
    edits = EditMetrics()
    with editor.clean_weights():
        clean = evaluate(editor.model, data.requests)
        before = [measure(editor.model, task) for task in tasks]
    edits.update(evaluate(editor.model, data.requests), clean)
    after = [measure(editor.model, task) for task in tasks]
    expected = {
        (n, name): (s.value, s.low, s.high, r.n)
        for n, results in ((0, before), (4, after))
        for r in results
        for name, s in r.scores.items()
    }
    found = {
        (int(r["edits"]), r["score"]): (float(r["value"]), float(r["low"]), float(r["high"]), int(r["n"]))
        for r in rows
        if r["task"] != "edits"
    }
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-6), key
    own = {row["score"]: float(row["value"]) for row in rows if row["task"] == "edits"}
    assert own == pytest.approx({name: float(value) for name, value in edits.compute().items()})
    of = {row["score"]: row["n"] for row in rows if row["task"] == "edits"}
    with_paraphrases = sum(bool(request.paraphrases) for request in data.requests)
    assert 0 < with_paraphrases < len(data.requests)
    assert int(of["efficacy/exact"]) == len(data.requests)
    assert int(of["generalisation/exact"]) == with_paraphrases
    assert of["score/probability"] == ""
    with next(tmp_path.rglob("metrics.csv")).open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["side/edits"]]
    assert [float(row["side/edits"]) for row in logged] == [0, 4]
    assert float(logged[1]["side/told/exact"]) == found[4, "told/exact"][0]
    assert float(logged[1]["side/edits/efficacy/exact"]) == own["efficacy/exact"]
    assert not logged[0]["side/edits/efficacy/exact"]


def test_edits_are_the_same_with_and_without(tmp_path, tasks):
    plain, measured = memit(tmp_path), memit(tmp_path)
    fit(plain, facts(tmp_path, batch_size=2))
    fit(measured, facts(tmp_path, batch_size=2), SideEffects(tasks, every_n_edits=1, precision="bf16"))
    assert identical(state(plain), state(measured))
    for when, values in plain.results.items():  # to rounding: the clean model was asked about fewer requests at a time
        assert measured.results[when] == pytest.approx(values, rel=1e-5)


def test_stops_early_when_an_ability_has_fallen(tmp_path, caplog):
    editor = memit(tmp_path)
    side = SideEffects([Ability([0.8, 0.6, 0.2, 0.9])], every_n_edits=1, stop_below=0.5)
    with caplog.at_level(logging.INFO):
        fit(editor, facts(tmp_path), side)
    assert editor.operations == 2
    assert editor.results["after"], "what was edited is measured all the same"
    assert "After 2 edits given/exact has come to 25% of the ability before them" in caplog.text


def test_an_ability_that_was_never_there_cannot_fall(tmp_path):
    editor = memit(tmp_path)
    fit(editor, facts(tmp_path), SideEffects([Ability([0.0] * 9)], every_n_edits=1, stop_below=1.0))
    assert editor.operations == 4


def test_a_rising_perplexity_is_a_falling_ability(tmp_path):
    class Rising(Ability):
        def run(self, adapter, how):
            result = super().run(adapter, how)
            return TaskResult(**(vars(result) | {"lower_is_better": True}))

    editor = memit(tmp_path)
    fit(editor, facts(tmp_path), SideEffects([Rising([20, 39, 41, 10])], every_n_edits=1, stop_below=0.5))
    assert editor.operations == 2


def test_a_resumed_fit_goes_on_with_the_table(tmp_path):
    whole = SideEffects([Ability([0.9, 0.7, 0.5])], every_n_edits=2, stop_below=0.6)
    fit(memit(tmp_path), facts(tmp_path), whole)

    first = SideEffects([Ability([0.9, 0.7])], every_n_edits=2, stop_below=0.6)
    with pytest.raises(RuntimeError, match="broken off"):
        fit(memit(tmp_path), facts(tmp_path), first, Break(tmp_path, after=3))
    second = SideEffects([Ability([0.5])], every_n_edits=2, stop_below=0.6)
    editor = memit(tmp_path)
    trainer(second).fit(editor, datamodule=facts(tmp_path), ckpt_path=tmp_path / "broken.ckpt")
    assert second.rows == whole.rows
    assert second.abilities == {"given": 0.9}
    assert editor.operations == 4


def test_a_fit_that_is_resumed_without_a_table_measures_the_clean_model(tmp_path):
    with pytest.raises(RuntimeError, match="broken off"):
        fit(memit(tmp_path), facts(tmp_path, batch_size=2), Break(tmp_path, after=1))
    ability, editor = Ability([1.0] * 9), memit(tmp_path)
    side = SideEffects([ability], every_n_edits=2)
    trainer(side).fit(editor, datamodule=facts(tmp_path, batch_size=2), ckpt_path=tmp_path / "broken.ckpt")
    assert [row["edits"] for row in side.rows if row["task"] == "given"] == [0, 2, 4]
    assert torch.equal(ability.weights[0], editor.clean[1])
    assert [row["n"] for row in side.rows if row["score"] == "efficacy/exact"] == [2, 4]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["gsm8"]}, "did you mean gsm8k"),
        ({"tasks": ["rte", "rte"]}, "each name once"),
        ({"every_n_edits": 0}, "at least 1"),
        ({"limit": 0}, "at least 1"),
        ({"stop_below": 1.5}, "share of an ability"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        SideEffects(**({"tasks": ["rte"], "every_n_edits": 2} | options))


def test_what_cannot_be_measured_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"set model\.mode to sequential"):
        fit(rome(tmp_path, mode="single"), facts(tmp_path), SideEffects([Ability([1.0])], every_n_edits=1))
    with pytest.raises(TypeError, match="LightningModule is none"):
        SideEffects(["rte"], every_n_edits=1).setup(None, LightningModule(), "fit")
    editor = memit(tmp_path)
    editor.adapter, editor.configure_model = None, lambda: pytest.fail("the model is loaded")
    missing = Generation(name="x", path=str(tmp_path / "none.jsonl"), prompt="{q}")
    with pytest.raises(FileNotFoundError):
        fit(editor, facts(tmp_path), SideEffects([missing], every_n_edits=1))
