"""Editing methods, one file each, as LightningModules."""

from rect_lightning.editors.base import Editor
from rect_lightning.editors.fine_tuning import FineTuning
from rect_lightning.editors.memit import MEMIT
from rect_lightning.editors.mend import MEND
from rect_lightning.editors.mend_training import MENDTraining
from rect_lightning.editors.rome import ROME

__all__ = ["MEMIT", "MEND", "ROME", "Editor", "FineTuning", "MENDTraining"]
