"""EMMET's update against the paper's formula, written out in float64, and the constraint that it is there for."""

import pytest
import torch

from rect_lightning.callbacks import RECT
from rect_lightning.editors import EMMET
from rect_lightning.models import Source
from rect_lightning.solving.moments import second_moments
from rect_lightning.solving.prefixes import Prefixes
from tests.editors.test_base import FAMILIES, facts, fit, locate_then_edit, record_updates, requests
from tests.editors.test_memit import keys_and_residuals, relative, subject_states


def emmet(folder, family="llama", **options):
    return locate_then_edit(EMMET, folder, family, **({"layers": [1, 2]} | options))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step_per", ["layer", "operation"])
@pytest.mark.parametrize("ridge", [0.0, 5.0])
def test_each_layer_s_update_is_the_paper_s(tmp_path, monkeypatch, family, step_per, ridge):
    editor = emmet(tmp_path, family, ridge=ridge, step_per=step_per)
    updates = record_updates(editor, monkeypatch)
    fit(editor, facts(tmp_path, batch_size=3), limit_train_batches=1, limit_val_batches=0)
    editor.restore()
    cs = second_moments(editor.model, editor.layers, editor.moments, fingerprint=editor.fingerprint)
    assert [layer for layer, *_ in updates] == [1, 2]
    for layer, update, batch, found in updates:
        k, r = keys_and_residuals(editor, layer, batch, found.stream + found.offset)
        inverse = torch.linalg.inv(cs[layer].double())
        expected = r @ torch.linalg.inv(k.T @ inverse @ k + ridge * torch.eye(3).double()) @ k.T @ inverse
        assert relative(update, expected) < 1e-4
        editor.model.weight(layer).data += editor.model.oriented(layer, update).float()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [[2], [1, 2]])
def test_without_a_ridge_the_constraint_holds(tmp_path, monkeypatch, family, layers):
    """The block's output at each subject becomes the target value, and with a ridge it does not quite."""
    lacks = []
    for ridge in (0.0, 1e-3, 1.0):
        editor = emmet(tmp_path, family, layers=layers, ridge=ridge, prefixes=Prefixes(templates=["{}"]))
        updates = record_updates(editor, monkeypatch)
        fit(editor, facts(tmp_path, batch_size=4), limit_val_batches=0)
        found = updates[0][3]
        now = torch.stack([subject_states(editor.model, request, "{}", 2)["stream"] for request in requests()])
        lacks.append(float((now - found.stream - found.offset).norm() / found.offset.norm()))
    assert lacks[0] < 1e-4 < lacks[2]
    assert lacks[0] < lacks[1] < lacks[2]


@pytest.mark.parametrize("step_per", ["layer", "operation"])
@pytest.mark.parametrize("mode", ["sequential", "single"])
def test_edits_take_under_rect(tmp_path, step_per, mode):
    editor = emmet(tmp_path, step_per=step_per, mode=mode)
    fit(editor, facts(tmp_path, batch_size=2), RECT(0.8))
    assert editor.results["after"]["efficacy/exact"] == 1
    assert editor.results["before"]["efficacy/exact"] == 0


@pytest.mark.parametrize(("options", "message"), [
    ({"ridge": -0.1}, "ridge must not be negative; got -0.1"),
    ({"ridge": float("nan")}, "ridge must not be negative; got nan"),
    ({"moments": None}, "EMMET needs second moments"),
])  # fmt: skip
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        EMMET(base=Source(name="tiny"), layers=[1], **options)


def test_the_same_request_twice_is_refused_without_a_ridge_and_nothing_is_left(tmp_path):
    editor = emmet(tmp_path, ridge=0.0)
    data = facts(tmp_path, batch_size=2)
    path = tmp_path / "facts.jsonl"
    line = path.read_text().splitlines()[0]
    path.write_text(line + "\n" + line.replace('"id": "a"', '"id": "again"') + "\n")
    with pytest.raises(ValueError, match="request 1 of this batch"):
        fit(editor, data)
    assert editor.is_clean()
