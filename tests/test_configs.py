"""The configurations that come with the package."""

import re
import shlex

import pytest
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser

from rect_lightning.callbacks import RECT
from rect_lightning.data import EditData
from rect_lightning.editors import (
    EMMET,
    KN,
    MEMIT,
    MEND,
    ROME,
    AlphaEdit,
    FineTuning,
    MENDTraining,
    UltraEdit,
)
from rect_lightning.shipped import configs_folder

FILES = sorted(configs_folder().glob("*.yaml"))
MODELS = ("gpt2xl", "gptj-6b", "llama-7b", "llama2-7b", "llama3-8b", "qwen2.5-7b", "mistral-7b", "smollm2")
FEWER_MODELS = ("gpt2xl", "llama2-7b", "llama3-8b", "smollm2")
METHODS = {"memit": MEMIT, "rome": ROME, "emmet": EMMET, "alphaedit": AlphaEdit, "ultraedit": UltraEdit, "kn": KN} | {
    "ft": FineTuning,
    "ft-l": FineTuning,
    "ft-m": FineTuning,
    "mend": MEND,
    "train_mend": MENDTraining,
}
AS_PUBLISHED = ("emmet", "alphaedit", "ultraedit", "kn")  # without RECT
every_config = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def _method(path):
    return path.stem.rpartition("_")[0]


@pytest.fixture(scope="module")
def parser():
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    # callbacks alone, since building a Trainer asks for the device
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(EditData, "data")
    return parser


def comments(path):
    """The comment that a file opens with, as lines without the sign, and all other comments."""
    text = path.read_text(encoding="utf-8")
    opening = re.match(r"(#.*\n)+", text)
    assert opening, f"{path.name} does not open with a comment"
    return [line.removeprefix("#").strip() for line in opening[0].splitlines()], re.findall(r"#.*", text)


def searched(steps, lr, weight_decay, clamp):
    return {"steps": steps, "lr": lr, "weight_decay": weight_decay, "clamp": clamp, "kl": 0.0625}


PUBLISHED = {
    "rome_gpt2xl": {"layers": [17], "search": searched(20, 0.5, 0.5, 4)},
    "rome_gptj-6b": {"layers": [5], "search": searched(20, 0.5, 0.5, 4)},
    "rome_llama-7b": {"layers": [5], "search": searched(25, 0.5, 1e-3, 4)},
    "rome_llama3-8b": {"layers": [5], "search": searched(25, 0.5, 1e-3, 4)},
    "memit_gpt2xl": {
        "layers": [13, 14, 15, 16, 17],
        "moments_weight": 20_000,
        "search": searched(20, 0.5, 0.5, 0.75),
    },
    "memit_gptj-6b": {
        "layers": [3, 4, 5, 6, 7, 8],
        "moments_weight": 15_000,
        "search": searched(25, 0.5, 0.5, 0.75),
    },
    "memit_llama-7b": {"layers": [4, 5, 6, 7, 8], "moments_weight": 15_000, "search": searched(25, 0.5, 1e-3, 4)},
    "memit_llama3-8b": {"layers": [4, 5, 6, 7, 8], "moments_weight": 15_000, "search": searched(25, 0.1, 0.5, 0.75)},
    "alphaedit_gpt2xl": {"layers": [13, 14, 15, 16, 17], "threshold": 0.02, "ridge": 10},
    "alphaedit_llama3-8b": {"layers": [4, 5, 6, 7, 8], "threshold": 0.02, "ridge": 10},
    "emmet_llama2-7b": {"layers": [5], "ridge": 0.1},
    "ultraedit_llama3-8b": {"lr": 1e-6},
    "ft_gpt2xl": {"layers": [0], "loss": "last", "steps": 25, "lr": 5e-4, "norm_box": None, "rank": None, "stop": 1e-2},
    "ft-l_gpt2xl": {"layers": [0], "loss": "last", "steps": 25, "lr": 5e-4, "norm_box": 5e-4, "stop": 1e-2},
    "ft-m_gpt2xl": {"layers": [0], "loss": "target", "steps": 25, "lr": 5e-4, "norm_box": None},
    "kn_gpt2xl": {"layers": None, "steps": 20, "threshold": 0.2, "share": 0.7, "old_weight": 2, "new_weight": 2},
    "train_mend_gpt2xl": {"layers": [45, 46, 47], "rank": 1920, "edit_weight": 0.1, "locality_weight": 1}
    | {"edit_lr": 1e-4},
}
"""What the source says that each file's first line names; where a file says nothing, the class's default has to."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_is_as_published(name, parser):
    options = parser.parse_args(["--config", str(configs_folder() / f"{name}.yaml")]).model.init_args.as_dict()
    search = PUBLISHED[name].get("search", {})
    assert {key: options["search"][key] for key in search} == search
    others = {key: value for key, value in PUBLISHED[name].items() if key != "search"}
    assert {key: options[key] for key in others} == others


def test_all_are_there():
    for method in METHODS:
        models = MODELS if method in ("memit", "rome") else FEWER_MODELS
        assert {f"{method}_{model}" for model in models} <= {path.stem for path in FILES}


@every_config
def test_fits_the_signatures(path, parser):
    config = parser.parse_args(["--config", str(path)])
    built = parser.instantiate_classes(config)
    method = METHODS[_method(path)]
    assert type(built.model) is method
    assert built.model.adapter is None, "building an editor loads no model"
    assert built.data.batch_size == 1 or method is not ROME
    assert built.data.batch_size >= 1
    assert built.model.layers == sorted(set(built.model.layers))
    if method is MENDTraining:
        assert [type(callback) for callback in built.trainer.callbacks] == [EarlyStopping]
        assert built.data.held_out > 0
    elif _method(path) in AS_PUBLISHED:
        assert built.trainer.callbacks is None
    else:
        assert [type(callback) for callback in built.trainer.callbacks] == [RECT]
        assert config.trainer.callbacks[0].init_args.keep == 0.4
    assert len(built.model.layers) == 1 or method is not ROME


@every_config
def test_says_only_what_matters(path):
    """Every value is looked at by its key once: YAML drops the first of two silently."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{path.name}: {keys}"
        return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=Strict)
    assert config.keys() == {"model", "data", "trainer"}


@every_config
def test_opens_with_the_exact_commands(path, parser):
    opening, _ = comments(path)
    commands = [shlex.split(line, comments=True) for line in opening if line.startswith("python ")]
    assert ["python", "-m", "rect_lightning", "fit", "--config", path.name] in commands
    as_published = _method(path) in AS_PUBLISHED
    other = "--trainer.callbacks+=rect_lightning.callbacks.RECT" if as_published else "--trainer.callbacks null"
    assert path.stem.startswith("train_") or any(other in " ".join(command) for command in commands)
    for python, m, module, subcommand, *arguments in commands:
        assert (python, m, module) == ("python", "-m", "rect_lightning")
        assert subcommand in ("fit", "validate", "test", "predict", "moments")
        assert arguments[:2] == ["--config", path.name]
        parser.parse_args(["--config", str(path), *arguments[2:]])


@every_config
def test_the_options_that_comments_name_exist(path, parser):
    _, all_comments = comments(path)
    options = [shlex.split(option) for option in re.findall(r"`(--[^`]+)`", "\n".join(all_comments))]
    assert options
    before = parser.parse_args(["--config", str(path)])
    for option in options:
        assert parser.parse_args(["--config", str(path), *option]) != before, f"{option} changes nothing"


def test_a_misspelt_option_is_refused(parser, tmp_path):
    text = (configs_folder() / "memit_gpt2xl.yaml").read_text(encoding="utf-8")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace("moments_weight", "moment_weight"))
    assert wrong.read_text() != text
    with pytest.raises(Exception, match="moment_weight"):
        parser.parse_args(["--config", str(wrong)])
