"""How it is timed on a GPU.

`graph`: many calls are captured into one CUDA graph, and events around a replay of it give the time of a call
without what Python and the driver take to launch it. `queue`: the same for plain calls, handed over while the
GPU still waits; they may take other kernels than captured ones. `wall`: plain calls, timed as on the CPU.
With a `cold` cache every call has tensors of its own, and other bytes are read before the first, so that no
input lies in the L2 cache; with a `hot` one all calls share theirs.

On the CPU the same code runs without graphs and events, so that it can be tested there.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vaekernels.bench.cases import COPY, Case, Layer, Problem
from vaekernels.bench.measure import (
    Row,
    Timer,
    _copy,
    _halves,
    common_fields,
    interleaved,
    memory,
    synchronize,
)

__all__ = [
    "COPY",
    "WAYS",
    "Facts",
    "GpuRow",
    "Stopwatch",
    "count_launches",
    "device_rows",
    "facts",
    "wall_rows",
]

# The calls of a replay move about this many bytes. Before a graph that draws numbers, torch writes its
# generator's seed and offset, about 5 us on an H200: ten calls of 200 MB leave 0.5 us of that to each.
BYTES_PER_REPLAY = 2 * 2**30
MOST_CALLS = 48
# Above, the graphs of all contenders together would not fit the memory.
LARGEST_TOGETHER = 2**25
USUAL_L2 = 64 * 2**20

Calls = Callable[[], object]
cuda: Any = torch.cuda  # parts of which have no annotations


@dataclass(frozen=True)
class GpuRow(Row):
    """A measurement on a GPU; bytes and launches are those of the direction."""

    clock: str = "graph"  # or queue, or wall
    cache: str = "hot"
    bytes_moved: int = 0  # that no implementation can help moving
    gb_per_s: float = 0.0
    copy_percent: float | None = None  # of the bandwidth of a copy of as many bytes, in the same run
    launches: int | None = None  # kernels, memsets and copies of one call


@dataclass(frozen=True)
class Facts:
    """What does not depend on the clock: launches and memory of one contender."""

    forward_launches: int | None
    backward_launches: int | None
    peak_bytes: int | None
    saved_bytes: int | None

    def launches(self, direction: str) -> int | None:
        each = (self.forward_launches, self.backward_launches)
        wanted = [each[backward] for backward in _halves(direction)]
        return None if None in wanted else sum(n for n in wanted if n is not None)


NO_FACTS = Facts(None, None, None, None)


def bytes_moved(case: Case, direction: str) -> int:
    return case.dtype.itemsize * sum(case.elements_moved(backward) for backward in _halves(direction))


def gradients(problem: Problem, outputs: list[Tensor], ones: list[Tensor]) -> list[Tensor]:
    """Of the inputs that have one. Nothing is added to `.grad`, which could be a kernel of its own."""
    inputs = [t for t in problem.inputs if t.requires_grad]
    return list(torch.autograd.grad(outputs, inputs, [*problem.grads, *ones]))


def warm_up(problem: Problem, layer: Layer) -> list[Tensor]:
    """Compiles and tunes what does so when it is first called; returns the gradients of the loss terms."""
    outputs = layer(problem.inputs)
    ones = [torch.ones_like(t) for t in outputs[len(problem.grads) :]]
    for _ in range(3):
        gradients(problem, layer(problem.inputs), ones)
    return ones


# ---- launches and memory ---------------------------------------------------------------------------------


def count_launches(function: Calls) -> Counter[str]:
    """Kernels, memsets and copies ("kernel", "gpu_memset", "gpu_memcpy") that a call makes the GPU run."""
    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        # Twice: the first start of the profiler in a process may miss the first kernels.
        for _ in range(2):
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                function()
                torch.cuda.synchronize()
        profiler.export_chrome_trace(str(trace))
        return launches_in(json.loads(trace.read_text(encoding="utf-8")))


def launches_in(trace: dict[str, Any]) -> Counter[str]:
    """From a trace in Chrome's format."""
    found = (str(event.get("cat", "")).lower() for event in trace["traceEvents"])
    return Counter(kind for kind in found if kind in ("kernel", "gpu_memset", "gpu_memcpy"))


def facts(problem: Problem, layer: Layer) -> Facts:
    """Launches and memory. The profiler slows down what comes after: time nothing in the same process."""
    timer = Timer(problem, layer)
    timer.both(2)
    peak, saved = memory(timer)
    if timer.device.type != "cuda":
        return Facts(None, None, peak, saved)
    ones = timer.grads[len(problem.grads) :]
    forward = count_launches(lambda: layer(problem.inputs)).total()
    both = count_launches(lambda: gradients(problem, layer(problem.inputs), ones)).total()
    if both == 0:
        return Facts(None, None, peak, saved)  # the profiler does not see this GPU
    return Facts(forward, both - forward, peak, saved)


# ---- the clock of the device -----------------------------------------------------------------------------


@dataclass
class Recording:
    """Calls that can be made again, what they hold on to, and what has to be done before each time."""

    replay: Calls
    kept: object
    graph: torch.cuda.CUDAGraph | None = None
    before: Recording | None = None


class CaptureFailed(Exception):
    """A capture broke off and took torch's generator with it: this process can draw no more numbers."""

    def __init__(self, contender: str, reason: str) -> None:
        super().__init__(f"{contender}: the capture failed: {reason}")
        self.contender, self.reason = contender, reason


class Stopwatch:
    """Records calls on one device and times them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.graphs = device, device.type == "cuda"
        if self.graphs:
            self.stream = cuda.Stream(device)
            properties = torch.cuda.get_device_properties(device)
            cache = getattr(properties, "L2_cache_size", 0) or USUAL_L2
            self.other_bytes = torch.ones(4 * cache // 4, device=device)  # four times the cache

    def synchronize(self) -> None:
        synchronize(self.device)

    def on_stream(self) -> AbstractContextManager[object]:
        """What will be recorded is warmed up here: autograd runs backward on the stream of the forward."""
        return torch.cuda.stream(self.stream) if self.graphs else nullcontext()

    def record(self, calls: Calls, graph: bool, before: Recording | None = None) -> Recording:
        if not (self.graphs and graph):
            with self.on_stream():  # once, so that one that fails is found here
                if before is not None:
                    before.replay()
                calls()
            return Recording(calls, None, before=before)
        captured = torch.cuda.CUDAGraph()
        pool = before.graph.pool() if before is not None and before.graph is not None else None
        try:
            with torch.cuda.graph(captured, pool=pool, stream=self.stream):
                kept = calls()
        except Exception as error:
            # torch leaves the capture's stream the current one where the end of the capture fails.
            cuda.set_stream(cuda.default_stream(self.device))
            try:
                torch.randn(1, device=self.device)
            except RuntimeError:
                raise CaptureFailed("", _line(error)) from error
            raise
        return Recording(captured.replay, kept, captured, before)

    def seconds(self, recordings: dict[str, Recording], samples: int, cold: bool) -> dict[str, list[float]]:
        """`samples` timings of each, in turn, so that a change of the machine's speed meets all of them."""
        if not self.graphs:
            return _by_clock(recordings, samples)
        with self.on_stream():
            cycles = {name: self._cycles_of_launch(recording) for name, recording in recordings.items()}
            events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in recordings}
            for _ in range(samples):
                for name, recording in recordings.items():
                    events[name].append(self._time(recording, cycles[name], cold))
            torch.cuda.synchronize(self.device)
        return {name: [1e-3 * a.elapsed_time(b) for a, b in pairs] for name, pairs in events.items()}

    def _time(
        self, recording: Recording, cycles: int, cold: bool
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        if recording.before is not None:
            recording.before.replay()
        if cold:
            self.other_bytes.sum()
        # The GPU waits here until the replay has been handed over: no gap is timed.
        cuda._sleep(cycles)
        start.record()
        recording.replay()
        end.record()
        return start, end

    def _cycles_of_launch(self, recording: Recording) -> int:
        """Twice the time in which a replay is handed over, in cycles of a clock of 2 GHz."""
        for _ in range(2):  # the first replay of a graph also uploads it
            torch.cuda.synchronize(self.device)
            if recording.before is not None:
                recording.before.replay()
            start = time.perf_counter()
            recording.replay()
            seconds = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        return int(2e9 * min(20e-3, 2 * seconds + 5e-5))


def _by_clock(recordings: dict[str, Recording], samples: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in recordings}
    for _ in range(samples):
        for name, recording in recordings.items():
            if recording.before is not None:
                recording.before.replay()
            start = time.perf_counter()
            recording.replay()
            found[name].append(time.perf_counter() - start)
    return found


# ---- measurements ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a device is timed."""

    clock: str
    cache: str

    @property
    def cold(self) -> bool:
        return self.cache == "cold"


WAYS = (Way("graph", "cold"), Way("graph", "hot"), Way("queue", "cold"))


def calls_of(case: Case, direction: str, way: Way) -> int:
    """How many calls a recording holds."""
    # A stream takes about a thousand launches ahead, and eager code needs thirty for a call.
    most = MOST_CALLS if way.clock == "graph" else MOST_CALLS // 3
    return max(1, min(most, BYTES_PER_REPLAY // max(1, bytes_moved(case, direction))))


def record_layer(
    watch: Stopwatch,
    problems: list[Problem],
    layer: Layer,
    ones: list[Tensor],
    direction: str,
    calls: int,
    way: Way,
) -> Recording:
    """`calls` calls of one pass: each on its own problem (cold), or all on the first."""
    given = problems[:calls] if way.cold else problems[:1] * calls
    outputs: list[list[Tensor]] = []

    def forward() -> list[list[Tensor]]:
        # What is dropped gives its memory to the next call, as in a loop that trains; cold calls keep theirs.
        if way.cold:
            return [layer(problem.inputs) for problem in given]
        for problem in given:
            layer(problem.inputs)
        return []

    def forward_for_backward() -> None:
        outputs[:] = [layer(problem.inputs) for problem in given]

    def backward() -> list[list[Tensor]]:
        # The outputs are given up: a compiled backward may write over what forward saved for it.
        taken = list(outputs)
        outputs.clear()
        found = [gradients(problem, out, ones) for problem, out in zip(given, taken, strict=True)]
        return found if way.cold else []

    def both() -> list[object]:
        found: list[object] = []
        for problem in given:
            out = layer(problem.inputs)
            grads = gradients(problem, out, ones)
            if way.cold:
                found.append(([o.detach() for o in out], grads))
        return found

    graph = way.clock == "graph"
    if direction == "backward":
        return watch.record(backward, graph, before=watch.record(forward_for_backward, graph))
    return watch.record(forward if direction == "forward" else both, graph)


def record_copy(watch: Stopwatch, case: Case, direction: str, calls: int, way: Way) -> Recording:
    """The floor: a copy of as many bytes as the layer has to move, half of them read and half written."""
    elements = max(1, bytes_moved(case, direction) // case.dtype.itemsize // 2)
    sources = [torch.ones(elements, dtype=case.dtype, device=watch.device) for _ in range(calls)]
    pairs = [(source, torch.empty_like(source)) for source in (sources if way.cold else sources[:1])]

    def copy() -> None:
        for source, target in pairs if way.cold else pairs * calls:
            target.copy_(source)

    watch.synchronize()
    with watch.on_stream():
        copy()
    recording = watch.record(copy, way.clock == "graph")
    recording.kept = pairs
    return recording


def device_rows(
    case: Case,
    layers: dict[str, Layer],
    watch: Stopwatch,
    *,
    directions: tuple[str, ...],
    samples: int,
    known: dict[str, Facts],
    say: Callable[[str], None],
) -> list[GpuRow]:
    """Every direction, way, contender and the copy. A contender that fails is named and left out."""
    rows: list[GpuRow] = []
    count = max(calls_of(case, direction, way) for direction in directions for way in WAYS)
    problems = [Problem.of(case, watch.device) for _ in range(count)]
    watch.synchronize()
    ones: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        with _tolerant(case, "first call", name, say), watch.on_stream():
            ones[name] = warm_up(problems[0], layer)
    for direction in directions:
        for way in WAYS:
            calls = calls_of(case, direction, way)
            recordings: dict[str, Recording] = {}
            times: dict[str, list[float]] = {}
            for name in (COPY, *ones):
                with _tolerant(case, f"{direction}, {way.cache} {way.clock}", name, say):
                    if name == COPY:
                        recordings[name] = record_copy(watch, case, direction, calls, way)
                    else:
                        recordings[name] = record_layer(
                            watch, problems, layers[name], ones[name], direction, calls, way
                        )
                    if case.numel > LARGEST_TOGETHER:
                        times |= watch.seconds({name: recordings.pop(name)}, samples, way.cold)
            if recordings:
                with _tolerant(case, f"{direction}, {way.cache} {way.clock}", "all", say):
                    times |= watch.seconds(recordings, samples, way.cold)
            recordings.clear()
            rows += _rows(case, times, direction, way, known, calls)
    return rows


@contextmanager
def _tolerant(case: Case, where: str, name: str, say: Callable[[str], None]) -> Iterator[None]:
    """One contender that fails, or does not fit the memory, does not end the others' measurements."""
    try:
        yield
    except CaptureFailed as error:
        raise CaptureFailed(name, f"{where}: {error.reason}") from error
    except Exception as error:
        say(f"{case.op} {case.name}, {where}: {name}: {_line(error)}")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:250]


def wall_rows(
    case: Case,
    layers: dict[str, Layer],
    device: torch.device,
    *,
    directions: tuple[str, ...],
    rounds: int,
    known: dict[str, Facts],
    say: Callable[[str], None],
) -> list[GpuRow]:
    """Plain calls, one after the other, until the GPU is done with all of them."""
    problem = Problem.of(case, device)
    timers: dict[str, Timer] = {}
    for name, layer in layers.items():
        with _tolerant(case, "wall", name, say):
            timer = Timer(problem, layer)
            timer.both(1)
            timers[name] = timer
    rows: list[GpuRow] = []
    for direction in directions:
        timings = {name: timer.timing(direction) for name, timer in timers.items()}
        timings[COPY] = _copy(case, direction, device)
        rows += _rows(case, interleaved(timings, rounds), direction, Way("wall", "hot"), known, 1)
    return rows


def _rows(
    case: Case,
    times: dict[str, list[float]],
    direction: str,
    way: Way,
    known: dict[str, Facts],
    calls: int,
) -> list[GpuRow]:
    moved = bytes_moved(case, direction)
    copied = 1e6 * statistics.median(times[COPY]) / calls if COPY in times else None
    rows = []
    for name, found in times.items():
        common = common_fields(case, direction, name, [t / calls for t in found])
        median = common["median"]
        of = known.get(name, NO_FACTS)
        rows.append(
            GpuRow(
                **common,
                peak_bytes=of.peak_bytes if direction == "both" else None,
                saved_bytes=of.saved_bytes if direction == "both" else None,
                clock=way.clock,
                cache=way.cache,
                bytes_moved=moved,
                gb_per_s=1e-3 * moved / median,
                copy_percent=None if copied is None else 100 * copied / median,
                launches=1 if name == COPY else of.launches(direction),
            )
        )
    return rows
