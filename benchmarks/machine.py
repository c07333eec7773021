"""What this machine can do: the bounds that timings are held against."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch


def timed(function: Callable[[], object], repeat: int = 5) -> float:
    """Median seconds of a call, after one that does not count."""
    function()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def matrix_speed(dtype: torch.dtype, width: int = 1024, rows: int = 1024) -> float:
    """FLOP/s of a matrix product of the shape that a model's layers have."""
    x, w = torch.randn(rows, width, dtype=dtype), torch.randn(4 * width, width, dtype=dtype)
    return 2 * rows * width * 4 * width / timed(lambda: torch.nn.functional.linear(x, w), 10)


def memory_speed(entries: int = 64_000_000) -> float:
    """Bytes/s of copying a tensor, read and written bytes together."""
    source = torch.randn(entries)
    target = torch.empty_like(source)
    return 8 * entries / timed(lambda: target.copy_(source), 5)


def peak_memory(function: Callable[[], object]) -> tuple[float, float]:
    """The most bytes that the process had during a call, and by how many that is above where it stood before.

    Both are nan where the system does not tell (Linux does).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _resident("VmRSS")
        function()
        peak = _resident("VmHWM")
    except OSError:
        peak = before = float("nan")
    return peak, peak - before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * float(line.split()[1]) for line in lines if line.startswith(field))


def description() -> str:
    """The processor and the number of threads."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
