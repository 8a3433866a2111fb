"""What a call costs where there is next to nothing to compute: mu and logvar of shape [16, 8], one thread.

    python benchmarks/small_calls.py [--rounds N] [--csv FILE]

The fused ops beside one eager product of the two tensors, which is the least that any op with two inputs
costs, and beside the eager lines that the op replaces. Every round times each once, one after the other.
Backward is driven as a training step drives it, by the engine itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import vaekernels as vk
from vaekernels.bench.cases import Case, eager
from vaekernels.bench.measure import interleaved, run_backward, spread, timed
from vaekernels.bench.report import machine, write_csv

SHAPE = (16, 8)
FREE_BITS = 0.25
PASSES = ("forward, no gradients", "forward", "forward and backward")
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


def calls() -> dict[str, Call]:
    layer = eager(Case(SHAPE, free_bits=FREE_BITS))
    return {
        "eager product": lambda mu, logvar: (mu * logvar,),
        "reparameterize": lambda mu, logvar: (vk.reparameterize(mu, logvar),),
        "gaussian_kl": lambda mu, logvar: (vk.gaussian_kl(mu, logvar, free_bits=FREE_BITS),),
        "sample_kl": lambda mu, logvar: vk.sample_kl(mu, logvar, free_bits=FREE_BITS)[:2],
        "eager sample_kl": lambda mu, logvar: tuple(layer([mu, logvar])),
    }


def timing(call: Call, direction: str) -> Callable[[int], float]:
    """Seconds of a call on tensors of its own."""
    wanted = direction != "forward, no gradients"
    mu, logvar = (torch.randn(SHAPE, requires_grad=wanted) for _ in range(2))
    grads = tuple(torch.ones_like(out) for out in call(mu, logvar))

    def step() -> None:
        outputs = call(mu, logvar)
        if direction == "forward and backward":
            mu.grad = logvar.grad = None
            run_backward(outputs, grads, False, False, (), True, True)

    return timed(step)


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
        found = interleaved({name: timing(call, direction) for name, call in calls().items()}, options.rounds)
        quantiles = {name: [1e6 * value for value in spread(values)] for name, values in found.items()}
        print(f"| {direction} | {' | '.join(f'{q[1]:.1f}' for q in quantiles.values())} |")
        rows += [Timing(name, direction, len(found[name]), *q) for name, q in quantiles.items()]
    if options.csv:
        write_csv(options.csv, rows, machine(torch.device("cpu")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
