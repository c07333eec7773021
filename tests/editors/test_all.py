"""What holds for every editor alike."""

import pytest

from rect_lightning.callbacks import RECT
from tests.editors.test_alphaedit import alphaedit
from tests.editors.test_base import FAMILIES, changed_names, edited_names, facts, fit, memit, rome, state
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


@pytest.mark.parametrize("mode", ["single", "sequential"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EDITORS)
def test_no_other_weight_changes(tmp_path, name, family, mode):
    editor = EDITORS[name](tmp_path, family)
    editor.mode = mode
    before = state(editor)
    fit(editor, facts(tmp_path, batch_size=1 if name == "ROME" else 2), RECT(0.4), limit_val_batches=0)
    assert changed_names(before, editor) == (edited_names(editor) if mode == "sequential" else set())
