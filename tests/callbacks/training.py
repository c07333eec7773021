"""A small LightningModule that any test can train under any optimizer."""

import torch
from lightning.pytorch import LightningModule, Trainer
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
