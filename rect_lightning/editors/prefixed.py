"""Editors that look at a request's prompt in several contexts."""

from typing import TYPE_CHECKING, Any

from rect_lightning.checkpoint_io import KEY
from rect_lightning.editors.base import Editor
from rect_lightning.solving.prefixes import Prefixes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Prefixed(Editor):
    """An editor with context prefixes, sampled once from the clean model; a resumed run has the same ones.

    Args:
        prefixes: Texts before the prompt.
        **kwargs: What every editor takes, see `Editor`.
    """

    def __init__(self, *, prefixes: Prefixes = Prefixes(), **kwargs: Any) -> None:  # noqa: B008 - frozen
        super().__init__(**kwargs)
        self.prefixes = prefixes
        self.templates: tuple[str, ...] = ()

    def attach(self, network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Edit this model; the prefixes of another one are forgotten."""
        super().attach(network, tokenizer)
        self.templates = ()

    def prepare(self) -> None:
        """Sample the prefixes, the same ones in all processes."""
        self.templates = self.processes.agree(self.templates or self.prefixes.resolve(self.model))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the prefixes too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY]["templates"] = list(self.templates)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the prefixes up again."""
        super().on_load_checkpoint(checkpoint)
        self.templates = tuple(checkpoint[KEY]["templates"])
