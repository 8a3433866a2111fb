"""The benchmark cases: what the fused latent layer is worth against eager code and `torch.compile`.

    python -m vaekernels.bench [--threads N] [--rounds N] [--no-compile] [--csv FILE]

Every round times each contender once, one after the other, so that a change in the machine's speed meets all
of them; the table shows medians over the rounds. benchmarks/ runs the same cases under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import csv
import functools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import vaekernels as vk

FREE_BITS = 0.25
# One timing covers about this much work, many steps where they are small.
SECONDS_PER_TIMING = 5e-3

LatentLayer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """One latent layer: mu and logvar of `shape`, with per-dimension free bits on the batch mean."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """mu and logvar as an encoder leaves them, and a gradient for z."""
        generator = torch.Generator(device).manual_seed(0)
        mu, logvar, grad_z = (torch.randn(self.shape, generator=generator, device=device) for _ in range(3))
        return (
            mu.to(self.dtype).requires_grad_(),
            (0.5 * logvar).to(self.dtype).requires_grad_(),
            grad_z.to(self.dtype),
        )


CASES = [
    Case((128, 32)),
    Case((1024, 128)),
    Case((64, 4, 64, 64)),
    Case((8192, 512)),
    Case((1024, 128), torch.bfloat16),
    Case((64, 4, 64, 64), torch.bfloat16),
]


def fused(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    z, kl, _ = vk.sample_kl(mu, logvar, free_bits=FREE_BITS)
    return z, kl


def eager(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The lines that `sample_kl` replaces, as most code bases have them."""
    std = torch.exp(0.5 * logvar)
    z = mu + torch.randn_like(std) * std
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())
    return z, kl.mean(0).clamp(min=FREE_BITS).sum()


# The engine itself. `torch.autograd.backward` spends as long on checking, in Python, the gradients that it is
# handed as a small layer takes, and a training step, which ends in a scalar, hands it none.
run_backward = torch.autograd.Variable._execution_engine.run_backward


@functools.cache
def one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def step(layer: LatentLayer, mu: Tensor, logvar: Tensor, grad_z: Tensor) -> None:
    """Forward and backward, z's gradient coming from a decoder and the KL's from the loss."""
    mu.grad = logvar.grad = None
    z, kl = layer(mu, logvar)
    run_backward((z, kl), (grad_z, one(kl.dtype, kl.device)), False, False, (), True, True)


def contenders(compiled: bool) -> dict[str, LatentLayer]:
    layers: dict[str, LatentLayer] = {"vaekernels": fused, "eager": eager}
    if compiled:
        layers["torch.compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    return layers


@dataclass(frozen=True)
class Timing:
    """Microseconds for one forward and backward."""

    case: str
    contender: str
    p20: float
    median: float
    p80: float


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure(case: Case, layers: dict[str, LatentLayer], rounds: int, device: torch.device) -> list[Timing]:
    """Times each contender `rounds` times, interleaved."""
    tensors = case.tensors(device)

    def seconds(layer: LatentLayer, repeat: int) -> float:
        # Untimed: it finds the caches and the allocator as the contender before has left them.
        step(layer, *tensors)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeat):
            step(layer, *tensors)
        synchronize(device)
        return (time.perf_counter() - start) / repeat

    repeats = {}
    for name, layer in layers.items():
        step(layer, *tensors)
        repeats[name] = max(1, round(SECONDS_PER_TIMING / min(seconds(layer, 3) for _ in range(3))))
    samples: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            samples[name].append(1e6 * seconds(layer, repeats[name]))
    found = []
    for name, times in samples.items():
        cuts = statistics.quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
        found.append(Timing(case.name, name, cuts[1], statistics.median(times), cuts[7]))
    return found


def table(timings: Sequence[Timing]) -> str:
    """Markdown: microseconds, and in brackets how many times ours that is."""
    names = list(dict.fromkeys(t.contender for t in timings))
    cells = {(t.case, t.contender): t.median for t in timings}
    lines = ["| forward + backward | " + " | ".join(f"{name} (µs)" for name in names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for case in dict.fromkeys(t.case for t in timings):
        ours = cells[case, names[0]]
        entries = [
            f"{cells[case, n]:,.0f}" + ("" if n == names[0] else f" ({cells[case, n] / ours:.1f}x)")
            for n in names
        ]
        lines.append(f"| {case} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def machine(device: torch.device) -> dict[str, str]:
    """What a timing depends on besides the code."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        models = (
            [
                line.partition(":")[2].strip()
                for line in info.read_text().splitlines()
                if line.startswith("model name")
            ]
            if info.exists()
            else []
        )
        name = models[0] if models else platform.processor() or platform.machine()
    try:
        folder = Path(__file__).resolve().parent
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        commit = ""
    kernels = vk._native.C.build_info()["cpu_isa"] if vk._native.C is not None else "reference"
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "kernels": kernels,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "vaekernels": vk.__version__,
        "commit": commit or "unknown",
    }


def write_csv(path: Path, timings: Sequence[Timing], device: torch.device) -> None:
    described = machine(device)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*asdict(timings[0]), *described])
        writer.writeheader()
        for t in timings:
            row = {key: round(v, 2) if isinstance(v, float) else v for key, v in asdict(t).items()}
            writer.writerow(row | described)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vaekernels.bench", description="Times the latent layer.")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=41, help="timings of each contender (default: 41)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, help="also write every figure to this file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    layers = contenders(not options.no_compile)
    timings: list[Timing] = []
    for case in CASES:
        print(f"  {case.name} ...", file=sys.stderr, flush=True)
        timings += measure(case, layers, options.rounds, device)
    print(", ".join(f"{key} {value}" for key, value in machine(device).items()))
    print()
    print(table(timings))
    if options.csv:
        write_csv(options.csv, timings, device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
