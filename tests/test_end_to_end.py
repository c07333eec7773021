"""Edits of a real model, SmolLM2-135M, as the shipped configurations make them but shorter."""

import json

import pytest
import yaml

from rect_lightning.cache import cache_dir
from rect_lightning.cli import main
from rect_lightning.data.prose import prose_path
from rect_lightning.models import Source, adapter_for
from rect_lightning.shipped import configs_folder
from rect_lightning.tasks import measure, named

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cached_model():
    """The model in the cache, downloaded once; skips where it cannot be."""
    config = yaml.safe_load((configs_folder() / "memit_smollm2.yaml").read_text(encoding="utf-8"))
    source = Source(**config["model"]["init_args"]["base"])
    try:
        source.folder()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"{source.name} is not at hand: {str(error).splitlines()[0]}")
    return cache_dir()


def fit(folder, patch, config, *options):
    """Run a shipped configuration; the metrics."""
    patch.chdir(folder)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # set by the command line, and taken back with the fixture
        patch.setenv(name, "0")
    moments = ["--model.moments.source", str(prose_path("prose")), "--model.moments.tokens", "2200"]
    main(["fit", "--config", config, *moments, "--trainer.enable_progress_bar", "false", *options])
    return json.loads((folder / "runs" / "version_0" / "metrics.json").read_text())


def test_memit_with_rect(cached_model, tmp_path, monkeypatch):
    results = fit(
        tmp_path, monkeypatch, "memit_smollm2.yaml", "--data.limit", "8", "--data.batch_size", "8",
        "--model.search.steps", "12",
    )  # fmt: skip
    before, after = results["before"], results["after"]
    assert before["efficacy/exact"] <= 0.25
    assert after["efficacy/exact"] >= 0.75
    assert after["efficacy/probability"] >= 0.75
    assert after["generalisation/probability"] > before["generalisation/probability"]
    assert after["locality/probability"] > 0.5
    assert 0.9 < after["perplexity/prose"] / before["perplexity/prose"] < 1.5


def test_rome_with_rect_one_at_a_time(cached_model, tmp_path, monkeypatch):
    results = fit(
        tmp_path, monkeypatch, "rome_smollm2.yaml", "--data.limit", "2", "--model.prefixes.count", "2",
    )  # fmt: skip
    assert results["before"]["efficacy/probability"] <= 0.5
    assert results["after"]["efficacy/probability"] == 1
    assert results["after"]["efficacy/exact"] >= 0.5
    assert results["after"]["locality/probability"] > 0.5


# Records of our own, in the schemas of the hub's data sets.
RECORDS = {
    "gsm8k": [
        {"question": "Ann has 2 pens and buys 3. How many has she?", "answer": "2 + 3 = <<2+3=5>>5 pens.\n#### 5"},
        {"question": "A box holds 4 eggs. How many do 6 boxes hold?", "answer": "4 * 6 = <<4*6=24>>24 eggs.\n#### 24"},
        {"question": "Of 9 birds 5 fly off. How many stay?", "answer": "9 - 5 = <<9-5=4>>4 birds.\n#### 4"},
        {"question": "Tea costs $3. What do 5 cost?", "answer": "3 * 5 = $<<3*5=15>>15.\n#### 15"},
    ],
    "boolq": [
        {"passage": f"{place} is the capital of {country}.", "question": f"is {place} in {other}", "answer": answer}
        for place, country, other, answer in [
            ("Rome", "Italy", "Italy", True), ("Oslo", "Norway", "Peru", False), ("Lima", "Peru", "Peru", True),
            ("Cairo", "Egypt", "Norway", False),
        ]
    ],
    "nq": [
        {"question": f"what is the capital of {country}", "answer": [capital]}
        for country, capital in [("france", "Paris"), ("italy", "Rome"), ("japan", "Tokyo"), ("spain", "Madrid")]
    ],
}  # fmt: skip


def test_tasks_in_a_batch_answer_as_one_at_a_time(cached_model, tmp_path):
    """Against transformers' own generate, each prompt alone and unpadded."""
    config = yaml.safe_load((configs_folder() / "memit_smollm2.yaml").read_text(encoding="utf-8"))
    model, tokenizer = Source(**config["model"]["init_args"]["base"]).load()
    adapter, right = adapter_for(model, tokenizer), {}
    for name, records in RECORDS.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        task = type(named(name))(path=str(path), max_new_tokens=16)
        task.stop = ()
        result = measure(adapter, task)
        for output in result.outputs:
            for prompt, text in zip(output.prompts, output.texts, strict=True):
                inputs = tokenizer(prompt, return_tensors="pt")
                longest = max(16, task.paper_tokens if prompt in task.paper_prompts(records[0]) else 0)
                alone = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
                assert tokenizer.decode(alone[0, inputs.input_ids.shape[1] :], skip_special_tokens=True) == text
        right |= {score: found.value for score, found in result.scores.items()}
    assert right["nq/exact"] + right["nq/f1"] > 0, "it knows a capital"
