"""What the clean model gives, shared by several runs."""

from __future__ import annotations

import json

import pytest

from rect_lightning.callbacks import RECT, SideEffects, side_effects
from rect_lightning.editors import measure, scored
from rect_lightning.tasks import Generation, Perplexity
from tests.callbacks.test_side_effects import Ability
from tests.editors.test_base import FAMILIES, PROSE, facts, fit, memit, opinionated, rome


@pytest.fixture
def made(monkeypatch):
    """What was measured, in order: requests, a text's perplexity, tasks."""
    calls = []

    def watch(module, name, kind):
        real = getattr(module, name)

        def watched(*args, **options):
            calls.append(kind)
            return real(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch(scored, "evaluate", "requests")
    watch(measure, "perplexity", "text")
    watch(side_effects, "measure", "task")
    return calls


def tasks(folder, answer="it", **options):
    path = folder / "told.jsonl"
    path.write_text("".join(json.dumps({"q": q, "a": answer}) + "\n" for q in ("I think so", "You", "The city")))
    (folder / "prose.txt").write_text(PROSE[:600])
    told = {"name": "told", "path": str(path), "prompt": "{q}", "answer": "a", "max_new_tokens": 4} | options
    return [Generation(**told), Perplexity(path=str(folder / "prose.txt"), context=64)]


def edit(folder, *callbacks, family="llama", limit=2, asked=None, data=None, **options):
    (folder / "prose.txt").write_text(PROSE[:600])
    options = {"reuse_clean": True, "prose": str(folder / "prose.txt")} | options
    side = SideEffects(tasks(folder) if asked is None else asked, every_n_edits=3, limit=limit, scoring="standard")
    editor = memit(folder, family, **options)
    fit(editor, facts(folder, **({"batch_size": 2} | (data or {}))), side, *callbacks)
    return editor, side


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_run_measures_only_what_it_edited(tmp_path, monkeypatch, made, family):
    monkeypatch.chdir(tmp_path)
    plain, plain_side = edit(tmp_path, family=family, reuse_clean=False)
    every = made.copy()
    assert sorted(every) == ["requests"] * 2 + ["task"] * 4 + ["text"] * 2, "clean and edited"
    edit(tmp_path, family=family)
    assert made == every * 2, "the first run measures all"
    made.clear()
    again, side = edit(tmp_path, RECT(0.4), family=family)
    assert made == ["task", "task", "requests", "text"], "of the edited model"
    assert again.results["before"] == plain.results["before"]
    assert again.results["after"] != plain.results["after"]
    assert [row for row in side.rows if row["edits"] == 0] == [row for row in plain_side.rows if row["edits"] == 0]
    assert side.abilities == plain_side.abilities


def test_single_edits_too(tmp_path, made):
    results = []
    for _ in range(2):
        editor = rome(tmp_path, mode="single", reuse_clean=True)
        fit(editor, facts(tmp_path, batch_size=1))
        results.append(editor.results)
    assert made == ["requests"] * (8 + 4)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({}, {}),
        ({"data": {"limit": 3}}, {"requests": 1}),
        ({"wild": True}, {"requests": 1}),
        ({"limit": 1}, {"task": 2}),
        ({"model": opinionated("llama", seed=5)}, {"task": 2, "text": 1, "requests": 1}),
    ],
    ids=["none", "requests", "how they are asked", "records", "weights"],
)
def test_another_question_is_asked_anew(tmp_path, monkeypatch, made, options, again):
    monkeypatch.chdir(tmp_path)
    edit(tmp_path)
    made.clear()
    edit(tmp_path, **options)
    edited = {"task": 2, "requests": 1, "text": 1}
    assert {kind: made.count(kind) - count for kind, count in edited.items()} == dict.fromkeys(edited, 0) | again


def test_another_task_is_asked_anew(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    for asked, times in (({}, 2), ({}, 0), ({"shots": 1}, 1), ({"max_new_tokens": 3}, 1), ({"answer": "I"}, 1)):
        made.clear()
        edit(tmp_path, asked=tasks(tmp_path, **asked))
        assert made.count("task") == 2 + times, asked


def test_a_task_from_elsewhere_is_never_kept(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    for value in (1.0, 0.5):
        _, side = edit(tmp_path, asked=[Ability([value] * 2)])
        assert side.abilities == {"given": value}


def test_a_model_that_answers_differently_for_its_configuration(tmp_path, made):
    for rope, times in ((10_000.0, 2), (20_000.0, 2), (20_000.0, 1)):
        made.clear()
        model = opinionated("llama")
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": rope}
        fit(memit(tmp_path, model=model, reuse_clean=True), facts(tmp_path, batch_size=4))
        assert made.count("requests") == times


def test_nothing_is_told_of_a_rule_that_may_change_without_this_package(tmp_path):
    class Own(Perplexity):
        """A rule of the user's."""

    task, text = tasks(tmp_path)
    task.prepare(2)
    assert task.told(2)["data"] == [{"q": "I think so", "a": "it"}, {"q": "You", "a": "it"}]
    assert text.told(None)["data"] == PROSE[:600]
    assert Own(path=text.path).told(None) is None
