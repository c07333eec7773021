"""The checkpoint of a run that is under way."""

from lightning.pytorch import Callback

from rect_lightning.callbacks.running import RunningCheckpoint
from rect_lightning.checkpoint_io import read_checkpoint
from tests.editors.test_base import facts, fit, memit


class Looks(Callback):
    def __init__(self, path):
        self.path, self.seen = path, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(read_checkpoint(self.path)["rect_lightning"]["requests"] if self.path.exists() else None)


def test_the_first_operation_is_saved_at_once_and_the_others_not_before_their_time(tmp_path):
    looks = Looks(tmp_path / "running.ckpt")
    fit(memit(tmp_path), facts(tmp_path, batch_size=1), RunningCheckpoint(dirpath=str(tmp_path)), looks)
    assert looks.seen == [None, ["a"], ["a"], ["a"]]
