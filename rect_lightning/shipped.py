"""Where the configurations that come with the package lie."""

from __future__ import annotations

from pathlib import Path


def configs_folder() -> Path:
    """The folder of the configurations that come with the package."""
    package = Path(__file__).parent
    inside = package / "configs"  # in an installed wheel; in a checkout they lie beside the package
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str, folder: Path | None = None) -> str:
    """The path of a configuration, one at hand before a shipped one; what does not end like a file comes back as it is.

    Args:
        name: A path, or the name of a shipped configuration.
        folder: Where the shipped ones of its kind lie; `configs_folder` if not given.

    Raises:
        FileNotFoundError: It is neither.
    """
    # what does not end like a file may be a configuration written out
    if not name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return name
    folder = folder or configs_folder()
    shipped = folder / name
    if shipped.is_file():
        return str(shipped)
    names = ", ".join(sorted(path.name for path in folder.glob("*.yaml")))
    raise FileNotFoundError(
        f"There is no file {name} here, nor a configuration of that name in the package, which has: {names}."
    )
