"""An editor as a LightningModule: one batch of requests is one edit operation, each step of the optimizer an update."""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import SGD, Optimizer

from rect_lightning.cache import cache_dir
from rect_lightning.data.prose import prose_path
from rect_lightning.data.request import EditRequest
from rect_lightning.editors import checkpoints
from rect_lightning.editors.base_model import BaseModelModule
from rect_lightning.editors.measure import Measurement, relative_changes, with_perplexity
from rect_lightning.editors.scored import Scored
from rect_lightning.editors.undoing import Beginning
from rect_lightning.kept import digest, how_read, how_run, kept
from rect_lightning.metrics import Wild, check_requests
from rect_lightning.models import Source, adapter_for
from rect_lightning.models.fingerprint import weights_fingerprint
from rect_lightning.processes import Processes
from rect_lightning.provenance import source_digest
from rect_lightning.solving.relative_change import change_statistics, relative_change

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


class Editor(BaseModelModule):
    """What all editing methods share; a method adds `compute_update`.

    Optimisation is manual. For each edited layer a surrogate loss whose gradient is exactly ``-ΔW`` is differentiated and
    SGD makes the step, so that callbacks see the update in ``on_before_optimizer_step`` and can mask it, and the next
    layer is computed from what they left. The edited weights are in fp32 and all others are frozen.

    Args:
        base: The model to edit.
        layers: The layers whose MLP down projections are edited, counted from 0.
        mode: sequential lets edits pile up; single starts each operation from the clean model, measures it and puts the
            clean weights back.
        step_per: layer takes an optimizer step for each layer, so that a layer is computed after a regulariser has masked
            the ones before it; operation takes one step for all layers at the end, as public code does.
        strength: Learning rate of the step, 1 for the update as computed.
        statistics: Values of δ, the relative change, of which to log the share of entries above; for the change of each
            weight since the clean model.
        prose: A text file whose perplexity is measured before and after the edits, "prose" for the one that comes with this
            package, null for none. Single mode has no edited model to measure in the end and leaves it out.
        wild: Whether to measure free answers too, beside what teacher forcing says of the edits: true asks as `Wild` does by
            default. Costs up to 40 tokens of writing for each prompt and paraphrase, before and after.
        reuse_clean: Keep what the clean model scores in the cache folder, and take it from there when it is asked the same
            again, as by the other runs of a grid: the requests' metrics and the prose's perplexity before the edits, and what
            `SideEffects` measures at 0 edits. In one process only.

    Raises:
        ValueError: The strength is not positive.
        FileNotFoundError: There is no such text.
    """

    def __init__(
        self,
        *,
        base: Source,
        layers: list[int],
        mode: Literal["sequential", "single"] = "sequential",
        step_per: Literal["layer", "operation"] = "layer",
        strength: float = 1.0,
        statistics: tuple[float, ...] = (0.077, 0.171),
        prose: str | None = "prose",
        wild: Wild | bool = False,
        reuse_clean: bool = False,
    ) -> None:
        super().__init__(base=base, layers=layers)
        if strength <= 0:
            raise ValueError(f"strength scales the update and must be positive; got {strength}.")
        if prose is not None:
            prose_path(prose)
        source_digest()  # what is kept later is of the code as it is now, and not of what is on disk by then
        self.automatic_optimization = False
        self.mode, self.step_per, self.strength = mode, step_per, strength
        self.statistics = list(statistics)
        self.clean: dict[int, Tensor] = {}
        self.operations = 0
        self.done: list[str] = []
        # What a method remembers of the operations so far. It is kept in checkpoints, forgotten in single mode, and put back
        # when an operation fails; so its tensors are replaced and never written into.
        self.memory: dict[str, Tensor] = {}
        self.unfinished: Beginning | None = None  # while an operation is under way, what it began with
        self.swapped_out: dict[int, Tensor] = {}  # while the clean weights are in place, the edited ones
        self.prose = prose
        self.wild = (Wild() if wild else None) if isinstance(wild, bool) else wild
        self.reuse_clean = reuse_clean
        self.measurement = Measurement()
        self.scored = Scored()
        self.results: dict[str, dict[str, float]] = {"before": {}, "after": {}}

    def setup(self, stage: str) -> None:
        """Refuse what the Trainer asks for and editing cannot honour, before anything is loaded, and make checkpoints safe.

        Raises:
            ValueError: The precision would take the edited weights out of fp32, or data are held out.
            RuntimeError: There are several processes, under another strategy than ddp.
        """
        super().setup(stage)
        if stage == "fit" and getattr(self.data_module, "held_out", False):
            raise ValueError(
                "data.held_out is for training a hypernetwork; an editor measures what it edited: set it to 0."
            )
        if self.trainer.world_size > 1 and not isinstance(self.trainer.strategy, DDPStrategy):
            raise RuntimeError(
                f"An update is computed from whole weights, which {type(self.trainer.strategy).__name__} may split over its "
                f"{self.trainer.world_size} processes: set trainer.strategy to ddp, or trainer.devices to 1."
            )

    # The model ---------------------------------------------------------------------------------------------------

    def attach(self, network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Edit this model, instead of loading `base`. Its weights as they stand now count as the clean ones.

        Raises:
            ValueError: The family is unknown or does not have the layers.
            TypeError: A weight to edit is not in fp32.
        """
        adapter = adapter_for(network, tokenizer)
        adapter.check_layers(self.layers)
        network.eval().requires_grad_(False)
        for layer in self.layers:
            weight = adapter.weight(layer)
            if weight.dtype != torch.float32:
                raise TypeError(
                    f"{adapter.projection_name(layer)} is in {weight.dtype}; edited weights have to be torch.float32, since "
                    "small updates are lost to rounding otherwise. Load the model in float32."
                )
            weight.requires_grad_(True)
        mixed = {parameter.dtype for parameter in network.parameters()} - {torch.float32}
        if mixed:
            raise TypeError(f"The model has weights in {', '.join(map(str, mixed))} besides fp32: load all in float32.")
        self.adapter = adapter
        self.network = network
        self.operations, self.done, self.memory, self.unfinished = 0, [], {}, None
        self.fingerprint, self._read_told = weights_fingerprint(network), ""
        self.clean = {layer: adapter.weight(layer).detach().clone() for layer in self.layers}
        self.scored = Scored()

    @contextmanager
    def clean_weights(self) -> Iterator[None]:
        """Inside, the model has its clean weights. What it had comes back at the end; nothing is copied."""
        edited = {layer: self.model.weight(layer).data for layer in self.layers}
        outer, self.swapped_out = self.swapped_out, self.swapped_out or edited
        for layer in self.layers:
            self.clean[layer] = self.clean[layer].to(edited[layer].device)
            self.model.weight(layer).data = self.clean[layer]
        try:
            yield
        finally:
            for layer in self.layers:
                self.model.weight(layer).data = edited[layer]
            self.swapped_out = outer

    def of_clean(self, told: Mapping[str, Any] | None, make: Callable[[], T], types: Sequence[type] = ()) -> T:
        """What is made with the clean weights in place; where `reuse_clean` says so, only if it is not in the cache.

        Args:
            told: All that it depends on besides the model, as JSON can say it; None where that is not known.
            make: Makes it, of what `kept` can keep.
            types: The dataclasses in it.
        """

        def made() -> T:
            with self.clean_weights():
                return make()

        if not self.reuse_clean or told is None or self.processes.count > 1:  # which have to make it together
            return made()
        self._read_told = self._read_told or digest(how_read(self.model))
        told = {**told, "run": how_run(self.model), "read": self._read_told}
        return kept(cache_dir() / "clean" / self.fingerprint, told, made, types)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the clean weights back, bit for bit, and forget what is remembered of the edits."""
        for layer in self.layers:
            self.model.weight(layer).copy_(self.clean[layer])
        self.memory = {}

    def is_clean(self) -> bool:
        """Whether no weight differs from the base model."""
        return all(torch.equal(self.model.weight(n).cpu(), clean.cpu()) for n, clean in self.clean.items())

    @property
    def timed(self) -> bool:
        """Whether an operation's seconds are those of its work, and are logged."""
        return True

    @property
    def method(self) -> str:
        """What the literature calls this: the class's name, unless its options make it another method."""
        return type(self).__name__

    @property
    def steps_per_batch(self) -> int:
        """How many optimizer steps an operation makes."""
        return len(self.layers) if self.step_per == "layer" else 1

    @property
    def show_progress(self) -> bool:
        """Whether bars inside a step are shown: as the Trainer's own, on the first process."""
        return (
            self._trainer is not None and self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
        )

    @property
    def processes(self) -> Processes:
        """The processes of the Trainer's run, which share the work of each operation."""
        if self._trainer is None:
            return Processes()
        return Processes(rank=self.trainer.global_rank, count=self.trainer.world_size, device=self.device)

    # An edit operation -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer:
        """Plain SGD over the edited weights: the step adds ``strength · ΔW``."""
        return SGD([self.model.weight(layer) for layer in self.layers], lr=self.strength)

    def on_fit_start(self) -> None:
        """Prepare what all operations share, from the clean model."""
        trainer: Any = self.trainer
        if self.mode == "single" or trainer.fast_dev_run:
            # single: each operation's weights are gone after it, so a checkpoint could only hold the base model;
            # fast_dev_run: none is wanted, but Lightning's save_last writes one
            checkpoints.NoCheckpoints(trainer)
        if self.mode == "single":
            self.measurement = Measurement()
            rank_zero_info(
                "Single mode: the clean weights come back after each operation, and no checkpoint is written. To keep the "
                "edits, set model.mode to sequential."
            )
        if trainer.fast_dev_run:
            # so many operations, and not so many layers, to which Lightning limits optimizer steps as well
            trainer.fit_loop.epoch_loop.max_steps = -1
        elif trainer.max_steps > 0:
            rank_zero_info(
                f"trainer.max_steps={trainer.max_steps} counts optimizer steps, of which an edit operation makes "
                f"{self.steps_per_batch}: the fit ends with operation {-(-trainer.max_steps // self.steps_per_batch)} at the "
                "latest, which is made whole."
            )
        check_requests(self.model, getattr(self.data_module, "requests", []), wild=self.wild)
        with self.clean_weights(), self.full_precision():
            self.prepare()

    def prepare(self) -> None:
        """Compute what all operations share. The model has its clean weights."""

    @abstractmethod
    def begin(self, requests: Sequence[EditRequest]) -> Any:
        """Compute what an operation needs once, whatever the number of layers; given to `compute_update`."""

    @abstractmethod
    def compute_update(self, layer: int, requests: Sequence[EditRequest], state: Any) -> Tensor:
        """The method's update ``ΔW`` of a layer, ``[out, in]``, from the model as it stands now."""

    def conclude(self, requests: Sequence[EditRequest]) -> None:
        """Note in `memory` what later operations need to know of this one, whose steps are made; nothing here."""

    def training_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        """Edit one batch of requests. Either the whole operation is made or, if anything fails, nothing of it.

        Several processes share its work; each makes the same steps.
        """
        self._check_shared(batch)
        self.scored.forget()
        start = time.perf_counter()
        with self._all_or_nothing(), self.full_precision():
            state = self.begin(batch)
            if self.step_per == "layer":
                for layer in self.layers:
                    self._step({layer: self._update(layer, batch, state)})
            else:
                self._step(self._updates_of_all_layers(batch, state))
            self.conclude(batch)
        self.operations += 1
        self.done += [request.id for request in batch]
        self.results = {"before": {}, "after": {}}  # what was measured is of the model before this operation
        if self.timed:
            self.log("edit/seconds", time.perf_counter() - start, batch_size=len(batch))
        self.log("edit/requests", float(len(self.done)), batch_size=len(batch), prog_bar=True)
        for layer in self.layers:
            clean = self.clean[layer].to(self.device)
            change = self.model.weight(layer).detach() - clean
            statistics = change_statistics(change, relative_change(change, clean), self.statistics)
            self.log_dict({f"change/{layer}/{key}": value for key, value in statistics.items()}, batch_size=len(batch))

    def _update(self, layer: int, requests: Sequence[EditRequest], state: Any) -> Tensor:
        """The update in the weight's own orientation and precision."""
        with torch.no_grad():
            update = self.compute_update(layer, requests, state)
            update = self.model.oriented(layer, update).to(self.model.weight(layer))
        if not update.isfinite().all():
            ids = ", ".join(request.id for request in requests)
            raise RuntimeError(
                f"The update of layer {layer} for the requests {ids} is not finite. The weights are as before this operation."
            )
        return update

    def _updates_of_all_layers(self, requests: Sequence[EditRequest], state: Any) -> dict[int, Tensor]:
        """Each layer's update, computed with those of the layers before it in place."""
        before = {layer: self.model.weight(layer).detach().clone() for layer in self.layers}
        updates = {}
        for layer in self.layers:
            updates[layer] = self._update(layer, requests, state)
            self.model.weight(layer).data.add_(updates[layer], alpha=self.strength)
        for layer, weight in before.items():
            self.model.weight(layer).data.copy_(weight)
        return updates

    def _step(self, updates: dict[int, Tensor]) -> None:
        """One optimizer step, on the surrogate ``-Σ ⟨ΔW, W⟩`` whose gradient is ``-ΔW``."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        terms = [-(update * self.model.weight(layer)).sum() for layer, update in updates.items()]
        if self.processes.count > 1:  # DDP averages gradients, and wants one of every weight
            terms += [0 * self.model.weight(layer).sum() for layer in self.layers if layer not in updates]
        self.manual_backward(torch.stack(terms).sum())
        optimizer.step()
        optimizer.zero_grad()

    def _check_shared(self, batch: Sequence[EditRequest]) -> None:
        if not self.processes.all_have([request.id for request in batch]):
            raise RuntimeError(
                "The processes were handed different requests, but they share the work of one operation: all must be handed "
                "the same. Take EditData, or set trainer.use_distributed_sampler to false."
            )

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        self.unfinished = beginning = Beginning(self)
        try:
            yield
        except BaseException:
            beginning.put_back(self)
            raise
        finally:
            self.unfinished = None

    def full_precision(self) -> torch.autocast:
        """Inside, all is computed as written, whatever the Trainer's precision: keys, moments, solves and metrics."""
        return torch.autocast(self.device.type, enabled=False)

    def on_train_batch_end(self, outputs: Any, batch: list[EditRequest], batch_idx: int) -> None:
        """In single mode, measure this operation and put the clean weights back; measure before `max_steps` ends a fit."""
        if 0 < self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True  # Lightning ends a fit without validation otherwise
        if self.mode == "single":
            try:
                if not self.abstained:
                    self._refuse_unchanged()
                with self.full_precision():
                    self.measurement.add(self, batch)
            finally:
                self.restore()

    @property
    def abstained(self) -> bool:
        """Whether the method itself found nothing to edit in this operation, which single mode measures as it is."""
        return False

    def on_train_epoch_end(self) -> None:
        """In single mode, log the metrics, which do not wait for a validation."""
        if self.mode == "single":
            self._report(self.measurement.compute())

    def on_fit_end(self) -> None:
        """Refuse to pass off the base model as an edited one."""
        if self.mode == "sequential":
            self._refuse_unchanged()
        elif not self.operations:
            raise RuntimeError("The fit made no edit operation; is trainer.limit_train_batches 0?")

    def _refuse_unchanged(self) -> None:
        if self.is_clean():
            raise RuntimeError(
                f"After {self.operations} edit operations no weight differs from the base model. Is a regulariser's keep, "
                "or the editor's strength, so small that nothing is left of the updates?"
            )

    # Measuring ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start measuring anew, except after a fit in single mode, which has measured as it went."""
        if not self._measured_while_editing:
            self.measurement = Measurement()
            self.scored.begin(self)
        if self.trainer.state.fn != "fit" and self.is_clean():
            rank_zero_warn(
                "No weight differs from the base model: what follows measures it twice. Give --ckpt_path of a run."
            )

    def validation_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        """Measure the requests on the clean model and on the edited one; in a fit, those that have been edited."""
        if self._measured_while_editing or self.trainer.sanity_checking:
            return
        self._check_shared(batch)
        if self.trainer.state.fn == "fit":
            done = set(self.done)
            batch = [request for request in batch if request.id in done]
        with self.full_precision():
            self.measurement.add(self, batch)

    def on_validation_epoch_end(self) -> None:
        """Log all metrics, as ``before/…`` and ``after/…``."""
        if self.trainer.sanity_checking or self._measured_while_editing:
            return
        results = self.measurement.compute()
        if self.prose is not None:
            with self.full_precision():
                results = with_perplexity(self, results, self.prose)
        self._report(results)

    def _report(self, results: dict[str, dict[str, float]]) -> None:
        self.results = results
        for when, values in results.items():
            # equal in all processes already
            self.log_dict({f"{when}/{name}": value for name, value in values.items()}, sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    @property
    def _measured_while_editing(self) -> bool:
        return self.mode == "single" and self.trainer.state.fn == "fit"

    def predict_step(self, batch: list[str], batch_idx: int) -> list[dict[str, str]]:
        """Continue prompts greedily before and after the edits: ``{"prompt", "before", "after"}`` for each."""
        with self.full_precision():
            return self.continuations(batch)

    def continuations(self, prompts: Sequence[str], *, max_new_tokens: int = 20) -> list[dict[str, str]]:
        """Greedy continuations by the clean and by the edited model."""
        from rect_lightning.metrics import generate

        with self.clean_weights():
            before = generate(self.model, prompts, max_new_tokens=max_new_tokens)
        after = generate(self.model, prompts, max_new_tokens=max_new_tokens)
        return [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)]

    # Checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the edited weights alone, and what they are the edit of."""
        checkpoints.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is one of this base model and these layers, and go on counting where it stopped.

        Raises:
            ValueError: It is not a whole edit checkpoint, one of another base model or other layers, or a fit would go on
                from it with other data.
        """
        checkpoints.load(self, checkpoint)

    def relative_changes(self) -> dict[str, Any]:
        """How far the entries of each edited weight are from the clean model; empty where none has moved."""
        return relative_changes(self)

    def provenance(self) -> dict[str, Any]:
        """What the edited weights come from, in plain values."""
        return checkpoints.provenance(self)
