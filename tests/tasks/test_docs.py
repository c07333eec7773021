"""What docs/tasks.md shows works as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from rect_lightning.tasks import Generation, MultipleChoice, measure, named
from tests.tiny import adapter as tiny_adapter

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_a_class_of_one_s_own(tmp_path):
    names: dict = {}
    exec(blocks("python")[0], names)
    path = tmp_path / "words.jsonl"
    path.write_text('{"word": "so"}\n{"word": "think"}\n')
    task = names["Reversed"](path=str(path), shots=1)
    result = measure(tiny_adapter("llama"), task)
    assert result.outputs[0].prompts == ("so spelt backwards is os\n\nthink spelt backwards is",)
    assert [*result.scores] == ["reversed/exact"]
    assert task.standard({"word": "so"}, task.parse({}, ["os."])) == {"exact": 1}


def test_tasks_in_yaml():
    (entries,) = [yaml.safe_load(block)["tasks"] for block in blocks("yaml") if block.startswith("tasks")]
    kinds = {"rect_lightning.tasks.MultipleChoice": MultipleChoice, "rect_lightning.tasks.Generation": Generation}
    weather, capitals = (kinds[entry["class_path"]](**entry["init_args"]) for entry in entries)
    assert weather.gold({"text": "It pours.", "label": "wet"}) == 0
    assert capitals.standard({"country": "France", "city": "Paris"}, "Paris!") == {"exact": 1, "f1": 1}


@pytest.mark.parametrize("name", re.findall(r"^\| `(\w+)`, `[A-Z]", PAGE, re.MULTILINE))
def test_the_table_names_the_data_sets_and_the_main_scores(name):
    (row,) = re.findall(rf"^\| `{name}`, .*$", PAGE, re.MULTILINE)
    task = named(name)
    assert f"`{type(task).__name__}`" in row
    if name != "perplexity":
        source, config, split = task.hub
        assert source in row
        assert all(word in row for word in (config, split) if word)
    assert f"**{getattr(task, 'main', name)}**" in row


def test_every_task_is_in_the_table():
    assert len(re.findall(r"^\| `(\w+)`, `[A-Z]", PAGE, re.MULTILINE)) == 9
