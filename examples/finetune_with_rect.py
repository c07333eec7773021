"""Fine-tune a model of your own under AdamW, and let only 10 % of each weight's entries change.

    python examples/finetune_with_rect.py

A small network learns one task, and is then fine-tuned to a similar one: freely, and with RECT, which keeps the changes that
are largest relative to the weight and holds all other entries at their starting values. For each, the accuracy on both tasks
and the share of entries that fine-tuning changed are printed.
"""

import copy
import logging
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rect_lightning.callbacks import RECT


class Classifier(LightningModule):
    """Any LightningModule will do; this one is a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of points and classes."""
        points, classes = batch
        return nn.functional.cross_entropy(self.network(points), classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer will do, too."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def task(directions: Tensor) -> TensorDataset:
    """Points whose class is the direction they lie furthest in."""
    points = torch.randn(4096, 16)
    return TensorDataset(points, (points @ directions).argmax(1))


def train(model: Classifier, data: TensorDataset, *callbacks: Callback) -> Classifier:
    """Two epochs."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=list(callbacks), **quiet)
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
    return model


@torch.no_grad()
def report(name: str, model: Classifier, start: Classifier, *tasks: TensorDataset) -> None:
    """One line: accuracy on each task, and the share of the weights' entries that differ from the start."""
    found = [float((model.network(d.tensors[0]).argmax(1) == d.tensors[1]).float().mean()) for d in tasks]
    pairs = [(new, old) for new, old in zip(model.parameters(), start.parameters(), strict=True) if new.ndim == 2]
    changed = sum(int((new != old).sum()) for new, old in pairs) / sum(new.numel() for new, _ in pairs)
    print(f"{name:<20} old task {found[0]:.3f}   new task {found[1]:.3f}   weights changed {changed:6.1%}")


def main() -> None:
    """Learn the old task, and fine-tune to the new one in two ways."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*num_workers.*")
    seed_everything(0)
    directions = torch.randn(16, 4)
    old, new = task(directions), task(directions + 0.5 * torch.randn(16, 4))
    start = train(Classifier(), old)
    report("before", start, start, old, new)
    report("fine-tuned", train(copy.deepcopy(start), new), start, old, new)
    # the matrices only: biases are few, and a bias that is zero has no relative change
    rect = RECT(keep=0.1, scope="run", parameters=["*.weight"])
    report("fine-tuned with RECT", train(copy.deepcopy(start), new, rect), start, old, new)


if __name__ == "__main__":
    main()
