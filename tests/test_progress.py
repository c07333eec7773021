"""What is shown at the end of a run."""

from types import SimpleNamespace

import pytest

from rect_lightning.progress import console


@pytest.mark.parametrize("bar", [True, False])
def test_the_progress_bar_is_ended_before_results_are_shown(capsys, bar):
    """Else it would be drawn once more below them."""
    ended = SimpleNamespace(teardown=lambda trainer, module, stage: print("bar", stage))
    trainer = SimpleNamespace(progress_bar_callback=ended if bar else None, state=SimpleNamespace(stage="train"))
    console(trainer, None).print("results")
    assert capsys.readouterr().out.split() == (["bar", "train"] if bar else []) + ["results"]
