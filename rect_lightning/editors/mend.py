"""MEND (Mitchell et al. 2022, "Fast Model Editing at Scale", arXiv 2110.11309): edits by a trained hypernetwork."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rect_lightning.checkpoint_io import KEY, read_checkpoint
from rect_lightning.data.request import EditRequest
from rect_lightning.editors.base import Editor
from rect_lightning.models import Adapter
from rect_lightning.solving.hypernetwork import Hypernetwork
from rect_lightning.solving.texts import answer_rows
from rect_lightning.solving.token_gradients import TokenGradients, token_gradients
from rect_lightning.solving.upper import run_lower


class MEND(Editor):
    """Edits that a hypernetwork makes of the requests' fine-tuning gradients, in one pass.

    ``ΔW = −α Σ δ̃ ũᵀ`` over all tokens of all requests, from the gradient of each request's own loss, so many requests get
    the sum of what each would get alone. The paper edits both matrices of the last three MLPs; here it is down projections
    alone, as in all editors. The gradients are taken once an operation, of the model as the operations before left it: later
    layers do not make up for what a regulariser left out of earlier ones, so both settings of ``step_per`` give the same.

    Args:
        checkpoint: What `MENDTraining` left for this base model and these layers, such as runs/version_0/checkpoints/best.ckpt.
        **kwargs: See `Editor`.
    """

    def __init__(self, *, checkpoint: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.checkpoint = checkpoint
        self.hypernetwork: Hypernetwork | None = None
        self._trained: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        """Read the hypernetwork and refuse one of other layers, before the model is loaded.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is none, or one for other layers.
        """
        super().setup(stage)
        if stage != "fit":
            return
        self._trained = read_checkpoint(self.checkpoint)
        told = self._trained[KEY]
        if "hypernetwork" not in told:
            raise ValueError(f"{self.checkpoint} holds edited weights and no hypernetwork: train one by MENDTraining.")
        if told["layers"] != self.layers:
            raise ValueError(
                f"{self.checkpoint} is a hypernetwork for the layers {told['layers']}, the configuration says {self.layers}."
            )

    def prepare(self) -> None:
        """Build the hypernetwork.

        Raises:
            ValueError: It was trained for another model.
        """
        told = self._trained[KEY]
        expected = told["hypernetwork"]["weights"]
        found = edited_shapes(self.model, self.layers)
        differ = [
            f"{name} {expected.get(name)} there and {found.get(name)} here"
            for name in expected.keys() | found.keys()
            if expected.get(name) != found.get(name)
        ]
        if differ:
            raise ValueError(f"{self.checkpoint} is for weights of other shapes: {'; '.join(sorted(differ))}.")
        if told["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.checkpoint} was trained on {told['base']['name']} (weights {told['fingerprint'][:12]}); the model "
                f"loaded is {self.base.name} (weights {self.fingerprint[:12]}). Train a hypernetwork for this one."
            )
        shapes = dict(zip(self.layers, found.values(), strict=True))
        hypernetwork = Hypernetwork(_pairs(shapes), rank=told["hypernetwork"]["rank"], edit_lr=1.0)
        prefix = "hypernetwork."
        hypernetwork.load_state_dict({n.removeprefix(prefix): x for n, x in self._trained["state_dict"].items()})
        self.hypernetwork = hypernetwork.to(self.device).eval().requires_grad_(False)
        self._trained = {KEY: told}  # without the optimizer's state

    def begin(self, requests: Sequence[EditRequest]) -> dict[int, Tensor]:
        """The updates of all layers, ``[out, in]``."""
        assert self.hypernetwork is not None
        rows = self.processes.mine(answer_rows(self.model, requests))
        with self.processes.together():
            lower = run_lower(self.model, [row.ids for row in rows], self.layers[0])
            gradients = token_gradients(self.model, lower, rows, self.layers)
            updates = {layer: self._sum(self.hypernetwork, layer, gradients) for layer in self.layers}
        return {layer: self.processes.sum(update) for layer, update in updates.items()}

    def compute_update(self, layer: int, requests: Sequence[EditRequest], state: dict[int, Tensor]) -> Tensor:
        """What the hypernetwork makes of this layer's gradient, ``[out, in]``."""
        return state[layer]

    @torch.no_grad()
    def _sum(self, hypernetwork: Hypernetwork, layer: int, gradients: Sequence[TokenGradients]) -> Tensor:
        weight = self.model.oriented(layer, self.model.weight(layer))
        update = torch.zeros_like(weight)
        for gradient in gradients:
            u, delta = hypernetwork(layer, gradient.u[layer], gradient.delta[layer])
            update += delta.T @ u
        return update

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which hypernetwork was used."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY]["hypernetwork_sha256"] = self._trained.get(KEY, {}).get("sha256")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another hypernetwork.

        Raises:
            ValueError: It is another one than the checkpoint's run used.
        """
        super().on_load_checkpoint(checkpoint)
        before = checkpoint[KEY].get("hypernetwork_sha256")
        if self._trained and before != self._trained[KEY]["sha256"]:
            raise ValueError(
                f"The run to go on with used another hypernetwork than {self.checkpoint}: name the one that it used."
            )
        self._trained = self._trained or {KEY: {"sha256": before}}


def edited_shapes(adapter: Adapter, layers: Sequence[int]) -> dict[str, list[int]]:
    """``[out, in]`` of each layer's down projection, by name, in order."""
    return {
        f"{adapter.projection_name(layer)}.weight": list(adapter.oriented(layer, adapter.weight(layer)).shape)
        for layer in layers
    }


def _pairs(shapes: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, int]]:
    return {layer: (shape[0], shape[1]) for layer, shape in shapes.items()}
