"""Free answers against the plain model, one prompt at a time."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from rect_lightning.callbacks.summary import Summary
from rect_lightning.data import EditRequest
from rect_lightning.editors import Editor
from rect_lightning.loggers import RunFolder
from rect_lightning.metrics import EditMetrics, FreeAnswer, Wild, check_requests, evaluate, free_answers, generation
from rect_lightning.metrics import request_metrics as each
from tests.editors.test_base import RECORDS, facts, fit, memit
from tests.metrics.naive import greedy

pytestmark = pytest.mark.usefixtures("own_cache")

REQUESTS = [
    EditRequest(
        id="a", subject="Danielle Darrieux", prompt="The mother tongue of {} is", target_new="English",
        paraphrases=("I think Danielle Darrieux speaks", "You know"),
    ),
    EditRequest(id="b", subject="Spain", prompt="What is the capital of {}?", target_new="it"),
    EditRequest(
        id="c", subject="LeBron James", prompt="{} plays the", target_new="the sport", paraphrases=("What is the sport",)
    ),
]  # fmt: skip


def naive_answer(adapter, prompt, wild):
    """The plain model's text for what it is asked, cut at the first stop."""
    asked = wild.context.replace("{}", prompt)
    new = greedy(adapter, asked, wild.max_new_tokens, ends=(0,))
    ids = adapter.tokenizer(asked)["input_ids"]
    text = adapter.tokenizer.decode(ids + new, skip_special_tokens=True)[len(asked) :].lstrip()
    for stop in wild.stops:
        text = text.split(stop)[0]
    return text.strip()


@pytest.mark.parametrize(
    "wild",
    [
        Wild(max_new_tokens=9),
        Wild(max_new_tokens=9, stops=("e", "<")),
        Wild(max_new_tokens=5, stops=(), context="Q: {}\nA:"),
        Wild(max_new_tokens=1),
    ],
)
def test_answers_are_those_of_one_prompt_at_a_time(tiny, wild):
    prompts = [prompt for request in REQUESTS for prompt in (request.text, *request.paraphrases)]
    found = free_answers(tiny, prompts, ["x"] * len(prompts), wild)
    expected = [naive_answer(tiny, prompt, wild) for prompt in prompts]
    assert [answer.text for answer in found] == expected
    assert len(set(expected)) > 1


def test_a_stop_ends_the_writing(tiny, monkeypatch):
    ran = []
    decode = generation._decode

    def noting(*args):
        new, log_probs = decode(*args)
        ran.extend(map(len, new))
        return new, log_probs

    monkeypatch.setattr(generation, "_decode", noting)
    [long] = free_answers(tiny, ["You"], ["x"], Wild(max_new_tokens=12, stops=()))
    stop = long.text[1]
    [short] = free_answers(tiny, ["You"], ["x"], Wild(max_new_tokens=12, stops=(stop,)))
    assert short.text == long.text.split(stop)[0].strip()
    assert ran[0] == 12
    assert ran[1] < 12


@pytest.mark.parametrize(
    ("text", "target", "exact", "begins"),
    [
        ("French", "French", True, True),
        ("the French!", "French", True, True),
        ("french language", "French", False, True),
        ("Frenchman", "French", False, False),
        ("It is French", "French", False, False),
        ("", "French", False, False),
        ("New", "New York", False, False),
    ],
)
def test_what_counts(text, target, exact, begins):
    answer = FreeAnswer(text, target)
    assert (answer.exact, answer.begins) == (exact, begins)


def test_metrics_are_means_over_prompts_then_requests(tiny):
    wild = Wild(max_new_tokens=6)
    asked = [[request.text, *request.paraphrases] for request in REQUESTS]
    texts = [[naive_answer(tiny, prompt, wild) for prompt in prompts] for prompts in asked]
    # the first is right at its own prompt, and begins with the answer at the last paraphrase; the third is right everywhere
    targets = [texts[0][0], "nothing of the kind", texts[2][0]]
    requests = [replace(request, target_new=target) for request, target in zip(REQUESTS, targets, strict=True)]
    scores = evaluate(tiny, requests, wild=wild)
    metrics = EditMetrics()
    metrics.update(scores, scores)
    values = {name: float(value) for name, value in metrics.compute().items()}
    right = [[float(FreeAnswer(t, target).exact) for t in ts] for ts, target in zip(texts, targets, strict=True)]
    begun = [[float(FreeAnswer(t, target).begins) for t in ts] for ts, target in zip(texts, targets, strict=True)]
    assert values["efficacy/wild"] == pytest.approx(sum(r[0] for r in right) / 3) == pytest.approx(2 / 3)
    assert values["efficacy/wild_begins"] == pytest.approx(sum(b[0] for b in begun) / 3)
    assert values["generalisation/wild"] == pytest.approx((sum(right[0][1:]) / 2 + right[2][1]) / 2)
    assert values["generalisation/wild_begins"] == pytest.approx((sum(begun[0][1:]) / 2 + begun[2][1]) / 2)
    assert [request["efficacy/wild"] for request in each(scores, scores)] == [1, 0, 1]
    assert "generalisation/wild" not in each(scores, scores)[1]
    assert not {"locality/wild", "locality/wild_begins"} & values.keys()


def test_off_it_writes_nothing_and_reports_nothing(tiny, monkeypatch):
    monkeypatch.setattr(generation, "_decode", None)
    scores = evaluate(tiny, REQUESTS)
    assert all(pair.free is None for score in scores for pair in (score.rewrite, *score.paraphrases))
    assert not [name for name in each(scores, scores)[0] if "wild" in name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "Answer:"}, r"wild\.context must hold '{}' once"),
        ({"context": "{} {}"}, r"wild\.context must hold '{}' once"),
        ({"stops": ("\n", "")}, r"wild\.stops must not be empty"),
        ({"max_new_tokens": 0}, r"wild\.max_new_tokens must be at least 1; got 0"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Wild(**options)


def test_refuses_what_it_could_not_measure_before_an_edit(tmp_path, tiny):
    with pytest.raises(
        ValueError, match=r"The target 'English' has \d tokens, more than an answer may have: raise wild"
    ):
        check_requests(tiny, REQUESTS, wild=Wild(max_new_tokens=1))
    wild = Wild(max_new_tokens=120)
    editor = memit(tmp_path, wild=wild)
    with pytest.raises(ValueError, match=r"needs \d+ tokens with its continuation"):
        fit(editor, facts(tmp_path, batch_size=2))
    assert editor.operations == 0
    assert editor.is_clean()


def test_warns_of_targets_that_hold_a_stop(tiny):
    louis = replace(REQUESTS[1], target_new="St. Louis")
    with pytest.warns(UserWarning, match=r"1 targets cannot be answered in full, such as 'St\. Louis'"):
        check_requests(tiny, [*REQUESTS, louis], wild=Wild())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_requests(tiny, [replace(louis, target_new="U.S.")], wild=Wild(stops=("\n",)))
        check_requests(tiny, REQUESTS, wild=Wild())


@pytest.mark.parametrize("mode", ["sequential", "single"])
def test_a_run_reports_it_before_and_after(tmp_path, mode):
    wild = Wild(context="You know it. {}", max_new_tokens=4, stops=())
    editor = memit(tmp_path, wild=wild, mode=mode)
    fit(editor, facts(tmp_path, batch_size=4), Summary(), logger=RunFolder(tmp_path, "runs"))
    [folder] = (tmp_path / "runs").glob("*")
    results = json.loads((folder / "metrics.json").read_text())
    names = ("efficacy/wild", "efficacy/wild_begins", "generalisation/wild", "generalisation/wild_begins")
    assert all(name in results[when] for when in ("before", "after") for name in names)
    assert results["before"]["efficacy/wild_begins"] == 0
    assert results["after"]["efficacy/wild_begins"] > 0
    requests = json.loads((folder / "requests.json").read_text())
    assert [request["id"] for request in requests] == [record["id"] for record in RECORDS]
    editor.restore()
    for request, made in zip(requests, editor.measurement.requests, strict=True):
        assert request["answers"] == made["answers"]
        assert request["answers"]["before"] == naive_answer(editor.model, request["text"], wild)
        assert (
            request["after"]["efficacy/wild_begins"]
            == FreeAnswer(request["answers"]["after"], request["target_new"]).begins
        )


def test_off_the_requests_hold_no_answers(tmp_path):
    editor = memit(tmp_path)
    fit(editor, facts(tmp_path, batch_size=4))
    assert "answers" not in editor.measurement.requests[0]
    assert not [name for name in editor.results["after"] if "wild" in name]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--model.wild", "true"], Wild()),
        (["--model.wild", "false"], None),
        ([], None),
        (["--model.wild.context", "Say it. {}"], Wild(context="Say it. {}")),
        (["--model.wild", '{"context": "Q: {}"}'], Wild(context="Q: {}")),  # a colon would make YAML of it alone
        (["--model.wild", '{"stops": ["\\n"], "max_new_tokens": 8}'], Wild(stops=("\n",), max_new_tokens=8)),
    ],
)
def test_the_command_line_takes_it(given, expected):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    parser.add_lightning_class_args(Editor, "model", subclass_mode=True)
    config = parser.parse_args(["--model", "MEMIT", "--model.base.name", "x", "--model.layers", "[1]", *given])
    assert parser.instantiate_classes(config).model.wild == expected
