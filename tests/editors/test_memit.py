"""MEMIT's update against the paper's formula, written out in float64."""

import pytest
import torch

from rect_lightning.callbacks import RECT
from rect_lightning.editors import MEMIT
from rect_lightning.models import Source
from rect_lightning.solving.moments import second_moments
from rect_lightning.solving.prefixes import Prefixes
from tests.editors.test_base import FAMILIES, facts, fit, memit, moments, record_updates, requests
from tests.solving.test_relative_change import naive_mask


def subject_states(adapter, request, template, layer):
    """Key, value and block output of a layer at the subject's last token, in float64: one prompt, the whole model."""
    front, _, back = request.prompt.partition("{}")
    start = template.partition("{}")[0] + front + request.subject
    ids = adapter.tokenizer(start + back)["input_ids"]
    last = len(adapter.tokenizer(start)["input_ids"]) - 1
    seen = {}
    handles = [
        adapter.projection(layer).register_forward_hook(lambda _m, args, out: seen.update(key=args[0], value=out)),
        adapter.blocks[layer].register_forward_hook(
            lambda _m, _a, out: seen.update(stream=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    adapter.model.double()
    try:
        with torch.no_grad():
            adapter.model(torch.tensor([ids]))
    finally:
        adapter.model.float()
        for handle in handles:
            handle.remove()
    return {name: tensor[0, last] for name, tensor in seen.items()}


def keys_and_residuals(editor, layer, batch, targets):
    """``K`` and ``(Z - H) / layers left``, columns are requests (MEMIT, eq. 20)."""
    adapter, templates = editor.model, editor.templates
    keys = []
    for request in batch:
        bare, *others = [subject_states(adapter, request, t, layer)["key"] for t in templates]
        keys.append((bare + sum(others) / len(others)) / 2 if others else bare)
    now = [subject_states(adapter, request, "{}", editor.layers[-1])["stream"] for request in batch]
    left = len(editor.layers) - editor.layers.index(layer)
    return torch.stack(keys, dim=1), (targets.T.double() - torch.stack(now, dim=1)) / left


def naive_update(editor, layer, batch, targets, c, weight):
    """``R Kᵀ (λC + K Kᵀ)⁻¹`` with the d x d matrix (MEMIT, eq. 14)."""
    k, r = keys_and_residuals(editor, layer, batch, targets)
    return r @ k.T @ torch.linalg.inv(weight * c.double() + k @ k.T)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step_per", ["layer", "operation"])
@pytest.mark.parametrize("keep", [None, 0.4])
def test_each_layer_s_update_is_the_paper_s(tmp_path, monkeypatch, family, step_per, keep):
    weight = 20.0  # so that moments and keys both count
    editor = memit(tmp_path, family, step_per=step_per, moments_weight=weight)
    updates = record_updates(editor, monkeypatch)
    once = {"limit_train_batches": 1, "limit_val_batches": 0}
    fit(editor, facts(tmp_path, batch_size=3), *([RECT(keep)] if keep else []), **once)
    final = {layer: editor.model.weight(layer).detach().clone() for layer in editor.layers}
    editor.restore()
    cs = second_moments(editor.model, editor.layers, editor.moments, fingerprint=editor.fingerprint)

    assert [layer for layer, *_ in updates] == [1, 2]
    left = {}
    for layer, update, batch, found in updates:
        expected = naive_update(editor, layer, batch, found.stream + found.offset, cs[layer], weight)
        assert relative(update, expected) < 1e-4
        assert relative(update, naive_update(editor, layer, batch, found.stream + found.offset, cs[layer], 15)) > 1e-2
        step = editor.model.oriented(layer, update).float()
        left[layer] = step * naive_mask(step, editor.clean[layer], keep) if keep else step
        # the next layer comes after what was kept of this one, or after all of it where all are masked in the end
        editor.model.weight(layer).data += left[layer] if step_per == "layer" else step
    for layer in editor.layers:
        torch.testing.assert_close(final[layer] - editor.clean[layer], left[layer], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_lands_on_the_targets(tmp_path, monkeypatch, family):
    """With hardly any weight on the moments the block's output becomes the target value itself."""
    editor = memit(tmp_path, family, moments_weight=1e-7, prefixes=Prefixes(templates=["{}"]))
    updates = record_updates(editor, monkeypatch)
    fit(editor, facts(tmp_path, batch_size=4), limit_val_batches=0)
    found = updates[0][3]
    now = torch.stack([subject_states(editor.model, request, "{}", 2)["stream"] for request in requests()])
    assert relative(now, (found.stream + found.offset).double()) < 1e-3
    assert relative(now, found.stream.double()) > 0.1


def test_more_weight_on_the_moments_changes_less(tmp_path):
    norms = []
    for weight in (0.1, 100.0, 1e5):
        editor = memit(tmp_path, moments_weight=weight)
        fit(editor, facts(tmp_path, batch_size=4), limit_val_batches=0)
        norms.append(float((editor.model.weight(1) - editor.clean[1]).norm()))
    assert norms[0] > norms[1] > norms[2] > 0


def test_refuses_to_do_without_moments(tmp_path):
    with pytest.raises(ValueError, match="MEMIT needs second moments: give `moments` a source"):
        MEMIT(base=Source(name="tiny"), layers=[1], moments=None)


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_refuses_a_weight_that_is_not_positive(tmp_path, weight):
    with pytest.raises(ValueError, match="moments_weight must be positive"):
        MEMIT(base=Source(name="tiny"), layers=[1], moments=moments(tmp_path), moments_weight=weight)


def test_refuses_too_few_tokens_and_changes_nothing(tmp_path):
    editor = memit(tmp_path, moments=moments(tmp_path, tokens=50))
    with pytest.raises(ValueError, match=r"50 tokens of .*text\.txt are too few: the keys are 96 wide"):
        fit(editor, facts(tmp_path))
    assert editor.is_clean()


def test_many_operations_factor_each_moment_once(tmp_path, monkeypatch):
    factored = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: factored.append(matrix.shape) or cholesky(matrix))
    editor = memit(tmp_path)
    fit(editor, facts(tmp_path, batch_size=1))
    assert editor.operations == len(requests()) > 1
    width = editor.model.oriented(1, editor.model.weight(1)).shape[1]
    assert factored == [(width, width)] * len(editor.layers)
