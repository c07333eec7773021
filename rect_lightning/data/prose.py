"""The text whose perplexity is measured."""

from __future__ import annotations

from pathlib import Path


def prose_path(prose: str, *, option: str = "model.prose") -> Path:
    """The text file to measure perplexity on; ``"prose"`` names the one that comes with the package.

    Args:
        prose: The name or path.
        option: Where it was given, for the message.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(__file__).with_name("prose.txt") if prose == "prose" else Path(prose)
    if not path.is_file():
        raise FileNotFoundError(
            f"{option}: there is no text file {path.resolve()}; name one, or null for no perplexity."
        )
    return path
