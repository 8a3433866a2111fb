"""The benchmark on a GPU: processes that measure, one after the other, and the record that they share.

First some processes side by side compile everything (into torch's and Triton's caches) and count launches and
memory; then one process after the other times the cases, alone on the GPU. A process that breaks down is
started again behind the case that it was at. What the time does not suffice for is left out and named.

    python -m vaekernels.bench.processes {facts,times} ...     the work of one process
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vaekernels import _native
from vaekernels._build import time_left
from vaekernels._files import lines_of
from vaekernels.bench import gpu, gpu_report
from vaekernels.bench.cases import GPU_CASES, QUICK, Case, Layer, Problem, eager, fused
from vaekernels.bench.report import machine

__all__ = ["SECONDS", "Record", "chosen_cases", "gather"]

# The contender that is written by hand in Triton is no part of the package: it is there in a source tree.
TRITON_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "triton_latent.py"
SECONDS = 450.0  # with the build before it under nine minutes
WORKERS = 5
SHARE_OF_FACTS = 0.3  # of the time, at most, for compiling and counting
DIRECTIONS = ("both", "forward", "backward")


def key(case: Case) -> str:
    return f"{case.op} {case.name}"


# ---- contenders ------------------------------------------------------------------------------------------


def makers(case: Case, with_compiled: bool = True) -> dict[str, Callable[[], Layer]]:
    """Who can compute the case; each is made only when its turn comes, since making may fail."""

    def triton() -> Layer:
        layer: Layer = _triton_latent().latent(case)
        return layer

    def compiled(**options: Any) -> Layer:
        layer: Layer = torch.compile(eager(case), fullgraph=True, dynamic=False, **options)
        return layer

    found: dict[str, Callable[[], Layer]] = {
        gpu_report.OURS: lambda: fused(case),
        gpu_report.EAGER: lambda: eager(case),
    }
    if with_compiled:
        found[gpu_report.COMPILED] = compiled
        found[gpu_report.TUNED] = lambda: compiled(mode="max-autotune-no-cudagraphs")
    if has_triton():
        found[gpu_report.TRITON] = triton
    return found


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None and TRITON_FILE.exists()


def _triton_latent() -> Any:
    spec = importlib.util.spec_from_file_location("triton_latent", TRITON_FILE)
    assert spec is not None and spec.loader is not None
    # Triton looks a kernel's globals up in its module, by name.
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(module, "latent"):
        spec.loader.exec_module(module)
    return module


# ---- the record: one JSON object a line, so that a process that dies leaves what it has measured ----------


@dataclass
class Record:
    """What the processes have written down so far."""

    facts: dict[str, dict[str, gpu.Facts]] = field(default_factory=dict)
    rows: list[gpu.GpuRow] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    barred: set[tuple[str, str]] = field(default_factory=set)  # contenders whose capture broke a process
    machine: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Record:
        record = cls()
        for path in paths:
            for line in lines_of(path.read_text(encoding="utf-8")) if path.exists() else ():
                with contextlib.suppress(json.JSONDecodeError):  # a line that was cut off
                    record._take(json.loads(line))
        return record

    def _take(self, entry: dict[str, Any]) -> None:
        kind, value = entry["kind"], entry["value"]
        if kind == "facts":
            self.facts.setdefault(value["case"], {})[value["contender"]] = gpu.Facts(**value["facts"])
        elif kind == "rows":
            self.rows += [gpu.GpuRow(**row) for row in value["rows"]]
            self.done.add(value["case"])
        elif kind == "started":
            self.started.append(value)
        elif kind == "note":
            self.notes.append(value)
        elif kind == "barred":
            self.barred.add((value["case"], value["contender"]))
        elif kind == "machine":
            self.machine = value

    def crashed(self) -> set[str]:
        """Cases at which a process ended for no known reason."""
        known = {case for case, _ in self.barred}
        return {
            c for c in self.started if c not in self.done and (c not in known or self.started.count(c) > 4)
        }


class Writer:
    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def write(self, kind: str, value: Any) -> None:
        self.file.write(json.dumps({"kind": kind, "value": value}) + "\n")
        self.file.flush()

    def note(self, line: str) -> None:
        print(line, flush=True)
        self.write("note", line)


# ---- the work of one process -----------------------------------------------------------------------------


def count_facts(
    cases: Sequence[Case], device: torch.device, writer: Writer, with_compiled: bool = True
) -> None:
    """Compiles everything, and counts launches and memory."""
    import torch._inductor.config as inductor

    # What torch.compile's tuning finds while others use the GPU must not be kept.
    inductor.autotune_local_cache = False
    for case in cases:
        torch.compiler.reset()
        problem = Problem.of(case, device)
        for name, make in makers(case, with_compiled).items():
            start = time.monotonic()
            try:
                found = gpu.facts(problem, make())
            except Exception as error:
                writer.note(f"{key(case)}: {name}: {type(error).__name__}: {str(error).strip()[:200]}")
                continue
            writer.write("facts", {"case": key(case), "contender": name, "facts": asdict(found)})
            print(f"{key(case)}: {name}: {found} in {time.monotonic() - start:.1f} s", flush=True)


def time_cases(
    cases: Sequence[Case],
    device: torch.device,
    writer: Writer,
    record: Record,
    until: float,
    samples: int,
    *,
    directions: tuple[str, ...] = DIRECTIONS,
    with_compiled: bool = True,
) -> None:
    """Times the cases that are neither done nor have broken a process before."""
    watch = gpu.Stopwatch(device)
    skipped = record.done | record.crashed()
    for case in cases:
        if key(case) in skipped:
            continue
        if time.time() > until:
            return
        writer.write("started", key(case))
        start = time.monotonic()
        torch.compiler.reset()
        layers: dict[str, Layer] = {}
        for name, make in makers(case, with_compiled).items():
            if (key(case), name) in record.barred:
                continue
            try:
                layers[name] = make()
            except Exception as error:
                writer.note(f"{key(case)}: {name}: {type(error).__name__}: {str(error).strip()[:200]}")
        known = record.facts.get(key(case), {})
        options: dict[str, Any] = {"directions": directions, "known": known, "say": writer.note}
        try:
            rows = gpu.device_rows(case, layers, watch, samples=samples, **options)
        except gpu.CaptureFailed as error:
            # This process can draw no more numbers; the next one measures the case without this contender.
            writer.write("barred", {"case": key(case), "contender": error.contender})
            writer.note(f"{key(case)}: {error}")
            return
        rounds = samples if case.numel <= gpu.LARGEST_TOGETHER else max(3, samples // 3)
        rows += gpu.wall_rows(case, layers, device, rounds=rounds, **options)
        writer.write("rows", {"case": key(case), "rows": [asdict(row) for row in rows]})
        print(f"{key(case)}: {len(rows)} rows in {time.monotonic() - start:.1f} s", flush=True)


def work(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    cases = chosen_cases(options)
    writer = Writer(options.write)
    if options.work == "facts":
        first, step = map(int, options.share.split("/"))
        count_facts(cases[first::step], device, writer, not options.no_compile)
        return 0
    record = Record.read([options.write, *options.read])
    if not record.machine:
        writer.write("machine", described(device))
    time_cases(
        cases,
        device,
        writer,
        record,
        options.until,
        options.samples,
        directions=("both",) if options.quick else DIRECTIONS,
        with_compiled=not options.no_compile,
    )
    return 0


def described(device: torch.device) -> dict[str, str]:
    """What a timing depends on besides the code."""
    found = machine(device) | {"cuda": torch.version.cuda or ""}
    found["commit"] = os.environ.get("COMMIT") or found["commit"]
    if device.type == "cuda":
        found["kernels"] = "cuda" if _native.has_kernels("cuda") else "reference"
    if importlib.util.find_spec("triton") is not None:
        from triton import __version__ as version

        found["triton"] = str(version)
    return found


# ---- the process that starts the others ------------------------------------------------------------------


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    return [case for case in (QUICK if options.quick else GPU_CASES) if case.numel <= options.largest]


def start_work(
    options: argparse.Namespace, log: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vaekernels.bench.processes", *arguments, "--device", options.device,
               "--largest", str(options.largest), "--samples", str(options.rounds)]  # fmt: skip
    command += [f"--{name.replace('_', '-')}" for name in ("quick", "no_compile") if getattr(options, name)]
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )


def finish(process: subprocess.Popen[bytes], until: float) -> int | None:
    """Waits until `until`, then ends the process with all that it started. None: it was ended."""
    status: int | None = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        status = process.wait(max(0.0, until - time.time()))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return status


def gather(options: argparse.Namespace, folder: Path) -> tuple[Record, list[str]]:
    """Both phases; returns what was measured and what was left out. `folder` keeps the record of every
    process, a line for each measurement, and their log.

    `options`: device, quick, largest, rounds, no_compile and, for all of it, seconds.
    """
    begin = time.time()
    # The last measurement may begin at `until`, and a report has to be written after it.
    until, end = begin + options.seconds - 25, begin + options.seconds
    log, left_out = folder / "bench.log", []
    log.write_bytes(b"")
    workers = min(WORKERS, os.cpu_count() or 1)
    facts = [folder / f"facts-{i}.jsonl" for i in range(workers)]
    times = folder / "times.jsonl"
    for earlier in (*folder.glob("facts-*.jsonl"), times):  # of another run, perhaps of other code
        earlier.unlink(missing_ok=True)
    started = []
    for i, path in enumerate(facts):
        given = ["facts", "--share", f"{i}/{workers}", "--write", str(path)]
        started.append(start_work(options, log, *given, environment={"TORCHINDUCTOR_COMPILE_THREADS": "3"}))
    for i, process in enumerate(started):
        status = finish(process, begin + SHARE_OF_FACTS * options.seconds)
        if status != 0:
            how = "was ended, its time being over" if status is None else f"ended with status {status}"
            left_out.append(f"process {i} of {workers} that counts launches and memory {how}")
    _say(f"compiled and counted in {time.time() - begin:.0f} s")

    cases = [key(case) for case in chosen_cases(options)]
    record = Record.read([*facts, times])
    measuring = time.monotonic()
    while time.time() < until and set(cases) - record.done - record.crashed():
        before = len(record.started)
        process = start_work(
            options, log, "times", "--write", str(times), "--until", str(until),
            "--read", *map(str, facts),
        )  # fmt: skip
        finish(process, end)
        record = Record.read([*facts, times])
        left = time_left(measuring, len(record.done), len(cases), sys.stderr)
        _say(f"{len(record.done)} of {len(cases)} cases at {time.time() - begin:.0f} s{left}")
        if len(record.started) == before:
            left_out.append("a process that measures ended before its first case: see bench.log")
            break
    for case in cases:
        if case in record.crashed():
            late = time.time() >= end - 1
            left_out.append(f"{case}: the {'time was over' if late else 'process broke down'} while it ran")
        elif case not in record.done:
            left_out.append(f"{case}: not begun, the time was over")
    return record, list(dict.fromkeys([*left_out, *record.notes]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The work of one process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=("facts", "times"))
    parser.add_argument("--device", required=True)
    parser.add_argument("--largest", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--write", type=Path, required=True)
    parser.add_argument("--read", type=Path, nargs="*", default=[])
    parser.add_argument("--until", type=float, default=float("inf"))
    return work(parser.parse_args(arguments))


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
