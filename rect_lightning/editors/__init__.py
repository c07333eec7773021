"""Editing methods, one file each, as LightningModules."""

from rect_lightning.editors.alphaedit import AlphaEdit
from rect_lightning.editors.base import Editor
from rect_lightning.editors.emmet import EMMET
from rect_lightning.editors.fine_tuning import FineTuning
from rect_lightning.editors.knowledge_neurons import KN
from rect_lightning.editors.memit import MEMIT
from rect_lightning.editors.mend import MEND
from rect_lightning.editors.mend_training import MENDTraining
from rect_lightning.editors.rome import ROME
from rect_lightning.editors.ultraedit import UltraEdit

__all__ = ["EMMET", "KN", "MEMIT", "MEND", "ROME", "AlphaEdit", "Editor", "FineTuning", "MENDTraining", "UltraEdit"]
