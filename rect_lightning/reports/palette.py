"""Colours for light and dark, told apart by the colour-blind too, and readable as text on their ground."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

LIGHT: Mapping[str, str] = MappingProxyType(
    {
        "paper": "#fdfdfc",
        "panel": "#f5f5f2",
        "ink": "#1c1d21",
        "muted": "#5d6069",
        "rule": "#dddcd6",
        "accent": "#0b5c9e",
        "series-0": "#0a5fa3",
        "series-1": "#b04a00",
        "series-2": "#00745a",
        "series-3": "#9a2f7d",
        "series-4": "#6f6200",
        "series-5": "#4b4fb8",
        "reference": "#686b73",
    }
)
DARK: Mapping[str, str] = MappingProxyType(
    {
        "paper": "#15171b",
        "panel": "#1d2026",
        "ink": "#e9e8e4",
        "muted": "#a3a7b0",
        "rule": "#363a42",
        "accent": "#7cbcf5",
        "series-0": "#6fb7f7",
        "series-1": "#ff9d57",
        "series-2": "#45cda4",
        "series-3": "#f08fd0",
        "series-4": "#d8c64a",
        "series-5": "#abaeff",
        "reference": "#a9acb5",
    }
)
SERIES = sum(name.startswith("series-") for name in LIGHT)


def series_colour(style: int) -> str:
    """The name of the colour of a series; negative styles are what others are compared with."""
    return f"series-{style % SERIES}" if style >= 0 else "reference"
