"""A cell's process: ``python -m rect_lightning.experiments.worker FOLDER``."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from rect_lightning.durable import whole_file
from rect_lightning.experiments.cell import lock_of


def work(folder: Path) -> None:
    """Run the cell of a folder, or go on with it, unless it is done; wait for another process that does so.

    The lock is held here rather than by whoever started this process, which may be killed before.
    """
    with lock_of(folder):
        if (folder / "cell.json").is_file():
            return
        from rect_lightning import cli

        sys.argv[1:] = [
            "fit",
            "--config",
            str(folder / "cell.yaml"),
            "--trainer.logger",
            _logger(folder),
            *_checkpoint(folder),
        ]
        cli.run()
        with whole_file(folder / "cell.json") as path:
            path.write_text(json.dumps(_peak_memory(), indent=2) + "\n")


def _logger(folder: Path) -> str:
    # each row is on the disk before the next operation, so that a kill loses none that a checkpoint has
    options = {"save_dir": str(folder.parent), "name": None, "version": folder.name, "flush_logs_every_n_steps": 1}
    return json.dumps({"class_path": "rect_lightning.loggers.RunFolder", "init_args": options})


def _checkpoint(folder: Path) -> list[str]:
    """Where to go on from; the log so far is put aside, since a run begins it anew."""
    from rect_lightning.runs import last_checkpoint

    logs = sorted(folder.glob("metrics*.csv"))
    try:
        checkpoint = last_checkpoint([folder])
    except FileNotFoundError:
        for path in (*logs, folder / "side_effects.csv"):
            path.unlink(missing_ok=True)
        return []
    if (log := folder / "metrics.csv").is_file():
        log.rename(folder / f"metrics.{len(logs)}.csv")
    return ["--ckpt_path", str(checkpoint)]


def _peak_memory() -> dict[str, Any]:
    """Bytes, of this process and of the accelerator, as far as they are known."""
    import torch

    peak: dict[str, Any] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["peak_memory/host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if ask := getattr(torch.get_device_module(), "max_memory_allocated", None):
        peak["peak_memory/device"] = ask()
    return peak


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    work(Path(sys.argv[1]))
