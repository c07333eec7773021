"""Fixtures that many tests share: tiny models of each family, a tiny tokenizer, and the optional reference data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Let several workers share the cores: threads that wait for each other's cores are many times slower than few threads."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of processes that tests start


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout (or ``$RECT_LIGHTNING_SHARED``); skips where there is none."""
    path = Path(os.environ.get("RECT_LIGHTNING_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"reference data not found in {path}")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of about 400 tokens, trained on a few sentences; adds no BOS."""
    from tests.tiny import tokenizer

    return tokenizer()


@pytest.fixture(params=["gpt2", "llama"])
def tiny(request: pytest.FixtureRequest):
    """An adapter around a tiny random model, GPT-2 and LLaMA in turn."""
    from tests.tiny import adapter

    return adapter(request.param)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a test puts into the cache out of the user's."""
    monkeypatch.setenv("RECT_LIGHTNING_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
