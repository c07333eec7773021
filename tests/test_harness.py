"""Tasks of lm-evaluation-harness on edited models; all from files, nothing from the hub."""

import json
import re
import sys
from pathlib import Path

import pytest

from rect_lightning import harness
from rect_lightning.cli import main
from rect_lightning.models import Source, adapter_for
from rect_lightning.reuse import export
from rect_lightning.tasks import BoolQ, measure
from tests import tiny
from tests.test_reuse import made, opinionated, save  # noqa: F401 - a fixture

PAGE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
QUESTIONS = [
    {"passage": f"{place} is in {country}.", "question": f"is {place} in {other}", "answer": country == other}
    for place, country in [("Rome", "Italy"), ("Oslo", "Norway"), ("Lima", "Peru"), ("Paris", "France")]
    for other in ("Italy", "Peru", "France")
]
PERPLEXITY = """
task: prose
dataset_path: json
dataset_kwargs: {data_files: {test: prose.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with two tasks and their data."""
    monkeypatch.chdir(tmp_path)
    (task,) = re.findall(r"```yaml\n(task: .*?)```", PAGE, re.DOTALL)
    (tmp_path / "boolq.yaml").write_text(task)
    (tmp_path / "boolq.jsonl").write_text("".join(json.dumps(record) + "\n" for record in QUESTIONS))
    (tmp_path / "prose.yaml").write_text(PERPLEXITY)
    texts = ["The mother tongue of Danielle is French.", "LeBron plays basketball.", "Because of this I think so."]
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


@pytest.fixture
def lm_eval(monkeypatch, tmp_path):
    """The harness, with a cache of its own for data; skips where it is not installed."""
    module = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[lm-eval]'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return module


def evaluate(network, task, **options):
    names, manager = harness.find_tasks([task])
    return harness.evaluate(network, tiny.tokenizer(), names, manager=manager, **options)["results"]


def test_a_task_has_the_score_that_ours_has(lm_eval, here):
    scores = []
    for seed in range(4):
        model = opinionated("llama", seed=seed)
        model.config.max_position_embeddings = 512  # the prompt takes some 160 of the tiny tokens
        theirs = evaluate(model, "boolq.yaml", batch_size=5, limit=11)
        ours = measure(adapter_for(model, tiny.tokenizer()), BoolQ(path="boolq.jsonl"), limit=11, scoring="standard")
        assert theirs["boolq_local"]["acc,none"] == pytest.approx(ours.scores["boolq/option"].value, abs=1e-12)
        scores.append(theirs["boolq_local"]["acc,none"])
    assert len(set(scores)) > 1


@pytest.mark.parametrize("kind", ["one.ckpt", "one.safetensors", "folder"])
def test_before_is_the_clean_model_and_after_the_edited_one(lm_eval, made, here, capsys, kind):  # noqa: F811
    folder, states = made
    path = here / kind if kind != "one.ckpt" else folder / kind
    if kind != "one.ckpt":
        export(folder / "one.ckpt", path)
    main(["lm-eval", str(path), "--tasks", "prose.yaml,boolq.yaml", "--output", "out/r.json", "--limit", "2"])
    told = json.loads((here / "out" / "r.json").read_text())
    network = Source(name=str(folder / "base")).load()[0]
    right = {"before": evaluate(network, "prose.yaml", limit=2)}
    network.load_state_dict(states["one"])
    right["after"] = evaluate(network, "prose.yaml", limit=2)
    values = {when: found["prose"]["byte_perplexity,none"] for when, found in right.items()}
    assert {when: told[when]["results"]["prose"]["byte_perplexity,none"] for when in values} == pytest.approx(values)
    assert abs(values["before"] - values["after"]) > 0.01
    assert told["after"]["n-samples"]["boolq_local"] == {"original": 12, "effective": 2}
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("before", "after", "boolq_local", f"{values['before']:.3f}", "±"))


def test_one_model_where_no_other_is_asked_for_or_known(lm_eval, made, here, capsys, caplog):  # noqa: F811
    folder, _ = made
    for path, more in ((folder / "one.ckpt", ["--clean", "false"]), (folder / "base", [])):
        with caplog.at_level("INFO", "rect_lightning"):
            main(["lm-eval", str(path), "--tasks", "prose.yaml", *more])
        shown = capsys.readouterr().out
        assert "after" in shown
        assert "before" not in shown
        assert ("base has no patch" in caplog.text) == (not more)


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(Source, "pretrained", lambda *_: pytest.fail("the model is loaded"))


def ask(folder, *options, tasks="prose.yaml"):
    main(["lm-eval", str(folder / "one.ckpt"), "--tasks", tasks, *options])


def test_a_task_that_is_not_there_is_refused_with_what_is_like_it(lm_eval, made, here, no_model, monkeypatch):  # noqa: F811
    from lm_eval.tasks import TaskManager

    def small(include_path, include_defaults):
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", small)
    with pytest.raises(ValueError, match=r"no task 'bolq_local'.* Near it are boolq_local"):
        ask(made[0], "--include_path", str(here), tasks="prose,bolq_local")
    with pytest.raises(ValueError, match=r"no task 'zzz'.* ends in \.yaml"):
        ask(made[0], tasks="zzz")
    with pytest.raises(ValueError, match="No task is named"):
        ask(made[0], tasks=",")


def test_tasks_in_a_folder_are_known_by_name_and_pattern(lm_eval, here):
    names, manager = harness.find_tasks(["pro*", "boolq_local", "prose"], here)
    assert names == ["prose", "boolq_local"]
    assert manager.all_tasks == ["boolq_local", "prose"], "the harness's own are not read"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (["--tasks", "none.yaml"], FileNotFoundError, r"no file none\.yaml"),
        (["--include_path", "none"], FileNotFoundError, "no folder none"),
        (["--limit", "0"], ValueError, "limit must be at least 1"),
        (["--output", "boolq.jsonl"], FileExistsError, r"boolq\.jsonl exists already"),
        (["--tasks", "broken.yaml"], RuntimeError, r"The task broken\.yaml cannot be made ready\. \w+: .+"),
        (["--tasks", "lost.yaml"], RuntimeError, r"The task lost\.yaml cannot be made ready\. .*gone\.jsonl"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    lm_eval, made, here, no_model, options, error, match  # noqa: F811
):  # fmt: skip
    (here / "broken.yaml").write_text("nonsense: 1\n")
    (here / "lost.yaml").write_text(PERPLEXITY.replace("prose.jsonl", "gone.jsonl"))
    with pytest.raises(error, match=match):
        ask(made[0], *options)


def test_there_is_no_such_model(here):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint, patch or folder none\.ckpt"):
        main(["lm-eval", "none.ckpt", "--tasks", "prose.yaml"])


def test_a_harness_that_is_not_installed_is_named(made, here, no_model, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rect_lightning\[lm-eval\]'"):
        ask(made[0])
