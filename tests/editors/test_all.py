"""What holds for every editor alike."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from rect_lightning.callbacks import PCA, PRUNE, RECT, SPHERE, FrobeniusNorm, NullSpace, Random, Shrink
from tests import tiny
from tests.editors.test_alphaedit import alphaedit
from tests.editors.test_base import FAMILIES, SEARCH, changed_names, edited_names, facts, fit, memit, rome, state
from tests.editors.test_emmet import emmet
from tests.editors.test_fine_tuning import fine_tuning
from tests.editors.test_knowledge_neurons import kn
from tests.editors.test_ultraedit import ultraedit

EDITORS = {
    "ROME": rome,
    "MEMIT": memit,
    "EMMET": emmet,
    "AlphaEdit": alphaedit,
    "UltraEdit": lambda folder, family: ultraedit(family),
    "FT": lambda folder, family: fine_tuning(family),
    "KN": lambda folder, family: kn(family, layers=[1, 2]),
}  # MEND, which needs a trained hypernetwork, has the same test in its own file

SHORT = replace(SEARCH, steps=3)


@pytest.mark.parametrize("mode", ["single", "sequential"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EDITORS)
def test_no_other_weight_changes(tmp_path, name, family, mode):
    editor = EDITORS[name](tmp_path, family)
    editor.mode = mode
    before = state(editor)
    fit(editor, facts(tmp_path, batch_size=1 if name == "ROME" else 2), RECT(0.4), limit_val_batches=0)
    assert changed_names(before, editor) == (edited_names(editor) if mode == "sequential" else set())


REGULARISERS = {
    "RECT": partial(RECT, 0.001),
    "Random": partial(Random, 0.4),
    "PCA": partial(PCA, 0.4, of="energy"),
    "Shrink": partial(Shrink, 0.7),
    "FrobeniusNorm": partial(FrobeniusNorm, 0.001),
    "PRUNE": partial(PRUNE, base=4.0),
    "NullSpace": partial(NullSpace, energy=0.05),
    "SPHERE": SPHERE,
}


@pytest.mark.parametrize("step_per", ["layer", "operation"])
@pytest.mark.parametrize("regulariser", REGULARISERS)
@pytest.mark.parametrize("name", EDITORS)
def test_every_regulariser_leaves_less_of_every_editor_s_change(tmp_path, name, regulariser, step_per):
    """What each leaves is tested with it; here, that it does so under any editor."""
    norms = []
    for regularised in (False, True):
        editor = EDITORS[name](tmp_path, "llama")
        editor.step_per = step_per
        if hasattr(editor, "search"):
            editor.search = SHORT
        if regulariser == "PRUNE":
            editor.strength = 50.0  # it restrains what is larger than the weight
        callbacks = [made(REGULARISERS[regulariser], editor, tmp_path)] if regularised else []
        batch_size = 1 if name == "ROME" else 4
        fit(editor, facts(tmp_path, batch_size=batch_size, limit=batch_size), *callbacks, limit_val_batches=0)
        first = editor.layers[0]  # later ones make up for what it has lost
        norms.append(float((editor.model.weight(first).detach() - editor.clean[first]).norm()))
    whole, left = norms
    assert left > 0
    if (name, regulariser) == ("ROME", "PCA"):
        assert left == pytest.approx(whole), "of one component it leaves one"
    else:
        assert left < 0.999 * whole


def made(make, editor, folder):
    """The regulariser, with second moments of the keys for one that wants them where the editor has none."""
    if make is not REGULARISERS["NullSpace"] or hasattr(editor, "moments"):
        return make()
    generator, files = torch.Generator().manual_seed(0), {}
    for layer in editor.layers:
        keys = torch.randn(200, editor.model.weight(layer).shape[1], generator=generator)  # llama's are [out, in]
        path = folder / f"moments{layer}.safetensors"
        save_file({"C": keys.T @ keys / 200}, path)
        files[f"network.{editor.model.projection_name(layer)}.weight"] = str(path)
    return make(files=files)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("make", [emmet, alphaedit])
def test_every_family_is_edited(tmp_path, make, family):
    """Of the others their own tests say so."""
    editor = make(tmp_path, model=tiny.model(family), search=SHORT)
    before = state(editor)
    fit(editor, facts(tmp_path, batch_size=2, limit=2), limit_val_batches=0)
    assert changed_names(before, editor) == edited_names(editor)
