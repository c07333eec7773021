"""What a checkpoint of an editor holds: the edited weights, what they are the edit of, and what the method remembers."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from rect_lightning.checkpoint_io import KEY
from rect_lightning.editors.undoing import regularisers
from rect_lightning.provenance import options, versions

if TYPE_CHECKING:
    from rect_lightning.editors.base import Editor
    from rect_lightning.editors.base_model import BaseModelModule


class NoCheckpoints(Callback):
    """Takes the place of a Trainer's checkpoint callbacks until the fit ends or fails."""

    def __init__(self, trainer: Any) -> None:
        self._callbacks = trainer.callbacks
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)] + [
            self
        ]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put them back."""
        trainer.callbacks = self._callbacks  # type: ignore[attr-defined]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put them back."""
        trainer.callbacks = self._callbacks  # type: ignore[attr-defined]


def save(editor: Editor, checkpoint: dict[str, Any]) -> None:
    """Reduce a Lightning checkpoint to the edited weights, and add their provenance and the editor's memory."""
    weights = editor.swapped_out
    checkpoint["memory"] = editor.memory
    if editor.unfinished is not None:
        # in the middle of an operation, as where a scheduler's signal asks for a checkpoint: none of it has happened
        editor.unfinished.put_into(checkpoint)
        weights = editor.unfinished.weights
    checkpoint["state_dict"] |= {weight_name(editor, layer): weight for layer, weight in weights.items()}
    each = editor.trainer.num_training_batches
    if 0 < each < float("inf"):
        rewind(checkpoint, int(editor.operations - editor.trainer.current_epoch * each) % int(each))
    names = {weight_name(editor, layer) for layer in editor.layers}
    checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in names}
    checkpoint[KEY] = editor.provenance() | {"sha256": None}  # for the writer to fill in, if it does


def load(editor: Editor, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint is one of this base model and these layers, and go on counting where it stopped.

    Raises:
        ValueError: It is not a whole edit checkpoint, one of another base model, other layers or another editor, or a
            fit would go on from it with other data.
    """
    told = checkpoint.get(KEY)
    if told is None or "editor" not in told:
        raise ValueError("This checkpoint is not one of an editor: it names no base model.")
    if told["fingerprint"] != editor.fingerprint:
        raise ValueError(
            f"This checkpoint edits {told['base']['name']} (weights {told['fingerprint'][:12]}); the model loaded is "
            f"{editor.base.name} (weights {editor.fingerprint[:12]}). Load it with the base model it was made from."
        )
    if told["editor"] != type(editor).__name__:
        raise ValueError(f"This checkpoint is one of {told['editor']}, the configuration says {type(editor).__name__}.")
    if told["layers"] != editor.layers:
        raise ValueError(f"This checkpoint edits layers {told['layers']}, the configuration says {editor.layers}.")
    missing = {weight_name(editor, layer) for layer in editor.layers} - checkpoint["state_dict"].keys()
    if missing:
        raise ValueError(f"This checkpoint lacks edited weights: {', '.join(sorted(missing))}. It cannot be loaded.")
    if editor._trainer is not None and editor.trainer.state.fn == "fit":
        _check_continuation(editor, checkpoint)
    editor.operations, editor.done = told["operations"], list(told["requests"])
    editor.memory = dict(checkpoint.get("memory", {}))


def weight_name(editor: Editor, layer: int) -> str:
    """The name of a layer's edited weight in the editor's state dict."""
    return f"network.{editor.model.projection_name(layer)}.weight"


def provenance(editor: Editor) -> dict[str, Any]:
    """What the edited weights come from, in plain values."""
    return {
        "editor": type(editor).__name__,
        "method": editor.method,
        "base": base_of(editor),
        "fingerprint": editor.fingerprint,
        "layers": editor.layers,
        "mode": editor.mode,
        "step_per": editor.step_per,
        "strength": editor.strength,
        "operations": editor.operations,
        "requests": editor.done,
        "config": _config(editor),
        "versions": versions(),
    }


def base_of(module: BaseModelModule) -> dict[str, Any]:
    """The base model in plain values, so that it can be found from elsewhere."""
    base = dataclasses.asdict(module.base)
    if Path(base["name"]).expanduser().exists():
        base["name"] = str(Path(base["name"]).expanduser().resolve())
    # of a hub model, what "main" was when it was loaded
    base["commit"] = getattr(module.model.model.config, "_commit_hash", None)
    return base


def _config(editor: Editor) -> dict[str, Any]:
    """The options of what decides the edits: editor, regularisers, data, seed."""
    trainer = editor._trainer
    data = getattr(trainer, "datamodule", None)
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "editor": {name: value for name, value in options(editor).items() if name != "base"},
        "regularisers": [
            {"callback": f"{type(callback).__module__}.{type(callback).__qualname__}", **options(callback)}
            for callback in regularisers(trainer)
        ],
        "data": {} if data is None else options(data),
        "precision": None if trainer is None else str(trainer.precision),
        "seed_everything": None if seed is None else int(seed),
    }


def _check_continuation(editor: Editor, checkpoint: dict[str, Any]) -> None:
    """Refuse to go on with other requests; tell where nothing is left to do, or of another configuration."""
    told, trainer, loop = checkpoint[KEY], editor.trainer, checkpoint["loops"]["fit_loop"]
    epochs = loop["epoch_progress"]["current"]["processed"]
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs:
        rank_zero_warn(
            f"All requests of this checkpoint's run are edited ({len(told['requests'])}), there is nothing to go on with. To "
            "edit more, export it and take the folder as the base model; what AlphaEdit and UltraEdit remember of past edits, "
            "and what regularisers of scope run count from, begins anew there."
        )
    data: Any = getattr(trainer, "datamodule", None)
    made = loop["epoch_loop.batch_progress"]["current"]["processed"]
    if made and hasattr(data, "batch_size"):
        begin = [request.id for request in data.requests[: made * data.batch_size]]
        if begin != told["requests"][-len(begin) :]:
            raise ValueError(
                f"This checkpoint has edited {_some(told['requests'])} in {made} operations of this pass, but the data "
                f"as configured begin with {_some(begin)}. Go on with the same data, order and batch_size."
            )
    was, now = told["config"], _config(editor)
    differ = [key for key in ("precision", "regularisers") if was[key] != now[key]]
    names = (was["editor"].keys() | now["editor"].keys()) - {"prose", "statistics", "wild"}
    differ += [key for key in names if was["editor"].get(key) != now["editor"].get(key)]
    if differ:
        rank_zero_warn(
            f"The configuration is not that of the checkpoint: {', '.join(sorted(differ))}. The operations to come follow "
            "the new one, so the result is not that of an uninterrupted run."
        )


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:3]) + (", …" if len(ids) > 3 else "")


def rewind(checkpoint: dict[str, Any], operations: int) -> None:
    """Let a resumed epoch begin after its operations that were completed: an unfinished or failed one is made again.

    Of a completed epoch these are none, since it is the next one that begins, also where a limit leaves out requests.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    for state in loop.get("combined_loader", []):
        if "handed_out" in state:
            state["handed_out"] = min(state["handed_out"], operations)
