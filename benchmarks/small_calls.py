"""What a call costs where there is next to nothing to compute: mu and logvar of shape [16, 8], one thread.

    python benchmarks/small_calls.py [--rounds N] [--csv FILE]

The fused ops beside one eager product of the two tensors, which is the least that any op with two inputs
costs, and beside the eager lines that the op replaces. Every round times each once, one after the other.
Backward is driven as a training step drives it, by the engine itself.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import vaekernels as vk
from vaekernels.bench.cases import Case, eager
from vaekernels.bench.measure import interleaved, run_backward, spread
from vaekernels.bench.report import machine

SHAPE = (16, 8)
FREE_BITS = 0.25
PASSES = ("forward, no gradients", "forward", "forward and backward")
Call = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


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
    """Seconds of a call, which is made so many times."""
    wanted = direction != "forward, no gradients"
    mu, logvar = (torch.randn(SHAPE, requires_grad=wanted) for _ in range(2))
    grads = tuple(torch.ones_like(out) for out in call(mu, logvar))

    def seconds(repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            outputs = call(mu, logvar)
            if direction == "forward and backward":
                mu.grad = logvar.grad = None
                run_backward(outputs, grads, False, False, (), True, True)
        return (time.perf_counter() - start) / repeat

    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times calls on near-empty tensors.")
    parser.add_argument("--rounds", type=int, default=51, help="timings of each (default: 51)")
    parser.add_argument("--csv", type=Path, help="also write every figure to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, str | float]] = []
    print(f"| microseconds | {' | '.join(calls())} |")
    print(f"| --- |{' ---: |' * len(calls())}")
    for direction in PASSES:
        found = interleaved({name: timing(call, direction) for name, call in calls().items()}, options.rounds)
        quantiles = {name: [1e6 * value for value in spread(values)] for name, values in found.items()}
        print(f"| {direction} | {' | '.join(f'{q[1]:.1f}' for q in quantiles.values())} |")
        for name, (p20, median, p80) in quantiles.items():
            times = {"p20": round(p20, 2), "median": round(median, 2), "p80": round(p80, 2)}
            rows.append({"call": name, "pass": direction, "rounds": options.rounds, **times})
    if options.csv:
        about = machine(torch.device("cpu"))
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *about])
            writer.writeheader()
            writer.writerows(row | about for row in rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
