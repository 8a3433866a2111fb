"""What a call costs where there is little to compute, one thread: mu and logvar of shape [16, 8], and one
training step's layer of [128, 32] whose code and data are out of the caches.

    python benchmarks/small_calls.py [--rounds N] [--csv FILE]

The fused ops beside one eager product of the two tensors, which is the least that any op with two inputs
costs, and beside the eager lines that the op replaces. Every round times each once, one after the other.
Backward is driven as a training step drives it, by the engine itself.

Cold: the contenders are called once each, in turn, and between two calls a buffer of 8 MiB is written, as the
rest of a training step's work would.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import vaekernels as vk
from vaekernels.bench.cases import Case, eager
from vaekernels.bench.measure import interleaved, run_backward, spread, timed
from vaekernels.bench.report import machine, write_csv

SHAPE, COLD_SHAPE = (16, 8), (128, 32)
FREE_BITS = 0.25
PASSES = ("forward, no gradients", "forward", "forward and backward")
COLD = "forward and backward, cold"
EVICTING = 2**23  # bytes, more than the second-level caches hold
Call = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Timing:
    """Microseconds; p20, median and p80 over the rounds."""

    call: str
    direction: str
    rounds: int
    p20: float
    median: float
    p80: float


def calls(shape: tuple[int, ...] = SHAPE) -> dict[str, Call]:
    layer = eager(Case(shape, free_bits=FREE_BITS))
    return {
        "eager product": lambda mu, logvar: (mu * logvar,),
        "reparameterize": lambda mu, logvar: (vk.reparameterize(mu, logvar),),
        "gaussian_kl": lambda mu, logvar: (vk.gaussian_kl(mu, logvar, free_bits=FREE_BITS),),
        "sample_kl": lambda mu, logvar: vk.sample_kl(mu, logvar, free_bits=FREE_BITS)[:2],
        "eager sample_kl": lambda mu, logvar: tuple(layer([mu, logvar])),
    }


def step_of(call: Call, direction: str, shape: tuple[int, ...] = SHAPE) -> Callable[[], None]:
    """A call on tensors of its own."""
    wanted = direction != "forward, no gradients"
    mu, logvar = (torch.randn(shape, requires_grad=wanted) for _ in range(2))
    grads = tuple(torch.ones_like(out) for out in call(mu, logvar))

    def step() -> None:
        outputs = call(mu, logvar)
        if direction in ("forward and backward", COLD):
            mu.grad = logvar.grad = None
            run_backward(outputs, grads, False, False, (), True, True)

    return step


def cold(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of single calls, each after the caches were filled with something else."""
    steps = {name: step_of(call, COLD, COLD_SHAPE) for name, call in calls.items()}
    buffer = torch.zeros(EVICTING // 4)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for warm in (True, *[False] * rounds):
        for name, step in steps.items():
            buffer.add_(1.0)
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
            if not warm:
                found[name].append(seconds)
    return found


def shown(direction: str, found: dict[str, list[float]]) -> list[Timing]:
    """A row of the table, printed."""
    quantiles = {name: [1e6 * value for value in spread(values)] for name, values in found.items()}
    print(f"| {direction} | {' | '.join(f'{q[1]:.1f}' for q in quantiles.values())} |")
    return [Timing(name, direction, len(found[name]), *q) for name, q in quantiles.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times calls on near-empty tensors.")
    parser.add_argument("--rounds", type=int, default=51, help="timings of each (default: 51)")
    parser.add_argument("--csv", type=Path, help="also write every figure to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Timing] = []
    print(f"| microseconds | {' | '.join(calls())} |")
    print(f"| --- |{' ---: |' * len(calls())}")
    for direction in PASSES:
        steps = {name: timed(step_of(call, direction)) for name, call in calls().items()}
        rows += shown(direction, interleaved(steps, options.rounds))
    rows += shown(f"{COLD}, {list(COLD_SHAPE)}", cold(calls(COLD_SHAPE), options.rounds))
    if options.csv:
        write_csv(options.csv, rows, machine(torch.device("cpu")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
