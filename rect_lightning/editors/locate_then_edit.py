"""What ROME, MEMIT and their kin share: a target value for each request, keys over prefixes, and the moments."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rect_lightning.cache import cache_dir
from rect_lightning.checkpoint_io import KEY
from rect_lightning.data.request import EditRequest
from rect_lightning.editors.prefixed import Prefixed
from rect_lightning.kept import how_run, kept
from rect_lightning.models.fingerprint import tensor_digest
from rect_lightning.solving.blocks import Tail
from rect_lightning.solving.keys import SubjectStates, subject_states
from rect_lightning.solving.moments import Moments, second_moments
from rect_lightning.solving.solvers import Factored
from rect_lightning.solving.texts import key_rows, search_rows
from rect_lightning.solving.values import TargetValues, ValueSearch, search_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LocateThenEdit(Prefixed):
    """Editors that search for a target value at the last edited layer and solve for the weights in closed form.

    Args:
        search: Hyper-parameters of the target value search.
        moments: Where the second moments C of the keys come from; null to leave C out.
        reuse_values: Keep target values that start from the clean weights in the cache folder, and take them from there when
            the same requests are searched for again with the same options, as where runs differ in their regulariser
            alone. How long edits take is not logged then.
        **kwargs: The prefixes, over which keys and the search are averaged, and what every editor takes; see `Prefixed` and
            `Editor`.
    """

    relative_to: str = "stream"
    """What the offset's norm is measured against, see `search_values`."""

    def __init__(
        self,
        *,
        search: ValueSearch = ValueSearch(),  # noqa: B008 - frozen
        moments: Moments | None = Moments(),  # noqa: B008 - frozen
        reuse_values: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.search, self.moments, self.reuse_values = search, moments, reuse_values
        self.factors: dict[int, Factored] = {}
        self.moments_digest: str | None = None
        self._moments_before: str | None = None  # those of the run that is resumed
        self.tail: Tail | None = None
        self._ahead: dict[EditRequest, TargetValues] = {}

    def attach(self, network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Edit this model; what was computed for another one is forgotten."""
        super().attach(network, tokenizer)
        self.factors, self.tail, self._ahead = {}, None, {}
        self.moments_digest = self._moments_before = None

    def prepare(self) -> None:
        """Prefixes, the factored moments of each layer, and the part of the model that the search runs."""
        super().prepare()
        self.prepare_moments()
        self._ahead = {}
        bf16 = "bf16" in str(self.trainer.precision)
        self.tail = Tail(self.model, self.layers[-1], torch.bfloat16 if bf16 else torch.float32)

    def prepare_moments(self) -> None:
        """Load the moments or estimate them, and make them ready; they are cached, so this is slow once.

        Raises:
            ValueError: A resumed run had others.
        """
        if self.moments is not None and self.moments_digest is None:
            found = second_moments(
                self.model,
                self.layers,
                self.moments,
                fingerprint=self.fingerprint,
                cache=cache_dir(),
                show_progress=self.show_progress,
                processes=self.processes,
            )
            self.take_moments(found)
            digests = [tensor_digest(str(layer), c) for layer, c in sorted(found.items())]
            self.moments_digest = hashlib.sha256(b"".join(digests)).hexdigest()
        if self._moments_before is not None and self._moments_before != self.moments_digest:
            raise ValueError(
                "The second moments are not those of the run that the checkpoint is of, so going on would not give what "
                f"an uninterrupted run gives. Configure the same `moments`, and bring {cache_dir() / 'moments'} along from "
                "the machine that computed them. To go on with others, export the checkpoint and edit that folder."
            )

    def take_moments(self, moments: dict[int, Tensor]) -> None:
        """Make of C, ``[in, in]`` by layer, what the method solves with."""
        self.factors = {layer: Factored(c, f"The second moment of layer {layer}") for layer, c in moments.items()}

    @property
    def timed(self) -> bool:
        """Not where a search may have been made by another run."""
        return not self.reuse_values

    def on_fit_end(self) -> None:
        """Let go of the search's copy of the model."""
        super().on_fit_end()
        self.tail, self._ahead = None, {}

    def begin(self, requests: Sequence[EditRequest]) -> TargetValues:
        """The requests' target values."""
        values = self._searched_ahead(requests) if self.mode == "single" else self._search(requests)
        losses = values.losses.nan_to_num(torch.inf).min(dim=1).values
        self.log("edit/search_loss", losses.mean(), batch_size=len(requests))
        return values

    def _search(self, requests: Sequence[EditRequest]) -> TargetValues:
        relative_to = self.relative_to if self.model.writes_to_stream else "value"
        keep = self.reuse_values and self.is_clean()

        def values(mine: Sequence[EditRequest]) -> TargetValues:
            assert self.tail is not None
            tail, rows = self.tail, search_rows(self.model, mine, self.templates)

            def search() -> TargetValues:
                return search_values(
                    self.model, tail, rows, self.search, relative_to=relative_to, show_progress=self.show_progress
                )

            if not keep:
                return search()
            told = how_run(self.model) | {
                "layer": tail.layer,
                "dtype": str(tail.dtype),
                "options": asdict(self.search),
                "relative_to": relative_to,
                "rows": [asdict(row) for row in rows],
            }
            folder = cache_dir() / "values" / self.fingerprint
            return kept(folder, told, search, [TargetValues], device=self.model.device)

        return self.processes.map(requests, values)

    def _searched_ahead(self, requests: Sequence[EditRequest]) -> TargetValues:
        """Target values where every operation starts from the same weights: searched for many operations at once."""
        if not self._ahead.keys() >= set(requests):
            coming = list(dict.fromkeys([*requests, *self._coming(requests)]))
            found = self._search(coming)
            self._ahead = {request: found.take(i) for i, request in enumerate(coming)}
        return TargetValues.cat([self._ahead[request] for request in requests])

    def _coming(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The requests of this operation and of those after it, as far as the Trainer will go and one search reaches."""
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        if not isinstance(dataset, list) or requests[0] not in dataset:
            return []
        first, together = dataset.index(requests[0]), self.search.together * self.processes.count
        operations = self.trainer.num_training_batches - self.trainer.fit_loop.epoch_loop.batch_idx
        return dataset[first : first + int(min(together, operations * len(requests)))]

    def states(self, layer: int, requests: Sequence[EditRequest], templates: Sequence[str]) -> SubjectStates:
        """Activations at the subject in each template, all templates of the first request first."""

        def read(mine: Sequence[EditRequest]) -> SubjectStates:
            rows = key_rows(self.model, mine, templates)
            return subject_states(self.model, rows, layer, show_progress=self.show_progress)

        return self.processes.map(requests, read)

    def mean_keys(self, layer: int, requests: Sequence[EditRequest], weights: Tensor) -> tuple[Tensor, SubjectStates]:
        """Keys averaged over the templates with these weights, ``[requests, in]``, and the states they come from."""
        states = self.states(layer, requests, self.templates)
        keys = states.key.view(len(requests), len(self.templates), -1)
        return torch.einsum("rtk,t->rk", keys, weights.to(keys)), states

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which moments were used."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY]["moments_digest"] = self.moments_digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which moments the run had."""
        super().on_load_checkpoint(checkpoint)
        self._moments_before = checkpoint[KEY]["moments_digest"]
