"""Editing methods, one file each, as LightningModules."""

from rect_lightning.editors.alphaedit import AlphaEdit
from rect_lightning.editors.base import Editor
from rect_lightning.editors.emmet import EMMET
from rect_lightning.editors.knowledge_neurons import KN
from rect_lightning.editors.memit import MEMIT
from rect_lightning.editors.rome import ROME
from rect_lightning.editors.ultraedit import UltraEdit

__all__ = ["EMMET", "KN", "MEMIT", "ROME", "AlphaEdit", "Editor", "UltraEdit"]
