"""KN's update against the paper's formula, from attributions of the plain model in float64."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rect_lightning.callbacks import RECT
from rect_lightning.data import EditData
from rect_lightning.editors import KN
from rect_lightning.models import Source
from rect_lightning.solving.prefixes import Prefixes
from tests import tiny
from tests.editors.test_base import (
    FAMILIES,
    RECORDS,
    edited_names,
    facts,
    fit,
    identical,
    opinionated,
    record_updates,
    state,
    trainer,
)
from tests.metrics.naive import greedy
from tests.solving.test_attribution import naive_attributions
from tests.solving.test_relative_change import naive_mask

TEMPLATES = ["{}", "I think so. {}", "You know it. {}"]


def kn(family="llama", *, model=None, **options):
    """A KN editor of a tiny model, all 4 layers."""
    options = {"steps": 3, "share": 0.5, "prose": None, "prefixes": Prefixes(templates=TEMPLATES)} | options
    editor = KN(base=Source(name="tiny"), **options)
    editor.attach(opinionated(family) if model is None else model, tiny.tokenizer())
    return editor


def first_token(request, answer):
    start = len(tiny.tokenizer()(request.text)["input_ids"])
    return tiny.tokenizer()(f"{request.text} {answer}")["input_ids"][start]


def naive_neurons(editor, request, old):
    """``(layer, neuron)`` of those found in enough prompts, one prompt, layer and step at a time."""
    counts = {}
    for template in editor.templates:
        ids = tiny.tokenizer()(template.replace("{}", request.text))["input_ids"]
        scores = torch.stack([naive_attributions(editor.model, n, ids, old, editor.steps) for n in editor.layers])
        for place, neuron in (scores >= editor.threshold * scores.max()).nonzero().tolist():
            key = (editor.layers[place], neuron)
            counts[key] = counts.get(key, 0) + 1
    return [key for key, count in counts.items() if count >= editor.share * len(editor.templates)]


def old_token(editor, request):
    """The first token of the true answer, else of what the model as it stands says."""
    if request.target_true:
        return first_token(request, request.target_true)
    return greedy(editor.model, request.text, 1)[0]


def naive_updates(editor, batch, weights, old_tokens):
    """``{layer: ΔW [out, in]}``, a column at a time."""
    embeddings = editor.model.model.get_output_embeddings().weight
    updates = {layer: torch.zeros_like(weights[layer]) for layer in editor.layers}
    for request, old in zip(batch, old_tokens, strict=True):
        e_old, e_new = embeddings[old], embeddings[first_token(request, request.target_new)]
        for layer, neuron in naive_neurons(editor, request, old):
            norm = weights[layer][:, neuron].norm()
            by = (norm / e_old.norm(), norm / e_new.norm()) if editor.scale == "column" else (1, 1)
            updates[layer][:, neuron] += by[1] * editor.new_weight * e_new - by[0] * editor.old_weight * e_old
    return updates


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", ["column", "embedding"])
@pytest.mark.parametrize("layers", [None, [1, 3]])
@pytest.mark.parametrize("step_per", ["layer", "operation"])
def test_the_update_is_the_paper_s(tmp_path, monkeypatch, family, scale, layers, step_per):
    """Of several requests in one operation, the last of which names no old answer."""
    editor = kn(family, scale=scale, layers=layers, step_per=step_per, old_weight=0.5, new_weight=2.0)
    data = facts(tmp_path, batch_size=4)
    updates = record_updates(editor, monkeypatch)
    fit(editor, data, limit_val_batches=0)
    final = {
        layer: editor.model.oriented(layer, editor.model.weight(layer)).detach().clone() for layer in editor.layers
    }
    editor.restore()
    clean = {layer: editor.model.oriented(layer, editor.model.weight(layer)).detach() for layer in editor.layers}
    batch = updates[0][2]
    assert [request.target_true is None for request in batch] == [False, False, False, True]
    expected = naive_updates(editor, batch, clean, [old_token(editor, request) for request in batch])

    assert [layer for layer, *_ in updates] == (layers or [0, 1, 2, 3])
    edited = 0
    for layer, update, *_ in updates:
        torch.testing.assert_close(update, expected[layer], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(final[layer] - clean[layer], expected[layer], rtol=1e-3, atol=1e-5)
        columns = (final[layer] != clean[layer]).any(dim=0)
        assert torch.equal(columns, expected[layer].ne(0).any(dim=0)), "other columns changed"
        edited += int(columns.sum())
    assert 4 <= edited < 0.3 * 96 * len(editor.layers)


def test_changes_the_down_projections_alone(tmp_path):
    editor = kn()
    before = state(editor)
    fit(editor, facts(tmp_path, batch_size=2))
    after = state(editor)
    assert {name for name in before if not torch.equal(before[name], after[name])} <= edited_names(editor)
    assert editor.results["after"]["efficacy/magnitude"] > editor.results["before"]["efficacy/magnitude"]
    assert all(parameter.grad is None for parameter in editor.parameters())


def test_later_operations_look_at_the_edited_model_and_answers_of_the_clean_one(tmp_path, monkeypatch):
    editor = kn()
    updates = record_updates(editor, monkeypatch)
    fit(editor, facts(tmp_path, batch_size=1), limit_val_batches=0)
    last = {layer: update for layer, update, batch, _ in updates if batch[0].id == "d"}
    request = next(batch[0] for *_, batch, _ in updates if batch[0].id == "d")
    with editor.clean_weights():
        old = old_token(editor, request)
    for layer, update in last.items():
        editor.model.weight(layer).data -= update  # llama's weights are [out, in]
    weights = {layer: editor.model.weight(layer).detach() for layer in editor.layers}
    assert old != old_token(editor, request), "the edited model would name another"
    expected = naive_updates(editor, [request], weights, [old])
    for layer, update in last.items():
        torch.testing.assert_close(update, expected[layer], rtol=1e-3, atol=1e-5)


def test_more_sharing_leaves_fewer_neurons(tmp_path, monkeypatch):
    found = []
    for share in (0.1, 0.5, 1.0):
        editor = kn(share=share)
        updates = record_updates(editor, monkeypatch)
        fit(editor, facts(tmp_path, limit=1), limit_val_batches=0)
        found.append(updates[0][3].neurons.bool()[0])
    assert found[0].sum() > found[1].sum() > found[2].sum() > 0
    assert not (found[2] & ~found[1]).any()


@pytest.mark.parametrize("keep", [0.001, 0.4])
def test_rect_keeps_the_largest_relative_changes(tmp_path, monkeypatch, keep):
    editor = kn()
    updates = record_updates(editor, monkeypatch)
    fit(editor, facts(tmp_path, batch_size=4), RECT(keep), limit_val_batches=0)
    for layer, update, *_ in updates:
        expected = update * naive_mask(update, editor.clean[layer], keep)
        torch.testing.assert_close(editor.model.weight(layer) - editor.clean[layer], expected, rtol=1e-3, atol=1e-6)
        # few columns change, so 40 % of the entries are all of them
        assert bool((expected != update).any()) == (keep == 0.001 and update.ne(0).any().item())


def test_single_operations_start_from_the_clean_model(tmp_path, monkeypatch):
    alone = []
    for record in RECORDS:
        editor = kn()
        updates = record_updates(editor, monkeypatch)
        path = tmp_path / "one.jsonl"
        path.write_text(json.dumps(record))
        fit(editor, EditData(str(path)), limit_val_batches=0)
        alone += [update for _, update, *_ in updates]
    editor = kn(mode="single")
    updates = record_updates(editor, monkeypatch)
    fit(editor, facts(tmp_path, batch_size=1))
    assert all(torch.equal(a, u) for a, (_, u, *_) in zip(alone, updates, strict=True))
    assert editor.is_clean()
    assert editor.results["after"] != editor.results["before"]


def test_a_resumed_run_comes_to_the_same_bits(tmp_path):
    sampled = Prefixes(count=2, lengths=(4,))
    whole = kn(prefixes=sampled)
    fit(whole, facts(tmp_path, batch_size=1), limit_val_batches=0)
    first = kn(prefixes=sampled)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(first, facts(tmp_path, batch_size=1), saving, limit_val_batches=0)
    second = kn(prefixes=sampled)
    trainer(limit_val_batches=0).fit(
        second, datamodule=facts(tmp_path, batch_size=1), ckpt_path=tmp_path / "step=8.ckpt", weights_only=False
    )
    assert second.operations == whole.operations == len(RECORDS)
    assert second.templates == whole.templates
    assert len(whole.templates) == 3
    assert identical(state(whole), state(second))


def without_neurons():
    """A model in which no down projection does anything, so that no neuron adds to anything."""
    model = opinionated("llama")
    for layer in range(4):
        model.model.layers[layer].mlp.down_proj.weight.data.zero_()
    return model


def test_requests_without_neurons_are_told_of_and_change_nothing(tmp_path):
    editor = kn(model=without_neurons())
    with (
        pytest.warns(UserWarning, match=r"No neuron has 0\.2 of the largest .* in 0\.5 of the 3 prompts of a, b: left"),
        pytest.raises(RuntimeError, match="no weight differs from the base model"),
    ):
        fit(editor, facts(tmp_path, batch_size=2))
    assert editor.is_clean()


def test_in_single_mode_they_are_measured_as_failed_edits(tmp_path):
    editor = kn(model=without_neurons(), mode="single")
    with pytest.warns(UserWarning, match="left unedited"):
        fit(editor, facts(tmp_path, batch_size=1))
    assert editor.operations == len(RECORDS)
    assert editor.results["after"] == editor.results["before"]


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_answers_that_begin_alike_are_told_of_and_left_unedited(tmp_path, mode):
    """Where the embeddings cancel: putting a token's in place of its own changes nothing."""
    alike = {
        "id": "alike",
        "subject": "Paris",
        "prompt": "The mayor of {}",
        "target_new": "the so",
        "target_true": "the I",
    }
    path = tmp_path / "alike.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (RECORDS[0], alike)))
    editor = kn(mode=mode, old_weight=2.0, new_weight=2.0)
    with pytest.warns(UserWarning, match="old and the new answer of alike begin with the same token") as warned:
        fit(editor, EditData(str(path), batch_size=1))
    assert not any("No neuron" in str(warning.message) for warning in warned)
    assert editor.operations == 2
    again = kn(old_weight=1.0, new_weight=2.0)
    fit(again, EditData(str(path), batch_size=1, offset=1))
    assert not again.is_clean(), "other weights raise the token that both begin with"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"threshold": 0.0}, "threshold is a share"),
        ({"threshold": 1.5}, "threshold is a share"),
        ({"share": 0.0}, "share is a share"),
        ({"old_weight": -1.0}, "must not be negative"),
        ({"old_weight": 0.0, "new_weight": 0.0}, "nor both 0"),
    ],
)
def test_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        KN(base=Source(name="tiny"), **options)


@pytest.mark.parametrize("layers", [[], [4], [2, 1]])
def test_refuses_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match="layers"):
        kn(layers=layers)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_edited(tmp_path, family):
    editor = kn(model=tiny.model(family), steps=2)
    fit(editor, facts(tmp_path, batch_size=4))
    assert not editor.is_clean()
