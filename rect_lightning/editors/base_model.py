"""A LightningModule around a base model that is loaded once, when the Trainer wants it."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule

from rect_lightning.checkpoint_io import EditCheckpointIO
from rect_lightning.models import Adapter, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Those that keep weights in fp32, in which updates are exact."""


class BaseModelModule(LightningModule, ABC):
    """What editors and their training share: the base model, fp32 weights, and checkpoints that are whole or not there.

    Args:
        base: The base model.
        layers: The layers whose MLP down projections it is about, counted from 0.
    """

    adapter: Adapter | None

    def __init__(self, *, base: Source, layers: list[int]) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds what is changed alone
        self.base, self.layers = base, list(layers)
        self.adapter = None

    def setup(self, stage: str) -> None:
        """Refuse what would take weights out of fp32, before anything is loaded, and make checkpoints safe.

        Raises:
            ValueError: The Trainer's precision would.
        """
        if str(self.trainer.precision) not in _PRECISIONS:
            raise ValueError(
                f"trainer.precision={self.trainer.precision} would take the model's weights out of fp32, in which updates are "
                f"exact; use one of {', '.join(_PRECISIONS)}."
            )
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a plugin of the user's stays
            self.trainer.strategy.checkpoint_io = EditCheckpointIO()

    def configure_model(self) -> None:
        """Load the base model, once."""
        if self.adapter is None:
            self.attach(*self.base.load())

    @abstractmethod
    def attach(self, network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Take this model, instead of loading `base`."""

    @property
    def model(self) -> Adapter:
        """The loaded model's adapter.

        Raises:
            RuntimeError: Nothing is loaded yet.
        """
        if self.adapter is None:
            raise RuntimeError("No model is loaded yet: the Trainer loads it, or call configure_model() or attach().")
        return self.adapter

    @property
    def data_module(self) -> Any:
        """The Trainer's data module, None where it was given loaders."""
        return getattr(self.trainer, "datamodule", None)
