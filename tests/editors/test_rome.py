"""ROME's update against the paper's formula, written out in float64."""

import pytest
import torch

from rect_lightning.editors import ROME
from rect_lightning.models import Source
from rect_lightning.solving.moments import second_moments
from rect_lightning.solving.prefixes import Prefixes
from tests.editors.test_base import FAMILIES, facts, fit, moments, record_updates, rome
from tests.editors.test_memit import relative, subject_states


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", ["bare", "mean"])
@pytest.mark.parametrize("with_c", [True, False])
def test_the_update_is_the_paper_s(tmp_path, monkeypatch, family, key, with_c):
    options = {"key": key, "moments": moments(tmp_path) if with_c else None}
    editor = rome(tmp_path, family, **options)
    updates = record_updates(editor, monkeypatch)
    fit(editor, facts(tmp_path, batch_size=1), limit_train_batches=2, limit_val_batches=0)
    editor.restore()
    width = updates[0][1].shape[1]
    c = torch.eye(width)
    if with_c:
        c = second_moments(editor.model, [1], editor.moments, fingerprint=editor.fingerprint)[1]

    assert len(updates) == 2
    for layer, update, batch, found in updates:
        states = [subject_states(editor.model, batch[0], template, layer) for template in editor.templates]
        mean = sum(s["key"] for s in states) / len(states)
        k = states[0]["key"] if key == "bare" else mean
        v = states[0]["value"] if key == "bare" else sum(s["value"] for s in states) / len(states)
        u = torch.linalg.inv(c.double()) @ mean
        target = (found.value + found.offset)[0].double()
        expected = (target - v)[:, None] @ u[None] / (u @ k)
        assert relative(update, expected) < 1e-4
        # what it is for: the edited weight maps the key to the target value
        assert relative(v + update @ k, target) < 1e-4
        editor.model.weight(layer).data += editor.model.oriented(layer, update).float()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", ["bare", "mean"])
@pytest.mark.parametrize("with_c", [True, False])
def test_the_edit_takes(tmp_path, family, key, with_c):
    editor = rome(tmp_path, family, key=key, moments=moments(tmp_path) if with_c else None, mode="single")
    fit(editor, facts(tmp_path, limit=2))
    assert editor.results["before"]["efficacy/exact"] == 0
    assert editor.results["after"]["efficacy/exact"] == 1


def test_without_prefixes_bare_and_mean_are_the_same(tmp_path, monkeypatch):
    found = []
    for key in ("bare", "mean"):
        editor = rome(tmp_path, key=key, prefixes=Prefixes(templates=["{}"]))
        updates = record_updates(editor, monkeypatch)
        fit(editor, facts(tmp_path, limit=1), limit_val_batches=0)
        found.append(updates[0][1])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("layers", [[1, 2], []])
def test_refuses_several_layers(layers):
    with pytest.raises(ValueError, match=r"ROME edits one layer; got layers .*MEMIT edits several"):
        ROME(base=Source(name="tiny"), layers=layers)
