from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from rect_lightning.models import Adapter
from rect_lightning.solving import moments as module
from rect_lightning.solving.corpus import Moments, token_rows
from rect_lightning.solving.moments import SecondMoment, second_moments
from tests import tiny as tiny_models

LAYERS = [1, 2]
SELF = Moments(tokens=410, context=16)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_TOKENS", 64)


@pytest.fixture
def text(tmp_path: Path) -> Moments:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Document {i} says that {i * i} is the square of {i}." for i in range(30)))
    return Moments(source=str(path), tokens=410, context=16)


def naive(adapter: Adapter, moments: Moments, layer: int) -> torch.Tensor:
    """One row at a time, to the end of the model, in float64."""
    rows = list(token_rows(adapter, moments))
    keys = []
    handle = adapter.projection(layer).register_forward_hook(lambda _m, args, _o: keys.append(args[0][0]))
    adapter.model.double()
    try:
        for row in rows:
            adapter.model(input_ids=row[None])
    finally:
        adapter.model.float()
        handle.remove()
    stacked = torch.cat(keys)
    assert stacked.dtype == torch.float64
    assert len(stacked) == moments.tokens
    return torch.einsum("ti,tj->ij", stacked, stacked) / len(stacked)


def count_passes(adapter: Adapter) -> list[int]:
    seen: list[int] = []
    adapter.blocks[0].register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def test_accumulates_as_float64_does():
    keys = torch.randn(5000, 24, generator=torch.Generator().manual_seed(0)) + 30
    moment = SecondMoment(24)
    for batch in keys.split(7):
        moment.update(batch)
    exact = keys.double().T @ keys.double() / 5000
    assert moment.count == 5000
    assert moment.compute().dtype == torch.float32
    assert ((moment.compute().double() - exact) / exact).abs().max() < 2e-7


def test_nothing_seen_has_no_moment():
    with pytest.raises(ValueError, match="No keys"):
        SecondMoment(4).compute()


@pytest.mark.parametrize("source", ["self", "text"])
def test_equals_a_naive_float64_computation(tiny: Adapter, text: Moments, source: str, small_batches: None):
    moments = SELF if source == "self" else text
    found = second_moments(tiny, LAYERS, moments, fingerprint="f")
    assert list(found) == LAYERS
    for layer, moment in found.items():
        exact = naive(tiny, moments, layer)
        assert (moment - exact).norm() < 1e-6 * exact.norm()


def test_bos_of_every_row_counts(text: Moments):
    adapter = tiny_models.adapter("llama", bos=True)
    exact = naive(adapter, text, 1)
    assert (second_moments(adapter, [1], text, fingerprint="f")[1] - exact).norm() < 1e-6 * exact.norm()


def test_batch_size_does_not_matter(tiny: Adapter, text: Moments, monkeypatch: pytest.MonkeyPatch):
    found = []
    for size in (1, 50, 4096):
        monkeypatch.setattr(module, "_BATCH_TOKENS", size)
        found.append(second_moments(tiny, LAYERS, text, fingerprint="f"))
    for layer in LAYERS:
        for other in found[1:]:
            torch.testing.assert_close(other[layer], found[0][layer], rtol=1e-5, atol=1e-6)


def test_pass_ends_at_the_last_layer_and_leaves_no_hook(tiny: Adapter, text: Moments):
    def fail(*_: object) -> None:
        raise AssertionError("ran beyond the last layer")

    handles = [
        m.register_forward_pre_hook(fail) for m in (tiny.blocks[3], tiny.norm, tiny.model.get_output_embeddings())
    ]
    second_moments(tiny, LAYERS, text, fingerprint="f")
    for handle in handles:
        handle.remove()
    assert tiny.model(input_ids=torch.tensor([[1, 2]])).logits.shape[1] == 2
    assert not any(tiny.projection(layer)._forward_pre_hooks for layer in LAYERS)


def test_autocast_does_not_reach_the_moments(tiny: Adapter, text: Moments):
    plain = second_moments(tiny, LAYERS, text, fingerprint="f")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = second_moments(tiny, LAYERS, text, fingerprint="f")
    assert all(torch.equal(plain[layer], cast[layer]) for layer in LAYERS)


def test_cache_serves_the_same_and_only_the_same(tiny: Adapter, text: Moments, tmp_path: Path):
    passes = count_passes(tiny)
    cache = tmp_path / "cache"
    first = second_moments(tiny, [1, 2], text, fingerprint="f", cache=cache)
    once = len(passes)
    again = second_moments(tiny, [1, 2], text, fingerprint="f", cache=cache)
    assert len(passes) == once
    assert all(torch.equal(first[layer], again[layer]) for layer in LAYERS)
    second_moments(tiny, [1, 2], text, fingerprint="other model", cache=cache)
    assert len(passes) == 2 * once
    Path(text.source).write_text(Path(text.source).read_text() + "One more. " * 9)
    second_moments(tiny, [1, 2], text, fingerprint="f", cache=cache)
    assert len(passes) == 3 * once


def test_only_missing_layers_are_computed(tiny: Adapter, text: Moments, tmp_path: Path):
    fresh = second_moments(tiny, [0, 1, 2], text, fingerprint="f")
    second_moments(tiny, [2], text, fingerprint="f", cache=tmp_path)
    handle = tiny.blocks[2].register_forward_pre_hook(lambda *_: pytest.fail("layer 2 was cached"))
    found = second_moments(tiny, [0, 1, 2], text, fingerprint="f", cache=tmp_path)
    handle.remove()
    assert list(found) == [0, 1, 2]
    assert all(torch.equal(found[layer], fresh[layer]) for layer in fresh)


def test_broken_cache_is_computed_anew(tiny: Adapter, text: Moments, tmp_path: Path):
    first = second_moments(tiny, [1], text, fingerprint="f", cache=tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(second_moments(tiny, [1], text, fingerprint="f", cache=tmp_path)[1], first[1])


def test_cached_file_of_another_layer_is_not_believed(tiny: Adapter, text: Moments, tmp_path: Path):
    first = second_moments(tiny, LAYERS, text, fingerprint="f", cache=tmp_path)
    one, two = (next(tmp_path.rglob(f"{tiny.projection_name(layer)}.safetensors")) for layer in LAYERS)
    one.write_bytes(two.read_bytes())
    assert torch.equal(second_moments(tiny, [1], text, fingerprint="f", cache=tmp_path)[1], first[1])


def _killed(moments: Moments, cache: Path, after: int) -> None:
    module._BATCH_TOKENS = 64
    torch.set_num_threads(1)
    adapter = tiny_models.adapter("llama")
    update = module._update
    passes: list[int] = []

    def update_or_die(*args: object) -> None:
        passes.append(1)
        if len(passes) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        update(*args)

    module._update = update_or_die
    second_moments(adapter, LAYERS, moments, fingerprint="f", cache=cache, save_every=0)


@pytest.mark.parametrize("source", ["self", "text"])
def test_goes_on_after_a_kill_to_the_same_bits(source: str, text: Moments, tmp_path: Path, small_batches: None):
    moments = SELF if source == "self" else text
    adapter = tiny_models.adapter("llama")
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(moments, tmp_path, 3))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("state-*"))) == 1

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = second_moments(adapter, LAYERS, moments, fingerprint="f")
        lengths: list[int] = []
        adapter.blocks[0].register_forward_pre_hook(
            lambda _m, args: lengths.append(args[0].shape[:2].numel()) if args[0].shape[1] > 1 else None
        )
        resumed = second_moments(adapter, LAYERS, moments, fingerprint="f", cache=tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert sum(lengths) == 410 - 3 * 64
    assert all(torch.equal(whole[layer], resumed[layer]) for layer in LAYERS)
    assert not list(tmp_path.rglob("state-*"))
    assert not list(tmp_path.rglob("*.partial"))


def test_state_of_other_weights_is_not_used(tiny: Adapter, text: Moments, tmp_path: Path, small_batches: None):
    sums = {layer: SecondMoment(8) for layer in LAYERS}
    path = tmp_path / "state.safetensors"
    totals = {str(layer): torch.ones(8, 8, dtype=torch.float64) for layer in LAYERS}
    module.moment_files.write(path, totals, {"fingerprint": "f", "rows": 4, "count": 64})
    assert module._restore(sums, path, {"fingerprint": "g"}) == 0
    assert sums[1].count == 0
    assert module._restore(sums, path, {"fingerprint": "f"}) == 4
    assert sums[1].count == 64
    module.moment_files.write(path, totals, {"fingerprint": "f", "count": 64})
    assert module._restore(sums, path, {"fingerprint": "f"}) == 0, "it does not tell its rows"


def _computes(moments: Moments, cache: Path, log: Path, start: object) -> None:
    adapter = tiny_models.adapter("gpt2")

    def note(*_: object) -> None:
        with log.open("a") as file:
            file.write("pass\n")

    adapter.blocks[0].register_forward_pre_hook(note)
    start.wait()  # type: ignore[attr-defined]
    found = second_moments(adapter, LAYERS, moments, fingerprint="f", cache=cache)
    torch.save(found, log.with_name(f"{os.getpid()}.pt"))


def test_two_processes_compute_once(text: Moments, tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    arguments = (text, tmp_path / "cache", tmp_path / "log", start)
    processes = [context.Process(target=_computes, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (torch.load(path) for path in tmp_path.glob("*.pt"))
    assert all(torch.equal(first[layer], second[layer]) for layer in LAYERS)
    assert (tmp_path / "log").read_text() == "pass\n" * 2  # the full rows and the shorter last one


def test_too_few_tokens_are_refused(tiny: Adapter, text: Moments, tmp_path: Path):
    width = tiny.oriented(1, tiny.weight(1)).shape[1]
    with pytest.raises(ValueError, match=f"{width - 1} tokens of self are too few: the keys are {width} wide"):
        second_moments(tiny, [1], Moments(tokens=width - 1), fingerprint="f")
    Path(text.source).write_text("Short.")
    with pytest.raises(ValueError, match="too few"), pytest.warns(UserWarning, match="fewer than the 410"):
        second_moments(tiny, [1], text, fingerprint="f", cache=tmp_path)
    Path(text.source).write_text("\n\n")
    with pytest.raises(ValueError, match="has no text"), pytest.warns(UserWarning, match="0 tokens"):
        second_moments(tiny, [1], text, fingerprint="f", cache=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_keys_that_are_not_finite_name_the_layer(tiny: Adapter, text: Moments):
    tiny.blocks[2].mlp.get_submodule("up_proj" if hasattr(tiny.blocks[2].mlp, "up_proj") else "c_fc").weight.fill_(
        float("nan")
    )
    with pytest.raises(ValueError, match="Layer 2: keys are not finite"):
        second_moments(tiny, [1, 2], text, fingerprint="f")


def test_own_file_is_read_and_one_of_other_weights_refused(tiny: Adapter, text: Moments, tmp_path: Path):
    computed = second_moments(tiny, LAYERS, text, fingerprint="f", cache=tmp_path)
    path = next(tmp_path.rglob(f"{tiny.projection_name(1)}.safetensors"))
    assert torch.equal(second_moments(tiny, [1], Moments(source=str(path)), fingerprint="f")[1], computed[1])
    folder = second_moments(tiny, LAYERS, Moments(source=str(path.parent)), fingerprint="f")
    assert all(torch.equal(folder[layer], computed[layer]) for layer in LAYERS)
    with pytest.raises(ValueError, match="for fingerprint f, but fingerprint g is wanted"):
        second_moments(tiny, [1], Moments(source=str(path)), fingerprint="g")
    with pytest.raises(ValueError, match="for layer 1, but layer 2 is wanted"):
        second_moments(tiny, [2], Moments(source=str(path)), fingerprint="f")


def publish(folder: Path, layer: int, width: int, count: int = 50) -> torch.Tensor:
    """A file as ROME's layer_stats writes it: the state of ``CombinedStat(mom2=SecondMoment())``, float32."""
    total = np.random.default_rng(layer).random((width, width), dtype=np.float32)
    np.savez(
        folder / f"transformer.h.{layer}.mlp.c_proj_float32_mom2_100000.npz",
        **{
            "mom2.constructor": "util.runningstats.SecondMoment()",
            "mom2.count": count,
            "mom2.mom2": total,
            "sample_size": 100000,
        },
    )
    return torch.from_numpy(total) / count


def test_published_statistics_are_read(tmp_path: Path):
    gpt2 = tiny_models.adapter("gpt2")
    expected = {layer: publish(tmp_path, layer, 128) for layer in LAYERS}
    name = "transformer.h.{layer}.mlp.c_proj_float32_mom2_100000.npz"
    for source in (tmp_path, tmp_path / name):
        found = second_moments(gpt2, LAYERS, Moments(source=str(source)), fingerprint="f")
        for layer in LAYERS:
            torch.testing.assert_close(found[layer], expected[layer], rtol=1e-6, atol=0)
    single = str(tmp_path / name.format(layer=1))
    assert list(second_moments(gpt2, [1], Moments(source=single), fingerprint="f")) == [1]
    with pytest.raises(ValueError, match="one file for 2 layers"):
        second_moments(gpt2, LAYERS, Moments(source=single), fingerprint="f")
    with pytest.raises(ValueError, match="is of layer 1, by its name; layer 2 is wanted"):
        second_moments(gpt2, [2], Moments(source=single), fingerprint="f")
    with pytest.raises(FileNotFoundError, match=r"no file transformer\.h\.3\.mlp\.c_proj_\*"):
        second_moments(gpt2, [3], Moments(source=str(tmp_path)), fingerprint="f")


def test_statistics_of_another_width_are_refused(tmp_path: Path):
    publish(tmp_path, 1, 64)
    with pytest.raises(ValueError, match=r"c_proj_.*npz.*\[64, 64\].*layer 1.*\[128, 128\]"):
        second_moments(tiny_models.adapter("gpt2"), [1], Moments(source=str(tmp_path)), fingerprint="f")


@pytest.mark.parametrize("content", ["text", "pickle", "keys", "count"])
def test_broken_statistics_are_refused(tmp_path: Path, content: str):
    path = tmp_path / "layer.npz"
    if content == "text":
        path.write_text("<html>404</html>")
    elif content == "pickle":
        np.savez(path, **{"mom2.mom2": np.array([{}], dtype=object), "mom2.count": 1})
    elif content == "keys":
        np.savez(path, **{"mean.mean": np.zeros(3)})
    else:
        np.savez(path, **{"mom2.mom2": np.zeros((128, 128)), "mom2.count": 0})
    with pytest.raises(ValueError, match=r"layer\.npz"):
        second_moments(tiny_models.adapter("gpt2"), [1], Moments(source=str(path)), fingerprint="f")


def test_prose_has_a_positive_definite_moment(shared: Path):
    adapter = tiny_models.adapter("llama")
    moments = Moments(source=str(shared / "data" / "wikipedia_prose.txt"), tokens=4000, context=64)
    moment = second_moments(adapter, [2], moments, fingerprint="f")[2]
    assert torch.linalg.eigvalsh(moment.double()).min() > 0
