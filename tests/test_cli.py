"""The command line, in this process, on a tiny model in a folder."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from rect_lightning import cli
from rect_lightning.checkpoint_io import read_checkpoint
from rect_lightning.cli import main
from rect_lightning.shipped import configs_folder
from tests import tiny
from tests.editors.test_base import PROSE, RECORDS, opinionated

TINY = """
model:
  class_path: rect_lightning.editors.MEMIT
  init_args:
    base: {name: BASE}
    layers: [1, 2]
    moments_weight: 0.1
    search: {steps: 20, lr: 0.5, weight_decay: 0, clamp: 100, kl: 0}
    prefixes: {templates: ["{}", "I think so. {}"]}
    moments: {source: text.txt, tokens: 800, context: 32}
    prose: text.txt
data:
  path: facts.jsonl
  batch_size: 2
trainer:
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
    - class_path: rect_lightning.callbacks.RECT
      init_args: {keep: 0.9}
"""


def furnish(folder, base):
    """A user's working directory: facts, a text and a configuration."""
    (folder / "facts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (folder / "text.txt").write_text(PROSE)
    (folder / "tiny.yaml").write_text(TINY.replace("BASE", str(base)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    opinionated("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def settle(folder, patch):
    patch.chdir(folder)
    patch.setenv("RECT_LIGHTNING_CACHE", str(folder / "cache"))
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # set by the command line, and taken back with the fixture
        patch.setenv(name, "0")


@pytest.fixture
def here(tmp_path, base, monkeypatch):
    """A working directory of its own for one test."""
    furnish(tmp_path, base)
    settle(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, base):
    """A working directory after one fit."""
    folder = tmp_path_factory.mktemp("fitted")
    furnish(folder, base)
    with pytest.MonkeyPatch.context() as patch:
        settle(folder, patch)
        main(["fit", "--config", "tiny.yaml"])
    return folder


@pytest.fixture
def after_fit(fitted, monkeypatch):
    settle(fitted, monkeypatch)
    return fitted


def newest(folder):
    return max((folder / "runs").glob("version_*"), key=lambda path: int(path.name.partition("_")[2]))


def printed(capsys, *arguments):
    """The configuration that these arguments amount to."""
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--print_config"])
    assert end.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def no_model(*_, **__):
    raise AssertionError("the model is loaded")


# A run and its folder ------------------------------------------------------------------------------------------------


def test_fit_leaves_a_run_folder(fitted):
    run = fitted / "runs" / "version_0"
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert files >= {
        "config.yaml", "metrics.csv", "metrics.json", "requests.json", "samples.json",
        "provenance.json", "relative_change.json", "checkpoints/edited.ckpt",
    }  # fmt: skip
    results = json.loads((run / "metrics.json").read_text())
    assert results.keys() == {"before", "after"}
    assert results["before"].keys() == results["after"].keys() >= {"efficacy/exact", "perplexity/text"}
    assert results["before"]["efficacy/exact"] == 0
    assert results["after"]["efficacy/exact"] == 1
    told = json.loads((run / "provenance.json").read_text())
    assert told["requests"] == ["a", "b", "c", "d"]
    assert told["operations"] == 2
    assert told == {k: v for k, v in checkpoint(run)["rect_lightning"].items() if k in told}
    each = json.loads((run / "requests.json").read_text())
    for when in ("before", "after"):
        of_each = [request[when]["efficacy/token"] for request in each]
        assert sum(of_each) / len(of_each) == pytest.approx(results[when]["efficacy/token"])
    samples = json.loads((run / "samples.json").read_text())
    assert len(samples) == 4
    assert samples[1]["request"] == "The sport of LeBron James → French"
    assert samples[1]["after"].startswith(" French")


def checkpoint(run):
    return torch.load(run / "checkpoints" / "edited.ckpt", weights_only=True)


def test_every_operation_is_logged(fitted):
    with open(fitted / "runs" / "version_0" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["edit/requests"] for row in rows if row["edit/requests"]] == ["2.0", "4.0"]
    (kept,) = {name for name in rows[0] if re.fullmatch(r"rect/.*layers\.1\..*/kept", name)}
    assert [float(row[kept]) for row in rows if row[kept]] == pytest.approx([0.9, 0.9], abs=1e-3)
    (last,) = [row for row in rows if row["after/efficacy/exact"]]
    assert float(last["after/efficacy/exact"]) == 1


def test_the_saved_configuration_makes_the_same_edits_again(here):
    main(["fit", "--config", "tiny.yaml"])
    main(["fit", "--config", "runs/version_0/config.yaml"])
    first, second = (checkpoint(here / "runs" / f"version_{i}")["state_dict"] for i in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = ((here / "runs" / f"version_{i}" / "metrics.json").read_text() for i in (0, 1))
    assert one == two


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_measuring_a_checkpoint_gives_the_fit_s_metrics(after_fit, stage):
    main([stage, "--config", "tiny.yaml", "--ckpt_path", "runs/version_0/checkpoints/edited.ckpt"])
    run = newest(after_fit)
    assert run.name != "version_0"
    for name in ("metrics.json", "samples.json"):
        found, expected = (json.loads((folder / name).read_text()) for folder in (run, run.parent / "version_0"))
        assert found == expected


def test_predict_shows_the_continuations(after_fit, capsys):
    main([
        "predict", "--config", "tiny.yaml", "--ckpt_path", "runs/version_0/checkpoints/edited.ckpt",
        "--data.prompts", '["The sport of LeBron James"]',
    ])  # fmt: skip
    out = capsys.readouterr().out
    shown = " ".join(out.replace("│", " ").split())  # a cell of the table wraps
    for word in ("The sport of LeBron", "before", "after", "French"):
        assert word in shown
    [prediction] = json.loads((newest(after_fit) / "predictions.json").read_text())
    assert prediction["prompt"] == "The sport of LeBron James"
    assert "French" in prediction["before"] + prediction["after"]


def test_predict_needs_a_checkpoint_and_prompts_alone(fitted, tmp_path, monkeypatch):
    """From an empty directory, with neither the facts nor the text of the run."""
    settle(tmp_path, monkeypatch)
    (tmp_path / "my_prompts.txt").write_text("The sport of LeBron James\n\nThe capital of Spain\n")
    run = fitted / "runs" / "version_0"
    main([
        "predict", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt"),
        "--data.prompts", "my_prompts.txt", "--model.prose", "null",
    ])  # fmt: skip
    found = json.loads((tmp_path / "runs" / "version_0" / "predictions.json").read_text())
    assert [prediction["prompt"] for prediction in found] == ["The sport of LeBron James", "The capital of Spain"]
    assert found[0]["after"].startswith(" French")
    assert not found[0]["before"].startswith(" French")


def test_moments_are_computed_ahead(here, monkeypatch):
    main(["moments", "--config", "tiny.yaml"])
    files = {path.name for path in (here / "cache" / "moments").rglob("*.safetensors")}
    assert files == {f"model.layers.{layer}.mlp.down_proj.safetensors" for layer in (1, 2)}
    assert not list(here.glob("runs/*/checkpoints/*")), "nothing is edited"

    def no_pass(*_, **__):
        raise AssertionError("the moments are computed again")

    monkeypatch.setattr("rect_lightning.solving.moments._pass", no_pass)
    main(["fit", "--config", "tiny.yaml"])


def test_a_fit_prints_before_and_after(here, capsys):
    main(["fit", "--config", "tiny.yaml", "--data.limit", "2", "--trainer.callbacks", "null"])
    out = capsys.readouterr().out
    assert re.search(r"efficacy/exact\W+0\.000\W+1\.000", out)
    assert "perplexity/text" in out
    assert "Run folder: runs/version_0" in out.replace("\n", "")
    with open("runs/version_0/metrics.csv", newline="") as file:
        assert not [name for name in next(csv.reader(file)) if name.startswith("rect/")]


def test_a_fast_dev_run_makes_one_operation_and_leaves_nothing(here, capsys):
    main(["fit", "--config", "tiny.yaml", "--trainer.fast_dev_run", "true"])
    assert "2 edits by MEMIT in 1 operation, sequential, with RECT" in capsys.readouterr().out
    assert not (here / "runs").exists()
    assert not (here / "checkpoints").exists()


def test_limit_train_batches(here):
    main(["fit", "--config", "tiny.yaml", "--trainer.limit_train_batches", "1"])
    assert json.loads((here / "runs" / "version_0" / "provenance.json").read_text())["requests"] == ["a", "b"]


def test_a_run_in_a_folder_that_exists_replaces_what_is_there(here):
    again = ["fit", "--config", "tiny.yaml", "--trainer.logger.version", "0"]
    main([*again, "--data.limit", "2"])
    first = set((here / "runs" / "version_0").rglob("*"))
    with pytest.warns(UserWarning, match="exists and is not empty"):
        main([*again, "--data.offset", "3"])
    run = here / "runs" / "version_0"
    assert set(run.rglob("*")) == first
    assert checkpoint(run)["rect_lightning"]["requests"] == ["d"]
    assert json.loads((run / "provenance.json").read_text())["requests"] == ["d"]
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["offset"] == 3
    with open(run / "metrics.csv", newline="") as file:
        assert [row["edit/requests"] for row in csv.DictReader(file) if row["edit/requests"]] == ["1.0"]


def test_several_loggers(here):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install '.[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "board", "name": ""}},
        {"class_path": "CSVLogger", "init_args": {"save_dir": "table", "name": ""}},
    ]
    main(["fit", "--config", "tiny.yaml", "--trainer.logger", json.dumps(loggers)])
    run = here / "board" / "version_0"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "metrics.json", "checkpoints"}, "the first logger's is the run folder"
    board = EventAccumulator(str(run)).Reload()
    assert [event.value for event in board.Scalars("edit/requests")] == [2, 4]
    assert [event.value for event in board.Scalars("after/efficacy/exact")] == [1]
    with open(here / "table" / "version_0" / "metrics.csv", newline="") as file:
        assert [row["edit/requests"] for row in csv.DictReader(file) if row["edit/requests"]] == ["2.0", "4.0"]
    assert not (here / "runs").exists()


def test_without_a_logger_files_go_to_the_runs_folder(here):
    (here / "config.yaml").write_text("mine")
    main(["fit", "--config", "tiny.yaml", "--trainer.logger", "false"])
    assert (here / "config.yaml").read_text() == "mine"
    assert {path.name for path in (here / "runs").iterdir()} >= {"config.yaml", "metrics.json", "checkpoints"}


def test_two_processes_leave_the_run_folder_of_one(here, fitted):
    command = [sys.executable, "-m", "rect_lightning", "fit", "--config", "tiny.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    run = subprocess.run(
        [*command, "--trainer.strategy", "ddp", "--trainer.devices", "2"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("4 edits by MEMIT in 2 operations") == 1
    assert [path.name for path in (here / "runs").iterdir()] == ["version_0"]
    one, two = fitted / "runs" / "version_0", here / "runs" / "version_0"
    files = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (one, two)]
    assert files[0] == files[1]
    results = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    for when in ("before", "after"):
        assert results[0][when] == pytest.approx(results[1][when], rel=1e-4)
    each = [[request["id"] for request in json.loads((f / "requests.json").read_text())] for f in (one, two)]
    assert each[0] == each[1] == ["a", "b", "c", "d"]
    for name in ("samples.json", "provenance.json"):
        assert (one / name).read_text() == (two / name).read_text()
    weights = [checkpoint(folder)["state_dict"] for folder in (one, two)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=0)


# Going on ------------------------------------------------------------------------------------------------------------


class CtrlC(Callback):
    """Stops a run after its first operation."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            raise KeyboardInterrupt


def stopped_fit(*arguments):
    stop = '--trainer.callbacks+={"class_path": "tests.test_cli.CtrlC"}'
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main(["fit", "--config", "tiny.yaml", *arguments, stop])


@pytest.mark.parametrize("where", [[], ["--trainer.logger.save_dir", "elsewhere"]])
def test_a_stopped_fit_goes_on_from_last(here, where, caplog):
    main(["fit", "--config", "tiny.yaml", "--trainer.logger.save_dir", "whole"])
    stopped_fit(*where)
    root = here / (where or ["", "runs"])[1]
    assert [p.name for p in (root / "version_0" / "checkpoints").iterdir()] == ["running.ckpt"]
    main(
        ["validate", "--config", "tiny.yaml", *where, "--ckpt_path", "last"]
    )  # leaves a run folder without checkpoints
    with caplog.at_level("INFO"):
        main(["fit", "--config", "tiny.yaml", *where, "--ckpt_path", "last"])
    assert f"--ckpt_path last: {root.relative_to(here)}/version_0/checkpoints/running.ckpt" in caplog.text
    assert same_weights(checkpoint(here / "whole" / "version_0"), checkpoint(root / "version_2"))
    config = yaml.safe_load((root / "version_2" / "config.yaml").read_text())
    assert config["ckpt_path"] is None, "the run's configuration would mean the checkpoint that it began with"
    for name in ("metrics.json", "requests.json", "samples.json"):
        assert (here / "whole" / "version_0" / name).read_text() == (root / "version_2" / name).read_text()


def same_weights(one, two):
    one, two = one["state_dict"], two["state_dict"]
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_last_where_there_is_none(here, monkeypatch):
    monkeypatch.setattr("rect_lightning.models.Source.load", no_model)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint to go on from in .*runs"):
        main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last"])


def test_last_where_the_newest_is_broken(after_fit, tmp_path, monkeypatch):
    shutil.copytree(after_fit / "runs" / "version_0", tmp_path / "copy" / "runs" / "version_0")
    furnish(tmp_path / "copy", after_fit)
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr("rect_lightning.models.Source.load", no_model)
    last = Path("runs/version_0/checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[:-5000])
    os.utime(last.with_name("running.ckpt"), (1, 1))
    message = (
        r"newest checkpoint cannot be used\. \S*last\.ckpt cannot be read.*--ckpt_path runs/version_0/\S*edited\.ckpt"
    )
    with pytest.raises(ValueError, match=message):
        main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last"])


@pytest.mark.parametrize(("content", "message"), [(None, "no checkpoint some"), (b"hello", "cannot be read")])
def test_a_bad_checkpoint_is_refused_before_the_model_is_loaded(here, monkeypatch, content, message):
    monkeypatch.setattr("rect_lightning.models.Source.load", no_model)
    if content:
        (here / "some.ckpt").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        main(["fit", "--config", "tiny.yaml", "--ckpt_path", "some.ckpt"])


def test_a_finished_run_is_measured(after_fit):
    with pytest.warns(UserWarning, match=r"All requests .* are edited \(4\), there is nothing to go on with"):
        main(["fit", "--config", "tiny.yaml", "--ckpt_path", "runs/version_0/checkpoints/last.ckpt"])
    run, first = newest(after_fit), after_fit / "runs" / "version_0"
    assert (run / "metrics.json").read_text() == (first / "metrics.json").read_text()


def test_what_the_last_validation_did_not_see_is_saved_and_measured_all_the_same(here):
    main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2"])
    saved = here / "runs" / "version_0"
    assert checkpoint(saved)["rect_lightning"]["operations"] == 6
    main(["validate", "--config", "tiny.yaml", "--ckpt_path", str(saved / "checkpoints" / "last.ckpt")])
    assert (newest(here) / "metrics.json").read_text() == (saved / "metrics.json").read_text()


def test_a_run_that_was_stopped_while_measuring_goes_on(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("rect_lightning.editors.scored.Scored.now", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["fit", "--config", "tiny.yaml"])
    main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last"])
    results = json.loads((here / "runs" / "version_1" / "metrics.json").read_text())
    assert results["after"]["efficacy/exact"] == 1
    assert (here / "runs" / "version_1" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("change", [["--data.batch_size", "1"], ["--data.offset", "1"], ["--data.shuffle", "true"]])
def test_going_on_with_other_data_is_refused(here, change):
    stopped_fit()
    with pytest.raises(ValueError, match=r"has edited a, b in 1 operations .* but the data as configured begin with"):
        main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last", *change])


def test_going_on_with_other_moments_is_refused(here):
    stopped_fit()
    with pytest.raises(ValueError, match="second moments are not those of the run"):
        main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--model.moments.tokens", "700"])


def test_going_on_with_another_configuration_is_told(here):
    stopped_fit()
    with pytest.warns(UserWarning, match="configuration is not that of the checkpoint: moments_weight, regularisers"):
        main([
            "fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--model.moments_weight", "0.2",
            "--trainer.callbacks.init_args.keep", "0.5", "--model.prose", "null",
        ])  # fmt: skip


def test_a_checkpoint_tells_how_it_was_made(fitted):
    told = checkpoint(fitted / "runs" / "version_0")["rect_lightning"]
    config = told["config"]
    assert config["editor"]["search"]["steps"] == 20
    assert config["editor"]["moments_weight"] == 0.1
    (rect,) = config["regularisers"]
    assert (rect["callback"], rect["keep"], rect["scope"]) == ("rect_lightning.callbacks.rect.RECT", 0.9, "step")
    assert (config["data"]["path"], config["data"]["batch_size"], config["data"]["seed"]) == ("facts.jsonl", 2, 0)
    assert (config["seed_everything"], config["precision"]) == (0, "32-true")
    assert told["base"].keys() == {"name", "file", "revision", "sha256", "commit"}
    assert Path(told["base"]["name"]).is_absolute()


# Configurations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "where", "expected"),
    [
        ("--model.search.steps", "3", "model.init_args.search.steps", 3),
        ("--model.layers", "[0, 3]", "model.init_args.layers", [0, 3]),
        ("--model.moments.tokens", "999", "model.init_args.moments.tokens", 999),
        ("--model.moments", "null", "model.init_args.moments", None),
        ("--model.base.revision", "main", "model.init_args.base.revision", "main"),
        ("--model.step_per", "operation", "model.init_args.step_per", "operation"),
        ("--data.batch_size", "7", "data.batch_size", 7),
        ("--trainer.precision", "bf16-mixed", "trainer.precision", "bf16-mixed"),
        ("--trainer.callbacks", "null", "trainer.callbacks", None),
        ("--seed_everything", "5", "seed_everything", 5),
    ],
)
def test_any_value_can_be_overridden(here, capsys, option, value, where, expected):
    config = printed(capsys, "fit", "--config", "tiny.yaml", option, value)
    for key in where.split("."):
        config = config[key]
    assert config == expected


def test_callbacks_can_be_added(here, capsys):
    added = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval=step"]
    config = printed(capsys, "fit", "--config", "tiny.yaml", *added)
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names == ["RECT", "LearningRateMonitor"]
    assert config["trainer"]["callbacks"][0]["init_args"]["keep"] == 0.9


@pytest.mark.parametrize("arguments", [["--config", "memit_gpt2xl.yaml"], ["--config=memit_gpt2xl.yaml"]])
def test_a_shipped_configuration_is_found_from_anywhere(here, capsys, monkeypatch, arguments):
    monkeypatch.setattr("rect_lightning.models.Source.load", no_model)
    config = printed(capsys, "fit", *arguments)
    assert config["model"]["class_path"] == "rect_lightning.editors.MEMIT"
    assert config["model"]["init_args"]["base"]["name"] == "gpt2-xl"


def test_a_file_of_that_name_here_wins(here, capsys):
    (here / "memit_gpt2xl.yaml").write_text((here / "tiny.yaml").read_text())
    config = printed(capsys, "fit", "--config", "memit_gpt2xl.yaml")
    assert config["model"]["init_args"]["layers"] == [1, 2]


def test_an_unknown_configuration_lists_the_shipped_ones(here):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "memit_gpt5.yaml"])
    assert "no file memit_gpt5.yaml" in end.value.code
    assert all(path.name in end.value.code for path in configs_folder().glob("*.yaml"))


def test_help_names_the_options_and_loads_no_model(here, capsys, monkeypatch):
    monkeypatch.setattr("rect_lightning.models.Source.load", no_model)
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("fit", "validate", "test", "predict", "moments"))


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"facts\.jsonl is not there"),
        ('{"subject": "a", "prompt": "{} is"}\n', "target_new"),
        ('{"subject": "a", "prompt": "{} is", "target_new": ""}\n', "empty"),
        ('{"subject": "a", "prompt": \n', "broken JSON"),
        ("", "no records"),
    ],
)
def test_bad_data_is_refused_before_the_model_is_loaded(here, monkeypatch, content, message):
    monkeypatch.setattr("rect_lightning.models.Source.load", no_model)
    (here / "facts.jsonl").unlink()
    if content is not None:
        (here / "facts.jsonl").write_text(content)
    with pytest.raises((ValueError, OSError, SystemExit), match=message):
        main(["fit", "--config", "tiny.yaml", "--model.base.name", "/nowhere"])


def test_a_base_model_that_is_not_there(here):
    with pytest.raises((OSError, SystemExit), match="no file or folder /nowhere"):
        main(["fit", "--config", "tiny.yaml", "--model.base.name", "/nowhere"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model.strength", "-1", "strength"),
        ("--data.batch_size", "0", "batch_size must be at least 1"),
        ("--model.moments_weight", "0", "moments_weight must be positive"),
        ("--model.moments", "null", "MEMIT needs second moments"),
        ("--model.prose", "nowhere.txt", r"nowhere\.txt"),
        ("--model.mode", "sometimes", "sometimes"),
        ("--model.no_such_option", "1", "no_such_option"),
    ],
)
def test_a_bad_value_is_refused_before_the_model_is_loaded(here, monkeypatch, capsys, option, value, message):
    monkeypatch.setattr("rect_lightning.models.Source.load", no_model)
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        main(["fit", "--config", "tiny.yaml", option, value])
    assert re.search(message, f"{error.value} {capsys.readouterr().err}")


def test_a_refusal_is_told_in_a_line_and_a_bug_with_its_traceback(here, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rect_lightning", "fit", "--config", "tiny.yaml", "--data.path", "nowhere.jsonl"])
    with pytest.raises(SystemExit, match=r"nowhere\.jsonl"):
        cli.run()
    monkeypatch.setattr(cli, "main", lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        cli.run()


# Side effects --------------------------------------------------------------------------------------------------------


def test_side_effects_from_the_command_line(here):
    """Tasks by name, by class_path and from a file of one's own."""
    pairs = [("It rains.", "It is wet."), ("So it is.", "No.")]
    records = [{"sentence1": a, "sentence2": b, "label": 0} for a, b in pairs]
    (here / "rte.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tasks = [
        {"class_path": "rect_lightning.tasks.RTE", "init_args": {"path": "rte.jsonl"}},
        {
            "class_path": "rect_lightning.tasks.MultipleChoice",
            "init_args": {
                "name": "weather", "path": "rte.jsonl", "prompt": "{sentence1} So", "options": ["it is", "no"],
                "answer": "label",
            },
        },
        {"class_path": "rect_lightning.tasks.Perplexity", "init_args": {"path": "text.txt", "context": 64}},
    ]  # fmt: skip
    side = "--trainer.callbacks"
    main([
        "fit", "--config", "tiny.yaml", f"{side}+=rect_lightning.callbacks.SideEffects", f"{side}.every_n_edits", "2",
        f"{side}.tasks", json.dumps(tasks), f"{side}.limit", "2",
    ])  # fmt: skip
    with open(newest(here) / "side_effects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*dict.fromkeys(row["edits"] for row in rows)] == ["0", "2", "4"]
    scores = {row["score"] for row in rows if row["task"] != "edits"}
    assert scores == {
        "rte/paper", "rte/option", "rte/generated", "weather/option", "weather/generated", "perplexity/text",
    }  # fmt: skip
    again = yaml.safe_load((newest(here) / "config.yaml").read_text())
    assert again["trainer"]["callbacks"][-1]["init_args"]["tasks"][1]["init_args"]["name"] == "weather"


def test_names_of_tasks_on_the_command_line(here, capsys):
    side = "--trainer.callbacks"
    words = ["fit", "--config", "tiny.yaml", f"{side}+=rect_lightning.callbacks.SideEffects", f"{side}.every_n_edits=8"]
    callback = printed(capsys, *words, f"{side}.tasks", "[gsm8k, rte]")["trainer"]["callbacks"][-1]
    assert callback["class_path"].endswith("SideEffects")
    assert callback["init_args"]["tasks"] == ["gsm8k", "rte"]
    with pytest.raises(ValueError, match="did you mean gsm8k"):
        main([*words, f"{side}.tasks", "[gsm8]"])


# Modules that are no editor ------------------------------------------------------------------------------------------


def best_loss(path):
    """The validation loss that a checkpoint was kept for."""
    (state,) = [
        state for key, state in read_checkpoint(path)["callbacks"].items() if "val/loss" in key and "Best" in key
    ]
    return float(state["best_model_score"])


def test_a_hypernetwork_is_trained_and_then_edits(here, monkeypatch, capsys, caplog):
    neighbours = [{"prompt": "You know Spain", "answer": "so"}]
    records = [
        {"subject": subject, "prompt": f"The {relation} of {{}}", "target_new": "is", "neighbours": neighbours}
        for subject in ("Paris", "Madrid", "LeBron James")
        for relation in ("city", "sport")
    ]
    (here / "facts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = yaml.safe_load((here / "tiny.yaml").read_text())
    base = config["model"]["init_args"]["base"]
    options = {"base": base, "layers": [2, 3]}
    config["trainer"] |= {
        "max_epochs": 3,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.EarlyStopping",
                "init_args": {"monitor": "val/loss", "strict": False},
            }
        ],
    }
    config["data"] |= {"held_out": 2}
    config["model"] = {
        "class_path": "rect_lightning.editors.MENDTraining",
        "init_args": options | {"rank": 4, "edit_lr": 0.1},
    }
    (here / "train.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "train.yaml", "--trainer.max_epochs", "2"])
    run = newest(here)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt", "running.ckpt"]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert len([row for row in rows if row["train/loss"]]) == 4
    assert len([row for row in rows if row["val/loss"]]) == 2
    main(["fit", "--config", "train.yaml", "--ckpt_path", "last"])  # the third epoch
    rows = list(csv.DictReader((newest(here) / "metrics.csv").open()))
    assert [row["epoch"] for row in rows if row["train/loss"]] == ["2", "2"]

    best = max(here.rglob("best.ckpt"), key=lambda path: path.stat().st_mtime)  # the third may not be better
    assert f"validation loss, {best_loss(best):.4g}, is in {best.relative_to(here)}" in caplog.text
    config["data"] |= {"held_out": 0, "batch_size": 3}
    config["trainer"] = {"accelerator": "cpu", "enable_progress_bar": False}
    config["model"] = {
        "class_path": "rect_lightning.editors.MEND",
        "init_args": options | {"checkpoint": str(best), "prose": None},
    }
    (here / "mend.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "mend.yaml"])
    assert "6 edits by MEND in 2 operations" in capsys.readouterr().out
    main(["validate", "--config", "mend.yaml", "--ckpt_path", str(newest(here) / "checkpoints" / "last.ckpt")])

    monkeypatch.setattr("rect_lightning.models.Source.load", no_model)
    with pytest.raises(ValueError, match="hypernetwork for the layers"):
        main(["fit", "--config", "mend.yaml", "--model.layers", "[1]"])
