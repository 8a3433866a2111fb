"""Time and peak memory of a diagnosis by examples and latent dimensions, with a decoder that costs next to
nothing: ``python benchmarks/diagnosis_memory.py`` writes benchmarks/results/diagnosis-memory.csv (8 minutes).

Every case is a process of its own, as the peak of a process never falls. One thread.
"""

from __future__ import annotations

import csv
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from vaekernels import collapse

RESULTS = Path(__file__).parent / "results" / "diagnosis-memory.csv"
CASES = [(n, dims) for dims in (16, 256, 4096) for n in (2048, 10_000, 50_000)]
USED = 8  # dimensions that hold log 2 nats each


def peak() -> float:
    """Of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(n: int, dims: int) -> list[str]:
    torch.set_num_threads(1)
    x = torch.randn(n, USED, generator=torch.Generator().manual_seed(0))

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = torch.zeros(2, len(x), dims)
        mu[:, :USED], logvar[:, :USED] = 0.75**0.5 * x, math.log(0.25)
        return mu, logvar

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        return -2 * (x - 0.75**0.5 * z[:, :USED]).square().sum(dim=1)

    before, began = peak(), time.perf_counter()
    report = collapse.diagnose(encode, log_likelihood, x, n=n, progress=False)
    bounds = [report.metrics[name] for name in ("mi_lower", "mi_upper")]
    return [
        str(n),
        str(dims),
        f"{time.perf_counter() - began:.1f}",
        f"{peak() - before:.0f}",
        *("" if bound is None else f"{bound.value:.2f}" for bound in bounds),
        report.verdict,
    ]


def main() -> None:
    rows = []
    for n, dims in CASES:
        told = subprocess.run(
            [sys.executable, __file__, str(n), str(dims)], check=True, capture_output=True, text=True
        ).stdout
        print(told, end="", flush=True)
        rows.append(told.strip().split(","))
    with open(RESULTS, "w", newline="") as file:
        header = ["examples", "dims", "seconds", "peak MiB", "I lower", "I upper", "verdict"]
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(",".join(measure(int(sys.argv[1]), int(sys.argv[2]))))
    else:
        main()
