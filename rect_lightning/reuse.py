"""Edited models as plain Hugging Face models and folders, and edits as patches."""

# No `from __future__ import annotations`: the command line reads the types of the commands.

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rect_lightning.checkpoint_io import KEY, read_edits
from rect_lightning.durable import whole_folder
from rect_lightning.models.fingerprint import weights_fingerprint
from rect_lightning.models.source import Source
from rect_lightning.patches import Change, Patch, stacked
from rect_lightning.runs import of_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def load_edited(path: str | Path, *, base: "str | Path | Source | PreTrainedModel | None" = None) -> "PreTrainedModel":
    """The edited model, as a plain Hugging Face model in fp32 and eval mode.

    Its tokenizer: ``AutoTokenizer.from_pretrained(model.name_or_path)``.

    Args:
        path: A run folder or its checkpoint, a patch, or a folder that `export` or `apply` wrote.
        base: The base model: a name, folder or `Source`, or the model itself, which is then edited in place. By default
            the one that the file names. Not for folders, which are whole models.

    Raises:
        FileNotFoundError: There is no such file, or the base model is not where it was.
        ValueError: The file is damaged or foreign, or the base model is another one or given for a folder.
    """
    path = of_run(Path(path).expanduser())
    return _folder(path, base)[0] if path.is_dir() else load_pair(path, base=base).network


@dataclass(frozen=True)
class Pair:
    """An edited model, with what it takes to have the clean one in its place."""

    network: "PreTrainedModel"
    """The edited model, as `load_edited` gives it."""
    tokenizer: "PreTrainedTokenizerBase | None"
    """Its tokenizer; None where the base model was given as a model."""
    clean: dict[str, Tensor]
    """The clean values of the weights that were edited, by name; empty for a folder that has no patches."""

    @contextmanager
    def clean_weights(self) -> Iterator[None]:
        """Inside, the network is the clean model."""
        weights = _weights(self.network)
        edited = _copies(self.network, self.clean)
        _put(weights, self.clean)
        try:
            yield
        finally:
            _put(weights, edited)


def load_pair(path: str | Path, *, base: "str | Path | Source | PreTrainedModel | None" = None) -> Pair:
    """The edited model as `load_edited`, from the same files, with the clean one beside it.

    Args:
        path: As there.
        base: As there.

    Raises:
        FileNotFoundError, ValueError: As there, or a folder's weights are not those that its last patch left.
    """
    path = of_run(Path(path).expanduser())
    if path.is_dir():
        network, tokenizer = _folder(path, base)
        return Pair(network, tokenizer, _unpatched(network))
    if path.suffix == ".safetensors":
        patch = Patch.load(path)
        network, tokenizer = _base(patch.provenance, base)
        _check_base(network, patch.base, patch.provenance, what=path)
        clean = _copies(network, patch.changes)
        patch.toggle(_weights(network))
        return Pair(network, tokenizer, clean)
    checkpoint = read_edits(path)
    network, tokenizer = _base(checkpoint[KEY], base)
    _check_base(network, checkpoint[KEY]["fingerprint"], checkpoint[KEY], what=path)
    edited = _edited_weights(checkpoint)
    clean = _copies(network, edited)
    _put(_weights(network), edited)
    return Pair(network, tokenizer, clean)


def export(
    checkpoint: Path,
    to: Path,
    *,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Write a run's edited model as a Hugging Face folder, or what the edits changed as a patch.

    The folder holds the edited weights, configuration, tokenizer, where they come from, and the patch that `revert` takes
    back. The base model is not changed.

    Args:
        checkpoint: The run's checkpoint, or its run folder.
        to: A new folder; or a file that ends in .safetensors, for a patch.
        base: The base model's name or folder, if it is not where it was during the run.
        dtype: The folder's dtype. Other than float32 rounds, small updates away to nothing, and cannot be reverted.

    Raises:
        FileNotFoundError: There is no such checkpoint, or the base model is not where it was.
        FileExistsError: There is something at that folder.
        ValueError: The checkpoint is damaged or foreign, or the base model is another one.
        OSError: The disk is full.
    """
    _check_free(to)
    checkpoint = of_run(checkpoint)
    loaded = read_edits(checkpoint)
    told = loaded[KEY]
    network, tokenizer = _base(told, base)
    _check_base(network, told["fingerprint"], told, what=checkpoint)
    stack = _stack(network)
    patch = _edit(network, _edited_weights(loaded), provenance=told)
    if to.suffix == ".safetensors":
        patch.save(to)
        size, share = to.stat().st_size, to.stat().st_size / patch.dense_bytes
        _log.info("Patch: %s, %.1f MB, %.1f %% of the edited weights in full.", to, size / 1e6, 100 * share)
        return
    if dtype != "float32":
        _log.warning("%s", _rounded(network, patch, getattr(torch, dtype)))
        stack = []
    else:
        stack = [*stack, patch]
    _write(to, network, tokenizer, stack, provenance=told | {"dtype": dtype})


def apply(patch: Path, to: Path, *, on: str | None = None) -> None:
    """Write a Hugging Face folder of a model with a patch applied, on top of those that the model has already.

    Of two patches that were made for the same base, the later one is added to what the first one left.

    Args:
        patch: The patch.
        to: A new folder.
        on: The model: the patch's base, or a folder that `export` or `apply` wrote from it. By default the patch's base.

    Raises:
        FileNotFoundError: There is no such patch, or the model is not where it was.
        FileExistsError: There is something at that folder.
        ValueError: The patch is damaged, for another base or applied already, or the model's weights were changed since
            its last patch.
        OSError: The disk is full.
    """
    _check_free(to)
    wanted = Patch.load(patch)
    network, tokenizer = _base(wanted.provenance, on)
    stack, state, weights = _stack(network), weights_fingerprint(network), _weights(network)
    _check_top(network, stack, state)
    if wanted.origin in [other.origin for other in stack]:
        raise ValueError(f"{network.name_or_path} has {patch} applied already.")
    states = [other.base for other in stack]
    if wanted.base == state:
        wanted.toggle(weights)
        applied = wanted
    elif wanted.base in states:
        new = stacked(wanted, stack[states.index(wanted.base) :], weights)
        applied = replace(_edit(network, new, provenance=wanted.provenance, state=state), origin=wanted.origin)
    else:
        raise ValueError(
            f"{patch} is for {_name(wanted.provenance)} (weights {wanted.base[:12]}); {network.name_or_path} has weights "
            f"{state[:12]}. Apply it to the model that it was made from, or to a folder patched from that."
        )
    _write(to, network, tokenizer, [*stack, applied])


def revert(folder: Path, to: Path) -> None:
    """Write a Hugging Face folder of a patched model without the patch that was applied last, bit for bit as before it.

    Args:
        folder: A folder that `export` or `apply` wrote; it stays as it is.
        to: A new folder.

    Raises:
        FileExistsError: There is something at that folder.
        ValueError: The folder has no patch, or its weights were changed since.
        OSError: The disk is full.
    """
    _check_free(to)
    network, tokenizer = _base({}, str(folder))
    stack = _stack(network)
    if not stack:
        raise ValueError(f"{folder} has no patch to revert (none of this package in {folder / 'patches'}).")
    _check_top(network, stack, weights_fingerprint(network))
    last = stack.pop()
    last.toggle(_weights(network))
    if weights_fingerprint(network) != last.base:
        raise ValueError(f"Reverting {folder} did not give back weights {last.base[:12]}; nothing was written.")
    _write(to, network, tokenizer, stack)


# What they share -----------------------------------------------------------------------------------------------------


def _folder(path: Path, base: object) -> tuple[Any, Any]:
    """The model and tokenizer of a Hugging Face folder."""
    if base is not None:
        raise ValueError(f"{path} is a whole model already; leave base out.")
    return Source(name=str(path)).pretrained()


def _base(told: Mapping[str, Any], given: "str | Path | Source | PreTrainedModel | None") -> tuple[Any, Any]:
    """The base model and its tokenizer: the one that is given, or the one that provenance names."""
    if given is None:
        base = dict(told["base"])
        commit = base.pop("commit", None)
        source = Source(**base | {"revision": base["revision"] or commit})
    elif isinstance(given, str | Path):
        source = Source(name=str(given))
    elif isinstance(given, Source):
        source = given
    else:
        return given, None
    try:
        return source.pretrained()
    except (OSError, RuntimeError) as error:
        if given is None:
            error.add_note("Say where the base model is, with `base` or `--base`.")
        raise


def _name(told: Mapping[str, Any]) -> str:
    return told.get("base", {}).get("name", "another model")


def _check_base(network: "PreTrainedModel", fingerprint: str, told: Mapping[str, Any], *, what: Path) -> None:
    found = weights_fingerprint(network)
    if found != fingerprint:
        raise ValueError(
            f"{what} edits {_name(told)} (weights {fingerprint[:12]}); {network.name_or_path or 'the model given'} has weights "
            f"{found[:12]}. Give the base model that it was made from, in fp32."
        )


def _check_top(network: "PreTrainedModel", stack: list[Patch], state: str) -> None:
    if stack and stack[-1].result != state:
        raise ValueError(
            f"The weights in {network.name_or_path} are not those that its last patch left (weights {state[:12]}, "
            f"{stack[-1].result[:12]} expected): it was changed since, and cannot be patched or reverted."
        )


def _check_free(to: Path) -> None:
    if to.exists() and (to.suffix == ".safetensors" or not to.is_dir() or any(to.iterdir())):
        raise FileExistsError(f"{to} exists already and is left as it is: name a new one.")


def _weights(network: "PreTrainedModel") -> dict[str, Tensor]:
    return {name: weight.data for name, weight in network.named_parameters()}


def _edited_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("network."): weight for name, weight in checkpoint["state_dict"].items()}


def _put(weights: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    for name, weight in new.items():
        weights[name].copy_(weight)


def _copies(network: "PreTrainedModel", names: Iterable[str]) -> dict[str, Tensor]:
    weights = _weights(network)
    return {name: weights[name].clone() for name in names}


def _unpatched(network: "PreTrainedModel") -> dict[str, Tensor]:
    """What the weights of a folder's model were before all its patches."""
    stack = _stack(network)
    if stack:
        _check_top(network, stack, weights_fingerprint(network))
    clean = _copies(network, {name for patch in stack for name in patch.changes})
    for patch in reversed(stack):
        patch.toggle(clean)
    return clean


def _edit(
    network: "PreTrainedModel", new: Mapping[str, Tensor], *, provenance: dict[str, Any], state: str | None = None
) -> Patch:
    """Put new weights in; what that changed, as a patch."""
    weights = _weights(network)
    base = state or provenance["fingerprint"]
    changes = {name: Change.between(weights[name], weight) for name, weight in new.items()}
    _put(weights, new)
    return Patch(base, weights_fingerprint(network), changes, provenance)


def _stack(network: "PreTrainedModel") -> list[Patch]:
    """The patches that a folder's model has, in order."""
    return [Patch.load(path) for path in sorted(Path(network.name_or_path or "").glob("patches/*.safetensors"))]


def _rounded(network: "PreTrainedModel", patch: Patch, dtype: torch.dtype) -> str:
    """Round the model, and say how much of the edit that loses."""
    edited = {name: weight.clone() for name, weight in _weights(network).items() if name in patch.changes}
    lost = changed = 0
    for name, change in patch.changes.items():
        old = edited[name].clone()
        change.toggle(old)
        lost += int(((old.to(dtype) == edited[name].to(dtype)) & (old != edited[name])).sum())
        changed += len(change.values)
    torch.nn.Module.to(network, dtype)
    return (
        f"In {dtype}, {100 * lost / max(changed, 1):.1f} % of the entries that the edits changed are again what they were, "
        "and the others are rounded. Measure the folder, or export in float32."
    )


def _write(
    to: Path,
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    stack: list[Patch],
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write a Hugging Face folder with the patches that lead to it, so that it is there whole or not at all."""
    with whole_folder(to) as folder:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for number, patch in enumerate(stack, 1):
            patch.save(folder / "patches" / f"{number:03}.safetensors")
        told = [patch.provenance | {"before": patch.base, "after": patch.result} for patch in stack]
        edits = told or ([provenance] if provenance else [])
        (folder / "provenance.json").write_text(json.dumps(edits, indent=2, ensure_ascii=False) + "\n", "utf-8")
    _log.info("Model: %s, patches: %s.", to, len(stack))
