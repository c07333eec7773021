"""Where a benchmark's text goes."""

from __future__ import annotations

import sys
from pathlib import Path


def write(text: str, out: Path | None) -> None:
    """Write a text to a file, or to the standard output where there is none."""
    if out:
        out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
