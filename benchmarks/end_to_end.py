"""What the latent layer is worth in a whole training step: time and memory with fused ops, with eager code
and with that code under `torch.compile`.

    python benchmarks/end_to_end.py [--device cuda] [--rounds N] [--output FILE.csv] [--models NAME ...]

The models of the trainer at its presets' sizes, a hierarchical VAE of 40 stochastic layers and a recurrent
state-space model. Model, data, batches and optimiser are the same; who computes the latent layers differs.
Every round times a few steps of each contender, one after the other, so that a change in the machine's speed
meets all; savings are medians over the rounds of the quotient within a round. The latent layers of a step,
forward and backward, are also timed by themselves, on the tensors that the step gave them.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import deep_vae
import state_space
import torch
from latent_ops import FUSED, Call, LatentOps, compiled, eager, recording
from rich.console import Console
from torch import Tensor, nn

import vaekernels as vk
from vaekernels._files import write_atomically
from vaekernels.bench.cases import FREE_BITS, OURS
from vaekernels.bench.measure import interleaved, peak_bytes, run_backward, spread, synchronize
from vaekernels.bench.report import machine
from vaekernels.training import data as datasets
from vaekernels.training.config import presets, settings
from vaekernels.training.trainer import Trainer

SECONDS_PER_TIMING = 0.15  # many steps where they are short
SECONDS_PER_MODEL = 40.0  # more rounds than fit are not made, but at least
LEAST_ROUNDS = 5


# ---- training steps --------------------------------------------------------------------------------------


class Workload(ABC):
    """One model with its data and optimiser."""

    model: nn.Module

    @abstractmethod
    def step(self, ops: LatentOps, number: int) -> None:
        """Trains on batch ``number``, counted round and round."""

    def forget(self) -> None:
        self.model.zero_grad()


class TrainerSteps(Workload):
    """A preset of the trainer, with free bits: its own step, with all that it checks and logs."""

    def __init__(self, preset: str, device: torch.device, folder: Path, given: str = "") -> None:
        engine = f"engine.device={device.type} engine.tensorboard=false"
        changes = f"objective.free_bits={FREE_BITS} {engine} {given}".split()
        config = settings.changed(presets.PRESETS[preset], settings.parse_set(changes))
        data = datasets.load(config.data, lambda text: print(f"  {text}", file=sys.stderr))
        self._run = Trainer(config, data, folder / preset, Console(quiet=True))
        self.model = self._run.model
        # All of one size: nothing is compiled anew on the way.
        order = self._run.batches.order(0)
        self._batches = [batch for batch in order if len(batch) == len(order[0])]

    def step(self, ops: LatentOps, number: int) -> None:
        own = vk.ops.sample_kl_packed  # the one that `vaekernels.nn` calls
        try:
            vk.ops.sample_kl_packed = ops.sample_kl_packed
            self._run.update(self._batches[number % len(self._batches)], "all")
        finally:
            vk.ops.sample_kl_packed = own


class ModelSteps(Workload):
    """A model whose ``forward`` takes the parts of a batch and the ops, and returns the loss."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[tuple[Tensor, ...]],
        device: torch.device,
        *,
        lr: float,
        clip: float,
    ) -> None:
        self.model = model.to(device)
        self._batches = [tuple(t.to(device) for t in batch) for batch in batches]
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        self._clip = clip

    def step(self, ops: LatentOps, number: int) -> None:
        self._optimizer.zero_grad()
        self.model(*self._batches[number % len(self._batches)], ops).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()


def deep_steps(sizes: deep_vae.Sizes, batch: int, device: torch.device) -> Workload:
    generator = torch.Generator().manual_seed(0)
    batches = [(deep_vae.photographs(batch, sizes.image, generator),) for _ in range(4)]
    return ModelSteps(deep_vae.DeepVAE(sizes), batches, device, lr=2e-4, clip=200.0)


def state_space_steps(
    sizes: state_space.Sizes, device: torch.device, steps: int = 50, batch: int = 50
) -> Workload:
    generator = torch.Generator().manual_seed(0)
    batches = [state_space.spring_chain(steps, batch, sizes, generator) for _ in range(4)]
    return ModelSteps(state_space.StateSpaceModel(sizes), batches, device, lr=6e-4, clip=100.0)


def _preset(name: str, given: str = "") -> Callable[[torch.device, Path], Workload]:
    return lambda device, folder: TrainerSteps(name, device, folder, given)


MODELS: dict[str, Callable[[torch.device, Path], Workload]] = {
    "mlp-digits": _preset("digits"),
    "ladder-digits": _preset("digits-ladder"),
    "row-gru-digits": _preset("digits-row-gru"),
    "conv-sprites": _preset("sprites"),
    "conv-sprites-8x16x16": _preset("sprites", "model.latent_channels=8"),
    "gru-docstrings": _preset("docstrings"),
    "lstm-docstrings": _preset("docstrings-lstm"),
    "dreamer": lambda device, _: state_space_steps(state_space.DREAMER, device),
    "vdvae-width-64": lambda device, _: deep_steps(deep_vae.SMALL, 16, device),
    # Seconds an image on a CPU; a GPU takes the batch that the model was published with.
    "vdvae-width-384": lambda device, _: deep_steps(
        deep_vae.PUBLISHED, 2 if device.type == "cpu" else 32, device
    ),
}


# ---- measuring -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One contender on one model. Milliseconds; ``ratio``: its step's time over that of the fused ops in the
    same round; ``latent``: the latent layers of a step by themselves; ``explained``: the share of the step by
    which these are slower than the fused ones; ``peak_bytes``: above what is there between two steps."""

    model: str
    parameters: int
    latent_calls: int
    latent_elements: int
    contender: str
    threads: int
    rounds: int
    step_p20: float
    step: float
    step_p80: float
    ratio_p20: float
    ratio: float
    ratio_p80: float
    latent: float
    explained: float
    peak_bytes: int

    @property
    def share(self) -> float:
        """Of the latent layers in the step."""
        return self.latent / self.step

    @property
    def saving(self) -> tuple[float, float, float]:
        """What fused ops save of this contender's step: 20th percentile, median, 80th percentile."""
        return 1 - 1 / self.ratio_p20, 1 - 1 / self.ratio, 1 - 1 / self.ratio_p80


def measure(
    name: str, workload: Workload, contenders: dict[str, LatentOps], rounds: int, device: torch.device
) -> list[Result]:
    times = step_times(workload, contenders, rounds, device)
    calls: list[Call] = []
    workload.step(recording(FUSED, calls), 0)
    alone = interleaved({who: layers_alone(ops, calls, device) for who, ops in contenders.items()}, rounds)
    step = {who: statistics.median(seconds) for who, seconds in times.items()}
    latent = {who: statistics.median(seconds) for who, seconds in alone.items()}
    results = []
    for who, ops in contenders.items():
        workload.forget()
        peak = peak_bytes(partial(workload.step, ops, 0), device)
        ratios = [own / fused for own, fused in zip(times[who], times[OURS], strict=True)]
        low, _, high = spread(times[who])
        ratio_low, _, ratio_high = spread(ratios)
        results.append(
            Result(
                model=name,
                parameters=sum(p.numel() for p in workload.model.parameters()),
                latent_calls=len(calls),
                latent_elements=sum(call.elements for call in calls if call.name != "gaussian_kl"),
                contender=who,
                threads=torch.get_num_threads(),
                rounds=len(ratios),
                step_p20=1e3 * low,
                step=1e3 * step[who],
                step_p80=1e3 * high,
                ratio_p20=ratio_low,
                ratio=statistics.median(ratios),
                ratio_p80=ratio_high,
                latent=1e3 * latent[who],
                explained=(latent[who] - latent[OURS]) / step[who],
                peak_bytes=peak,
            )
        )
    return results


def step_times(
    workload: Workload, contenders: dict[str, LatentOps], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a step, for each round."""

    def timing(ops: LatentOps, first: int, steps: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for number in range(first, first + steps):
            workload.step(ops, number)
        synchronize(device)
        return (time.perf_counter() - start) / steps

    once = 0.0
    for ops in contenders.values():
        timing(ops, 0, 1)  # compiles, and makes what is made once
        once = max(once, timing(ops, 1, 1))
    steps = max(1, round(SECONDS_PER_TIMING / once))
    fitting = int(SECONDS_PER_MODEL / (len(contenders) * steps * once))
    times: dict[str, list[float]] = {who: [] for who in contenders}
    for number in range(min(rounds, max(LEAST_ROUNDS, fitting))):
        for who, ops in contenders.items():
            times[who].append(timing(ops, number * steps, steps))
    return times


def layers_alone(ops: LatentOps, calls: list[Call], device: torch.device) -> Callable[[int], float]:
    """Times the forward and backward of all calls of a step."""
    grads = tuple(torch.ones_like(t) for call in calls for t in call.outputs(ops))

    def timing(repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            for call in calls:
                for leaf in call.leaves:
                    leaf.grad = None
            outputs = tuple(t for call in calls for t in call.outputs(ops))
            run_backward(outputs, grads, False, False, (), True, True)
        synchronize(device)
        return (time.perf_counter() - start) / repeat

    return timing


# ---- reporting -------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    lines = [
        "| model | latent calls | by | step (ms) | fused saves | explained | layers (ms) | share | MB |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        first = r.contender == OURS
        what = f"{r.model} ({r.parameters / 1e6:.2g} M parameters)" if first else ""
        latent = f"{r.latent_calls}, of {r.latent_elements:,} elements" if first else ""
        spread = f"{r.step:,.1f} ({r.step_p20:,.1f} to {r.step_p80:,.1f})"
        saving = " | " if first else f"{_percent(r)} | {100 * r.explained:.1f} %"
        lines.append(
            f"| {what} | {latent} | {r.contender} | {spread} | {saving} | {r.latent:.2f} | "
            f"{100 * r.share:.1f} % | {r.peak_bytes / 1e6:,.1f} |"
        )
    return "\n".join(lines)


def _percent(result: Result) -> str:
    low, middle, high = (100 * s for s in result.saving)
    return f"{middle:.1f} % ({low:.1f} to {high:.1f})"


KINDS = ("saves time", "worth nothing", "costs time", "saves memory", "costs memory")


def verdict(results: Sequence[Result]) -> str:
    """Where fused ops are worth something in a step, where nothing, and where they cost."""
    lines = []
    fused = {r.model: r for r in results if r.contender == OURS}
    for contender in dict.fromkeys(r.contender for r in results if r.contender != OURS):
        found: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for r in results:
            if r.contender != contender:
                continue
            low, middle, high = r.saving
            kind = "saves time" if low > 0 else "costs time" if high < 0 else "worth nothing"
            found[kind].append(f"{r.model} ({100 * middle:.1f} %)")
            memory = 1 - fused[r.model].peak_bytes / r.peak_bytes
            if abs(memory) >= 0.01:
                kind = "saves memory" if memory > 0 else "costs memory"
                found[kind].append(f"{r.model} ({100 * memory:.1f} %)")
        lines += [
            f"Against {contender}, {kind}: {'; '.join(names)}." for kind, names in found.items() if names
        ]
    lines.append(
        "A saving is a share of the step's time, the median over the rounds; it is nothing where 0 lies "
        "between the 20th and the 80th percentile. Where it is far from what the layers by themselves "
        "explain, the machine was disturbed. Memory: at the peak, of 1 % and more."
    )
    return "\n\n".join(lines)


def write_csv(path: Path, results: Sequence[Result], described: dict[str, str]) -> None:
    text = io.StringIO()
    names = [f.name for f in fields(Result)]
    writer = csv.DictWriter(text, [*names, "share", *described], lineterminator="\n")
    writer.writeheader()
    for r in results:
        values: dict[str, Any] = {**asdict(r), "share": r.share}
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        writer.writerow(rounded | described)
    write_atomically(path, text.getvalue())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Times training steps with fused, eager and compiled latent layers."
    )
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="where to run (default: cpu)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=15, help="at most, of each contender (default: 15)")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, metavar="MODEL", help="only these: " + "; ".join(MODELS)
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write every figure to this CSV file"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.output is not None and not options.output.absolute().parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.parent}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no GPU here")
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    device, results = torch.device(options.device), []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(options.models or MODELS):
            print(f"  {name} ...", file=sys.stderr, flush=True)
            torch.manual_seed(0)
            contenders = {OURS: FUSED, "eager": eager()}
            if not options.no_compile:
                contenders["torch.compile"] = compiled()
            workload = MODELS[name](device, Path(folder, str(number)))
            results += measure(name, workload, contenders, options.rounds, device)
    described = machine(device)
    print(", ".join(f"{key} {value}" for key, value in described.items() if value))
    print(f"threads {torch.get_num_threads()}, medians of {max(r.rounds for r in results)} rounds or fewer\n")
    print(table(results), verdict(results), sep="\n\n")
    if options.output is not None:
        write_csv(options.output, results, described)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
