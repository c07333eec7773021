"""Editing methods, one file each, as LightningModules."""

from rect_lightning.editors.base import Editor
from rect_lightning.editors.knowledge_neurons import KN
from rect_lightning.editors.memit import MEMIT
from rect_lightning.editors.rome import ROME

__all__ = ["KN", "MEMIT", "ROME", "Editor"]
