"""Which parameters a regulariser is for, and which it cannot honour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pkgutil import resolve_name

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.nn import Module, Parameter
from torch.optim import Optimizer


def choose(module: Module, parameters: Iterable[str] | None, modules: Iterable[str] | None) -> dict[Parameter, str]:
    """The parameters that both selections name, with their names.

    Args:
        module: The whole model.
        parameters: Globs over parameter names, any of which has to match; None for all.
        modules: Types of modules, as ``torch.nn.Linear`` or only ``Linear``: a parameter has to be inside a module of one of
            them, or of a subclass; None for all.

    Raises:
        ValueError: A glob or a type matches nothing, or the two have nothing in common.
    """
    found = {parameter: name for name, parameter in module.named_parameters()}
    chosen = set(found)
    if parameters is not None:
        matches = {glob: [p for p, name in found.items() if fnmatchcase(name, glob)] for glob in parameters}
        _refuse_empty(matches, f"parameter names are such as {', '.join(list(found.values())[:3])}")
        chosen &= {p for matched in matches.values() for p in matched}
    if modules is not None:
        inside = {kind: [p for m in module.modules() if _is_a(m, kind) for p in m.parameters()] for kind in modules}
        _refuse_empty(inside, f"module types are {', '.join(sorted({type(m).__name__ for m in module.modules()}))}")
        chosen &= {p for matched in inside.values() for p in matched}
    if not chosen:
        raise ValueError(f"No parameter is in both parameters={parameters} and modules={modules}.")
    return {parameter: name for parameter, name in found.items() if parameter in chosen}


def without_optimizer(parameters: Mapping[Parameter, str], optimizers: Iterable[Optimizer]) -> dict[Parameter, str]:
    """Those of the parameters that no optimizer has."""
    stepped = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return {parameter: name for parameter, name in parameters.items() if parameter not in stepped}


def refuse_without_optimizer(parameters: Mapping[Parameter, str], optimizers: Iterable[Optimizer]) -> None:
    """Refuse parameters none of which an optimizer has, unless some are frozen, and so may be given to one later.

    Raises:
        ValueError: They are such.
    """
    if len(without_optimizer(parameters, optimizers)) == len(parameters) and all(p.requires_grad for p in parameters):
        raise ValueError(
            f"No optimizer has any of the chosen parameters, such as {next(iter(parameters.values()))}, so there would be "
            "nothing to regularise. Choose others, or give them to an optimizer."
        )


def refuse_sharded_strategy(strategy: Strategy) -> None:
    """Refuse strategies under which no process has whole weights.

    Raises:
        ValueError: It is one of them.
    """
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ValueError(
            f"{type(strategy).__name__} shards weights or optimizer, and the largest changes of a weight cannot be found in "
            "a shard. Use one device or strategy=ddp, or remove the callback."
        )


def refuse_sharded(parameters: Mapping[Parameter, str]) -> None:
    """Refuse parameters that are pieces of a weight.

    Raises:
        ValueError: One of them is.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FlatParameter
    from torch.distributed.tensor import DTensor

    for parameter, name in parameters.items():
        if isinstance(parameter, (DTensor, FlatParameter)):
            raise ValueError(
                f"{name} is sharded ({type(parameter).__name__}), and the largest changes of a weight cannot be found in a "
                "shard. Choose other parameters, do not shard, or remove the callback."
            )


def _is_a(module: Module, kind: str) -> bool:
    if "." in kind:
        try:
            return isinstance(module, resolve_name(kind))
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(f"modules names types of modules, such as torch.nn.Linear; {kind} is none.") from error
    return kind in {base.__name__ for base in type(module).__mro__}


def _refuse_empty(matches: Mapping[str, list[Parameter]], hint: str) -> None:
    empty = [pattern for pattern, matched in matches.items() if not matched]
    if empty or not matches:
        raise ValueError(f"No parameter of the model matches {', '.join(empty) or 'an empty list'}; {hint}.")
