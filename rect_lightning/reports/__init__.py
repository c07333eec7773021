"""Runs and grids as pages and figures."""

from rect_lightning.reports.page import report

__all__ = ["report"]
