"""What an edit operation begins with, kept so that a failed one leaves nothing behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer

if TYPE_CHECKING:
    from rect_lightning.editors.base import Editor


class Beginning:
    """The edited weights, the editor's memory, Lightning's count of steps, and the regularisers' state, as they are now."""

    def __init__(self, editor: Editor) -> None:
        self.weights = {layer: editor.model.weight(layer).detach().clone() for layer in editor.layers}
        self.memory = dict(editor.memory)
        self.steps = _steps(editor.trainer).state_dict()
        self.callbacks = [(callback, callback.state_dict()) for callback in regularisers(editor.trainer)]

    def put_back(self, editor: Editor) -> None:
        """Let all be as it was."""
        for layer, weight in self.weights.items():
            editor.model.weight(layer).data.copy_(weight)
        editor.memory = self.memory
        _steps(editor.trainer).load_state_dict(self.steps)
        for callback, state in self.callbacks:
            callback.load_state_dict(state)

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint's counts, memory and regularisers be as they were; the weights are for the editor to name."""
        checkpoint["memory"] = self.memory
        checkpoint["global_step"] = self.steps["total"]["completed"]
        checkpoint["loops"]["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"] = self.steps
        for callback, state in self.callbacks:
            if callback.state_key in checkpoint.get("callbacks", {}):
                checkpoint["callbacks"][callback.state_key] = state


def regularisers(trainer: Trainer | None) -> list[Callback]:
    """The callbacks that see the updates, and so may change them."""
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    return [c for c in callbacks if type(c).on_before_optimizer_step is not Callback.on_before_optimizer_step]


def _steps(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
