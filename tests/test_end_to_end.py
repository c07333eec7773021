"""Edits of a real model, SmolLM2-135M, as the shipped configurations make them but shorter."""

import json

import pytest
import yaml

from rect_lightning.cache import cache_dir
from rect_lightning.cli import configs_folder, main
from rect_lightning.editors.measure import prose_path
from rect_lightning.models import Source

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
