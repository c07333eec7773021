"""Checkpoints on the disk: whole or as before, checked, and harmless."""

import contextlib
import errno
import io
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from rect_lightning.checkpoint_io import EditCheckpointIO, read_checkpoint
from rect_lightning.models.fingerprint import content_digest
from tests.editors.test_base import facts, fit, memit, trainer

pytestmark = pytest.mark.usefixtures("own_cache")


def a_checkpoint(seed=0):
    """What an editor's checkpoint is like, small enough for many broken copies."""
    torch.manual_seed(seed)
    told = {"fingerprint": "f" * 64, "requests": ["a", "b"], "operations": 2, "strength": 0.5, "base": {"name": "x"}}
    told["sha256"] = None
    loops = {"fit_loop": {"state_dict": {"combined_loader": [{"handed_out": 2}]}}}
    return {"state_dict": {"network.w": torch.randn(8, 20)}, "loops": loops, "epoch": 0, "rect_lightning": told}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "some.ckpt"
    EditCheckpointIO().save_checkpoint(a_checkpoint(), path)
    return path


def same(a, b):
    return content_digest(a) == content_digest(b | {"rect_lightning": b["rect_lightning"] | {"sha256": None}})


# Integrity -----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(path):
    assert same(a_checkpoint(), read_checkpoint(path))
    assert torch.load(path, weights_only=True).keys() == a_checkpoint().keys()


def test_a_digest_tells_values_types_and_structure_apart():
    one = torch.zeros(2)
    different = [
        {}, [], "", None, 0, 0.0, False, {"a": 1}, {"a": "1"}, {"a": 2}, {"b": 1}, [1, [2]], [[1], 2], [1, 2], one,
        -one, one[None], one.double(), [one], {"x": one},
    ]  # fmt: skip
    assert len({content_digest(value) for value in different}) == len(different)


def test_a_flipped_bit_is_refused_or_of_no_consequence(path):
    whole, content = path.read_bytes(), a_checkpoint()
    rng, refused, total = random.Random(0), 0, 0
    for at in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[at] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            assert same(content, read_checkpoint(path)), at
        except ValueError as error:
            refused += str(path) in str(error) and "\n" not in str(error)
        else:
            continue
        total += 1
    assert refused == total > 100


def test_a_flipped_weight_which_torch_would_load_is_refused(path):
    whole = path.read_bytes()
    at = whole.index(a_checkpoint()["state_dict"]["network.w"].numpy().tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=r"some\.ckpt is damaged: its content does not have the checksum"):
        EditCheckpointIO().load_checkpoint(path)


def test_a_truncated_file_is_refused_with_its_neighbours_named(path):
    whole = path.read_bytes()
    (path.parent / "older.ckpt").write_bytes(whole)
    for length in range(0, len(whole), 31):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"some\.ckpt cannot be read: it is truncated.*Beside it: older\.ckpt"):
            EditCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("content", ["text", "tensor", "zip", "module"])
def test_a_foreign_file_is_refused(path, content):
    if content == "text":
        path.write_text("To be, or not to be.")
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "b")
    else:
        torch.save(torch.zeros(2) if content == "tensor" else {"state_dict": {"w": torch.zeros(2)}}, path)
    with pytest.raises(ValueError, match=r"some\.ckpt (is not a checkpoint of an editor|cannot be read)"):
        read_checkpoint(path)


def test_a_checkpoint_that_is_not_there(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*other\.ckpt\. Beside it: some\.ckpt"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_a_folder_is_no_checkpoint(path):
    for read in (read_checkpoint, EditCheckpointIO().load_checkpoint):
        with pytest.raises(IsADirectoryError, match=r"is a folder.*name a checkpoint in it, such as some\.ckpt"):
            read(path.parent)


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["archive", "bare pickle"])
def test_objects_are_never_unpickled(tmp_path, kind):
    path, created = tmp_path / "evil.ckpt", tmp_path / "created"
    checkpoint = a_checkpoint() | {"epoch": Malicious(created)}
    if kind == "archive":
        torch.save(checkpoint, path)
    else:
        path.write_bytes(pickle.dumps(checkpoint))
    for weights_only in (None, False, True):
        with pytest.raises(ValueError, match=r"evil\.ckpt cannot be read") as error:
            EditCheckpointIO().load_checkpoint(path, weights_only=weights_only)
        assert "weights_only" not in str(error.value)  # torch advises to load it all the same
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(path)
    assert not created.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert created.exists(), "the file is malicious indeed"


# Writing -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_file_as_it_was(path, monkeypatch):
    before = path.read_bytes()
    save = torch.save

    def fills_the_disk(content, file):
        buffer = io.BytesIO()
        save(content, buffer)
        file.write(buffer.getvalue()[:500])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fills_the_disk)
    with pytest.raises(OSError, match=r"no room for .*some\.ckpt: the disk.*What was there before is as it was"):
        EditCheckpointIO().save_checkpoint(a_checkpoint(1), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["some.ckpt"]


def test_a_real_limit_leaves_the_file_as_it_was(path):
    """The largest file that a process may write is limited by the system; torch reports that as something else."""
    resource = pytest.importorskip("resource")
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    large = a_checkpoint() | {"state_dict": {"network.w": torch.randn(1000, 100)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"no room for .*some\.ckpt"):
            EditCheckpointIO().save_checkpoint(large, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["some.ckpt"]


def test_any_other_failure_is_told_as_it_is(path):
    before = path.read_bytes()
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        EditCheckpointIO().save_checkpoint(a_checkpoint() | {"epoch": lambda: None}, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["some.ckpt", "without_suffix"])
def test_what_a_killed_writer_left_of_the_same_file_is_removed_and_nothing_else(path, name):
    path.with_name(f"{name}.partial").write_text("half")
    others = ["another_run_s.ckpt.partial", "download.iso.partial"]
    for other in others:
        path.with_name(other).write_text("not this file's")
    EditCheckpointIO().save_checkpoint(a_checkpoint(1), path.with_name(name))
    assert sorted(os.listdir(path.parent)) == sorted({*others, "some.ckpt", name})
    assert same(a_checkpoint(1), read_checkpoint(path.with_name(name)))


def test_an_object_is_refused_by_name_when_it_is_written_and_the_old_file_stays(path):
    before = path.read_bytes()
    holds = {"callbacks": {"Fine": {"n": 1}, "Mine": {"n": 2, "folder": Path("x")}}}
    with pytest.raises(ValueError, match=r"some\.ckpt.*callbacks → Mine → folder is a (Posix|Windows)Path"):
        EditCheckpointIO().save_checkpoint(a_checkpoint() | holds, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["some.ckpt"]


def test_a_set_is_the_same_in_another_process(path):
    content = a_checkpoint() | {"callbacks": {"Mine": {"seen": {f"request {n}" for n in range(20)}}}}
    EditCheckpointIO().save_checkpoint(content, path)
    assert same(content, read_checkpoint(path))
    code = "import sys; from rect_lightning.checkpoint_io import read_checkpoint; read_checkpoint(sys.argv[1])"
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ | {"PYTHONHASHSEED": seed}, check=True)


def test_a_file_of_another_writer_has_no_checksum_and_is_read_with_a_remark(path, caplog):
    torch.save(a_checkpoint(), path)
    with caplog.at_level("WARNING"):
        assert same(a_checkpoint(), read_checkpoint(path))
    assert "some.ckpt carries no checksum" in caplog.text
    content = a_checkpoint()
    del content["rect_lightning"]["sha256"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"some\.ckpt is damaged"):
        read_checkpoint(path)


# In a Trainer --------------------------------------------------------------------------------------------------------


def test_an_editor_s_trainer_keeps_checkpoints_so(tmp_path):
    run = fit(memit(tmp_path), facts(tmp_path, limit=1), limit_val_batches=0)
    assert type(run.strategy.checkpoint_io) is EditCheckpointIO


def test_a_plugin_of_the_user_s_stays(tmp_path):
    class Mine(TorchCheckpointIO):
        pass

    editor, run = memit(tmp_path), trainer(plugins=[Mine()])
    run.fit(editor, datamodule=facts(tmp_path, limit=1))
    assert type(run.strategy.checkpoint_io) is Mine
    run.save_checkpoint(tmp_path / "mine.ckpt")
    saved = read_checkpoint(tmp_path / "mine.ckpt")["state_dict"]
    assert all(torch.equal(weight, editor.state_dict()[name]) for name, weight in saved.items())


def test_another_module_s_checkpoint_is_kept_unchanged(tmp_path):
    content = {"state_dict": {"w": torch.zeros(2)}, "epoch": 3}
    EditCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    loaded = EditCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert content_digest(loaded) == content_digest(content)
