"""The aggregate posterior of a batch against the eager code that writes out all pairs, and its torch.compile.

    python benchmarks/aggregate_posterior.py [--device cuda] [--shapes 512x32 ...] [--rounds N] [--csv FILE]

What is timed is `log_aggregate_posterior` of B samples and their B posteriors of D dimensions, with the log
densities of the single dimensions. In every round each contender runs once, one after the other; the table
has the medians. Memory is that of a forward and backward, above the inputs: on a GPU what the allocator gave
out, on the CPU (Linux) how far the process grew, each contender in a process of its own.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor

import vaekernels as vk
from vaekernels.bench.measure import interleaved, peak_bytes, spread, synchronize
from vaekernels.bench.report import machine, write_csv

SHAPES = ("512x32", "2048x16")
DIRECTIONS = ("forward", "backward", "both")
MIB = 1 << 20
Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    t = -0.5 * ((z[:, None] - mu) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi))
    log_m = math.log(len(mu))
    return torch.logsumexp(t.sum(2), 1) - log_m, torch.logsumexp(t, 1) - log_m


CONTENDERS: dict[str, Callable[[], Function]] = {
    "vaekernels": lambda: vk.log_aggregate_posterior,
    "eager": lambda: eager,
    "compiled": lambda: torch.compile(eager),
}


@dataclass(frozen=True)
class Timing:
    """Milliseconds; p20, median and p80 over the rounds. Peak: MiB of a forward and backward."""

    shape: str
    dtype: str
    direction: str
    contender: str
    rounds: int
    p20: float
    median: float
    p80: float
    times_as_fast: float
    """the median of eager over this one"""
    peak: float


def tensors(shape: str, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    batch, dims = map(int, shape.split("x"))
    draw = torch.Generator().manual_seed(0)
    mu, logvar, eps = (torch.randn(batch, dims, generator=draw) for _ in range(3))
    logvar = 0.3 * logvar - 2
    z = mu + torch.exp(0.5 * logvar) * eps
    leaves = [t.to(device, dtype).requires_grad_() for t in (z, mu, logvar)]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    grads = [torch.full(s, 1 / batch, device=device, dtype=compute) for s in ((batch,), (batch, dims))]
    return leaves, grads


def timing(
    function: Function, direction: str, leaves: list[Tensor], grads: list[Tensor]
) -> Callable[[int], float]:
    """Seconds of one call."""
    device = leaves[0].device

    def run(repeat: int) -> float:
        out = function(*leaves) if direction == "backward" else ()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeat):
            if direction != "backward":
                out = function(*leaves)
            if direction != "forward":
                wanted = [g.to(o.dtype) for g, o in zip(grads, out, strict=True)]
                torch.autograd.grad(out, leaves, wanted, retain_graph=direction == "backward")
        synchronize(device)
        return (time.perf_counter() - start) / repeat

    return run


def peak(contender: str, shape: str, device: torch.device, dtype: torch.dtype) -> float:
    """MiB of a forward and backward."""
    if device.type == "cpu":
        command = [sys.executable, __file__, "--peak-of", contender, "--shapes", shape]
        done = subprocess.run(
            [*command, "--dtype", str(dtype)[6:]], capture_output=True, text=True, check=False
        )
        return float(done.stdout) if done.returncode == 0 else math.nan
    leaves, grads = tensors(shape, device, dtype)
    step = timing(CONTENDERS[contender](), "both", leaves, grads)
    step(1)
    return peak_bytes(lambda: step(1), device) / MIB


def grown(contender: str, shape: str, dtype: torch.dtype) -> float:
    """MiB by which this process grows in its second forward and backward."""
    leaves, grads = tensors(shape, torch.device("cpu"), dtype)
    step = timing(CONTENDERS[contender](), "both", leaves, grads)
    step(1)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest size so far
    before = memory_of_process("VmRSS")
    step(1)
    return (memory_of_process("VmHWM") - before) / 1024


def memory_of_process(field: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(
    shape: str, names: Sequence[str], device: torch.device, dtype: torch.dtype, rounds: int
) -> list[Timing]:
    leaves, grads = tensors(shape, device, dtype)
    functions = {name: CONTENDERS[name]() for name in names}
    peaks = {name: peak(name, shape, device, dtype) for name in names}
    rows = []
    for direction in DIRECTIONS:
        found = interleaved({n: timing(f, direction, leaves, grads) for n, f in functions.items()}, rounds)
        quantiles = {name: [1e3 * value for value in spread(values)] for name, values in found.items()}
        base = quantiles["eager"][1] if "eager" in quantiles else math.nan
        for name, (p20, median, p80) in quantiles.items():
            counts = (len(found[name]), p20, median, p80, base / median, peaks[name])
            rows.append(Timing(shape, str(dtype)[6:], direction, name, *counts))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times the aggregate posterior.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxD")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each (default: 15)")
    parser.add_argument("--csv", type=Path, help="also write every figure to this file")
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    if options.peak_of:
        print(grown(options.peak_of, options.shapes[0], dtype))
        return 0
    device = torch.device(options.device)
    # Else compiled code frees in backward what the next backward of the same forward would need.
    torch._functorch.config.donated_buffer = False
    print("| shape | direction | contender | ms | times eager | peak MiB |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    rows: list[Timing] = []
    for shape in options.shapes:
        for row in measure(shape, options.contenders, device, dtype, options.rounds):
            rows.append(row)
            print(
                f"| {row.shape} | {row.direction} | {row.contender} | {row.median:.3f} | "
                f"{row.times_as_fast:.2f} | {row.peak:.1f} |",
                flush=True,
            )
    if options.csv:
        write_csv(options.csv, rows, machine(device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
