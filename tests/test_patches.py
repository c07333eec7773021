"""Patches: exact both ways, small, stackable, and refused where they do not belong."""

import json
import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rect_lightning.patches import Change, Patch, stacked


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changed(old, share, seed=1):
    """A copy with about this share of entries changed."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(old.shape, generator=generator) < share
    return torch.where(mask, old + 0.01 * torch.randn(old.shape, generator=generator), old)


def bits(tensor):
    return tensor.contiguous().numpy().view(np.uint32)


def same_bits(a, b):
    return np.array_equal(bits(a), bits(b))


@pytest.mark.parametrize("shape", [(7, 5), (64, 64), (3, 1000)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 1.0])
def test_a_change_applies_and_reverts_bit_for_bit(shape, share):
    old = weight(*shape)
    new = changed(old, share)
    change, work = Change.between(old, new), old.clone()
    change.toggle(work)
    assert same_bits(work, new)
    change.toggle(work)
    assert same_bits(work, old)
    assert len(change.values) == int((bits(old) != bits(new)).sum())
    assert change.density == pytest.approx(len(change.values) / math.prod(shape))


def test_values_that_compare_equal_or_never_do_count_by_their_bits():
    old = torch.tensor([[0.0, float("nan"), 1.0, float("inf")]])
    new = torch.tensor([[-0.0, float("nan"), 1.0, 5e-324]])
    change, work = Change.between(old, new), old.clone()
    assert len(change.values) == 2
    change.toggle(work)
    assert same_bits(work, new)


@pytest.mark.parametrize(("share", "kind"), [(0.01, torch.int32), (0.4, torch.uint8)])
def test_positions_are_kept_in_the_smaller_way(share, kind):
    old = weight(100, 100)
    change = Change.between(old, changed(old, share))
    assert change.positions.dtype == kind
    expected = np.flatnonzero(bits(old) != bits(changed(old, share)))
    if kind == torch.uint8:
        found = np.flatnonzero(np.unpackbits(change.positions.numpy(), count=old.numel()))
    else:
        found = change.positions.numpy()
    assert np.array_equal(found, expected)
    assert change.positions.nbytes <= min(old.numel() // 8 + 1, 4 * len(change.values))


def test_weights_that_are_not_fp32_are_refused():
    with pytest.raises(ValueError, match="fp32"):
        Change.between(weight(3, 3).half(), weight(3, 3).half())


def a_patch(share=0.4, seed=1):
    old = {"a.weight": weight(30, 20), "b.weight": weight(40, 10, seed=5)}
    new = {name: changed(w, share, seed) for name, w in old.items()}
    changes = {name: Change.between(old[name], new[name]) for name in old}
    return old, new, Patch("f" * 64, "e" * 64, changes, {"requests": ["ä"], "layers": [1]})


def test_a_file_holds_the_patch(tmp_path):
    old, new, patch = a_patch()
    patch.save(tmp_path / "p.safetensors")
    read = Patch.load(tmp_path / "p.safetensors")
    assert (read.base, read.result, read.provenance, read.origin) == (
        patch.base, patch.result, patch.provenance, patch.origin,
    )  # fmt: skip
    read.toggle(old)
    assert all(same_bits(old[name], new[name]) for name in new)
    names = {f"{name}.{part}" for name in new for part in ("positions", "values")}
    assert load_file(tmp_path / "p.safetensors").keys() == names, "readable without this package"


@pytest.mark.parametrize(("share", "of_dense"), [(0.4, 0.43125), (0.2, 0.23125), (0.01, 0.02)])
def test_a_file_is_as_small_as_said(tmp_path, share, of_dense):
    old = weight(500, 500)
    patch = Patch("f", "e", {"w": Change.between(old, changed(old, share))})
    patch.save(tmp_path / "p.safetensors")
    assert patch.dense_bytes == 4 * old.numel()
    assert (tmp_path / "p.safetensors").stat().st_size / patch.dense_bytes == pytest.approx(of_dense, rel=0.05)


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    _, _, patch = a_patch(0.05)
    patch.save(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 11):
        broken = bytearray(whole)
        broken[at] ^= 1 << (at % 8)
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"p\.safetensors"):
            Patch.load(path)
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"p\.safetensors"):
            Patch.load(path)


def test_what_is_no_patch_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a patch of this package"):
        Patch.load(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no patch"):
        Patch.load(tmp_path / "nothing.safetensors")


def test_a_full_disk_leaves_no_half_patch(tmp_path):
    resource = pytest.importorskip("resource")
    _, _, patch = a_patch()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
    try:
        with pytest.raises(OSError, match=r"no room for .*p\.safetensors"):
            patch.save(tmp_path / "p.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not os.listdir(tmp_path)


def test_stacked_patches_add_where_they_meet_and_are_exact_where_they_do_not():
    base = {"a.weight": weight(30, 20), "b.weight": weight(40, 10, seed=5)}
    states = {name: [w] for name, w in base.items()}
    one = {name: changed(w, 0.4, 1) for name, w in base.items()}
    two = {name: changed(w, 0.4, 2) for name, w in one.items()}  # made on one
    third = {name: changed(w, 0.4, 3) for name, w in base.items()}  # made on the base
    third = {
        name: torch.where(w != base[name], 1e-3 * w, w) for name, w in third.items()
    }  # so far that sums are rounded

    def patch(old, new):
        return Patch("x", "y", {name: Change.between(old[name], new[name]) for name in old})

    now = {name: w.clone() for name, w in two.items()}
    found = stacked(patch(base, third), [patch(base, one), patch(one, two)], now)
    assert all(same_bits(now[name], two[name]) for name in now), "left as they were"
    for name in states:
        old, before, new = base[name].numpy(), two[name].numpy(), third[name].numpy()
        for at in np.ndindex(*old.shape):
            expected = new[at] if before[at] == old[at] else before[at] + (new[at] - old[at])
            assert found[name].numpy()[at] == expected


def test_the_provenance_is_readable_in_the_file(tmp_path):
    _, _, patch = a_patch()
    patch.save(tmp_path / "p.safetensors")
    raw = (tmp_path / "p.safetensors").read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert json.loads(metadata["header"])["provenance"] == patch.provenance
