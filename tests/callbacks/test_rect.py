"""RECT as a callback in a Trainer."""

import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from rect_lightning.callbacks import RECT
from tests.solving.test_relative_change import naive_mask


class Model(LightningModule):
    """Two layers trained by whatever optimizer a test asks for."""

    def __init__(self, optimizer):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False), torch.nn.Linear(8, 2, bias=False))
        self.optimizer = optimizer
        self.gradients = {}

    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().sum()

    def on_after_backward(self):
        self.gradients = {name: p.grad.clone() for name, p in self.named_parameters()}

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def fit(model, callback, tmp_path):
    trainer = Trainer(
        max_steps=1, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, DataLoader(torch.randn(4, 6), batch_size=4))
    return trainer


def test_masks_each_matrix_against_the_current_weight(tmp_path):
    model = Model(lambda p: torch.optim.SGD(p, lr=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fit(model, RECT(keep=0.4), tmp_path)
    for name, weight in model.named_parameters():
        update = -0.1 * model.gradients[name]
        mask = naive_mask(update, before[name], 0.4)
        assert torch.equal(weight != before[name], mask & (update != 0))
        torch.testing.assert_close(weight[mask], (before[name] + update)[mask])
        logged = trainer.callback_metrics
        assert logged[f"rect/{name}/kept"] == pytest.approx(round(0.4 * update.numel()) / update.numel())
        assert logged[f"rect/{name}/manhattan"] == pytest.approx(float(update.abs().sum()), rel=1e-5)
        share = float((update.abs() / before[name].abs() > 0.171).float().mean())
        assert logged[f"rect/{name}/above_0.171"] == pytest.approx(share)


def test_keeping_all_changes_nothing(tmp_path):
    results = []
    for callback in (RECT(keep=1.0), RECT(keep=0.3)):
        torch.manual_seed(1)
        model = Model(lambda p: torch.optim.SGD(p, lr=0.1))
        torch.manual_seed(2)
        expected = [p.detach().clone() for p in model.parameters()]
        fit(model, callback, tmp_path)
        expected = [w - 0.1 * g for w, g in zip(expected, model.gradients.values(), strict=True)]
        results.append(all(torch.allclose(p, w) for p, w in zip(model.parameters(), expected, strict=True)))
    assert results == [True, False]


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, 0.1, weight_decay=1),
    ],
)
def test_refuses_an_optimizer_that_moves_masked_entries(optimizer, tmp_path):
    with pytest.raises(ValueError, match="plain SGD"):
        fit(Model(optimizer), RECT(), tmp_path)


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, 40])
def test_refuses_a_keep_that_is_no_share(keep):
    with pytest.raises(ValueError, match=r"0\.4 for the top 40 %"):
        RECT(keep=keep)


def test_refuses_an_update_that_is_not_finite(tmp_path):
    model = Model(lambda p: torch.optim.SGD(p, lr=0.1))
    with torch.no_grad():
        model.layers[1].weight[0, 0] = torch.nan
    before = model.layers[0].weight.detach().clone()
    with pytest.raises(ValueError, match="not finite"):
        fit(model, RECT(), tmp_path)
    assert torch.equal(model.layers[0].weight, before)


def test_imports_no_model_code():
    code = "import sys; from rect_lightning.callbacks import RECT; print('rect_lightning.models' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_45_million_entries_take_less_than_two_copies_of_the_matrix():
    """A LLaMA down projection, in a process of its own so that its peak memory is RECT's."""
    code = """
import resource, torch
from rect_lightning.callbacks import RECT
from rect_lightning.callbacks.changes import GradientChange
weight = torch.nn.Parameter(torch.randn(4096, 11008)); weight.grad = torch.randn(4096, 11008)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    RECT(keep=0.4).regularise([GradientChange("weight", weight, weight.grad, -1.0)])
copies = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * weight.numel())
kept = int((weight.grad != 0).sum())
print(kept, round(copies, 2))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == round(0.4 * 4096 * 11008)
    assert float(out[1]) < 2
