"""Training of MEND's hypernetwork (Mitchell et al. 2022, arXiv 2110.11309), a LightningModule like any other."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Adam, Optimizer

from rect_lightning.checkpoint_io import KEY
from rect_lightning.data.request import EditRequest
from rect_lightning.editors.base_model import BaseModelModule
from rect_lightning.editors.checkpoints import base_of, rewind
from rect_lightning.editors.mend import edited_shapes
from rect_lightning.metrics import check_requests
from rect_lightning.models import Source, adapter_for
from rect_lightning.models.encoding import Row, encode
from rect_lightning.models.fingerprint import weights_fingerprint
from rect_lightning.provenance import options, versions
from rect_lightning.solving.hypernetwork import Hypernetwork
from rect_lightning.solving.likelihood import divergence, negative_log_likelihood, places
from rect_lightning.solving.token_gradients import token_gradients
from rect_lightning.solving.upper import Change, Lower, run_lower, run_upper

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, slots=True)
class _Probes:
    """Texts on which edits are tried: the rows, whose edit each is to see, its share in the loss, and its lower part."""

    rows: list[Row]
    owners: list[int]
    shares: Tensor
    lower: list[Lower]

    def share(self, batch: Lower) -> Tensor:
        return self.shares[batch.rows]


class _Best(ModelCheckpoint):
    """Goes on with the best one of the run that is resumed, though each run has a folder of its own."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        there = Path(state_dict["best_model_path"]).is_file()
        super().load_state_dict(state_dict | {"dirpath": self.dirpath} if there else state_dict)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._tell()

    def _tell(self) -> None:
        if self.best_model_path:
            rank_zero_info(
                f"The hypernetwork with the lowest validation loss, {float(self.best_model_score or 0):.4g}, is in "
                f"{self.best_model_path}"
            )


class MENDTraining(BaseModelModule):
    """Trains a hypernetwork for `MEND`, by gradient descent through the edits that it makes.

    The loss of an edit is ``edit_weight · NLL(target | prompt and paraphrases) + locality_weight · KL(before ‖ after)``, the
    latter on the tokens of the neighbours' prompts and answers. The model itself stays as it is: what does not depend on the
    edit runs once, and the edit is added as factors to what the down projections give.

    The data's last ``held_out`` requests are validated with and never trained on. `best.ckpt` is the one with the lowest
    validation loss, and what `MEND` wants. `last.ckpt` is that of the last validation. These take the place of any
    ModelCheckpoint that the Trainer has. Requests come in the same order in each epoch. A training that is resumed has to have
    the same ones; where nothing in it is better, the best one stays in the folder of the run before.

    Args:
        base: The model that is to be edited.
        layers: The layers whose MLP down projections will be edited, counted from 0; the paper takes the last three.
        rank: Rank of the hypernetwork's matrices.
        edits: How many requests are edited together; a batch holds one such edit after the other.
        edit_weight: The weight of the edit's own loss.
        locality_weight: The weight of what else changes.
        lr: Adam's learning rate.
        edit_lr: What the edits' own learning rate starts at, for each layer.
        lr_lr: Adam's learning rate of the logarithms of the edits' learning rates.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        *,
        base: Source,
        layers: list[int],
        rank: int = 1920,
        edits: int = 1,
        edit_weight: float = 0.1,
        locality_weight: float = 1.0,
        lr: float = 1e-4,
        edit_lr: float = 1e-4,
        lr_lr: float = 1e-2,
    ) -> None:
        super().__init__(base=base, layers=layers)
        numbers = {
            "rank": rank,
            "edits": edits,
            "edit_weight": edit_weight,
            "lr": lr,
            "edit_lr": edit_lr,
            "lr_lr": lr_lr,
        }
        for name, value in numbers.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive; got {value}.")
        if locality_weight < 0:
            raise ValueError(f"locality_weight must not be negative; got {locality_weight}.")
        self.rank, self.edits = rank, edits
        self.edit_weight, self.locality_weight = edit_weight, locality_weight
        self.lr, self.edit_lr, self.lr_lr = lr, edit_lr, lr_lr

    def setup(self, stage: str) -> None:
        """Refuse data that cannot be validated with, or are handed to several processes, before anything is loaded.

        Raises:
            ValueError: Nothing is held out, batches are no whole number of edits, or there are several processes.
        """
        super().setup(stage)
        if self.trainer.world_size > 1:
            raise ValueError("Every process would train on the same batches: set trainer.devices to 1.")
        if stage != "fit":
            return
        if getattr(self.data_module, "held_out", None) == 0:
            raise ValueError("A hypernetwork is validated on requests that it is not trained on: set data.held_out.")
        size = getattr(self.data_module, "batch_size", self.edits)
        if size % self.edits:
            raise ValueError(
                f"data.batch_size={size} must be a multiple of model.edits={self.edits}: a batch is cut into edits."
            )

    def configure_callbacks(self) -> list[Callback]:
        """Keep the hypernetwork with the lowest validation loss, and the last one."""
        # a last one of its own: `save_last` waits for the next best
        options: dict[str, Any] = {"enable_version_counter": False}
        return [
            _Best(monitor="val/loss", filename="best", **options),
            ModelCheckpoint(filename="last", **options),
        ]

    def attach(self, network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Train for this model, instead of loading `base`.

        Raises:
            ValueError: The family is unknown or does not have the layers.
        """
        adapter = adapter_for(network, tokenizer)
        adapter.check_layers(self.layers)
        self.adapter, self.network = adapter, network.eval().requires_grad_(False)
        self.fingerprint = weights_fingerprint(network)
        self.shapes = edited_shapes(adapter, self.layers)
        shapes = {layer: (o, i) for layer, (o, i) in zip(self.layers, self.shapes.values(), strict=True)}
        self.hypernetwork = Hypernetwork(shapes, rank=self.rank, edit_lr=self.edit_lr)

    def configure_optimizers(self) -> Optimizer:
        """Adam, with a learning rate of its own for the edits' learning rates."""
        networks = {"params": list(self.hypernetwork.networks.parameters()), "lr": self.lr}
        return Adam([networks, {"params": [self.hypernetwork.log_lr], "lr": self.lr_lr}])

    def on_fit_start(self) -> None:
        """Refuse requests that the model cannot run, or that say nothing of what is to stay.

        Raises:
            ValueError: They have no neighbours, which locality is learned from.
        """
        requests = getattr(self.data_module, "requests", [])
        check_requests(self.model, requests)
        if requests and self.locality_weight and not any(request.neighbours for request in requests):
            raise ValueError(
                "No request has neighbours, from which a hypernetwork learns what to leave alone: give some, or set "
                "model.locality_weight to 0."
            )

    def training_step(self, batch: list[EditRequest], batch_idx: int) -> Tensor:
        """The mean loss of the batch's edits."""
        return self._logged(batch, "train")

    def validation_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        """The mean loss of edits that are not trained on."""
        if self.trainer.sanity_checking:
            return  # which comes before the first tokens that it could normalise by
        with torch.inference_mode(False), torch.no_grad():  # editing takes gradients, and asks for them itself
            self._logged(batch, "val")

    def _logged(self, requests: list[EditRequest], stage: str) -> Tensor:
        edit, locality = self.losses(requests)
        loss = self.edit_weight * edit + self.locality_weight * locality
        values = {"loss": loss, "edit_loss": edit, "locality_loss": locality}
        logs = {f"{stage}/{name}": value.detach() for name, value in values.items()}
        self.log_dict(logs, batch_size=len(requests), prog_bar=True)
        return loss

    def losses(self, requests: Sequence[EditRequest]) -> tuple[Tensor, Tensor]:
        """Edit the requests, ``edits`` at a time, and say how well the edits hold and what else they change.

        Returns:
            The negative log-likelihood of the targets, and the divergence of the neighbours; means over requests, in nats.
        """
        prompts = [(i, r.text, r.target_new) for i, r in enumerate(requests)]
        paraphrases = [(i, text, r.target_new) for i, r in enumerate(requests) for text in r.paraphrases]
        neighbours = [(i, n.prompt, n.answer) for i, r in enumerate(requests) for n in r.neighbours]
        texts = [1 + len(r.paraphrases) for r in requests]
        at_prompts = self._probes(prompts, [1 / n for n in texts])
        changes = self._edit(at_prompts)
        edit = locality = torch.zeros((), device=self.device)
        for probes in (at_prompts, self._probes(paraphrases, [1 / n for n in texts])):
            for batch in probes.lower:
                states = run_upper(self.model, batch, changes([probes.owners[i] for i in batch.rows]))
                read = places([probes.rows[i] for i in batch.rows], "target", self.device)
                edit = edit + probes.share(batch) @ negative_log_likelihood(self.model, states, read)
        if self.locality_weight:
            probes = self._probes(neighbours, [1 / max(1, len(r.neighbours)) for r in requests])
            for batch in probes.lower:
                with torch.no_grad():
                    before = run_upper(self.model, batch, {})
                after = run_upper(self.model, batch, changes([probes.owners[i] for i in batch.rows]))
                lengths = [len(probes.rows[i].ids) for i in batch.rows]
                locality = locality + probes.share(batch) @ divergence(self.model, before, after, lengths)
        return edit / len(requests), locality / len(requests)

    def _probes(self, texts: Sequence[tuple[int, str, str]], shares: Sequence[float]) -> "_Probes":
        """Texts, each with its request, prompt and target, run as far as no edit matters; shares are those of the requests."""
        rows = encode(self.model.tokenizer, [prompt for _, prompt, _ in texts], [target for *_, target in texts])
        lower = list(run_lower(self.model, [row.ids for row in rows], self.layers[0]))
        owners = [i for i, *_ in texts]
        return _Probes(rows, owners, torch.tensor([shares[i] for i in owners], device=self.device), lower)

    def _edit(self, prompts: "_Probes") -> Callable[[Sequence[int]], dict[int, Change]]:
        """The edits, as changes for rows that belong to given requests."""
        factors: dict[int, tuple[Tensor, Tensor]] = {}
        gradients = token_gradients(self.model, prompts.lower, prompts.rows, self.layers)
        for layer in self.layers:
            of_rows = [g.u[layer] for g in gradients]
            u, delta = self.hypernetwork(layer, torch.cat(of_rows), torch.cat([g.delta[layer] for g in gradients]))
            tokens = [len(row) for row in of_rows]
            together = [sum(tokens[i : i + self.edits]) for i in range(0, len(tokens), self.edits)]
            # filled up with zeros, which add nothing
            factors[layer] = pad_sequence(u.split(together), True), pad_sequence(delta.split(together), True)

        def changes(owners: Sequence[int]) -> dict[int, Change]:
            which = torch.tensor(owners, device=self.device) // self.edits
            return {layer: _product(u[which], delta[which]) for layer, (u, delta) in factors.items()}

        return changes

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the hypernetwork alone, and what it is for."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        batches = self.trainer.num_training_batches
        if 0 < batches < float("inf"):
            rewind(checkpoint, progress.processed % int(batches))
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: x for name, x in state.items() if name.startswith("hypernetwork.")}
        checkpoint[KEY] = {
            "hypernetwork": {"weights": self.shapes, "rank": self.rank},
            "layers": self.layers,
            "base": base_of(self),
            "fingerprint": self.fingerprint,
            "config": self._config(),
            "requests": self._trained_on(),
            "versions": versions(),
            "sha256": None,  # for the writer to fill in
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is a hypernetwork for this model and these layers, trained on the same requests.

        Warns of other options.

        Raises:
            ValueError: It is not.
        """
        told = checkpoint.get(KEY, {})
        if "hypernetwork" not in told:
            raise ValueError(
                "This checkpoint is not one of a hypernetwork's training. If --ckpt_path last took that of a later run, name "
                "one by its path."
            )
        wanted = (self.fingerprint, self.layers, {"weights": self.shapes, "rank": self.rank})
        if (told["fingerprint"], told["layers"], told["hypernetwork"]) != wanted:
            raise ValueError(
                f"This checkpoint is a hypernetwork of rank {told['hypernetwork']['rank']} for the layers {told['layers']} of "
                f"{told['base']['name']} (weights {told['fingerprint'][:12]}), not of rank {self.rank} for the layers "
                f"{self.layers} of {self.base.name} (weights {self.fingerprint[:12]})."
            )
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self._check_continuation(told)

    def _check_continuation(self, told: dict[str, Any]) -> None:
        if told["requests"] != self._trained_on():
            raise ValueError(
                f"This checkpoint was trained on {len(told['requests'])} requests, and the data as configured have "
                f"{len(self._trained_on())} to train on, or others, or in another order, so that some may be held out now that "
                "it has learned. Go on with the same data, order, limit and held_out."
            )
        now = self._config()
        if differ := sorted(name for name in now if told["config"].get(name) != now[name]):
            rank_zero_warn(
                f"The configuration is not that of the checkpoint: {', '.join(differ)}. The rest of the training follows the "
                "new one, but for learning rates, with which Adam goes on as they were."
            )

    def _trained_on(self) -> list[str]:
        requests = getattr(self.data_module, "requests", [])
        return [request.id for request in requests[: len(requests) - getattr(self.data_module, "held_out", 0)]]

    def _config(self) -> dict[str, Any]:
        """The options that decide what comes of the training."""
        own = {name: value for name, value in options(self).items() if name != "base"}
        return own | {"batch_size": getattr(self.data_module, "batch_size", None)}


def _product(u: Tensor, delta: Tensor) -> Change:
    return lambda key: (key @ u.mT) @ delta
