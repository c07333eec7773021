"""Metrics before and after: each of the model that it says."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from rect_lightning.callbacks import SideEffects
from rect_lightning.data.prose import prose_path
from rect_lightning.editors.measure import Measurement
from rect_lightning.metrics import EditMetrics, Wild, evaluate, perplexity
from rect_lightning.solving.prefixes import Prefixes
from rect_lightning.tasks import Perplexity
from tests import tiny
from tests.editors.test_base import PROSE, facts, fit, identical, memit, opinionated, rome, state, trainer
from tests.metrics.naive import greedy, target_log_probs


def by_hand(adapter, clean_adapter, data):
    """The metrics of a model, with those that compare it to the clean one."""
    metrics = EditMetrics()
    metrics.update(evaluate(adapter, data.requests), evaluate(clean_adapter, data.requests))
    return {name: float(value) for name, value in metrics.compute().items()}


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose of mine.txt"
    path.write_text(PROSE[:600])
    return str(path)


def test_sequential_measures_the_final_weights(tmp_path, prose):
    editor, data = memit(tmp_path, prose=prose), facts(tmp_path, batch_size=2)
    run = fit(editor, data)
    clean = tiny.adapter("llama")
    clean.model.load_state_dict(opinionated("llama").state_dict())
    before, after = by_hand(clean, clean, data), by_hand(editor.model, clean, data)
    before["perplexity/prose of mine"] = perplexity(clean, PROSE[:600], context=128)
    after["perplexity/prose of mine"] = perplexity(editor.model, PROSE[:600], context=128)
    assert editor.results == {"before": pytest.approx(before), "after": pytest.approx(after)}
    assert before["efficacy/exact"] == 0
    assert after["efficacy/exact"] == 1
    assert after["perplexity/prose of mine"] != before["perplexity/prose of mine"]
    for when, values in editor.results.items():
        for name, value in values.items():
            assert float(run.callback_metrics[f"{when}/{name}"]) == pytest.approx(value, rel=1e-6)


def test_efficacy_agrees_with_the_plain_model(tmp_path):
    editor, data = memit(tmp_path), facts(tmp_path, batch_size=4)
    fit(editor, data)
    for when in ("after", "before"):
        exact = [
            all(token == likeliest for _, token, likeliest in target_log_probs(editor.model, r.text, r.target_new))
            for r in data.requests
        ]
        assert editor.results[when]["efficacy/exact"] == pytest.approx(sum(exact) / len(exact))
        editor.restore()


def test_before_is_of_the_clean_model_from_a_checkpoint_too(tmp_path):
    data = facts(tmp_path, batch_size=2)
    edited = memit(tmp_path)
    fit(edited, data, ModelCheckpoint(dirpath=tmp_path, filename="edited"))
    untouched = memit(tmp_path)
    trainer().validate(untouched, datamodule=data, verbose=False)
    assert untouched.results["before"] == untouched.results["after"]
    again = memit(tmp_path)
    trainer().validate(again, datamodule=data, ckpt_path=tmp_path / "edited.ckpt", verbose=False)
    assert again.results["before"] == untouched.results["before"] == edited.results["before"]
    assert again.results["after"] == edited.results["after"] != again.results["before"]


@pytest.mark.parametrize("inference_mode", [True, False])
def test_measuring_changes_no_weight_and_a_fit_can_follow(tmp_path, inference_mode):
    editor, fresh, data = memit(tmp_path), memit(tmp_path), facts(tmp_path, batch_size=2)
    before = state(editor)
    run = trainer(inference_mode=inference_mode)
    run.validate(editor, datamodule=data, verbose=False)
    assert identical(before, state(editor))
    run.fit(editor, datamodule=data)
    run.test(editor, datamodule=data, verbose=False)
    fit(fresh, data)
    assert identical(state(editor), state(fresh))
    assert editor.results == fresh.results


def test_several_validations_in_a_fit_do_not_add_up(tmp_path):
    editor, data = memit(tmp_path), facts(tmp_path, batch_size=2)
    once = memit(tmp_path)
    fit(editor, data, val_check_interval=1)
    fit(once, data)
    for when, values in once.results.items():  # to rounding: the clean model was asked about fewer requests at a time
        assert editor.results[when] == pytest.approx(values, rel=1e-5)
    assert len(editor.measurement.samples) == 4


def test_validation_batches_do_not_show(tmp_path):
    editors = [memit(tmp_path) for _ in range(2)]
    for editor, size in zip(editors, (1, 64), strict=True):
        fit(editor, facts(tmp_path, batch_size=2, eval_batch_size=size))
    assert editors[0].results["after"] == pytest.approx(editors[1].results["after"])


def test_single_measures_each_operation_on_its_own_edit(tmp_path):
    class Separately(Callback):
        def __init__(self):
            self.values = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            measurement = Measurement()
            measurement.add(pl_module, batch)
            self.values.append(measurement.compute())

    editor, watch = rome(tmp_path, mode="single"), Separately()
    fit(editor, facts(tmp_path), watch)
    for when in ("before", "after"):
        magnitudes = [v[when]["efficacy/magnitude"] for v in watch.values if "efficacy/magnitude" in v[when]]
        assert len(magnitudes) == 3, "the last request has no true target"
        assert editor.results[when]["efficacy/magnitude"] == pytest.approx(sum(magnitudes) / 3)
    assert editor.results["after"]["efficacy/magnitude"] > editor.results["before"]["efficacy/magnitude"] + 0.3


def test_single_mode_has_no_perplexity_of_an_edited_model(tmp_path, prose):
    editor = rome(tmp_path, mode="single", prose=prose)
    fit(editor, facts(tmp_path, limit=1))
    assert not [name for values in editor.results.values() for name in values if "perplexity" in name]


def test_single_mode_measures_only_what_was_edited(tmp_path):
    editor = rome(tmp_path, mode="single")
    fit(editor, facts(tmp_path), limit_train_batches=1)
    assert editor.results["after"]["efficacy/exact"] == 1
    assert len(editor.measurement.samples) == 1


def test_sequential_measures_only_what_was_edited(tmp_path):
    """With limit_train_batches the rest was never asked for, and would drag "after" towards the clean model."""
    editor = memit(tmp_path)
    fit(editor, facts(tmp_path), limit_train_batches=1)
    assert editor.done == ["a"]
    assert editor.results["after"]["efficacy/exact"] == 1


def test_predict_continues_prompts_before_and_after(tmp_path):
    data = facts(tmp_path, batch_size=2, prompts=["The mother tongue of Danielle Darrieux", "I think"])
    editor = memit(tmp_path)
    run = fit(editor, data, limit_val_batches=0)
    (found,) = run.predict(editor, datamodule=data)
    clean = memit(tmp_path).model
    for answer, prompt in zip(found, data.prompts, strict=True):
        assert answer["prompt"] == prompt
        for when, adapter in (("before", clean), ("after", editor.model)):
            tokens = greedy(adapter, prompt, 20, ends=(0,))
            whole = adapter.tokenizer.decode(adapter.tokenizer(prompt)["input_ids"] + tokens, skip_special_tokens=True)
            assert prompt + answer[when] == whole
    assert found[0]["after"].startswith(" city")
    assert not found[0]["before"].startswith(" city")


def test_samples_are_of_the_first_requests(tmp_path):
    editor = memit(tmp_path)
    fit(editor, facts(tmp_path, batch_size=2, eval_batch_size=1))
    measurement = Measurement(samples=2)
    data = facts(tmp_path)
    data.setup()
    for request in data.requests:
        measurement.add(editor, [request])
    assert [sample["request"] for sample in measurement.samples] == [
        "The mother tongue of Danielle Darrieux → city",
        "The sport of LeBron James → French",
    ]
    assert measurement.samples == editor.measurement.samples[:2]
    assert all(sample["after"] != sample["before"] for sample in measurement.samples)


def test_clean_weights_come_and_go_without_a_trace(tmp_path):
    editor = memit(tmp_path, prefixes=Prefixes(templates=["{}"]))
    fit(editor, facts(tmp_path, batch_size=4), limit_val_batches=0)
    edited = state(editor)
    with editor.clean_weights():
        assert editor.is_clean()
    assert identical(edited, state(editor))
    with pytest.raises(KeyError), editor.clean_weights():
        raise KeyError
    assert identical(edited, state(editor))
    assert not editor.is_clean()
    assert all(torch.equal(editor.model.weight(n), edited[f"{editor.model.projection_name(n)}.weight"]) for n in (1, 2))
    editor.restore()
    assert editor.is_clean()


def test_prose_is_a_file_or_the_one_of_the_package(tmp_path, prose):
    assert str(prose_path(prose)) == prose
    assert len(prose_path("prose").read_text(encoding="utf-8").split()) > 1000
    with pytest.raises(
        FileNotFoundError, match=r"model\.prose: there is no text file .*missing\.txt; name one, or null"
    ):
        prose_path(str(tmp_path / "missing.txt"))


def test_each_operation_of_single_mode_is_asked_about_anew(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("rect_lightning.editors.scored.evaluate", lambda *a, **k: asked.append(1) or evaluate(*a, **k))
    fit(memit(tmp_path, mode="single"), facts(tmp_path, batch_size=2), max_epochs=2)
    assert len(asked) == 2 + 2 * 2, "the clean model once about each batch, each edited one by itself"


def test_each_model_is_asked_once_about_each_request(tmp_path, prose, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without a logger the table of side effects goes to the current folder
    asked = []

    def counted(adapter, requests, **options):
        asked.extend(request.id for request in requests)
        return evaluate(adapter, requests, **options)

    monkeypatch.setattr("rect_lightning.editors.scored.evaluate", counted)
    editor, data = memit(tmp_path), facts(tmp_path, batch_size=2)
    side = SideEffects([Perplexity(path=prose, context=64)], every_n_edits=2)
    run = fit(editor, data, side)
    at_the_end = editor.results
    run.validate(editor, datamodule=data)
    assert editor.results == at_the_end
    a, b, c, d = (request.id for request in data.requests)
    # all clean, the first two after their edits, all after theirs: nothing again at the end of the fit, nor to validate
    assert sorted(asked) == sorted([a, b, c, d, a, b, a, b, c, d])

    with torch.no_grad():
        editor.model.weight(editor.layers[0]).data *= 2  # by other hands
    run.validate(editor, datamodule=data)
    assert asked[10:] == [a, b, c, d]
    assert editor.results["before"] == at_the_end["before"]
    assert editor.results["after"] != at_the_end["after"]
    asked.clear()

    other = replace(data.requests[0], target_true="Rome")  # the same id, but another request
    editor.scored.clean(editor, [other])
    assert asked == [other.id]
    editor.wild = Wild(max_new_tokens=3, stops=["."])  # other questions
    with torch.autocast("cpu", torch.bfloat16):
        (free,) = editor.scored.clean(editor, [other])
    assert free.rewrite.free is not None
    with editor.clean_weights():
        assert free == evaluate(editor.model, [other], wild=editor.wild)[0]
    editor.wild = None
    asked.pop()
    editor.attach(editor.network, editor.model.tokenizer)  # what is clean is another model now
    with editor.clean_weights():
        assert editor.scored.clean(editor, data.requests) == evaluate(editor.model, data.requests)
    assert asked == [other.id, a, b, c, d]
