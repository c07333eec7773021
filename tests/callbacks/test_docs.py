"""What docs/regularisers.md shows is what there is."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from rect_lightning import callbacks
from rect_lightning.callbacks.regulariser import Regulariser

PAGE = (Path(__file__).parents[2] / "docs" / "regularisers.md").read_text(encoding="utf-8")
KINDS = {n: c for n in callbacks.__all__ if issubclass(c := getattr(callbacks, n), Regulariser)}


@pytest.mark.parametrize("snippet", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_the_yaml_builds_what_it_names(snippet):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    given = yaml.safe_load(snippet)
    built = parser.instantiate_classes(parser.parse_object(given)).trainer.callbacks
    entries = given["trainer"]["callbacks"]
    assert len(built) == len(entries)
    for callback, entry in zip(built, entries, strict=True):
        assert type(callback).__name__ == entry["class_path"].rpartition(".")[2]
        assert isinstance(callback, Regulariser)
        for name, value in entry["init_args"].items():
            assert getattr(callback, name) == value


def test_every_one_is_in_the_table_in_the_yaml_and_among_the_costs():
    rows = re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(KINDS)
    for name in KINDS:
        assert f"callbacks.{name}\n" in PAGE
        assert re.search(rf"^\| {name}\b.*\d", PAGE, re.MULTILINE), f"{name} has no costs"


@pytest.mark.parametrize("name", KINDS)
def test_its_own_options_are_its_arguments_and_tell_states_apart(name):
    kind = KINDS[name]
    assert set(kind.own_options) <= set(inspect.signature(kind).parameters)
    assert kind.own_options
