"""What regularisers cost: seconds (on a CPU, of all its threads together) and memory for one update of one weight.

    python -m benchmarks.regularisers                                       # 576 x 1536, SmolLM2
    python -m benchmarks.regularisers --shape 4096 11008 --device cuda      # LLaMA 7B

The update is of rank 100, as one of MEMIT for 100 requests. Memory is the peak above the weight and its gradient, and for
`NullSpace` what it keeps as well; on a CPU, memory that is reused does not show in small matrices. What `NullSpace` prepares
once a run takes a time cubic in IN, many minutes at 11,008; --quick leaves that out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from time import perf_counter, process_time

import torch

from benchmarks.machine import description, peak_memory
from rect_lightning.callbacks import PCA, PRUNE, RECT, SPHERE, FrobeniusNorm, NullSpace, Random, Shrink
from rect_lightning.callbacks.changes import GradientChange
from rect_lightning.callbacks.linear import LinearRegulariser
from rect_lightning.callbacks.regulariser import Regulariser
from rect_lightning.solving.null_space import null_space_projector

NAME = "weight"


def change(shape: tuple[int, int], device: str, size: float = 0.2) -> GradientChange:
    """A weight as of a new layer, and an update of a share of its norm."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator) * 0.02
    left, right = torch.randn(shape[0], 100, generator=generator), torch.randn(100, shape[1], generator=generator)
    update = left @ right
    update *= size * weight.norm() / update.norm()
    return GradientChange(NAME, weight.to(device), update.to(device), -1.0)


MAKERS: dict[str, Callable[[], Regulariser]] = {
    "RECT": RECT,
    "Random": Random,
    "Shrink(factor)": partial(Shrink, 0.7),
    "Shrink(like_rect)": partial(Shrink, like_rect=0.4),
    "FrobeniusNorm": partial(FrobeniusNorm, 0.1),
    "PRUNE, nothing to restrain": PRUNE,
    "PRUNE": PRUNE,
    "PCA": PCA,
    "SPHERE": SPHERE,
    "NullSpace": NullSpace,
}


def made(name: str, projector: torch.Tensor | None) -> Regulariser:
    """A regulariser as it stands after the start of a fit."""
    regulariser = MAKERS[name]()
    if isinstance(regulariser, LinearRegulariser):
        regulariser._linear = {NAME: torch.nn.Linear(1, 1)}
    if isinstance(regulariser, NullSpace) and projector is not None:
        regulariser._projectors = {NAME: projector}
    return regulariser


def cost(function: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds and bytes of one call."""
    if device == "cpu":
        seconds = [0.0]

        def timing() -> None:
            start = process_time()
            function()
            seconds[0] = process_time() - start

        _, memory = peak_memory(timing)
        return seconds[0], memory
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), perf_counter()
    function()
    torch.cuda.synchronize()
    return perf_counter() - start, torch.cuda.max_memory_allocated() - before


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, default=[576, 1536], metavar=("OUT", "IN"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=[*MAKERS])
    parser.add_argument("--quick", action="store_true", help="without the preparation of NullSpace")
    options = parser.parse_args(arguments)
    shape = tuple(options.shape)
    megabytes = 4 * shape[0] * shape[1] / 1e6

    write = sys.stdout.write
    write(f"{shape[0]} x {shape[1]}, {megabytes:.0f} MB in fp32, {options.device}; {description()}\n\n")
    write("| | seconds | memory, MB | of the weight's |\n|---|---|---|---|\n")

    def row(name: str, function: Callable[[], object], kept: float = 0.0) -> None:
        seconds, memory = cost(function, options.device)
        memory = memory / 1e6 + kept
        write(f"| {name} | {seconds:.3g} | {memory:.0f} | {memory / megabytes:.1f} |\n")
        sys.stdout.flush()

    with torch.no_grad():
        for name in options.only:
            # the first call, of a small one, loads libraries
            made(name, torch.eye(8).double()).regularise([change((8, 8), options.device)])
            projector = torch.eye(shape[1], dtype=torch.float64) if name == "NullSpace" else None
            seen = change(shape, options.device, size=3.0 if name == "PRUNE" else 0.2)
            kept = 0.0 if projector is None else projector.nbytes / 1e6
            row(name, partial(made(name, projector).regularise, [seen]), kept)
        if not options.quick:
            keys = torch.randn(2 * shape[1], shape[1], generator=torch.Generator().manual_seed(1))
            keys *= torch.logspace(0, -3, shape[1])
            c = (keys.T @ keys / len(keys)).to(options.device)
            row("NullSpace, once a run", lambda: null_space_projector(c))


if __name__ == "__main__":
    main()
