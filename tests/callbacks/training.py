"""A small LightningModule that any test can train under any optimizer."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

BATCHES = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))


class Model(LightningModule):
    """Two layers, one of them with a bias, under the optimizers that a function of the module gives."""

    def __init__(self, optimizers, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 2, bias=False)).to(dtype)
        self.make_optimizers = optimizers

    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().sum()

    def configure_optimizers(self):
        return self.make_optimizers(self)


def adamw(module, **options):
    return torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1, **options)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.01)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def trainer(*callbacks, steps=1, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    fixed = {"max_steps": steps, "accelerator": "cpu", "devices": 1, "callbacks": list(callbacks)}
    return Trainer(**(fixed | quiet | options))


def fit(module, *callbacks, steps=1, ckpt_path=None, **options):
    """Train on the same batches each time; the Trainer."""
    made = trainer(*callbacks, steps=steps, **options)
    made.fit(module, DataLoader(BATCHES, batch_size=4), ckpt_path=ckpt_path)
    return made


KINDS = [sgd, adamw, lambda m: torch.optim.SGD(m.parameters(), 0.01, momentum=0.9)]


def updates(callback, optimizer, **options):
    """What each weight's update is without and with a callback, in a first step."""
    free, module = Model(optimizer), Model(optimizer)
    before = weights(module)
    fit(free)
    logged = fit(module, callback, **options).callback_metrics
    pairs = {n: (weights(free)[n] - w, weights(module)[n] - w) for n, w in before.items()}
    return before, pairs, {name: float(value) for name, value in logged.items()}


def truncated(matrix, count):
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :count] * s[:count]) @ vh[:count]).float()


class ByStep(Model):
    """Takes its batches by the number of the step: a DataLoader begins anew when it is resumed."""

    def training_step(self, batch, batch_idx):
        return super().training_step(BATCHES[4 * self.global_step :][:4], batch_idx)


def fit_with_a_stop(make, folder, optimizer=adamw):
    """A module that is trained for eight steps with a callback, and one that is stopped after three and resumed."""
    whole, stopped, resumed = (ByStep(optimizer) for _ in range(3))
    fit(whole, make(), steps=8)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(folder / "stopped.ckpt")
                raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        fit(stopped, make(), Stop(), steps=8)
    torch.load(folder / "stopped.ckpt", weights_only=True)
    fit(resumed, make(), steps=8, ckpt_path=folder / "stopped.ckpt")
    return whole, resumed
