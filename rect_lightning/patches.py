"""A patch: the entries of a model's weights that an edit changed, in one small file that can be applied and reverted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rect_lightning.durable import whole_file
from rect_lightning.models.fingerprint import content_digest

_FORMAT = "rect_lightning.patch.v1"


@dataclass(frozen=True)
class Change:
    """Where one fp32 weight changed, and how: with the bit pattern of the old value XORed with that of the new one.

    XOR is its own inverse and knows no rounding, so the same values turn the old weight into the new one and back, bit for
    bit.
    """

    shape: tuple[int, ...]
    positions: Tensor
    """Positions in the flattened weight: int32 indices, or a mask of a bit an entry (uint8, the highest bit first),
    whichever is smaller; indices are where less than an entry in 32 changed."""
    values: Tensor
    """``old XOR new`` as int32, in the order of the positions."""

    @classmethod
    def between(cls, old: Tensor, new: Tensor) -> Change:
        """The change from one fp32 weight to another of its shape."""
        bits = (_bits(old) ^ _bits(new)).cpu()
        positions = bits.nonzero()[:, 0]
        if 32 * len(positions) < bits.numel() < 2**31:
            where = positions.to(torch.int32)
        else:
            where = torch.from_numpy(np.packbits(bits.numpy() != 0))
        return cls(tuple(old.shape), where, bits[positions])

    def toggle(self, weight: Tensor) -> None:
        """Turn the old weight into the new one, or the new one into the old, in place."""
        at = self.positions.long()
        if self.positions.dtype == torch.uint8:
            mask = np.unpackbits(self.positions.numpy(), count=math.prod(self.shape))
            at = torch.from_numpy(mask).nonzero()[:, 0]
        _bits(weight)[at.to(weight.device)] ^= self.values.to(weight.device)

    @property
    def density(self) -> float:
        """The share of entries that changed."""
        return len(self.values) / math.prod(self.shape)


@dataclass(frozen=True)
class Patch:
    """The difference between two states of a model, each known by its fingerprint."""

    base: str
    """Fingerprint of the model that the patch is for, see `weights_fingerprint`."""
    result: str
    """Fingerprint of that model with the patch applied."""
    changes: dict[str, Change]
    """What changed, by the weight's name in the model."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the edits come from, in plain values."""
    origin: str = ""
    """Which patch this is: its own digest, or in a stack the digest of the one that was asked for."""

    def __post_init__(self) -> None:
        if not self.origin:
            object.__setattr__(self, "origin", content_digest([self.base, self.result, self._tensors()]))

    def toggle(self, weights: Mapping[str, Tensor]) -> None:
        """Apply the patch to the weights of its base, or revert it on those of its result, in place."""
        for name, change in self.changes.items():
            change.toggle(weights[name])

    @property
    def dense_bytes(self) -> int:
        """What the changed weights take in full, in fp32."""
        return sum(4 * math.prod(change.shape) for change in self.changes.values())

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            OSError: The disk is full.
        """
        shapes = {name: list(change.shape) for name, change in self.changes.items()}
        told = {"base": self.base, "result": self.result, "origin": self.origin, "shapes": shapes}
        header, tensors = json.dumps(told | {"provenance": self.provenance}), self._tensors()
        metadata = {"format": _FORMAT, "header": header, "sha256": content_digest([header, tensors])}
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Patch:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is truncated, damaged or of another kind.
        """
        if not path.is_file():
            raise FileNotFoundError(f"There is no patch {path}.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read as a patch ({error}): it is truncated or of another kind."
            ) from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a patch of this package (its format says {metadata.get('format')}).")
        if metadata.get("sha256") != content_digest([metadata.get("header"), dict(sorted(tensors.items()))]):
            raise ValueError(f"{path} is damaged: its content does not have its checksum. Get it anew.")
        header = json.loads(metadata["header"])
        changes = {
            name: Change(tuple(shape), tensors[f"{name}.positions"], tensors[f"{name}.values"])
            for name, shape in header["shapes"].items()
        }
        return cls(header["base"], header["result"], changes, header["provenance"], header["origin"])

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"{name}.positions": change.positions for name, change in self.changes.items()}
        found |= {f"{name}.values": change.values for name, change in self.changes.items()}
        return dict(sorted(found.items()))


def stacked(patch: Patch, stack: list[Patch], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a patch makes of weights that other patches have changed since the state that it was made for.

    Where the others left an entry alone it gets the patch's value; where both changed it, both changes are added.

    Args:
        patch: A patch for the state before ``stack``.
        stack: The patches that were applied since, in order.
        weights: The weights with the stack applied; left as they are.

    Returns:
        The new weights, for the names that the patch changes.
    """
    before = {name: weights[name].detach().clone() for name in patch.changes}
    for other in reversed(stack):
        replace(other, changes={n: c for n, c in other.changes.items() if n in before}).toggle(before)
    after = {name: weight.clone() for name, weight in before.items()}
    patch.toggle(after)
    now = {name: weights[name].detach() for name in before}
    return {
        name: torch.where(now[name].view(torch.int32) == old.view(torch.int32), new, now[name] + (new - old))
        for (name, old), new in zip(before.items(), after.values(), strict=True)
    }


def _bits(weight: Tensor) -> Tensor:
    """The bit patterns of an fp32 weight, flattened; a view."""
    if weight.dtype != torch.float32:
        raise ValueError(f"Patches are of fp32 weights, and this one is in {weight.dtype}.")
    return weight.detach().view(-1).view(torch.int32)
