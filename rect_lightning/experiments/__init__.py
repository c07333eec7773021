"""Grids of runs: editors, regularisers, seeds and whatever else, every combination in a process of its own."""

from rect_lightning.experiments.grid import Cell, Grid
from rect_lightning.experiments.running import run_grid
from rect_lightning.experiments.table import collect

__all__ = ["Cell", "Grid", "collect", "run_grid"]
