"""A digest that says which weights a model holds."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


def weights_fingerprint(model: nn.Module) -> str:
    """The SHA-256 of all parameters and persistent buffers, as 64 hex digits.

    Each tensor is hashed with its name, dtype and shape, byte for byte, so one changed entry, or the same values in
    another dtype, give another fingerprint. Device, memory layout, parameter order and process make no difference. A
    tied weight counts once, under the first of its names in alphabetical order.

    SHA-256 because processors have instructions for it; tensors are hashed in parallel, four at a time.

    Args:
        model: The model; a tensor on another device is copied to the CPU while it is hashed.

    Raises:
        ValueError: A weight is on the meta device and so has no values.
    """
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if tensor.is_meta:
            raise ValueError(f"Weight {name} is on the meta device: load the model before taking its fingerprint.")
        if names.setdefault(id(tensor), name) == name:
            tensors[name] = tensor
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the GIL
        digests = list(pool.map(tensor_digest, tensors.keys(), tensors.values()))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    """The SHA-256 of one tensor with its name, dtype and shape."""
    header = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
    # Viewed as bytes because NumPy knows no bfloat16.
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    digest = hashlib.sha256(header)
    digest.update(values)
    return digest.digest()


def content_digest(content: Any) -> str:
    """The SHA-256 of nested dicts, lists and sets of tensors and plain values, in order, as 64 hex digits."""
    digest = hashlib.sha256()
    _feed(digest, content)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(tensor_digest("", value))
    elif isinstance(value, dict | list | tuple | set | frozenset):
        items = [*value.items()] if isinstance(value, dict) else value
        if isinstance(value, set | frozenset):
            items = sorted(value, key=content_digest)  # their own order differs from process to process
        digest.update(f"{type(value).__name__}({len(items)}:".encode())
        for item in items:
            _feed(digest, item)
    else:
        digest.update(f"{type(value).__name__}:{value!r};".encode())
