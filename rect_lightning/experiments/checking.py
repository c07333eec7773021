"""All configurations of a grid are parsed and built before the first cell starts, and their data read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from rect_lightning.experiments.cell import Cell


def check(cells: Sequence[Cell]) -> None:
    """Parse the cells' configurations and build what they name; then read their data, once each. No model is loaded.

    Raises:
        ValueError: Some are wrong. All reasons are told, each with a cell that it is of.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser

    from rect_lightning.callbacks import SideEffects
    from rect_lightning.data import EditData
    from rect_lightning.editors import Editor

    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)  # building one asks for the device
    parser.add_lightning_class_args(Editor, "model", subclass_mode=True)
    parser.add_lightning_class_args(EditData, "data")
    readings: dict[str, tuple[Cell, Callable[[], None]]] = {}

    def build(cell: Cell) -> None:
        # a copy, since parsing completes what it is given
        built: Any = parser.instantiate_classes(parser.parse_object(deepcopy(cell.config)))
        readings.setdefault(repr(cell.config.get("data")), (cell, partial(built.data.setup, "fit")))
        for asked, callback in zip(cell.config["trainer"]["callbacks"], built.trainer.callbacks, strict=True):
            if isinstance(callback, SideEffects):
                readings.setdefault(repr(asked), (cell, partial(callback.setup, built.trainer, built.model, "fit")))

    _all_or_reasons((cell, partial(build, cell)) for cell in cells)
    _all_or_reasons(readings.values())


def _all_or_reasons(steps: Iterable[tuple[Cell, Callable[[], None]]]) -> None:
    from rect_lightning.parser import reason

    wrong: dict[str, list[str]] = {}
    for cell, step in steps:
        try:
            step()
        except (Exception, SystemExit) as error:
            wrong.setdefault(reason(str(error)), []).append(cell.name)
    if wrong:
        told = [
            f"{names[0]}{f' and {len(names) - 1} more' * bool(names[1:])}: {error}" for error, names in wrong.items()
        ]
        raise ValueError("\n".join(["Nothing was started, since configurations are wrong.", *told]))
