"""What an editor needs to know of a decoder: where its blocks and down projections sit, and how it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rect_lightning.solving.orientation import keeps_in_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Adapter:
    """One decoder and its tokenizer, seen through the few places that editing touches.

    A family is a subclass that names those places; nothing else in the package knows a model's layout.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer; a fast one, since the subject's last token is found by character offsets.

    Raises:
        TypeError: The tokenizer has no character offsets, or a down projection is no float ``Linear`` or ``Conv1D``.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    """The values of ``config.model_type`` that this layout serves."""
    blocks_path: ClassVar[str]
    """Dotted path from the model to the list of its decoder blocks."""
    projection_path: ClassVar[str]
    """Dotted path from a block to the down projection of its MLP."""
    norm_path: ClassVar[str]
    """Dotted path from the model to the norm between the last block and the vocabulary."""
    writes_to_stream: ClassVar[bool] = True
    """Whether a block adds the down projection's output to the residual stream as it is."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise TypeError(
                f"{type(tokenizer).__name__} gives no character offsets, which finding the subject's last token needs: "
                "load the fast tokenizer (AutoTokenizer does so when a tokenizer.json is there)."
            )
        self.model = model
        self.tokenizer = tokenizer
        for layer in range(self.num_layers):
            _check_projection(self.projection(layer), self.projection_name(layer))

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        blocks: Any = self.model.get_submodule(self.blocks_path)
        return blocks

    @property
    def num_layers(self) -> int:
        """How many decoder blocks there are."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embedding."""
        weight: Any = self.model.get_input_embeddings().weight
        return weight.device

    @property
    def backbone(self) -> nn.Module:
        """The model without its vocabulary head: token ids in, normalised hidden states out."""
        return self.model.base_model

    @property
    def norm(self) -> nn.Module:
        """The norm between the last block and the vocabulary head."""
        return self.model.get_submodule(self.norm_path)

    @property
    def context_length(self) -> int:
        """The longest input in tokens that the model's positions allow."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def projection_name(self, layer: int) -> str:
        """The dotted name of a layer's down projection in the model."""
        return f"{self.blocks_path}.{layer}.{self.projection_path}"

    def projection(self, layer: int) -> nn.Module:
        """The down projection of a layer's MLP, whose input is the key and whose output is the value."""
        return self.model.get_submodule(self.projection_name(layer))

    def weight(self, layer: int) -> nn.Parameter:
        """The weight of a layer's down projection, in its own orientation (see `oriented`)."""
        weight: Any = self.projection(layer).weight
        return weight

    def oriented(self, layer: int, matrix: Tensor) -> Tensor:
        """A matrix ``[out, in]`` in the orientation of the layer's weight, or back again (it is its own inverse)."""
        return matrix.T if keeps_in_out(self.projection(layer)) else matrix

    def check_layers(self, layers: list[int]) -> None:
        """Refuse layers that this model does not have.

        Raises:
            ValueError: A layer is out of range, given twice, out of order, or none is given.
        """
        if not layers or sorted(set(layers)) != list(layers):
            raise ValueError(f"layers must be increasing and distinct, at least one; got {layers}.")
        if layers[0] < 0 or layers[-1] >= self.num_layers:
            raise ValueError(
                f"layers {layers} do not fit a model of {self.num_layers} layers (0 to {self.num_layers - 1})."
            )

    @property
    def head(self) -> nn.Module:
        """The vocabulary head."""
        head: Any = self.model.get_output_embeddings()
        return head

    def logits(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """Vocabulary logits ``[..., vocabulary]`` of normalised hidden states ``[..., width]``.

        Args:
            hidden: What `backbone` gives, or `norm`.
            head: A copy of the head to use instead of the model's own, in another precision say.
        """
        head = self.head if head is None else head
        logits: Tensor = head(hidden)
        return logits

    def stream_change(self, layer: int, value: Tensor, change: Tensor) -> Tensor:
        """How the residual stream changes when the down projection's output ``value`` does (all ``[..., width]``)."""
        return change

    def value_change(self, layer: int, value: Tensor, change: Tensor) -> Tensor:
        """The change of ``value`` that changes the residual stream by ``change``: the inverse of `stream_change`."""
        return change


def _check_projection(module: nn.Module, name: str) -> None:
    if not (isinstance(module, nn.Linear) or keeps_in_out(module)):
        raise TypeError(f"{name} is a {type(module).__name__}; a Linear or a Conv1D can be edited.")
    weight: Any = module.weight
    if not weight.is_floating_point():
        raise TypeError(f"{name} has {weight.dtype} weights; load the model unquantised to edit it.")
