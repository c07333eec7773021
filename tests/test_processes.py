"""Two processes share the work of one, and come to the same; see `tests/two_processes.py` for what they run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rect_lightning.processes import Processes
from rect_lightning.solving.moments import second_moments
from tests import tiny, two_processes
from tests.editors.test_mend import train, training
from tests.two_processes import LAYERS, pair

KINDS = ["layer", "operation", "single"]


@pytest.fixture(scope="module")
def hypernetwork(tmp_path_factory):
    """The checkpoint of a hypernetwork for MEND."""
    return train(tmp_path_factory.mktemp("hypernetwork"), training(), max_epochs=1).checkpoint_callback.best_model_path


@pytest.fixture(scope="module")
def two(tmp_path_factory, hypernetwork):
    """The folder of a run with two processes, and what each of them found."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "tests.two_processes", str(folder), hypernetwork]
    environment = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr
    return folder, [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, hypernetwork):
    """What a single process finds."""
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)  # sampled text depends on rounding
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECT_LIGHTNING_CACHE", str(folder / "cache"))
        yield {
            "edits": two_processes.edits(folder, hypernetwork, {"devices": 1}),
            "passes": two_processes.passes(folder, Processes()),
        }
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", [*KINDS, "neurons", "gradients", "fine-tuning", "hypernetwork"])
def test_the_weights_are_those_of_a_single_process(two, alone, kind):
    ranks = [found["edits"][kind]["weights"] for found in two[1]]
    expected = alone["edits"][kind]["weights"]
    assert len(expected) == {"single": 5}.get(kind, 2), "in single mode those before each restoring, and the clean ones"
    for first, second, one in zip(*ranks, expected, strict=True):
        assert torch.equal(first, second), "processes agree bit for bit"
        torch.testing.assert_close(first, one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_is_shared(two, alone, kind):
    first, second = (found["edits"][kind] for found in two[1])
    assert first["done"] == second["done"] == alone["edits"][kind]["done"] == ["a", "b", "c", "d"]
    expected = {"single": (["a", "c"], ["b", "d"])}.get(
        kind, (["a", "c", "d"], ["b", "d"])
    )  # with d alone, both search for it
    assert (sorted(first["searched"]), sorted(second["searched"])) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_and_samples_are_those_of_a_single_process(two, alone, kind):
    first, second = (found["edits"][kind] for found in two[1])
    one = alone["edits"][kind]
    for when in ("before", "after"):
        assert first["results"][when] == second["results"][when] == pytest.approx(one["results"][when], rel=1e-4)
    assert first["logged"] == second["logged"] == pytest.approx(one["logged"], rel=1e-4)
    assert ("perplexity/prose" in one["results"]["after"]) == (kind == "layer")
    assert first["samples"] == one["samples"]
    assert len(first["samples"]) == 4


def test_side_effects_are_those_of_a_single_process(two, alone):
    first, second = (found["edits"]["layer"]["side"] for found in two[1])
    one = alone["edits"]["layer"]["side"]
    assert first == second
    assert [(row["edits"], row["score"]) for row in first] == [(row["edits"], row["score"]) for row in one]
    assert {row["edits"] for row in one} == {0, 3}
    assert [row["value"] for row in first] == pytest.approx([row["value"] for row in one], rel=1e-4, abs=1e-6)


def test_predictions_are_those_of_a_single_process(two, alone):
    assert two[1][0]["edits"]["predictions"] == alone["edits"]["predictions"]


@pytest.mark.parametrize("source", ["text", "self"])
def test_moments_are_those_of_a_single_process(two, alone, source):
    first, second = (found["passes"][source] for found in two[1])
    one = alone["passes"][source]
    assert first["tokens"] + second["tokens"] == one["tokens"] == 410
    assert 0.3 < first["tokens"] / 410 < 0.7
    for layer in LAYERS:
        assert torch.equal(first["moments"][layer], second["moments"][layer])
        torch.testing.assert_close(first["moments"][layer], one["moments"][layer], atol=1e-6, rtol=1e-5)


def test_moments_of_two_processes_are_cached_for_one(two):
    folder, found = two
    adapter = tiny.adapter("llama")
    adapter.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("the moments are computed again"))
    small_batches, _ = two_processes.patched_sizes()
    with small_batches:
        again = second_moments(adapter, LAYERS, two_processes.text(folder), fingerprint="f", cache=folder / "moments")
    assert all(torch.equal(again[layer], found[0]["passes"]["text"]["moments"][layer]) for layer in LAYERS)
    assert not [*folder.rglob("state-*"), *folder.rglob("*.partial")][1:], "but the state of the pass that was stopped"


def test_one_process_goes_on_with_a_pass_of_two(two, alone):
    folder, found = two
    assert [one["stopped"] for one in found] == [True, True]
    assert len(list((folder / "stopped").rglob("state-*"))) == 1
    adapter, ran = tiny.adapter("llama"), []
    adapter.blocks[0].register_forward_pre_hook(lambda _m, args: ran.append(args[0].shape[:2].numel()))
    small_batches, _ = two_processes.patched_sizes()
    with small_batches:
        resumed = second_moments(adapter, LAYERS, two_processes.text(folder), fingerprint="f", cache=folder / "stopped")
    assert sum(ran) == 410 - 4 * 64, "two rounds of a batch each were saved"
    for layer in LAYERS:
        torch.testing.assert_close(resumed[layer], alone["passes"]["text"]["moments"][layer], atol=1e-6, rtol=1e-5)


def test_results_come_in_the_order_of_the_items(two):
    for found in two[1]:
        for items, result in found["map"].items():
            expected = pair(list(range(items)))
            assert torch.equal(result["twice"], expected.twice)
            assert torch.equal(result["once"], expected.once)
        assert found["sum"].tolist() == [2, 1]
        assert found["agree"] == ("rank", 0)
        assert found["all_have"] == (True, False)


def test_processes_with_different_requests_are_refused(two):
    for found in two[1]:
        assert "The processes were handed different requests" in found["refusals"]["loader"]


def test_what_fails_in_one_process_fails_in_all(two):
    told = [found["refusals"] for found in two[1]]
    assert told[0]["failure"] == "RuntimeError: Process 1 failed: ValueError: out of luck"
    assert told[1]["failure"] == "ValueError: out of luck"
    assert told[0]["clean"]
    assert told[1]["clean"]


def test_what_fails_in_one_process_alone_fails_in_all(two):
    for rank, found in enumerate(two[1]):
        assert len(found["local failures"]) == 12, sorted(found["local failures"])
        for name, (failing, told) in found["local failures"].items():
            expected = "ValueError: out of luck"
            assert told == (expected if rank == failing else f"RuntimeError: Process {failing} failed: {expected}"), (
                name
            )
