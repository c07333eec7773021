"""What all regularisers share: they see the change that an optimizer makes, whichever it is, and leave a part of it."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rect_lightning.callbacks.changes import Change, GradientChange, WeightChange
from rect_lightning.callbacks.gradients import check_gradients, is_plain_sgd
from rect_lightning.callbacks.parameters import (
    choose,
    refuse_sharded,
    refuse_sharded_strategy,
    refuse_without_optimizer,
    without_optimizer,
)


class Regulariser(Callback, ABC):
    """Leave a part of the change that an optimizer makes; a method adds `regularise`, which says what part.

    Under plain SGD (no momentum, no weight decay), whose change of a weight is ``-lr`` times its gradient, the gradient is
    regularised before the step, at no memory of its own. Under any other optimizer the weights are copied before the step,
    after the closure's backward pass, and what they changed by is regularised right after it, before other callbacks see it.
    What is undone is undone in the weights alone: momentum goes on from what the optimizer has computed, and an optimizer
    that keeps weights of its own (master weights, averages) may write them back.

    Args:
        scope: step regularises the change of each step; run the whole change since the first step of the run, for which a
            copy of the starting weights is kept, also in checkpoints.
        parameters: Globs over parameter names, such as ``*.mlp.*.weight``; null for all that are trained.
        modules: Types of the modules that the parameters are in, such as ``torch.nn.Linear``; null for any.
        every_n_steps: Let the weights move freely for so many steps of their optimizer, and regularise what these amount to;
            and in any case before a validation, at the end of an epoch and of the training, and after each batch of an editor
            in single mode, which puts its weights back then. Checkpoints from in between hold what has not been regularised
            yet, with the copies to go on from.
        start_step: Leave so many first steps alone. With scope run their change counts, from then on and when the training
            ends, until when they are validated and saved as they are; null is a tenth of the run there, where its length is
            known, else 0. What is chosen after the first step of all is hard to leave again: entries that were undone have to
            overtake, in one step, what others have gathered in many.

    Raises:
        ValueError: every_n_steps is below 1 or start_step below 0.
    """

    own_options: ClassVar[tuple[str, ...]] = ()
    """Attributes with a method's own options, which its state in a checkpoint is told apart by."""
    repeatable: bool = True
    """Whether it leaves as it is, bit for bit, what it has left. Else it acts only after steps, and not once more at the end
    of a run, where other callbacks may have put averaged weights in place."""

    def __init__(
        self,
        *,
        scope: Literal["step", "run"] = "step",
        parameters: str | list[str] | None = None,
        modules: str | list[str] | None = None,
        every_n_steps: int = 1,
        start_step: int | None = None,
    ) -> None:
        super().__init__()
        if scope not in ("step", "run"):
            raise ValueError(f"scope is step or run; got {scope!r}.")
        if every_n_steps < 1 or (start_step or 0) < 0:
            raise ValueError(
                f"every_n_steps is at least 1 and start_step at least 0; got {every_n_steps} and {start_step}."
            )
        self.scope = scope
        self.parameters = [parameters] if isinstance(parameters, str) else parameters
        self.modules = [modules] if isinstance(modules, str) else modules
        self.every_n_steps, self.start_step = every_n_steps, start_step
        self._start = -1  # while it is not known
        self._names: dict[Parameter, str] = {}
        self._before: dict[str, Tensor] = {}  # what changes are counted from
        self._hooks: dict[Optimizer, tuple[RemovableHandle, RemovableHandle]] = {}
        self._depth: Counter[Optimizer] = Counter()  # of steps within steps, as where a subclass calls its parent's
        self._steps: list[int] = []  # taken so far, in the order of the optimizers
        self._due: dict[Optimizer, bool] = {}  # of the steps under way, whether to regularise after them
        self._open = False  # whether there are steps that are not regularised yet
        self._ended = False  # whether it has acted since the run ended, which it would not have done yet
        self._logs: dict[str, float] = {}

    @abstractmethod
    def regularise(self, changes: Sequence[Change]) -> dict[str, float]:
        """Leave of these changes what is to be left of them, by their ``keep`` or ``replace``, and return what to log.

        Called without gradients, with the weights that moved in a step, or with all that the run has trained; and on each
        process of a distributed run with the same bits, from which it has to make the same ones.
        """

    # Before a run ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse sharding strategies, and forget the last run.

        Raises:
            ValueError: The strategy shards.
        """
        if stage == "fit":
            refuse_sharded_strategy(trainer.strategy)
            self._before, self._steps, self._open, self._ended = {}, [], False, False
            self._start = -1 if self.start_step is None else self.start_step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters.

        Raises:
            ValueError: There are none, or they are sharded, or a resumed run had others.
        """
        self._names = choose(pl_module, self.parameters, self.modules)
        refuse_sharded(self._names)
        weights = self._all()
        for name, before in self._before.items():
            if name not in weights or weights[name].shape != before.shape:
                raise ValueError(
                    f"The checkpoint has starting weights of {name}, of shape {tuple(before.shape)}, which the chosen "
                    "parameters of this model do not have."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle when to begin, and be called after each step of each optimizer.

        Raises:
            ValueError: No optimizer has any of the chosen parameters.
            TypeError: An optimizer cannot do that.
        """
        refuse_without_optimizer(self._names, trainer.optimizers)
        if self._start < 0:
            self._start = _tenth(trainer, getattr(pl_module, "steps_per_batch", 1)) if self.scope == "run" else 0
        for optimizer in trainer.optimizers:
            self._watch(optimizer)

    def _watch(self, optimizer: Optimizer) -> int:
        """Hook onto an optimizer, once; its index."""
        if optimizer not in self._hooks:
            try:
                after = optimizer.register_step_post_hook(self._after_step)
                self._hooks[optimizer] = optimizer.register_step_pre_hook(self._before_step), after
            except AttributeError as error:
                raise TypeError(
                    f"{type(optimizer).__name__} has no working register_step_post_hook, so {type(self).__name__} cannot see "
                    "its steps. Make it a torch.optim.Optimizer whose __init__ calls super().__init__()."
                ) from error
            if len(self._steps) < len(self._hooks):
                self._steps.append(0)
        return list(self._hooks).index(optimizer)

    # A step ------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forget steps that were begun and not made, as by a loss scaler; tell of a run that goes on though it was ended."""
        self._due.clear()
        self._depth.clear()
        if self._ended:
            rank_zero_warn(
                f"{type(self).__name__} has acted when the run of this checkpoint ended, after {max(self._steps)} optimizer "
                "steps: what comes now is added to what it left, and regularised together with it. To interrupt a run and go "
                "on as if it had not been, kill it rather than end it."
            )
            self._ended = False

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Regularise the gradients, or copy the weights.

        Raises:
            ValueError: A gradient is sparse or not finite.
        """
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if optimizer in self._due and scaler is None:
            return  # in the midst of a step that evaluates its closure several times
        steps = self._steps[self._watch(optimizer)]
        self._due[optimizer] = False
        weights = self._weights(optimizer)
        if not check_gradients(weights, skips=scaler is not None) or (self.scope == "step" and steps < self._start):
            return
        if self.scope == "step" and self.every_n_steps == 1 and is_plain_sgd(optimizer, scaler):
            self._regularise(
                [
                    GradientChange(self._names[weight], weight, weight.grad, _scale(group))
                    for group in optimizer.param_groups
                    for weight in group["params"]
                    if weight in self._names and weight.grad is not None and weight.grad.any()
                ]
            )
            return
        first = self.scope == "step" and (steps - self._start) % self.every_n_steps == 0
        for name, weight in weights.items():
            if first or name not in self._before:
                self._before[name] = weight.detach().clone()
        taken = steps + 1 - self._start
        self._due[optimizer] = taken > 0 and taken % self.every_n_steps == 0

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth[optimizer] += 1

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Regularise what the step has made of the weights."""
        self._depth[optimizer] -= 1
        if self._depth[optimizer] > 0:
            return
        due = self._due.pop(optimizer, None)
        if due is None:
            raise RuntimeError(
                f"{type(optimizer).__name__} made a step that Lightning knows nothing of, so {type(self).__name__} could not "
                "see the weights before it. Step what self.optimizers() gives, not the torch optimizer inside."
            )
        self._steps[self._watch(optimizer)] += 1
        self._open = True
        if due:
            self._close(self._weights(optimizer) if self.scope == "step" else self._all())

    def _close_early(self, *, ending: bool) -> None:
        """Regularise what is still open; not the first steps of a run that are to be left alone, unless it is ending."""
        alone = self.scope == "run" and max(self._steps, default=0) <= self._start
        if self._open and (ending or not alone):
            self._close(self._all())
            self._ended = alone and not self.repeatable

    @torch.inference_mode(False)
    @torch.no_grad()
    def _close(self, weights: dict[str, Tensor]) -> None:
        """Regularise the change of these weights since their copies, which scope step is then done with.

        Raises:
            ValueError: A weight is not finite.
        """
        changes = []
        for name, weight in weights.items():
            if name in self._before:
                before = self._before[name] = self._before[name].to(weight)
                if self.scope == "run" or not torch.equal(weight, before):
                    if not weight.isfinite().all():
                        raise ValueError(
                            f"The optimizer has made entries of {name} that are not finite; the weights are left as it has "
                            "made them. Go on from a checkpoint, with a smaller learning rate or larger eps."
                        )
                    changes.append(WeightChange(name, before, weight))
        self._regularise(changes)
        if self.scope == "step":
            for name in weights:
                self._before.pop(name, None)
        self._open = self.scope == "step" and bool(self._before)

    def _regularise(self, changes: Sequence[Change]) -> None:
        if changes:
            logs = self.regularise(changes)
            self._logs |= {f"{type(self).__name__.lower()}/{key}": value for key, value in logs.items()}

    def _weights(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The chosen weights that an optimizer can move; also those without a gradient, which some decay all the same."""
        weights = (weight for group in optimizer.param_groups for weight in group["params"])
        return {self._names[w]: w for w in weights if w in self._names and (w.requires_grad or w.grad is not None)}

    def _all(self) -> dict[str, Tensor]:
        return {name: weight for weight, name in self._names.items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Regularise the last steps of an epoch, and log the batch's, here since a step's own hooks may not."""
        restores = getattr(pl_module, "mode", None) == "single"  # an editor, which measures after this and begins anew
        ending = restores or _is_ending(trainer)
        if trainer.is_last_batch or ending:
            self._close_early(ending=ending)
        if self.scope == "step" and self.every_n_steps == 1:
            self._before.clear()  # of steps that a loss scaler has skipped
        if self._logs:
            pl_module.log_dict(self._logs)
            self._logs = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Regularise what is to be measured."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._close_early(ending=_is_ending(trainer) or _is_stopped(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Regularise what is to be saved, also where a run was stopped; Lightning's checkpoint callbacks come after this."""
        self._close_early(ending=_is_ending(trainer) or _is_stopped(trainer))

    # After a run -------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Regularise what is still open: the last steps, and the whole run."""
        self._close_at_end()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The whole run once more, since other callbacks may have put averaged weights in place at the end of training.

        Warns of parameters that were chosen in vain.
        """
        self._close_at_end()
        left_out = [*without_optimizer(self._names, trainer.optimizers).values()]
        if left_out and (self.parameters, self.modules) != (None, None):
            rank_zero_warn(
                f"{type(self).__name__} had nothing to regularise in {len(left_out)} of its {len(self._names)} chosen "
                f"parameters, which no optimizer had: {', '.join(left_out[:3])}{', …' if len(left_out) > 3 else ''}."
            )

    def _close_at_end(self) -> None:
        if self.repeatable or self._open:
            self._close(self._all())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizers alone."""
        self._unhook()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers alone."""
        self._unhook()

    def _unhook(self) -> None:
        for handles in self._hooks.values():
            for handle in handles:
                handle.remove()
        self._hooks, self._due, self._logs = {}, {}, {}
        self._depth.clear()

    # Checkpoints -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """One for each choice of options, so that a Trainer can have several."""
        names = ("scope", "parameters", "modules", "every_n_steps", "start_step")
        key = self._generate_state_key(**{name: getattr(self, name) for name in names})
        return key + repr({name: getattr(self, name) for name in self.own_options}) if self.own_options else key

    def state_dict(self) -> dict[str, Any]:
        """The copies that changes are counted from, each optimizer's number of steps, and how many are left alone."""
        return {
            "before": dict(self._before),
            "steps": list(self._steps),
            "start": self._start,
            "open": self._open,
            "ended": self._ended,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self._before, self._steps = dict(state_dict["before"]), list(state_dict["steps"])
        self._start, self._open = state_dict["start"], state_dict.get("open", bool(self._before))
        self._ended = state_dict.get("ended", False)


def check_share(regulariser: Regulariser, **options: float) -> None:
    """Refuse options that are no shares.

    Raises:
        ValueError: One is 0 or below, or above 1.
    """
    for name, share in options.items():
        if not 0 < share <= 1:
            raise ValueError(
                f"{type(regulariser).__name__}'s {name} is a share above 0 and up to 1, such as 0.4 for 40 %; got {share}."
            )


def _scale(group: dict[str, Any]) -> float:
    """What plain SGD multiplies gradients by."""
    return float(group["lr"]) if group["maximize"] else -float(group["lr"])


def _is_ending(trainer: Trainer) -> bool:
    """Whether a run has made its last batch, as far as its length tells."""
    last_epoch = 0 < (trainer.max_epochs or 0) <= trainer.current_epoch + 1
    return 0 < trainer.max_steps <= trainer.global_step or (trainer.is_last_batch and last_epoch)


def _is_stopped(trainer: Trainer) -> bool:
    """Whether a run has been told to stop and will."""
    enough = trainer.current_epoch + 1 >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return trainer.should_stop and enough


def _tenth(trainer: Trainer, steps_per_batch: int) -> int:
    """Of the steps of a run, or 0 where their number is unknown; a module that makes them itself may make several a batch."""
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes from epoch to epoch
        return 0
    if steps == float("inf"):
        return 0
    steps = int(steps) * steps_per_batch
    return (min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps) // 10
