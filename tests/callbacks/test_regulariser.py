"""What all regularisers share: how they see a step, what they refuse, and how they go on after a stop."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch.utils.data import DataLoader

from rect_lightning.callbacks import RECT, Shrink
from rect_lightning.callbacks.changes import WeightChange
from rect_lightning.callbacks.parameters import refuse_sharded, refuse_sharded_strategy
from rect_lightning.callbacks.regulariser import Regulariser
from tests.callbacks.test_rect import assert_same, changed, left
from tests.callbacks.training import BATCHES, Model, adamw, fit, sgd, trainer, weights

ROOT = Path(__file__).resolve().parents[2]


class Half(Regulariser):
    """Half of each update, which no mask can make."""

    def regularise(self, changes):
        norms = {}
        for change in changes:
            norms[change.name] = float(change.update.norm()) * abs(change.scale)
            change.replace(change.update / 2)
        return norms


class Watch(Callback):
    """The weights after each batch."""

    def on_train_start(self, trainer, pl_module):
        self.seen = [weights(pl_module)]

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(weights(pl_module))


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_regulariser_can_replace_an_update(optimizer):
    free, module = Model(optimizer), Model(optimizer)
    before = weights(module)
    fit(free)
    logged = fit(module, Half()).callback_metrics
    for name, weight in weights(module).items():
        torch.testing.assert_close(weight, (before[name] + weights(free)[name]) / 2)
        assert logged[f"half/{name}"] == pytest.approx(float((weights(free)[name] - before[name]).norm()), rel=1e-4)


def test_only_the_chosen_parameters():
    cases = {
        "layers.0.weight": {"parameters": ["layers.0.*"], "modules": ["torch.nn.Linear"], "keep": 0.1},
        "layers.0.bias": {"parameters": ["*bias"]},
        "layers.1.weight": {"parameters": ["*.1.*", "*.1.weight"]},
    }
    for name, options in cases.items():
        free, module = Model(adamw), Model(adamw)
        before = weights(module)
        fit(free)
        fit(module, RECT(**options))
        expected = weights(free)
        inside = [n for n in expected if n == name or (name == "layers.0.weight" and n == "layers.0.bias")]
        expected |= {n: left(before, expected, options.get("keep", 0.4))[n] for n in inside}
        assert_same(weights(module), expected)


def test_several_at_once():
    """Each with parameters of its own."""
    module = Model(adamw)
    before = weights(module)
    callbacks = RECT(0.1, scope="run", parameters=["*.0.*"]), RECT(0.5, scope="run", parameters=["*.1.*"])
    fit(module, *callbacks, steps=3)
    assert changed(before, weights(module)) == {"layers.0.weight": 5, "layers.0.bias": 1, "layers.1.weight": 8}


@pytest.mark.parametrize(
    "other", [{"keep": 0.1}, {"every_n_steps": 3}, {"per": "all"}, {"scope": "run"}, {"start_step": 2}], ids=str
)
def test_two_of_the_same_parameters(other, tmp_path):
    """Each with its own state, also after a stop."""
    one, two = RECT(0.5), RECT(**({"keep": 0.5} | other))
    fit(Model(adamw), one, two, steps=4).save_checkpoint(tmp_path / "a.ckpt")
    states = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    assert states.keys() == {one.state_key, two.state_key}


def test_a_resumed_run_goes_on_with_the_first_steps_it_had(tmp_path):
    """A tenth of the run as it was begun."""
    fit(Model(adamw), RECT(scope="run"), steps=20).save_checkpoint(tmp_path / "a.ckpt")
    resumed = RECT(scope="run")
    fit(Model(adamw), resumed, steps=40, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.state_dict()["start"] == 2
    assert resumed.state_dict()["steps"] == [40]
    fit(Model(adamw), resumed, steps=30)
    assert resumed.state_dict()["start"] == 3


@pytest.mark.parametrize("maximize", [False, True])
def test_a_gradient_s_scale_has_the_sign_of_the_change(maximize):
    class Notes(Regulariser):
        def regularise(self, changes):
            self.seen = {c.name: c.before + c.scale * c.update for c in changes}
            return {}

    notes, module = Notes(), Model(lambda m: torch.optim.SGD(m.parameters(), 0.01, maximize=maximize))
    fit(module, notes)
    for name, weight in weights(module).items():
        torch.testing.assert_close(weight, notes.seen[name])


def test_every_n_steps_regularises_the_change_of_them_together():
    free, module, seen = Model(adamw), Model(adamw), Watch()
    fit(free, steps=5)  # the first two of which are left alone
    fit(module, RECT(every_n_steps=3, start_step=2), seen, steps=5)
    start, end = seen.seen[2], seen.seen[5]
    assert_same(end, left(start, weights(free)))
    assert changed(start, seen.seen[4])["layers.0.weight"] == 48  # in between they move freely


def test_a_run_is_left_alone_for_its_first_tenth():
    free, module, seen, all_along = Model(adamw), Model(adamw), Watch(), Watch()
    fit(free, steps=2)
    fit(module, RECT(scope="run"), seen, steps=25)  # batches of 2.5 epochs
    fit(Model(adamw), RECT(scope="run", start_step=0), all_along, steps=25)
    assert_same(seen.seen[2], weights(free))
    for weight in (seen.seen[3], all_along.seen[1], all_along.seen[2]):
        assert changed(seen.seen[0], weight)["layers.0.weight"] == round(0.4 * 48)


def test_a_last_step_is_never_left_open(tmp_path):
    """What a checkpoint of the last step holds is what there is after training."""
    module = Model(adamw)
    before = weights(module)
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    fit(module, RECT(scope="run", every_n_steps=100), saving, steps=5, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_same(weights(module), saved)
    assert changed(before, saved)["layers.0.weight"] == round(0.4 * 48)


class Stop(Callback):
    """Ends a run after three steps."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 3


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({"every_n_steps": 100}, [Stop]),
        ({"scope": "run", "every_n_steps": 100, "start_step": 0}, [Stop]),
        ({"scope": "run", "start_step": 100}, [Stop]),
        ({"scope": "run", "start_step": 100}, []),
    ],
    ids=str,
)
def test_what_is_saved_at_the_end_of_an_epoch_is_regularised(options, stops, tmp_path):
    """However the run ends, and whatever its length had to do with it."""
    module, saving = Model(adamw), ModelCheckpoint(tmp_path, save_last=True)
    before = weights(module)
    callbacks = RECT(0.25, **options), *(stop() for stop in stops), saving
    fit(module, *callbacks, steps=-1, max_epochs=1, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert changed(before, saved)["layers.0.weight"] == 12
    assert_same(weights(module), saved)


def test_first_steps_are_left_alone_across_epochs():
    seen = Watch()
    fit(Model(adamw), RECT(0.25, scope="run", start_step=15), seen, steps=-1, max_epochs=2)
    counts = [changed(seen.seen[0], w)["layers.0.weight"] for w in seen.seen]
    assert counts == [0] + 15 * [48] + 5 * [12]


@pytest.mark.parametrize("options", [{"every_n_steps": 100}, {"scope": "run", "start_step": 0, "every_n_steps": 100}])
def test_what_is_validated_is_regularised(options):
    class Validated(Model):
        def val_dataloader(self):
            return torch.utils.data.DataLoader(BATCHES[:4])

        def on_validation_epoch_start(self):
            if not self.trainer.sanity_checking:
                counts.append(changed(before, weights(self))["layers.0.weight"])

        def validation_step(self, batch, batch_idx):
            pass

    module, counts = Validated(adamw), []
    before = weights(module)
    fit(module, RECT(0.25, **options), steps=6, val_check_interval=2)
    assert len(counts) == 3
    assert counts[0] == 12
    assert counts == 3 * [12] if "scope" in options else max(counts) < 48


def test_a_scaler_that_skips_the_last_step_leaves_none_open():
    class Overflows(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (torch.inf if self.trainer.is_last_batch else 1)

        def on_train_epoch_end(self):
            counts.append(changed(before, weights(self))["layers.0.weight"])

    module, counts = Overflows(adamw), []
    before = weights(module)
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16))
    fit(module, RECT(0.25, every_n_steps=100), steps=-1, max_epochs=1, plugins=scaler)
    assert counts == [12]


def test_an_editor_that_puts_its_weights_back_measures_what_is_left():
    class Single(Model):
        mode = "single"

        def on_train_batch_end(self, *_):
            counts.append(changed(before, weights(self))["layers.0.weight"])
            self.load_state_dict(before)

    for options in ({"every_n_steps": 2}, {"scope": "run", "every_n_steps": 2}, {"scope": "run", "start_step": 9}):
        module, counts = Single(adamw), []
        before = weights(module)
        fit(module, RECT(0.25, **options), steps=5)
        assert counts == 5 * [12], options


@pytest.mark.parametrize(
    "options",
    [{}, {"scope": "run"}, {"every_n_steps": 4}, {"scope": "run", "every_n_steps": 2, "start_step": 2}],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one(options, tmp_path):
    class ByStep(Model):  # a DataLoader begins anew when it is resumed
        def training_step(self, batch, batch_idx):
            return super().training_step(BATCHES[4 * self.global_step :][:4], batch_idx)

    whole, stopped, resumed = ByStep(adamw), ByStep(adamw), ByStep(adamw)
    fit(whole, RECT(0.3, **options), steps=8)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        fit(stopped, RECT(0.3, **options), Stop(), steps=8)
    torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    fit(resumed, RECT(0.3, **options), steps=8, ckpt_path=tmp_path / "stopped.ckpt")
    assert_same(weights(resumed), weights(whole))


def test_a_second_run_begins_anew():
    module, rect = Model(adamw), RECT(scope="run")
    fit(module, rect, steps=2)
    before = weights(module)
    fit(module, rect, steps=2)
    assert changed(before, weights(module))["layers.0.weight"] == round(0.4 * 48)


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    fit(Model(adamw), RECT(scope="run"), steps=2).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    state["before"]["layers.1.weight"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"layers\.1\.weight, of shape \(1,\)"):
        fit(Model(adamw), RECT(scope="run"), steps=4, ckpt_path=tmp_path / "b.ckpt")


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_steps_that_a_loss_scaler_skips(optimizer):
    class Overflows(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx in (0, 2) else loss

    module, seen = Overflows(optimizer), Watch()
    fit(
        module,
        RECT(0.3),
        seen,
        steps=-1,
        max_epochs=1,
        limit_train_batches=4,
        plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16)),
    )
    counts = [changed(a, b)["layers.0.weight"] for a, b in zip(seen.seen, seen.seen[1:], strict=False)]
    share = round(0.3 * 48)
    assert counts == [0, share, 0, share]


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(optimizer, precision):
    module, seen = Model(optimizer), Watch()
    fit(module, RECT(0.3), seen, steps=3, precision=precision)
    for before, after in zip(seen.seen[1:], seen.seen[2:], strict=False):
        count = changed(before, after)["layers.0.weight"]
        assert 0 < count <= round(0.3 * 48)


def test_half_precision_changes_are_compared_in_fp32():
    """In bf16, whose changes are multiples of few values, as well."""
    before, after = (torch.tensor([x], dtype=torch.bfloat16) for x in (1.0078125, -3.0))
    assert WeightChange("w", before, after).update.tolist() == [-4.0078125]  # in bf16, -4
    free, module = (Model(adamw, torch.bfloat16) for _ in range(2))
    before = weights(module)
    batch = {"precision": "bf16-true"}
    fit(free, **batch)
    fit(module, RECT(), **batch)
    wide = [{n: w.float() for n, w in x.items()} for x in (before, weights(free))]
    assert_same({n: w.float() for n, w in weights(module).items()}, left(*wide))


class Adversaries(LightningModule):
    """Two optimizers in turn, by manual optimisation, with a weight that both step."""

    def __init__(self, raw=False):
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first, self.second = torch.nn.Linear(6, 4), torch.nn.Linear(4, 2)
        self.raw, self.seen = raw, []

    def configure_optimizers(self):
        shared = [*self.second.parameters()]
        return torch.optim.AdamW([*self.first.parameters(), *shared], 0.1), torch.optim.SGD(shared, 0.1, momentum=0.9)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.second(self.first(batch)).square().sum())
            before = weights(self)
            (optimizer.optimizer if self.raw else optimizer).step()
            self.seen.append(changed(before, weights(self)))


def test_several_optimizers_by_manual_optimisation():
    module = Adversaries()
    fit(module, RECT(0.5), steps=6)
    assert module.seen[0] == {"first.weight": 12, "first.bias": 2, "second.weight": 4, "second.bias": 1}
    assert module.seen[1] == {"first.weight": 0, "first.bias": 0, "second.weight": 4, "second.bias": 1}
    assert len(module.seen) == 6


@pytest.mark.parametrize("used_before", [False, True])
def test_an_optimizer_that_calls_its_parent_s_step(used_before):
    """Whose hooks torch calls as well, once there has been an optimizer of the parent's class."""

    class Parent(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    class Child(Parent):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.data += 0.01
            return loss

    if used_before:
        Parent([torch.zeros(1, requires_grad=True)])
    free, module = (Model(lambda m: Child(m.parameters(), 0.05)) for _ in range(2))
    before = weights(module)
    fit(free)
    fit(module, RECT(0.3))
    assert_same(weights(module), left(before, weights(free), 0.3))


def test_refuses_steps_past_lightning():
    with pytest.raises(RuntimeError, match=r"self\.optimizers\(\)"):
        fit(Adversaries(raw=True), RECT())


def test_averages_see_what_is_left():
    class Averaging(WeightAveraging):
        def on_train_end(self, trainer, pl_module):
            self.average = {n: p.clone() for n, p in self._average_model.module.named_parameters()}
            super().on_train_end(trainer, pl_module)

    averaging, module, seen = Averaging(), Model(adamw), Watch()
    fit(module, averaging, RECT(0.3, parameters=["*.0.*"]), seen, steps=1)
    assert_same(averaging.average, seen.seen[1])
    for order in ([WeightAveraging(), RECT(0.3, scope="run")], [RECT(0.3, scope="run"), WeightAveraging()]):
        module = Model(adamw)
        before = weights(module)
        fit(module, *order, steps=5)
        assert changed(before, weights(module))["layers.0.weight"] == round(0.3 * 48)


def test_frozen_and_tied_parameters():
    class Tied(Model):
        def __init__(self):
            super().__init__(lambda m: torch.optim.AdamW(m.parameters(), 0.1))
            self.again = self.layers[1]
            self.layers[0].weight.requires_grad_(False)

    module, rect = Tied(), RECT(0.5, scope="run")
    before = weights(module)
    fit(module, rect, steps=2)
    assert changed(before, weights(module)) == {"layers.0.weight": 0, "layers.0.bias": 4, "layers.1.weight": 8}
    assert "layers.0.weight" not in rect.state_dict()["before"]  # nothing is copied that does not train


def test_the_optimizer_is_left_as_it_was():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                raise KeyError("failed")

    done = fit(Model(adamw), RECT(), steps=2)
    assert not done.optimizers[0]._optimizer_step_post_hooks
    assert not done.optimizers[0]._optimizer_step_pre_hooks
    failing = trainer(RECT(), Fails(), steps=3)
    with pytest.raises(KeyError, match="failed"):
        failing.fit(Model(adamw), torch.utils.data.DataLoader(BATCHES, batch_size=4))
    assert not failing.optimizers[0]._optimizer_step_post_hooks


def test_trains_where_nothing_is_logged():
    fit(Model(adamw), RECT(), barebones=True, logger=None, enable_checkpointing=None)


# Refusals ------------------------------------------------------------------------------------------------------------


def refused(module, callback, match, error=ValueError):
    before = weights(module)
    with pytest.raises(error, match=match):
        fit(module, callback, steps=2)
    assert_same(weights(module), before)


def test_refuses_what_matches_nothing():
    refused(Model(adamw), RECT(parameters=["*.0.*", "*.mlp.*"]), r"\*\.mlp\.\*; parameter names are such as layers\.0")
    refused(Model(adamw), RECT(parameters=[]), "an empty list")
    refused(Model(adamw), RECT(modules=["Conv2d"]), "Conv2d; module types are Linear, Model, Sequential")
    refused(Model(adamw), RECT(modules=["torch.nn.Lineal"]), r"types of modules.*torch\.nn\.Lineal is none")
    model = Model(adamw)
    model.norm = torch.nn.LayerNorm(2)
    refused(model, RECT(parameters=["layers.*"], modules=["LayerNorm"]), "both parameters=.* and modules=")


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_refuses_an_update_that_is_not_finite(optimizer):
    class Overflows(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.inf

    refused(Overflows(optimizer), RECT(), "not finite")


def only(layer):
    """AdamW over one layer."""
    return lambda module: torch.optim.AdamW(module.layers[layer].parameters(), lr=0.05)


def test_refuses_parameters_that_no_optimizer_has():
    refused(Model(only(0)), RECT(parameters=["layers.1.*"]), r"No optimizer has any .* such as layers\.1\.weight")


def test_warns_of_some_parameters_that_no_optimizer_had(recwarn):
    fit(Model(only(0)), RECT(), steps=2)  # all that are trained, whichever these are
    assert not [w for w in recwarn if "nothing to regularise" in str(w.message)]
    with pytest.warns(UserWarning, match=r"RECT had nothing to regularise in 1 of its 3 .* had: layers\.1\.weight\.$"):
        fit(Model(only(0)), RECT(parameters=["layers.*"]), steps=2)


def test_parameters_that_are_given_to_an_optimizer_later(recwarn):
    class Unfreezes(Callback):
        def on_train_start(self, trainer, pl_module):
            self.before = weights(pl_module)

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.layers[1].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": pl_module.layers[1].parameters()})

    module, unfreezes = Model(only(0)), Unfreezes()
    module.layers[1].requires_grad_(False)
    fit(module, RECT(0.5, parameters=["layers.1.*"]), unfreezes, steps=11)
    assert changed(unfreezes.before, weights(module))["layers.1.weight"] == 8
    assert not [w for w in recwarn if "nothing to regularise" in str(w.message)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_weights_that_are_not_finite(value):
    """Though their gradients are; nothing of such a step is hidden."""

    class Breaks(torch.optim.AdamW):
        def step(self, closure=None):
            loss = super().step(closure)
            self.param_groups[0]["params"][-1].data[0, 0] = value
            return loss

    module = Model(lambda m: Breaks(m.parameters(), 0.05))
    with pytest.raises(ValueError, match=r"made entries of layers\.1\.weight that are not finite"):
        fit(module, RECT(0.3))
    assert not module.layers[1].weight[0, 0].isfinite()
    assert all(p.isfinite().all() for p in module.layers[0].parameters())


def test_refuses_sparse_gradients():
    class Sparse(Model):
        def __init__(self):
            super().__init__(lambda m: torch.optim.SGD(m.parameters(), 0.1))
            self.embedding = torch.nn.Embedding(5, 6, sparse=True)

        def training_step(self, batch, batch_idx):
            return self.layers(self.embedding(torch.tensor([1, 2]))).sum()

    refused(Sparse(), RECT(), r"embedding\.weight is sparse")
    fit(Sparse(), RECT(parameters=["layers.*"]))


def test_refuses_an_optimizer_that_cannot_be_watched():
    class Bare(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters)}]
            self.state, self.defaults = {}, {}

        def step(self, closure=None):
            closure()

    refused(Model(lambda m: Bare(m.parameters())), RECT(), "Bare has no working register_step_post_hook", TypeError)


def test_refuses_sharded_parameters(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    with pytest.raises(ValueError, match="FSDPStrategy shards"):
        refuse_sharded_strategy(FSDPStrategy())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match=r"layers\.0\.weight is sharded \(DTensor\)"):
            refuse_sharded({sharded: "layers.0.weight"})
    finally:
        torch.distributed.destroy_process_group()


# Several processes ---------------------------------------------------------------------------------------------------


def test_ranks_agree_bit_for_bit(tmp_path):
    """Two processes, each with half of the data."""
    code = f"""
import torch
from torch.utils.data import DataLoader
from rect_lightning.callbacks import RECT
from tests.callbacks.training import BATCHES, Model, adamw, trainer, weights
module = Model(adamw)
start = weights(module)
run = trainer(RECT(0.3, parameters=["*.0.*"]), RECT(0.3, scope="run", per="all", parameters=["*.1.*"]), steps=4,
              strategy="ddp", default_root_dir={str(tmp_path)!r}, **{{"devices": 2}})
run.fit(module, DataLoader(BATCHES, batch_size=4))
torch.save({{"start": start, "end": weights(module)}}, {str(tmp_path)!r} + f"/{{run.global_rank}}.pt")
"""
    script = tmp_path / "train.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=300)
    assert not done.returncode, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_same(first["end"], second["end"])
    assert changed(first["start"], first["end"])["layers.1.weight"] == round(0.3 * 16)
    alone = copy.deepcopy(Model(adamw))
    fit(alone, RECT(0.3), steps=4)
    assert not torch.equal(weights(alone)["layers.1.weight"], first["end"]["layers.1.weight"])  # both halves counted


def test_what_a_stopped_run_validates_is_what_it_leaves():
    class Validated(Model):
        measured = None

        def val_dataloader(self):
            return DataLoader(BATCHES, batch_size=4)

        def validation_step(self, batch, batch_idx):
            self.measured = weights(self)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 2

    module = Validated(adamw)
    fit(module, Shrink(0.5, scope="run", start_step=10**9), Stop(), steps=8, num_sanity_val_steps=0)
    assert module.measured is not None
    assert all(torch.equal(module.measured[name], weight) for name, weight in weights(module).items())
