"""What a checkpoint of an editor holds: the edited weights alone, and what they are the edit of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rect_lightning.provenance import versions

if TYPE_CHECKING:
    from rect_lightning.editors.base import Editor


def save(editor: Editor, checkpoint: dict[str, Any]) -> None:
    """Reduce a Lightning checkpoint to the edited weights, and add their provenance."""
    for layer, weight in editor.unfinished.items():
        # in the middle of an operation, as where a scheduler's signal asks for a checkpoint: none of it has happened
        checkpoint["state_dict"][weight_name(editor, layer)] = weight
    _rewind(checkpoint, editor.operations - editor.trainer.current_epoch * editor.trainer.num_training_batches)
    names = {weight_name(editor, layer) for layer in editor.layers}
    checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in names}
    checkpoint["rect_lightning"] = editor.provenance()


def load(editor: Editor, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint is one of this base model and these layers, and go on counting where it stopped.

    Raises:
        ValueError: It is not a whole edit checkpoint, or one of another base model or other layers.
    """
    told = checkpoint.get("rect_lightning")
    if told is None:
        raise ValueError("This checkpoint is not one of an editor: it names no base model.")
    if told["fingerprint"] != editor.fingerprint:
        raise ValueError(
            f"This checkpoint edits {told['base']['name']} (weights {told['fingerprint'][:12]}); the model loaded is "
            f"{editor.base.name} (weights {editor.fingerprint[:12]}). Load it with the base model it was made from."
        )
    if told["layers"] != editor.layers:
        raise ValueError(f"This checkpoint edits layers {told['layers']}, the configuration says {editor.layers}.")
    missing = {weight_name(editor, layer) for layer in editor.layers} - checkpoint["state_dict"].keys()
    if missing:
        raise ValueError(f"This checkpoint lacks edited weights: {', '.join(sorted(missing))}. It cannot be loaded.")
    editor.operations, editor.done = told["operations"], list(told["requests"])


def weight_name(editor: Editor, layer: int) -> str:
    """The name of a layer's edited weight in the editor's state dict."""
    return f"network.{editor.model.projection_name(layer)}.weight"


def provenance(editor: Editor) -> dict[str, Any]:
    """What the edited weights come from, in plain values."""
    base = editor.base
    return {
        "editor": type(editor).__name__,
        "base": {"name": base.name, "file": base.file, "revision": base.revision},
        "fingerprint": editor.fingerprint,
        "layers": editor.layers,
        "mode": editor.mode,
        "step_per": editor.step_per,
        "strength": editor.strength,
        "operations": editor.operations,
        "requests": editor.done,
        "versions": versions(),
    }


def _rewind(checkpoint: dict[str, Any], operations: float) -> None:
    """Let a resumed epoch begin after the operations that were completed: an unfinished or failed one is made again."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    for state in loop.get("combined_loader", []):
        if "handed_out" in state:
            state["handed_out"] = int(min(state["handed_out"], operations))
