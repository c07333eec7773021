"""What a grid is: axes with named levels, and the configuration of a `fit` for each combination of them."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Any

from rect_lightning.experiments.cell import Cell, slug
from rect_lightning.experiments.reading import merged, read_mapping, written
from rect_lightning.shipped import configs_folder, find_config

Config = dict[str, Any]

COLUMNS = ("edits", "source", "name", "value", "low", "high", "n", "unparseable")
"""The columns of a grid's table besides the axes'."""

_QUIET: Config = {"trainer": {"enable_progress_bar": False}}  # a log is no terminal


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Runs for every combination of the levels of some axes.

    A cell's configuration is the base with the bases of its levels laid over it, then the common part, then its level of each
    axis, in order. What is laid over wins: mappings key by key, anything else as a whole. A base whose model is of another
    class than that of the one below leaves nothing of the latter's model and callbacks. Except callbacks: those of the
    levels are *added* to the common ones, and those of the bases are left out wherever a grid names any of its own.

    Raises:
        ValueError: An axis has no levels, no cell is left, two have one folder, or ``skip`` names what is not there.
    """

    name: str
    axes: Mapping[str, Mapping[str, Config]]
    """Axis to level to configuration, all in order. A level's ``base`` is a configuration too, see above."""
    base: Config = field(default_factory=dict)
    """What each cell starts from."""
    common: Config = field(default_factory=dict)
    """Laid over the base of all cells."""
    skip: tuple[Mapping[str, Collection[str]], ...] = ()
    """Combinations to leave out: a cell goes where each axis named has one of the levels named."""
    output: Path = Path()
    """The folder of the cells' folders and of ``table.csv``; ``runs/NAME`` if not given."""

    def __post_init__(self) -> None:
        if self.output == Path():
            object.__setattr__(self, "output", Path("runs") / slug(self.name))
        empty = [axis for axis, levels in self.axes.items() if not levels]
        if not self.axes or empty:
            raise ValueError(f"The grid {self.name} needs axes with at least one level each; empty: {empty or 'axes'}.")
        if taken := self.axes.keys() & set(COLUMNS):
            raise ValueError(
                f"The table has columns of its own called {', '.join(sorted(taken))}: give the axes other names."
            )
        for chosen in self.skip:
            self._check_levels("skip", chosen)
        names = Counter(cell.name.casefold() for cell in self.cells())
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"Cells would share a folder: {', '.join(twice[:5])}. Give their levels other names.")
        if not names:
            raise ValueError(f"skip leaves no cell of the grid {self.name}.")

    @classmethod
    def load(cls, *configs: str | Path) -> Grid:
        """Read a grid.

        Args:
            configs: YAML files, names of experiments that come with the package, or YAML written out; later ones are laid
                over earlier ones.

        Raises:
            FileNotFoundError: A file, or a configuration in ``base``, is not there.
            ValueError: It is no valid YAML, or has unknown or missing keys.
        """
        content: Config = {}
        for config in configs:
            content = merged(content, read_mapping(find_config(str(config), configs_folder() / "experiments")))
        known = [part.name for part in fields(cls)]
        for key in content:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
                raise ValueError(f"A grid has no key {key!r}; {hint}")
        if missing := {"name", "axes"} - content.keys():
            raise ValueError(f"The grid has no {' and no '.join(sorted(missing))}.")
        name = str(content["name"])
        return cls(
            name=name,
            output=Path(content.get("output") or "").expanduser(),
            base=_read_base(content.get("base")),
            common=_mapping("common", content.get("common")),
            axes={
                _name("an axis", axis): {
                    _name(f"a level of {axis}", level): _with_base(_mapping(f"{axis}: {level}", config))
                    for level, config in _mapping(f"the axis {axis}", levels).items()
                }
                for axis, levels in _mapping("axes", content["axes"]).items()
            },
            skip=tuple(
                {
                    str(axis): [str(level) for level in _listed(levels)]
                    for axis, levels in _mapping("skip", each).items()
                }
                for each in _listed(content.get("skip"))
            ),
        )

    def text(self) -> str:
        """The grid as YAML that `load` reads, all bases written out."""
        skip = [{axis: list(levels) for axis, levels in each.items()} for each in self.skip]
        parts = {"name": self.name, "output": str(self.output), "base": self.base, "common": self.common}
        return written({**parts, "axes": {axis: dict(levels) for axis, levels in self.axes.items()}, "skip": skip})

    def cells(self, only: Mapping[str, Collection[str]] | None = None) -> list[Cell]:
        """All cells, in order, the last axis fastest.

        Args:
            only: Levels of axes to which to keep.

        Raises:
            ValueError: An axis or a level is not there.
        """
        only = only or {}
        self._check_levels("only", only)
        products = itertools.product(*self.axes.values())
        chosen = (dict(zip(self.axes, levels, strict=True)) for levels in products)
        return [
            Cell(levels=levels, config=self._config(levels), output=self.output)
            for levels in chosen
            if all(levels[axis] in kept for axis, kept in only.items())
            and not any(all(levels[axis] in left_out for axis, left_out in each.items()) for each in self.skip)
        ]

    def _config(self, levels: Mapping[str, str]) -> Config:
        chosen = [dict(self.axes[axis][level]) for axis, level in levels.items()]
        bases = [level.pop("base", {}) for level in chosen]
        under = reduce(_laid_over, [_QUIET, self.base, *bases])
        callbacks = _callbacks(self.common) if self._names_callbacks() else _callbacks(under)
        config = reduce(merged, [self.common, *chosen], under)
        config["trainer"] = {**(config["trainer"] or {}), "callbacks": sum(map(_callbacks, chosen), callbacks)}
        config["trainer"].pop("logger", None)  # a cell's files go to the cell's folder
        config.pop("ckpt_path", None)
        return copy.deepcopy(config)

    def _names_callbacks(self) -> bool:
        levels = [level for levels in self.axes.values() for level in levels.values()]
        return any("callbacks" in (config.get("trainer") or {}) for config in (self.common, *levels))

    def _check_levels(self, what: str, chosen: Mapping[str, Collection[str]]) -> None:
        for axis, levels in chosen.items():
            if axis not in self.axes:
                raise ValueError(f"{what}: there is no axis {axis!r}; the axes are {', '.join(self.axes)}.")
            for level in levels:
                if level not in self.axes[axis]:
                    raise ValueError(f"{what}: {axis} has no level {level!r}, but {', '.join(self.axes[axis])}.")


def _read_base(files: Any) -> Config:
    """The configurations in these files, or written out, later ones laid over earlier ones."""
    return reduce(
        _laid_over,
        (each if isinstance(each, dict) else read_mapping(find_config(str(each))) for each in _listed(files)),
        {},
    )


def _laid_over(under: Config, base: Config) -> Config:
    """A base over another, of which nothing is left of the model and the callbacks where its model is of another class."""
    classes = [(config.get("model") or {}).get("class_path") for config in (under, base)]
    if None not in classes and classes[0] != classes[1]:
        under = {key: value for key, value in under.items() if key != "model"}
        if under.get("trainer"):
            under["trainer"] = {key: value for key, value in under["trainer"].items() if key != "callbacks"}
    return merged(under, base)


def _with_base(level: Config) -> Config:
    return {**level, "base": _read_base(level["base"])} if "base" in level else level


def _callbacks(config: Config) -> list[Any]:
    return list(_listed((config.get("trainer") or {}).get("callbacks")))


def _listed(value: Any) -> Iterable[Any]:
    """A list; one thing alone, or nothing, may be given without."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _mapping(where: str, value: Any) -> Config:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where} has to be a mapping, and is {value!r}.")
    return value or {}


def _name(what: str, name: Any) -> str:
    if isinstance(name, bool) or not isinstance(name, str | int | float):
        raise ValueError(f"YAML reads the name of {what} as {name!r}: put it in quotes.")
    return str(name)
