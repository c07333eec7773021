"""KN (Dai et al. 2022, "Knowledge Neurons in Pretrained Transformers", arXiv 2104.08696)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import normalize

from rect_lightning.data.request import EditRequest
from rect_lightning.editors.prefixed import Prefixed
from rect_lightning.metrics import continuations
from rect_lightning.models import adapter_for
from rect_lightning.models.encoding import encode
from rect_lightning.solving.attribution import found_neurons
from rect_lightning.solving.texts import key_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """What an operation edits.

    Attributes:
        neurons: ``[requests, layers, inner width]`` uint8, one at each request's knowledge neurons.
        old: ``[requests]`` int64, the old answers' tokens.
        new: ``[requests]`` int64, the new answers' tokens.
    """

    neurons: Tensor
    old: Tensor
    new: Tensor


class KN(Prefixed):
    """Moves the output columns of a fact's knowledge neurons from the old answer's embedding to the new one's.

    Knowledge neurons are those with a large share in the old answer's probability (see `found_neurons`), in the prompt and
    behind most of the prefixes alike. Column ``n`` of a down projection becomes ``w - λ₁ e(old) + λ₂ e(new)``.

    The old answer is the request's ``target_true``, where it is not known the clean model's own next token. Of an answer of
    several tokens the first one counts, since the paper knows only answers of one. Its embedding is its row of the
    vocabulary head: the paper takes the word embedding, which in BERT is the same, and moves a column along it because the
    head reads the stream through it.

    All neurons of an operation are found before its first step. A request without knowledge neurons is told of and left
    unedited, as the authors leave out such facts, and so is one whose answers begin with the same token, where λ₁ = λ₂.

    Args:
        layers: The layers whose neurons are looked at, null for all.
        steps: Steps of the integrated gradients.
        threshold: A neuron is found in a prompt if its attribution is at least this share of the largest one.
        share: A neuron is one of the fact if it is found in at least this share of the prompts.
        old_weight: λ₁.
        new_weight: λ₂.
        scale: column scales an embedding to the norm of the column it goes to, as the authors' code does; embedding takes
            it as it is, as in the paper's formula.
        **kwargs: See `Prefixed` and `Editor`.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        *,
        layers: list[int] | None = None,
        steps: int = 20,
        threshold: float = 0.2,
        share: float = 0.7,
        old_weight: float = 1.0,
        new_weight: float = 8.0,
        scale: Literal["column", "embedding"] = "column",
        **kwargs: Any,
    ) -> None:
        super().__init__(layers=layers or [], **kwargs)
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}.")
        for name, value in (("threshold", threshold), ("share", share)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} is a share, above 0 and at most 1; got {value}.")
        if min(old_weight, new_weight) < 0 or old_weight == new_weight == 0:
            raise ValueError(
                f"old_weight and new_weight must not be negative, nor both 0; got {old_weight} and {new_weight}."
            )
        self.all_layers = layers is None
        self.steps, self.threshold, self.share = steps, threshold, share
        self.old_weight, self.new_weight, self.scale = old_weight, new_weight, scale
        self._located_any = False

    def attach(self, network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Edit this model."""
        if self.all_layers:
            self.layers = list(range(adapter_for(network, tokenizer).num_layers))
        super().attach(network, tokenizer)

    def begin(self, requests: Sequence[EditRequest]) -> Located:
        """Find the requests' knowledge neurons in the model as it stands now."""
        located = self.processes.map(requests, self._locate)
        found = located.neurons.bool().flatten(1).any(dim=1)
        same = (located.old == located.new) & (self.old_weight == self.new_weight)  # whose update is zero
        if missing := _ids(requests, ~found):
            rank_zero_warn(
                f"No neuron has {self.threshold:g} of the largest attribution in {self.share:g} of the {len(self.templates)} "
                f"prompts of {missing}: left unedited. A smaller share or threshold finds more."
            )
        if unchanged := _ids(requests, found & same):
            rank_zero_warn(
                f"The old and the new answer of {unchanged} begin with the same token, and KN puts the embedding of the one "
                "in place of the other's: left unedited."
            )
        located.neurons[same] = 0
        counts = located.neurons.sum(dim=(1, 2))
        self._located_any = bool(counts.any())
        self.log("edit/neurons", counts.float().mean(), batch_size=len(requests))
        return located

    def _locate(self, requests: Sequence[EditRequest]) -> Located:
        old = self._old_tokens(requests)
        rows = [row.ids for row in key_rows(self.model, requests, self.templates)]
        found = found_neurons(
            self.model,
            rows,
            [token for token in old for _ in self.templates],
            self.layers,
            steps=self.steps,
            threshold=self.threshold,
            show_progress=self.show_progress,
        )
        shares = found.unflatten(0, (len(requests), len(self.templates))).float().mean(dim=1)
        new = self._first_tokens(requests, [request.target_new for request in requests])
        return Located(
            neurons=(shares >= self.share - 1e-6).byte(),
            old=torch.tensor(old, device=shares.device),
            new=torch.tensor(new, device=shares.device),
        )

    def _old_tokens(self, requests: Sequence[EditRequest]) -> list[int]:
        known = [request for request in requests if request.target_true is not None]
        others = [request for request in requests if request.target_true is None]
        tokens = dict(zip(known, self._first_tokens(known, [str(r.target_true) for r in known]), strict=True))
        with self.clean_weights():
            said = continuations(self.model, [request.text for request in others], max_new_tokens=1)
        tokens |= {request: continuation.tokens[0] for request, continuation in zip(others, said, strict=True)}
        return [tokens[request] for request in requests]

    def _first_tokens(self, requests: Sequence[EditRequest], answers: Sequence[str]) -> list[int]:
        rows = encode(self.model.tokenizer, [request.text for request in requests], answers)
        return [row.target_ids[0] for row in rows]

    def compute_update(self, layer: int, requests: Sequence[EditRequest], state: Located) -> Tensor:
        """The update ``[out, in]``, zero but for the columns of knowledge neurons."""
        weight = self.model.oriented(layer, self.model.weight(layer))
        embeddings: Any = self.model.head.weight
        old, new = (embeddings[tokens.to(embeddings.device)].to(weight) for tokens in (state.old, state.new))
        if self.scale == "column":
            old, new = normalize(old), normalize(new)
        neurons = state.neurons[:, self.layers.index(layer)].to(weight)
        update = (self.new_weight * new - self.old_weight * old).T @ neurons
        return update * weight.norm(dim=0) if self.scale == "column" else update

    @property
    def abstained(self) -> bool:
        """Whether no request had knowledge neurons: a failed edit among others."""
        return not self._located_any


def _ids(requests: Sequence[EditRequest], chosen: Tensor) -> str:
    return ", ".join(request.id for request, is_one in zip(requests, chosen.tolist(), strict=True) if is_one)
