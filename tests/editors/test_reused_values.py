"""Target values that several runs share."""

import pytest

from rect_lightning.callbacks import RECT
from rect_lightning.editors import locate_then_edit
from rect_lightning.solving.prefixes import Prefixes
from tests.editors.test_base import FAMILIES, SEARCH, facts, fit, identical, memit, opinionated, rome, state


@pytest.fixture
def searched(monkeypatch):
    """How many requests each search was for."""
    counts, search = [], locate_then_edit.search_values

    def counting(adapter, tail, rows, *args, **options):
        counts.append(len(rows))
        return search(adapter, tail, rows, *args, **options)

    monkeypatch.setattr(locate_then_edit, "search_values", counting)
    return counts


def edit(editor, folder, *callbacks, **options):
    fit(editor, facts(folder, **({"batch_size": 4} | options)), *callbacks, limit_val_batches=0)
    return editor


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_run_finds_the_same_without_a_search(tmp_path, searched, family):
    plain = edit(memit(tmp_path, family), tmp_path)
    first = edit(memit(tmp_path, family, reuse_values=True), tmp_path, RECT(0.4))
    assert searched == [4, 4]
    again = edit(memit(tmp_path, family, reuse_values=True), tmp_path)
    assert searched == [4, 4]
    assert identical(state(again), state(plain))
    assert not identical(state(first), state(plain)), "what is kept does not know of the regulariser"


def test_single_edits_are_shared_too(tmp_path, searched):
    for _ in range(2):
        editor = edit(rome(tmp_path, reuse_values=True, mode="single"), tmp_path, batch_size=1)
        assert editor.results["after"]["efficacy/token"] > 0.5
        assert searched == [4]


def test_what_starts_from_edited_weights_is_searched_for_again(tmp_path, searched):
    for seen in ([2, 2], [2, 2, 2]):
        edit(memit(tmp_path, reuse_values=True), tmp_path, batch_size=2)
        assert searched == seen, "the first operation alone is shared"


def test_times_that_may_lack_a_search_are_not_logged(tmp_path):
    for reuse in (False, True):
        run = fit(memit(tmp_path, reuse_values=reuse), facts(tmp_path, batch_size=4), limit_val_batches=0)
        assert ("edit/seconds" in run.logged_metrics) == (not reuse)


def test_models_that_differ_in_their_configuration_alone_are_told_apart(tmp_path, searched):
    for rope in (10_000.0, 20_000.0):
        model = opinionated("llama")
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": rope}
        edit(memit(tmp_path, reuse_values=True, model=model), tmp_path)
    assert len(searched) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"search": type(SEARCH)(steps=3)},
        {"layers": [1, 3]},
        {"prefixes": Prefixes(templates=["{}"])},
        {"family": "gpt2"},
        {"seed": 1},
        {"limit": 3},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_requests_options_and_models_are_told_apart(tmp_path, searched, changed):
    edit(memit(tmp_path, reuse_values=True), tmp_path)
    options = dict(changed)
    limit = {"limit": options.pop("limit")} if "limit" in options else {}
    if "seed" in options:
        options = {"model": opinionated("llama", seed=options["seed"])}
    edit(memit(tmp_path, reuse_values=True, **options), tmp_path, **limit)
    assert len(searched) == 2


def test_a_damaged_file_is_made_anew(tmp_path, searched):
    first = edit(memit(tmp_path, reuse_values=True), tmp_path)
    [path] = (tmp_path / "cache" / "values").rglob("result.pt")
    path.write_bytes(path.read_bytes()[:-8])
    assert identical(state(edit(memit(tmp_path, reuse_values=True), tmp_path)), state(first))
    assert len(searched) == 2
