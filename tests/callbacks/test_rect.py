"""RECT as a callback in a Trainer, against its definition."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from rect_lightning.callbacks import RECT
from tests.callbacks.training import BATCHES, Model, adamw, fit, sgd, weights
from tests.solving.test_relative_change import naive_mask


class Gradients(Callback):
    """Copies the gradients of the last backward pass."""

    def on_after_backward(self, trainer, pl_module):
        self.seen = {name: p.grad.clone() for name, p in pl_module.named_parameters()}


def left(before, after, keep=0.4):
    """What RECT leaves of a change, tensor by tensor."""
    return {n: torch.where(naive_mask(after[n] - before[n], before[n], keep), after[n], before[n]) for n in before}


def changed(before, after):
    return {n: int((before[n] != after[n]).sum()) for n in before}


def assert_same(found, expected):
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_plain_sgd_s_gradient_is_masked_against_the_current_weight():
    module, gradients = Model(sgd), Gradients()
    before = weights(module)
    logged = fit(module, gradients, RECT(keep=0.4)).callback_metrics
    for name, weight in module.named_parameters():
        update = -0.01 * gradients.seen[name]
        mask = naive_mask(update, before[name], 0.4)
        assert torch.equal(weight.grad != 0, mask & (update != 0))
        assert torch.equal(weight, before[name].add(weight.grad, alpha=-0.01))
        torch.testing.assert_close(weight[mask], (before[name] + update)[mask])
        assert logged[f"rect/{name}/kept"] == pytest.approx(round(0.4 * update.numel()) / update.numel())
        assert logged[f"rect/{name}/manhattan"] == pytest.approx(float(update.abs().sum()), rel=1e-5)
        share = float((update.abs() / before[name].abs() > 0.171).float().mean())
        assert logged[f"rect/{name}/above_0.171"] == pytest.approx(share)
        smallest = float((update.abs() / before[name].abs())[mask].min())
        assert logged[f"rect/{name}/threshold"] == pytest.approx(smallest, rel=1e-5)


@pytest.mark.parametrize("per", ["tensor", "all"])
def test_a_warm_up_from_zero_with_zero_weights(per):
    """A step of learning rate 0 changes nothing, not even by 0 times infinity."""

    def warming_up(module):
        torch.nn.init.zeros_(module.layers[0].bias)
        optimizer = sgd(module)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 2))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Model(warming_up)
    rect = RECT(keep=0.4, per=per)
    before = weights(module) | {"layers.0.bias": torch.zeros(8)}
    fit(module, rect, steps=1)
    assert_same(weights(module), before)
    fit(module, rect, steps=3)
    moved = changed(before, weights(module))
    assert 0 < sum(moved.values()) < sum(weight.numel() for weight in before.values())


OPTIMIZERS = {
    "AdamW": adamw,
    "fused": partial(adamw, fused=True),
    "foreach": partial(adamw, foreach=True),
    "amsgrad, maximize": partial(adamw, amsgrad=True, maximize=True),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.01, momentum=0.9, nesterov=True),
    "decay": lambda m: torch.optim.SGD(m.parameters(), 0.01, weight_decay=1),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=5),
    "line search": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=5, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_s_step_is_what_it_is_and_the_rest_undone(optimizer):
    """Against the same step without RECT."""
    free, module = Model(optimizer), Model(optimizer)
    before = weights(module)
    fit(free)
    logged = fit(module, RECT(keep=0.4)).callback_metrics
    assert_same(weights(module), left(before, weights(free)))
    for name, weight in weights(free).items():
        assert logged[f"rect/{name}/kept"] == pytest.approx(round(0.4 * weight.numel()) / weight.numel())
        assert logged[f"rect/{name}/manhattan"] == pytest.approx(float((weight - before[name]).abs().sum()), rel=1e-5)


def test_many_steps_with_groups_accumulation_and_clipping():
    """Against a loop by hand."""

    def groups(module):
        first, second = module.layers
        options = [{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.2, "weight_decay": 0.0}]
        return torch.optim.AdamW(options, lr=0.05, weight_decay=0.1)

    module, by_hand = Model(groups), Model(groups)
    fit(module, RECT(keep=0.3), steps=4, accumulate_grad_batches=2, gradient_clip_val=0.5)
    optimizer = groups(by_hand)
    for pair in BATCHES.split(8)[:4]:
        for batch in pair.split(4):
            (by_hand.layers(batch).square().sum() / 2).backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        before = weights(by_hand)
        optimizer.step()
        optimizer.zero_grad()
        by_hand.load_state_dict(left(before, weights(by_hand), 0.3))
    assert_same(weights(module), weights(by_hand))


def test_keeping_all_changes_nothing():
    for optimizer in (sgd, adamw):
        for scope in ("step", "run"):
            free, module = Model(optimizer), Model(optimizer)
            fit(free, steps=3)
            fit(module, RECT(keep=1.0, scope=scope), steps=3)
            assert_same(weights(module), weights(free))


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_one_threshold_over_all_tensors(optimizer):
    free, module = Model(optimizer), Model(optimizer)
    before = weights(module)
    fit(free)
    fit(module, RECT(keep=0.3, per="all"))
    flat = {name: torch.cat([x.flatten() for x in w.values()]) for name, w in
            {"before": before, "free": weights(free), "found": weights(module)}.items()}  # fmt: skip
    mask = naive_mask(flat["free"] - flat["before"], flat["before"], 0.3)
    assert torch.equal(flat["found"] != flat["before"], mask)
    assert torch.equal(flat["found"][mask], flat["free"][mask])


@pytest.mark.parametrize("optimizer", [sgd, adamw, lambda m: torch.optim.SGD(m.parameters(), 0.01, momentum=0.9)])
@pytest.mark.parametrize("options", [{}, {"every_n_steps": 3}, {"start_step": 4}, {"start_step": 99}])
def test_a_run_changes_exactly_its_share(optimizer, options):
    for per in ("tensor", "all"):
        module = Model(optimizer)
        before = weights(module)
        fit(module, RECT(keep=0.3, scope="run", per=per, **options), steps=7)
        counts = changed(before, weights(module))
        if per == "tensor":
            assert counts == {name: round(0.3 * w.numel()) for name, w in before.items()}
        else:
            assert sum(counts.values()) == round(0.3 * sum(w.numel() for w in before.values()))


def test_a_run_s_first_step_is_that_of_scope_step():
    step, run = Model(adamw), Model(adamw)
    fit(step, RECT(keep=0.3))
    fit(run, RECT(keep=0.3, scope="run"))
    assert_same(weights(run), weights(step))


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, 40])
def test_refuses_a_keep_that_is_no_share(keep):
    with pytest.raises(ValueError, match=r"0\.4 for 40 %"):
        RECT(keep=keep)


@pytest.mark.parametrize("options", [{"per": "layer"}, {"scope": "epoch"}, {"every_n_steps": 0}, {"start_step": -1}])
def test_refuses_other_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RECT(**options)


def test_works_where_there_is_no_transformers():
    """Lightning imports it if it can; after that, nobody can."""
    code = """
import sys
import lightning.pytorch
for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
    del sys.modules[name]
sys.modules["transformers"] = None
from tests.callbacks.training import Model, adamw, fit
from rect_lightning.callbacks import RECT
fit(Model(adamw), RECT())
print("rect_lightning.models" in sys.modules)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("values", ["distinct", "many zeros", "alike in columns", "equal"])
def test_45_million_entries_take_less_than_two_copies_of_the_matrix(values):
    """A LLaMA down projection, in a process of its own so that its peak memory is RECT's."""
    change = {
        "distinct": "pass",
        "many zeros": "weight.grad.view(-1)[: 30_000_000] = 0",
        "alike in columns": "weight.grad[:, ::86] = 0",
        "equal": "weight.data.fill_(2); weight.grad.fill_(1)",
    }
    code = f"""
import resource, torch
from rect_lightning.callbacks import RECT
from rect_lightning.callbacks.changes import GradientChange
weight = torch.nn.Parameter(torch.randn(4096, 11008)); weight.grad = torch.rand(4096, 11008) + 0.1  # no entry is 0 by chance
{change[values]}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    RECT(keep=0.4).regularise([GradientChange("weight", weight, weight.grad, -1.0)])
copies = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * weight.numel())
kept = int((weight.grad != 0).sum())
print(kept, round(copies, 2))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == (4096 * 11008 - 30_000_000 if values == "many zeros" else round(0.4 * 4096 * 11008))
    assert float(out[1]) < 2
