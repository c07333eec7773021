"""Target values that are kept between runs: they depend on the clean model and the requests, not on what is made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch

from rect_lightning.cache import cached_folder
from rect_lightning.provenance import versions
from rect_lightning.solving.blocks import Tail
from rect_lightning.solving.values import SEARCH_VERSION, SearchRows, TargetValues, ValueSearch


def kept_values(
    folder: Path,
    search: Callable[[], TargetValues],
    *,
    tail: Tail,
    rows: Sequence[SearchRows],
    options: ValueSearch,
    relative_to: str,
) -> TargetValues:
    """What ``search`` finds, searched for only the first time; the same to the bit afterwards.

    Args:
        folder: Where values of this model, with the weights that it has now, are kept.
        search: The search, `search_values` with all that follows.
        tail: The part of the model that is searched: its layer, dtype and device tell values apart.
        rows: The texts of all requests that are searched for together.
        options: The hyper-parameters.
        relative_to: What the offset's norm is measured against.

    Returns:
        The target values, on the model's device.
    """
    from safetensors.torch import load_file, save_file

    device = tail.adapter.device
    config = tail.adapter.model.config.to_dict()
    told = {
        "search": SEARCH_VERSION,
        "config": {name: value for name, value in config.items() if name != "_name_or_path"},
        "precision": torch.get_float32_matmul_precision(),
        "layer": tail.layer,
        "dtype": str(tail.dtype),
        "device": device.type,
        "options": asdict(options),
        "relative_to": relative_to,
        "rows": [asdict(row) for row in rows],
        "versions": versions(),
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]
    name = "values.safetensors"

    def build(new: Path) -> None:
        found = search()
        save_file({part.name: getattr(found, part.name).contiguous() for part in fields(found)}, new / name)

    return TargetValues(**load_file(cached_folder(folder / digest, build) / name, device=str(device)))
