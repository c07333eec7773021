"""Second moments in files: ours as safetensors, and the ``.npz`` that the authors of ROME and MEMIT publish."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rect_lightning.durable import whole_file
from rect_lightning.models.adapter import Adapter

_FORMAT = "rect_lightning.second_moments.v1"


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a header, so that the file is either whole or as it was before."""
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"format": _FORMAT, "header": json.dumps(header, sort_keys=True)})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that `write` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is broken, or of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}).") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no second moments of this package (its format says {metadata.get('format')}).")
    return tensors, json.loads(metadata["header"])


def file_name(adapter: Adapter, layer: int) -> str:
    """The name of the file of a layer's moments."""
    return f"{adapter.projection_name(layer)}.safetensors"


def precomputed(adapter: Adapter, layers: list[int], source: str, *, fingerprint: str) -> dict[int, Tensor]:
    """Second moments that a user gives as files.

    Args:
        adapter: The model.
        layers: The layers wanted.
        source: A file for one layer, a path with ``{layer}`` in it, or a folder in which a file's name begins with the
            name of the layer's projection, such as ``transformer.h.13.mlp.c_proj_float32_mom2_100000.npz``.
        fingerprint: The weights' fingerprint. A ``.npz`` file does not say what weights it belongs to; there, only the
            shape can be checked.

    Returns:
        ``C`` by layer, ``[d, d]`` fp32.

    Raises:
        FileNotFoundError: A layer has no file.
        ValueError: A file is broken, ambiguous, or belongs to another model, layer or width.
    """
    paths = {layer: _path(adapter, layer, source, of=len(layers)) for layer in layers}
    return {layer: _load(adapter, layer, path, fingerprint) for layer, path in paths.items()}


def matrix(path: str | Path) -> Tensor:
    """``C`` from one file, of whatever weight: ``.npz`` as published, or ``.safetensors`` with a tensor of that name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no second moments.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path.resolve()} of second moments.")
    if path.suffix == ".npz":
        return _published(path)
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("C")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file with a tensor C ({error}).") from error


def _path(adapter: Adapter, layer: int, source: str, *, of: int) -> Path:
    path = Path(source.replace("{layer}", str(layer)))
    if path.is_dir():
        name = adapter.projection_name(layer)
        found = sorted([*path.glob(f"{name}_*.npz"), *path.glob(f"{name}.npz"), *path.glob(f"{name}.safetensors")])
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{path} has several files for layer {layer}, name one: {names}.")
        there = ", ".join(sorted(f.name for f in path.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{path} has no file {name}_*.npz or {name}.safetensors (there: {there}).")
    if of > 1 and "{layer}" not in source:
        raise ValueError(f"moments.source: {source} is one file for {of} layers: give a folder or put {{layer}} in it.")
    if not path.is_file():
        raise FileNotFoundError(f"moments.source: there is no file {path.resolve()} (layer {layer}).")
    return path


def _load(adapter: Adapter, layer: int, path: Path, fingerprint: str) -> Tensor:
    for other in range(adapter.num_layers):
        if other != layer and path.name.startswith(adapter.projection_name(other) + "_"):
            raise ValueError(f"{path} is of layer {other}, by its name; layer {layer} is wanted.")
    moment = _published(path) if path.suffix == ".npz" else _own(path, layer, fingerprint)
    width = adapter.oriented(layer, adapter.weight(layer)).shape[1]
    if moment.shape != (width, width):
        raise ValueError(
            f"{path}: the second moment is {list(moment.shape)}, but layer {layer} of this model has keys of width "
            f"{width}, so [{width}, {width}] is needed. The file belongs to another model."
        )
    if not moment.isfinite().all():
        raise ValueError(f"{path}: the second moment of layer {layer} is not finite.")
    return moment


def _own(path: Path, layer: int, fingerprint: str) -> Tensor:
    tensors, header = read(path)
    if "C" not in tensors:
        raise ValueError(f"{path} holds no finished second moment (it has {', '.join(tensors)}).")
    for field, wanted in (("fingerprint", fingerprint), ("layer", layer)):
        if header[field] != wanted:
            raise ValueError(
                f"{path} was computed for {field} {header[field]}, but {field} {wanted} is wanted. Set "
                "moments.source to the right file, or to a text to compute new moments."
            )
    return tensors["C"]


def _published(path: Path) -> Tensor:
    """``E[k kᵀ]`` from the state that ROME's ``CombinedStat(mom2=SecondMoment())`` saves."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"mom2.mom2", "mom2.count"} - set(arrays)
            if missing:
                raise ValueError(f"no {' and no '.join(sorted(missing))} (found: {', '.join(sorted(arrays))})")
            total = torch.from_numpy(np.asarray(arrays["mom2.mom2"], dtype=np.float64))
            count = int(arrays["mom2.count"])
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no second moments as ROME and MEMIT publish them: {error}.") from error
    if count < 1:
        raise ValueError(f"{path} counts {count} tokens.")
    return (total / count).float()
