"""Results that are kept between runs: whole, and never another question's."""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict, dataclass

import pytest
import torch

from rect_lightning import kept as module
from rect_lightning import provenance
from rect_lightning.kept import digest, how_read, how_run, kept
from rect_lightning.metrics import SCORES, Wild, evaluate
from rect_lightning.provenance import source_digest
from tests.editors.test_base import requests


@dataclass(frozen=True)
class Stranger:
    value: int


def counted(value):
    def make():
        make.calls += 1
        return value

    make.calls = 0
    return make


def test_it_is_made_once_for_each_question(tmp_path):
    make = counted({"a": [1.5, float("inf")], "text": "é", "tensor": torch.arange(3)})
    first = kept(tmp_path, {"q": 1, "r": [2]}, make)
    again = kept(tmp_path, {"r": [2], "q": 1}, make)
    assert make.calls == 1
    assert first["a"] == again["a"] == [1.5, float("inf")]
    assert torch.equal(again["tensor"], torch.arange(3))
    kept(tmp_path, {"q": 1, "r": [3]}, make)
    assert make.calls == 2


@pytest.mark.parametrize("what", ["source_digest", "versions"])
def test_other_code_makes_it_again(tmp_path, monkeypatch, what):
    make = counted(1)
    kept(tmp_path, {}, make)
    monkeypatch.setattr(module, what, lambda: "other")
    kept(tmp_path, {}, make)
    assert make.calls == 2


def test_nothing_is_kept_of_what_fails(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        kept(tmp_path, {}, fail)
    assert kept(tmp_path, {}, lambda: 3) == 3


def test_only_the_classes_named_are_read(tmp_path):
    assert kept(tmp_path, {"named": 1}, lambda: [Stranger(2)], [Stranger]) == [Stranger(2)]
    with pytest.raises(pickle.UnpicklingError, match="Stranger"):
        kept(tmp_path, {}, lambda: [Stranger(2)])


def test_scores_come_back_as_they_were(tmp_path, tiny):
    scores = evaluate(tiny, requests(), wild=Wild(max_new_tokens=3))
    assert kept(tmp_path, {}, lambda: scores, SCORES) == scores
    assert asdict(kept(tmp_path, {}, lambda: None, SCORES)[0]) == asdict(scores[0])


def test_digest_reads_any_order_and_every_value():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_what_tells_models_apart(tiny):
    told, read = digest(how_run(tiny)), digest(how_read(tiny))
    assert (told, read) == (digest(how_run(tiny)), digest(how_read(tiny)))
    tiny.tokenizer = copy.deepcopy(tiny.tokenizer)
    tiny.tokenizer.add_tokens(["unheard"])
    ends = tiny.model.generation_config.eos_token_id
    tiny.model.generation_config.eos_token_id = [7]
    assert digest(how_run(tiny)) != told
    tiny.model.generation_config.eos_token_id = ends
    assert digest(how_run(tiny)) == told
    tiny.model.config.initializer_range = 0.5
    assert digest(how_run(tiny)) != told
    assert digest(how_read(tiny)) != read


def test_what_cannot_be_written_is_not_lost(tmp_path, monkeypatch):
    make = counted([1.0])

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="could not be kept.*No space left"):
        assert kept(tmp_path, {}, make) == [1.0]
    assert make.calls == 1
    monkeypatch.undo()
    assert kept(tmp_path, {}, make) == [1.0]
    assert make.calls == 2


def test_an_error_while_it_is_made_is_its_own(tmp_path):
    def unreadable():
        raise FileNotFoundError("no such text")

    with pytest.raises(FileNotFoundError, match="no such text") as caught:
        kept(tmp_path, {}, unreadable)
    assert not getattr(caught.value, "__notes__", [])  # no advice on the cache


def test_code_that_changes_on_disk_is_not_what_runs(tmp_path, monkeypatch):
    first = source_digest()
    package = tmp_path / "package"
    package.mkdir()
    (package / "new.py").write_text("changed = True")
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert source_digest() == first
    source_digest.cache_clear()
    try:
        assert source_digest() != first
    finally:
        source_digest.cache_clear()
