"""Results kept between runs, each under a digest of all that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn

from rect_lightning.cache import cached_folder
from rect_lightning.models.encoding import encode
from rect_lightning.provenance import source_digest, versions

if TYPE_CHECKING:
    from rect_lightning.models import Adapter

T = TypeVar("T")
_NAME = "result.pt"


def kept(
    folder: Path,
    told: Mapping[str, Any],
    make: Callable[[], T],
    types: Sequence[type] = (),
    *,
    device: torch.device | str = "cpu",
) -> T:
    """What ``make`` gives, made only the first time; the same to the bit afterwards.

    A result is of this very source code: a rule that has changed since makes it again. What was made and cannot be written
    is returned all the same, with a warning.

    Args:
        folder: Where results of this kind are kept, of a model with these weights.
        told: All else that the result depends on, as JSON can say it.
        make: Makes it: numbers, texts, tensors, containers of these, and dataclasses.
        types: The dataclasses among these.
        device: Where the tensors in it belong.
    """
    made: list[T] = []

    def build(new: Path) -> None:
        try:
            made.append(make())
        except OSError as error:  # which is not one of the cache
            raise _NotMade from error
        content = BytesIO()  # of a full disk torch's own writer would say nothing that can be told from other errors
        torch.save(made[0], content)
        (new / _NAME).write_bytes(content.getbuffer())

    try:
        path = (
            cached_folder(folder / digest({**told, "versions": versions(), "source": source_digest()}), build) / _NAME
        )
    except _NotMade as error:
        reason = error.__cause__ or error
        raise reason from reason.__cause__
    except OSError as error:
        if not made:
            raise
        rank_zero_warn(f"What was made could not be kept for later runs, which will make it again: {error}")
        return made[0]
    with torch.serialization.safe_globals([*types]):
        result: T = torch.load(path, weights_only=True, map_location=device)
    return result


class _NotMade(Exception):
    """What was to be kept could not be made, for the reason that caused this."""


def digest(told: Mapping[str, Any]) -> str:
    """The SHA-256 of what JSON makes of this, in any order, as 32 hex digits."""
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


def how_run(adapter: Adapter) -> dict[str, Any]:
    """What the numbers of a model depend on besides its weights, such as its configuration and how products are taken."""
    config = adapter.model.config.to_dict()
    return {
        "config": {name: value for name, value in config.items() if name != "_name_or_path"},
        "ends": getattr(adapter.model.generation_config, "eos_token_id", None),
        "attention": getattr(adapter.model.config, "_attn_implementation", None),
        "precision": torch.get_float32_matmul_precision(),
        "device": adapter.device.type,
    }


def how_read(adapter: Adapter) -> dict[str, Any]:
    """What decides about the tokens of a text."""
    tokenizer = adapter.tokenizer
    rules = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "rules": sorted(tokenizer.get_vocab().items()) if rules is None else rules.to_str(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "example": encode(tokenizer, ["a"])[0].ids,
    }
