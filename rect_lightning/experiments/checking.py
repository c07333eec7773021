"""All configurations of a grid are parsed and built before the first cell starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rect_lightning.experiments.cell import Cell
from rect_lightning.parser import reason


def check(cells: Sequence[Cell]) -> None:
    """Parse the cells' configurations and build what they name; then read their data. No model is loaded.

    Raises:
        ValueError: Some are wrong. All reasons are told, each with a cell that it is of.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser

    from rect_lightning.data import EditData
    from rect_lightning.editors import Editor

    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)  # building one asks for the device
    parser.add_lightning_class_args(Editor, "model", subclass_mode=True)
    parser.add_lightning_class_args(EditData, "data")

    built: dict[str, Any] = {}

    def build(cell: Cell) -> None:
        data = parser.instantiate_classes(parser.parse_object(cell.config)).data
        built.setdefault(repr(cell.config.get("data")), (cell, data))

    _all_or_reasons(cells, build)
    data = {cell.name: data for cell, data in built.values()}
    _all_or_reasons([cell for cell, _ in built.values()], lambda cell: _read(data[cell.name]))


def _read(data: Any) -> None:
    data.prepare_data()
    data.setup("fit")


def _all_or_reasons(cells: Sequence[Cell], do: Callable[[Cell], None]) -> None:
    wrong: dict[str, list[str]] = {}
    for cell in cells:
        try:
            do(cell)
        except (Exception, SystemExit) as error:
            wrong.setdefault(reason(str(error)), []).append(cell.name)
    if wrong:
        told = [
            f"{names[0]}{f' and {len(names) - 1} more' * bool(names[1:])}: {error}" for error, names in wrong.items()
        ]
        raise ValueError("\n".join(["Nothing was started, since configurations are wrong.", *told]))
