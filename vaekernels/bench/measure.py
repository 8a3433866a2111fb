"""How it is timed.

Every round times each contender once, one after the other, so that a change in the machine's speed meets all
of them; what is reported is the median over the rounds with the 20th and 80th percentile.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from vaekernels.bench.cases import COPY, Case, Layer, Problem, contenders

__all__ = ["PASSES", "Row", "interleaved", "measure", "memory", "peak_bytes", "spread", "timed"]

# One timing covers about this much work, many steps where they are small.
SECONDS_PER_TIMING = 5e-3
# A case and pass whose rounds would take longer than this gets fewer, down to the least: 2^26 elements take
# seconds a round, and their times vary least.
SECONDS_PER_CASE = 15.0
LEAST_ROUNDS = 5
PASSES = ("forward", "backward", "both")

# The engine itself. `torch.autograd.backward` spends as long on checking, in Python, the gradients that it is
# handed as a small layer takes, and a training step, which ends in a scalar, hands it none.
run_backward = torch.autograd.Variable._execution_engine.run_backward


@dataclass(frozen=True)
class Row:
    """One measurement. Times in microseconds; bytes for a forward and backward together."""

    op: str
    case: str
    model: str
    numel: int
    dtype: str
    direction: str  # forward, backward or both
    contender: str
    threads: int
    rounds: int  # timings that the quantiles are of
    p20: float
    median: float
    p80: float
    peak_bytes: int | None = None  # above the inputs
    saved_bytes: int | None = None  # kept for backward besides the inputs

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.op, self.case, self.direction, self.contender, self.threads


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def output_grads(problem: Problem, outputs: list[Tensor]) -> list[Tensor]:
    """A gradient for each output: the problem's own for z, one for the loss term."""
    return [*problem.grads, *(torch.ones_like(t) for t in outputs[len(problem.grads) :])]


class Timer:
    """Seconds of one contender on one problem, a pass at a time."""

    def __init__(self, problem: Problem, layer: Layer) -> None:
        self.problem, self.layer = problem, layer
        self.device = problem.inputs[0].device
        self.grads = output_grads(problem, layer(problem.inputs))

    def forget(self) -> None:
        for t in self.problem.inputs:
            t.grad = None

    def backward(self, outputs: list[Tensor]) -> None:
        run_backward(tuple(outputs), tuple(self.grads), False, False, (), True, True)

    def both(self, repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            self.forget()
            self.backward(self.layer(self.problem.inputs))
        synchronize(self.device)
        return (time.perf_counter() - start) / repeat

    def forward(self, repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            self.layer(self.problem.inputs)
        synchronize(self.device)
        return (time.perf_counter() - start) / repeat

    def backward_alone(self, repeat: int) -> float:
        total = 0.0
        # Graphs in small batches: all at once they would be out of the caches when their turn comes.
        for done in range(0, repeat, 8):
            graphs = [self.layer(self.problem.inputs) for _ in range(min(8, repeat - done))]
            synchronize(self.device)
            start = time.perf_counter()
            while graphs:
                self.forget()
                self.backward(graphs.pop())
            synchronize(self.device)
            total += time.perf_counter() - start
        return total / repeat

    def timing(self, direction: str) -> Callable[[int], float]:
        return {"forward": self.forward, "backward": self.backward_alone, "both": self.both}[direction]


def measure(
    case: Case, *, rounds: int, device: torch.device, compiled: bool, passes: tuple[str, ...] = PASSES
) -> list[Row]:
    """Times every contender and the copy of the same bytes, interleaved."""
    problem = Problem.of(case, device)
    timers = {name: Timer(problem, layer) for name, layer in contenders(case, compiled=compiled).items()}
    rows = []
    for direction in passes:
        timings = {name: timer.timing(direction) for name, timer in timers.items()}
        timings[COPY] = _copy(case, direction, device)
        bytes_of = {name: memory(t) for name, t in timers.items()} if direction == "both" else {}
        for name, times in interleaved(timings, rounds).items():
            peak, saved = bytes_of.get(name, (None, None))
            common = common_fields(case, direction, name, times)
            rows.append(Row(**common, peak_bytes=peak, saved_bytes=saved))
    return rows


def common_fields(case: Case, direction: str, contender: str, times: list[float]) -> dict[str, Any]:
    """A row's fields but for its bytes, from seconds of a call in each round."""
    p20, median, p80 = (1e6 * t for t in spread(times))
    return {
        "op": case.op,
        "case": case.name,
        "model": case.model,
        "numel": case.numel,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": direction,
        "contender": contender,
        "threads": torch.get_num_threads(),
        "rounds": len(times),
        "p20": p20,
        "median": median,
        "p80": p80,
    }


def timed(step: Callable[[], object]) -> Callable[[int], float]:
    """Seconds of a step on the CPU, which is run so many times: what `interleaved` takes."""

    def timing(repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            step()
        return (time.perf_counter() - start) / repeat

    return timing


def spread(values: list[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th percentile, none of them beyond the values themselves."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], statistics.median(values), cuts[3]


def interleaved(timings: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each timing in turn, `rounds` times; fewer where that would take long."""
    repeats, round_seconds = {}, 0.0
    for name, timing in timings.items():
        timing(1)  # whatever is done once
        step = max(1e-9, timing(1))
        if step < SECONDS_PER_TIMING:
            step = max(1e-9, min(timing(3) for _ in range(3)))
        repeats[name] = max(1, round(SECONDS_PER_TIMING / step))
        round_seconds += (1 + repeats[name]) * step
    rounds = min(rounds, max(LEAST_ROUNDS, int(SECONDS_PER_CASE / round_seconds)))
    samples: dict[str, list[float]] = {name: [] for name in timings}
    for _ in range(rounds):
        for name, timing in timings.items():
            timing(1)  # finds the caches and the allocator as the contender before has left them
            samples[name].append(timing(repeats[name]))
    return samples


def _copy(case: Case, direction: str, device: torch.device) -> Callable[[int], float]:
    moved = sum(case.elements_moved(backward) for backward in _halves(direction))
    source = torch.zeros(max(1, moved // 2), dtype=case.dtype, device=device)
    target = torch.empty_like(source)

    def timing(repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            target.copy_(source)
        synchronize(device)
        return (time.perf_counter() - start) / repeat

    return timing


def _halves(direction: str) -> list[bool]:
    return [False, True] if direction == "both" else [direction == "backward"]


# ---- memory ----------------------------------------------------------------------------------------------


def memory(timer: Timer) -> tuple[int, int]:
    """Bytes at the peak of a forward and backward above the inputs, and kept between the two."""
    timer.forget()
    inputs = {t.untyped_storage().data_ptr() for t in timer.problem.inputs}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        timer.layer(timer.problem.inputs)

    def step() -> None:
        timer.backward(timer.layer(timer.problem.inputs))

    peak = peak_bytes(step, timer.device)
    timer.forget()
    return peak, sum(kept.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of `step` above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # Only the profiler sees what is allocated in C++, and only its raw events show each allocation.
    with _no_stderr(), profile(profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(0, *accumulate(sizes)) if sizes else 0


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Some builds of the profiler write a line there at every start and stop."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
