"""The command line: Lightning's fit, validate, test and predict, and what only this tool does."""

import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from torch import distributed

from rect_lightning import harness, reports, reuse
from rect_lightning.cache import cache_dir
from rect_lightning.callbacks.running import RunningCheckpoint
from rect_lightning.callbacks.summary import Summary
from rect_lightning.data import EditData
from rect_lightning.editors import Editor
from rect_lightning.editors.locate_then_edit import LocateThenEdit
from rect_lightning.experiments.command import experiment
from rect_lightning.parser import EditParser, reason
from rect_lightning.runs import checkpoint_file
from rect_lightning.shipped import find_config

_log = logging.getLogger("rect_lightning")

COMMANDS: dict[str, Callable[..., None]] = {
    "export": reuse.export,
    "apply": reuse.apply,
    "revert": reuse.revert,
    "lm-eval": harness.lm_eval,
    "report": reports.report,
}
"""Commands that need neither data nor a Trainer."""


class EditTrainer(Trainer):
    """A Trainer that can also do what comes before an edit."""

    def validate(self, model: Any = None, *, verbose: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """Measure the requests on the clean model and on the edited one."""
        return super().validate(model, verbose=verbose, **kwargs)

    def test(self, model: Any = None, *, verbose: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """The same as validate."""
        return super().test(model, verbose=verbose, **kwargs)

    def moments(self, model: Editor, datamodule: EditData | None = None) -> None:
        """Estimate the second moments that an editor needs and cache them, without editing anything.

        Several processes share the text.

        Args:
            model: The editor.
            datamodule: Not needed.

        Raises:
            TypeError: It is an editor that uses none.
        """
        if not isinstance(model, LocateThenEdit) or model.moments is None:
            raise TypeError(
                f"{type(model).__name__} as configured uses no second moments: there is nothing to prepare."
            )
        if self.strategy.launcher is None:
            self._moments(model)
        else:
            self.strategy.launcher.launch(self._moments, model, trainer=self)

    def _moments(self, model: LocateThenEdit) -> None:
        self.strategy.connect(model)
        self.strategy.setup_environment()
        model.trainer = self
        model.configure_model()
        model.to(self.strategy.root_device)
        model.prepare_moments()
        rank_zero_info("The second moments of layers %s are in %s.", model.layers, cache_dir() / "moments")


class SaveConfig(SaveConfigCallback):
    """Lightning's, without the checkpoint that a run began with: what reads the file means this run, not that one."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:
        config = config.clone()
        if "ckpt_path" in config:
            config["ckpt_path"] = None
        super().__init__(parser, config, *args, **kwargs)


class EditCLI(LightningCLI):
    """LightningCLI with the package's configurations, and a run folder with all that a run leaves."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands, and ``moments``."""
        return {**LightningCLI.subcommands(), "moments": {"model", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, after giving the names of shipped configurations their paths; find or refuse the checkpoint."""
        if args is None:
            args = sys.argv[1:]
        if isinstance(args, list):
            self.config = parser.parse_args(with_shipped_configs(args))
        else:
            super().parse_arguments(parser, args)
        asked = self.config.get(self.config.subcommand, {})
        if asked.get("ckpt_path"):
            asked["ckpt_path"] = checkpoint_file(str(asked["ckpt_path"]), asked["trainer"])

    def after_fit(self) -> None:
        """Measure, where a resumed run had only that left to do."""
        if isinstance(self.model, Editor) and self.model.operations and not self.model.results["after"]:
            self.trainer.validate(self.model, datamodule=self.datamodule)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One pass over the requests, logged at every edit operation."""
        parser.set_defaults(
            {
                "trainer.max_epochs": 1,
                "trainer.devices": 1,
                "trainer.log_every_n_steps": 1,
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
                # without a logger a run's files go there, and not over a config.yaml that lies here
                "trainer.default_root_dir": "runs",
            }
        )


def run() -> None:
    """The command: `main`, with what this package refuses told in a line and not as a traceback."""
    _log.addHandler(logging.StreamHandler())
    _log.setLevel(logging.INFO)
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
        "lm_eval.models.huggingface",
    ):
        logging.getLogger(name).addFilter(_is_news)
    try:
        main()
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        if not _is_refusal(error):
            raise
        sys.exit("\n".join([f"{type(error).__name__}: {reason(str(error))}", *getattr(error, "__notes__", [])]))
    else:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # its threads would be cut off by the end of the process


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning's is more than advice on other products, or a default that is not in force here."""
    advice = (
        "litlogger",
        "litmodels",
        "`weights_only` was not set",
        "`pretrained` model kwarg",
        "already-initialized model",
    )
    return not any(words in record.getMessage() for words in advice)


def _is_refusal(error: BaseException) -> bool:
    """Whether an error was raised on purpose, here or by the parser about an option, and is no bug."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if "jsonargparse" in Path(last.filename).parts:
        return isinstance(error, ValueError)
    return Path(last.filename).is_relative_to(Path(__file__).parent) and (last.line or "").startswith("raise ")


def main(args: ArgsType = None) -> None:
    """Run a command line.

    Args:
        args: The arguments; those of the process if not given.
    """
    # edits are computed in eval mode on purpose, and requests are few: neither needs a warning
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    warnings.filterwarnings("ignore", message=r".*does not have many workers")
    warnings.filterwarnings("ignore", message=r"The dirpath has changed")  # of course: each run has a folder of its own
    warnings.filterwarnings("ignore", message=r".*LeafSpec", module=r"lightning\.")
    # a checkpoint is of whole operations, as it should be
    warnings.filterwarnings("ignore", message=r"Using ModelCheckpoint with manual optimization")
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list) and words[:1] == ["experiment"]:
        experiment(words[1:])
        return
    if isinstance(words, list) and words and words[0] in COMMANDS:
        _command(words[0], words[1:])
        return
    EditCLI(
        LightningModule,
        EditData,
        trainer_class=EditTrainer,
        parser_class=EditParser,
        subclass_mode_model=True,
        seed_everything_default=0,
        trainer_defaults={
            "logger": {
                "class_path": "rect_lightning.loggers.RunFolder",
                "init_args": {"save_dir": "runs", "name": None},
            },
            "callbacks": [
                # no version counter: in a folder that is used again, `edited` belongs to the rest of what lies there;
                # by itself it saves only after validation, where that is not at the end of each epoch
                ModelCheckpoint(
                    filename="edited", save_last=True, save_on_train_epoch_end=True, enable_version_counter=False
                ),
                RunningCheckpoint(),
                Summary(),
            ],
        },
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "python -m rect_lightning",
            "description": "Edit language models, and measure what the edits did and what they harmed.",
            "epilog": f"Besides: {', '.join(COMMANDS)}, for edited models and pages; `export --help`. And experiment, for "
            "grids of fits; `experiment --help`.",
        },
        args=args,
    )


def _command(name: str, args: list[str]) -> None:
    """Run one of `COMMANDS`, whose required options are positional."""
    function = COMMANDS[name]
    description = str(function.__doc__).partition("\n\n    Args:")[0]
    parser = ArgumentParser(prog=f"rect_lightning {name}", description=description)
    parser.add_function_arguments(function, as_positional=True, sub_configs=False)
    function(**parser.parse_args(args))


def with_shipped_configs(args: Sequence[str]) -> list[str]:
    """Arguments in which ``--config NAME`` points to the package's own configuration, where no file NAME is at hand.

    Raises:
        SystemExit: A named configuration is neither.
    """
    found: list[str] = []
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if equals and flag in ("--config", "-c"):
            found.append(f"{flag}={_config(value)}")
        elif i and args[i - 1] in ("--config", "-c"):
            found.append(_config(arg))
        else:
            found.append(arg)
    return found


def _config(name: str) -> str:
    try:
        return find_config(name)
    except FileNotFoundError as error:
        sys.exit(str(error))
