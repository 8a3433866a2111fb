"""What a whole training step takes on the fused ops and on eager code, and the latent layer's share of it.

    python benchmarks/train_step.py [--threads N] [--rounds N] [--csv FILE]

The same trainer, model, data and batches; only the function that draws z and computes the KL differs. A round
times some steps of each, one after the other, so that a change in the machine's speed meets both; the table
shows medians over the rounds. The latent layer, forward and backward, is timed alone, at the same shape.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import vaekernels as vk
from vaekernels import bench
from vaekernels.training import data as datasets
from vaekernels.training import presets, settings
from vaekernels.training.loop import Trainer

PRESETS = ("docstrings", "digits", "sprites")
GIVEN = f"objective.free_bits={bench.FREE_BITS} engine.device=cpu engine.tensorboard=false"
STEPS = 10  # in one timing


@dataclass(frozen=True)
class StepTiming:
    """Microseconds, medians."""

    preset: str
    shape: str
    ops: str
    step: float
    latent: float

    @property
    def share(self) -> float:
        return self.latent / self.step


def eager_packed(moments: Tensor, dim: int = 1, *, generator: Any = None, **options: Any) -> vk.SampleKL:
    """:func:`vaekernels.bench.eager` in the form in which the trainer calls the fused op."""
    mu, logvar = moments.chunk(2, dim=dim)
    std = torch.exp(0.5 * logvar)
    z = mu + torch.randn(std.shape, generator=generator) * std
    rate = (-0.5 * (1 + logvar - mu.pow(2) - logvar.exp())).mean(0)
    return vk.SampleKL(z, rate.clamp(min=options["free_bits"]).sum(), rate)


OPS: dict[str, Callable[..., vk.SampleKL]] = {"vaekernels": vk.sample_kl_packed, "eager": eager_packed}


def trainer(preset: str, folder: Path) -> Trainer:
    config = settings.changed(presets.PRESETS[preset], settings.parse_set(GIVEN.split()))
    data = datasets.load(config.data, lambda text: print(text, file=sys.stderr))
    return Trainer(config, data, folder / preset, Console(quiet=True))


def measure(preset: str, folder: Path, rounds: int) -> list[StepTiming]:
    run = trainer(preset, folder)
    order = run.batches.order(0)
    steps: dict[str, list[float]] = {name: [] for name in OPS}
    for number in range(rounds + 1):
        for name, op in OPS.items():
            vk.sample_kl_packed = op
            start = time.perf_counter()
            for step in range(STEPS):
                run.update(order[(number * STEPS + step) % len(order)], "all")
            if number:  # the first round warms up
                steps[name].append(1e6 * (time.perf_counter() - start) / STEPS)
    vk.sample_kl_packed = OPS["vaekernels"]
    shape = (run.config.optim.batch_size, run.model.latent_dim)
    layers = {"vaekernels": bench.fused, "eager": bench.eager}
    alone = {
        t.contender: t.median for t in bench.measure(bench.Case(shape), layers, rounds, torch.device("cpu"))
    }
    text = "x".join(map(str, shape))
    return [StepTiming(preset, text, name, statistics.median(steps[name]), alone[name]) for name in OPS]


def table(timings: Sequence[StepTiming]) -> str:
    lines = ["| preset | latent | ops | step (µs) | latent layer (µs) | share |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: |")
    for t in timings:
        lines.append(
            f"| {t.preset} | {t.shape} | {t.ops} | {t.step:,.0f} | {t.latent:,.0f} | {100 * t.share:.1f} % |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times training steps.")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=31, help="timings of each contender (default: 31)")
    parser.add_argument("--csv", type=Path, help="also write every figure to this file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        timings = [t for preset in PRESETS for t in measure(preset, Path(folder), options.rounds)]
    machine = bench.machine(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print()
    print(table(timings))
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*asdict(timings[0]), "share", *machine])
            writer.writeheader()
            for t in timings:
                row = asdict(t) | {
                    "step": round(t.step, 1),
                    "latent": round(t.latent, 1),
                    "share": round(t.share, 4),
                }
                writer.writerow(row | machine)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
