"""Edited models as plain Hugging Face models and folders, through the command line as users have it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rect_lightning
from rect_lightning import cli
from rect_lightning.cli import main
from rect_lightning.models import Source
from rect_lightning.models.fingerprint import weights_fingerprint
from rect_lightning.patches import Patch
from rect_lightning.reuse import apply, export, load_edited, load_pair, revert
from tests import tiny
from tests.editors.test_base import RECT, ModelCheckpoint, facts, fit, identical, memit, opinionated, state


def edit(folder, base, *, family="llama", limit=None, offset=0, name="edited", **options):
    """An edit of the model in a folder, as a checkpoint; and the edited weights."""
    editor = memit(folder, family, model=Source(name=str(base)).load()[0], **options)
    editor.base = Source(name=str(base))
    checkpoint = ModelCheckpoint(dirpath=folder, filename=name, enable_version_counter=False)
    fit(editor, facts(folder, limit=limit, offset=offset), RECT(0.4), checkpoint, limit_val_batches=0)
    return folder / f"{name}.ckpt", state(editor)


def save(folder, model):
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model's folder, and checkpoints of two edits of it: ``base``, ``one.ckpt``, ``two.ckpt``."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECT_LIGHTNING_CACHE", str(folder / "cache"))
        base = save(folder / "base", opinionated("llama"))
        states = {
            "one": edit(folder, base, limit=2, name="one")[1],
            "two": edit(folder, base, offset=2, name="two")[1],
            "base": state_of(base),
        }
    return folder, states


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """An empty working directory, elsewhere than what was made."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state_of(folder):
    """The weights of a folder, opened with nothing but transformers."""
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def same(a, b):
    return identical(
        {name: w.view(torch.int32) for name, w in a.items()}, {name: w.view(torch.int32) for name, w in b.items()}
    )


# One line ------------------------------------------------------------------------------------------------------------


def test_load_edited_gives_a_plain_model(made, here):
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder, states = made
    model = rect_lightning.load_edited(str(folder / "one.ckpt"))
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert all(weight.requires_grad for weight in model.parameters())
    assert same(model.state_dict(), states["one"])
    assert not same(states["one"], states["base"])
    ids = AutoTokenizer.from_pretrained(model.name_or_path)("The sport of", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, ids.shape[1] + 2)


def test_load_edited_takes_a_patch_and_a_folder_too(made, here):
    folder, states = made
    export(folder / "one.ckpt", here / "p.safetensors")
    export(folder / "one.ckpt", here / "edited")
    for path in ("p.safetensors", "edited"):
        assert same(load_edited(path).state_dict(), states["one"])


def test_the_clean_model_is_at_hand_beside_the_edited_one(made, here):
    folder, states = made
    for name in ("one", "two"):
        export(folder / f"{name}.ckpt", here / f"{name}.safetensors")
    apply(here / "one.safetensors", here / "1")
    apply(here / "two.safetensors", here / "12", on=str(here / "1"))
    for path in (folder / "one.ckpt", here / "one.safetensors", here / "12"):
        pair = load_pair(path)
        edited = state_of(path) if path.is_dir() else states["one"]
        assert same(pair.network.state_dict(), edited)
        with pair.clean_weights():
            assert same(pair.network.state_dict(), states["base"])
        assert same(pair.network.state_dict(), edited)
        assert pair.tokenizer is not None
    assert load_pair(folder / "base").clean == {}


def test_load_edited_from_a_base_that_is_elsewhere(made, here):
    folder, states = made
    shutil.copytree(folder / "base", here / "moved")
    given = Source(name=str(folder / "base")).pretrained()[0]
    for base in (str(here / "moved"), here / "moved", Source(name=str(here / "moved")), given):
        assert same(load_edited(folder / "one.ckpt", base=base).state_dict(), states["one"])
    assert same(given.state_dict(), states["one"]), "in place"


def test_the_wrong_base_is_refused_by_name_and_left_as_it_was(made, here):
    folder, _ = made
    other = opinionated("llama", seed=1)
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    with pytest.raises(ValueError, match=rf"one\.ckpt edits {folder}/base \(weights \w+\); .* has weights \w+"):
        load_edited(folder / "one.ckpt", base=other)
    assert identical(before, dict(other.state_dict()))


def test_a_folder_is_whole_and_takes_no_base(made, here):
    folder, _ = made
    with pytest.raises(ValueError, match=r"base is a whole model already; leave base out"):
        load_edited(folder / "base", base="nonsense")


def test_a_base_that_has_gone_is_named(made, here):
    folder, _ = made
    (folder / "base").rename(folder / "gone")
    try:
        with pytest.raises(OSError, match=r"no file or folder .*base") as error:
            load_edited(folder / "one.ckpt")
        assert "--base" in error.value.__notes__[0]
    finally:
        (folder / "gone").rename(folder / "base")


def test_importing_the_package_is_quick():
    assert rect_lightning.load_edited is load_edited
    with pytest.raises(AttributeError, match="no attribute 'load_nothing'"):
        rect_lightning.load_nothing  # noqa: B018


# Folders -------------------------------------------------------------------------------------------------------------


def test_an_exported_folder_opens_with_transformers_alone(made, here):
    from transformers import AutoTokenizer

    folder, states = made
    main(["export", str(folder / "one.ckpt"), "edited"])
    assert same(state_of(here / "edited"), states["one"])
    assert AutoTokenizer.from_pretrained(here / "edited")("Spain").input_ids
    assert (here / "edited" / "generation_config.json").is_file()
    [told] = json.loads((here / "edited" / "provenance.json").read_text())
    assert told["requests"] == ["a", "b"]
    assert told["before"] == told["fingerprint"]
    assert told["after"] == weights_fingerprint(load_edited(here / "edited"))
    assert sorted(path.name for path in (here / "edited" / "patches").iterdir()) == ["001.safetensors"]
    assert not [path.name for path in (here / "edited").glob("*.safetensors") if path.name != "model.safetensors"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3_mm"])
def test_every_layout_survives_the_way_out_and_back(tmp_path, monkeypatch, family):
    monkeypatch.setenv("RECT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    base = save(tmp_path / "base", tiny.model(family))
    checkpoint, after = edit(tmp_path, base, family=family, limit=1)
    export(checkpoint, tmp_path / "edited")
    assert same(Source(name=str(tmp_path / "edited")).load()[0].state_dict(), after)
    revert(tmp_path / "edited", tmp_path / "back")
    assert weights_fingerprint(load_edited(tmp_path / "back")) == weights_fingerprint(load_edited(base))


def test_an_export_in_bf16_says_what_it_loses(made, here, caplog):
    folder, states = made
    main(["export", str(folder / "one.ckpt"), "edited", "--dtype", "bfloat16"])
    assert "% of the entries that the edits changed are again what they were" in caplog.text
    loaded = state_of(here / "edited")
    assert {weight.dtype for weight in loaded.values()} == {torch.bfloat16}
    assert all(torch.equal(loaded[name], weight.bfloat16()) for name, weight in states["one"].items())
    with pytest.raises(ValueError, match="has no patch to revert"):
        revert(here / "edited", here / "back")


def test_an_export_into_the_empty_folder_that_one_is_in(made, here):
    folder, states = made
    export(folder / "one.ckpt", Path())
    assert same(state_of(here), states["one"])


@pytest.mark.parametrize("to", ["edited", "p.safetensors", "plain"])
def test_what_is_there_already_is_left_alone(made, here, monkeypatch, to):
    folder, _ = made
    monkeypatch.setattr(Source, "pretrained", lambda *_: pytest.fail("the model is loaded"))
    there = here / to
    if to != "edited":
        there.write_text("mine")
    else:
        there.mkdir()
        (there / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists already"):
        export(folder / "one.ckpt", there)


def test_a_failing_export_leaves_nothing(made, here, monkeypatch):
    folder, _ = made
    monkeypatch.setattr(Patch, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(folder / "one.ckpt", here / "edited")
    assert not os.listdir(here)


def test_a_full_disk_leaves_nothing(made, here):
    resource = pytest.importorskip("resource")
    folder, _ = made
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"no room for .*edited"):
            export(folder / "one.ckpt", here / "edited")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not os.listdir(here)


# Patches -------------------------------------------------------------------------------------------------------------


def test_a_patch_applies_and_reverts_bit_for_bit(made, here, caplog):
    folder, states = made
    with caplog.at_level("INFO"):
        main(["export", str(folder / "one.ckpt"), "one.safetensors"])
    assert "% of the edited weights in full" in caplog.text
    main(["apply", "one.safetensors", "edited"])
    assert same(state_of(here / "edited"), states["one"])
    main(["revert", "edited", "back"])
    assert same(state_of(here / "back"), states["base"])
    assert json.loads((here / "back" / "provenance.json").read_text()) == []


def test_patches_of_one_base_stack_and_come_off_in_order(made, here):
    folder, states = made
    for name in ("one", "two"):
        export(folder / f"{name}.ckpt", here / f"{name}.safetensors")
    apply(here / "one.safetensors", here / "1")
    apply(here / "two.safetensors", here / "12", on=str(here / "1"))
    told = json.loads((here / "12" / "provenance.json").read_text())
    assert [t["requests"] for t in told] == [["a", "b"], ["c", "d"]]
    assert told[0]["after"] == told[1]["before"]
    both = state_of(here / "12")
    for name, base in states["base"].items():
        change = (states["one"][name] - base) + (states["two"][name] - base)
        torch.testing.assert_close(both[name], base + change, atol=1e-6, rtol=1e-5)
    assert not same(both, states["one"])
    revert(here / "12", here / "back1")
    assert same(state_of(here / "back1"), states["one"])
    revert(here / "back1", here / "back0")
    assert same(state_of(here / "back0"), states["base"])


def test_an_edit_of_an_edited_folder_stacks_on_it(made, here, monkeypatch):
    monkeypatch.setenv("RECT_LIGHTNING_CACHE", str(here / "cache"))
    folder, states = made
    export(folder / "one.ckpt", here / "1")
    checkpoint, after = edit(here, here / "1", offset=2)
    export(checkpoint, here / "12")
    assert same(state_of(here / "12"), after)
    export(checkpoint, here / "second.safetensors")
    apply(here / "second.safetensors", here / "applied", on=str(here / "1"))
    assert same(state_of(here / "applied"), after)
    with pytest.raises(ValueError, match=r"second\.safetensors is for .*/1 \(weights \w+\); .*base has weights"):
        apply(here / "second.safetensors", here / "refused", on=str(folder / "base"))
    revert(here / "12", here / "back1")
    revert(here / "back1", here / "back0")
    assert same(state_of(here / "back0"), states["base"])


def test_a_patch_is_not_applied_twice(made, here):
    folder, _ = made
    export(folder / "one.ckpt", here / "one.safetensors")
    export(folder / "two.ckpt", here / "two.safetensors")
    apply(here / "one.safetensors", here / "1")
    apply(here / "two.safetensors", here / "12", on=str(here / "1"))
    for name in ("one", "two"):
        with pytest.raises(ValueError, match=rf"has .*{name}\.safetensors applied already"):
            apply(here / f"{name}.safetensors", here / "121", on=str(here / "12"))
    assert not (here / "121").exists()


def test_a_patch_for_another_base_is_refused(made, here):
    folder, _ = made
    export(folder / "one.ckpt", here / "one.safetensors")
    other = save(here / "other", opinionated("llama", seed=1))
    with pytest.raises(ValueError, match=r"is for .*base \(weights \w+\); .*other has weights \w+"):
        apply(here / "one.safetensors", here / "edited", on=str(other))
    assert not (here / "edited").exists()


def test_a_folder_that_was_changed_since_is_refused(made, here):
    folder, _ = made
    export(folder / "one.ckpt", here / "1")
    export(folder / "two.ckpt", here / "two.safetensors")
    model = load_edited(here / "1")
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(here / "1")
    with pytest.raises(ValueError, match="changed since"):
        revert(here / "1", here / "back")
    with pytest.raises(ValueError, match="changed since"):
        apply(here / "two.safetensors", here / "12", on=str(here / "1"))
    with pytest.raises(ValueError, match="changed since"):
        load_pair(here / "1")
    assert load_edited(here / "1").model.norm.weight[0] == model.model.norm.weight[0]


def test_a_revert_that_would_not_give_the_base_back_is_refused(made, here):
    folder, _ = made
    export(folder / "one.ckpt", here / "1")
    path = here / "1" / "patches" / "001.safetensors"
    replace(Patch.load(path), base="0" * 64).save(path)
    with pytest.raises(ValueError, match=r"did not give back weights 0{12}; nothing was written"):
        revert(here / "1", here / "back")
    assert not (here / "back").exists()


def test_what_was_never_patched_cannot_be_reverted(made, here):
    folder, _ = made
    with pytest.raises(ValueError, match="no patch to revert"):
        revert(folder / "base", here / "back")


# The command line ----------------------------------------------------------------------------------------------------


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert f"rect_lightning {name}" in shown
        assert "Args:" not in shown


def test_a_refusal_is_a_line(made, here, monkeypatch):
    (here / "some.ckpt").write_text("hello")
    monkeypatch.setattr("sys.argv", ["rect_lightning", "export", "some.ckpt", "edited"])
    with pytest.raises(SystemExit, match=r"^ValueError: some\.ckpt cannot be read"):
        cli.run()


def test_a_run_folder_stands_for_its_checkpoint(made, here):
    folder, _ = made
    run = here / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match=r"version_0 has no checkpoints/last\.ckpt"):
        export(run, here / "edited")
    shutil.copy(folder / "one.ckpt", run / "checkpoints" / "last.ckpt")
    export(run, here / "edited")
    assert same(state_of(here / "edited"), dict(load_edited(run).state_dict()))


def test_what_is_written_is_as_readable_as_other_files(made, here):
    folder, _ = made
    (here / "plain").write_text("")
    export(folder / "one.ckpt", here / "p.safetensors")
    export(folder / "one.ckpt", here / "edited")
    written = [here / "p.safetensors", *(path for path in (here / "edited").rglob("*") if path.is_file())]
    assert {path.stat().st_mode for path in written} == {(here / "plain").stat().st_mode}
