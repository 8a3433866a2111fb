"""The benchmark: what the fused latent layer is worth against eager code, `torch.compile` and others.

    vaekernels bench [--quick] [--device DEVICE] [--csv PATH] [--plots PATH] [--compare PATH]

On a GPU (`--device cuda`) times are those of the device, in processes whose record survives one that breaks
down (`processes`); a tuned torch.compile and a version written in Triton are timed as well. benchmarks/ runs
the CPU's cases under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from vaekernels._build import time_left
from vaekernels._files import write_atomically
from vaekernels.bench import gpu_report, processes
from vaekernels.bench.cases import (
    CASES,
    GPU_CASES,
    MODEL_CASES,
    QUICK,
    SIZES,
    Case,
    contenders,
    has_diffusers,
    serves_diffusers,
)
from vaekernels.bench.gpu import GpuRow
from vaekernels.bench.measure import PASSES, Row, Timer, measure
from vaekernels.bench.plots import plot
from vaekernels.bench.report import R, compare, machine, memory, read_csv, table, write_csv

__all__ = ["CASES", "MODEL_CASES", "QUICK", "SIZES", "Case", "Row", "Timer", "contenders", "main", "measure"]

THREAD_CASES = [Case((128, 32)), Case((1024, 128)), Case((2048, 512)), Case((8192, 512))]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m vaekernels.bench") -> int:
    """Runs the command; returns its exit status."""
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    # Everything that can be wrong is found before the first timing: a full run takes an hour.
    device = _device(parser, options.device)
    on_gpu = device.type == "cuda"
    _defaults(parser, options, on_gpu)
    cases = _cases(parser, options, on_gpu)
    _check_outputs(parser, options)
    if on_gpu:
        return _on_gpu(options, cases, _earlier(parser, options.compare, GpuRow))
    return _on_cpu(options, device, cases, _earlier(parser, options.compare, Row))


def _on_cpu(
    options: argparse.Namespace, device: torch.device, cases: list[Case], earlier: list[Row] | None
) -> int:
    """Every case in this process, timed from outside; on any device."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if any(map(serves_diffusers, cases)) and not has_diffusers():
        _say("diffusers is not installed and is left out")
    passes = ("both",) if options.quick else PASSES
    rows: list[Row] = []
    begun = time.monotonic()
    for number, case in enumerate(cases, 1):
        left = time_left(begun, number - 1, len(cases), sys.stderr)
        _say(f"{number}/{len(cases)} {case.op} {case.name} ...{left}")
        rows += measure(
            case, rounds=options.rounds, device=device, compiled=not options.no_compile, passes=passes
        )
    if device.type == "cpu" and not options.quick and options.threads is None:
        rows += _fewer_threads(options.rounds, device, options.largest)
    described = machine(device)
    fewest, most = min(r.rounds for r in rows), max(r.rounds for r in rows)
    rounds = f"{most}" if fewest == most else f"{fewest} to {most}"
    text = ", ".join(f"{key} {value}" for key, value in described.items() if value)
    text += f"\nthreads {torch.get_num_threads()}, medians of {rounds}\n"
    shown = [row for row in rows if row.threads == torch.get_num_threads()]
    for part in (*(table(shown, direction) for direction in reversed(passes)), memory(shown)):
        text += f"\n{part}\n"
    change = None if earlier is None else compare(rows, earlier)
    _finish(options, rows, described, text, change, lambda folder: plot(rows, folder, described))
    return 0


def _on_gpu(options: argparse.Namespace, cases: list[Case], earlier: list[GpuRow] | None) -> int:
    """On the device's clock, in processes of their own. 1 where nothing could be measured."""
    if not processes.has_triton():
        _say("triton is left out: it needs the package triton and benchmarks/triton_latent.py")
    folder = options.record or Path(tempfile.mkdtemp(prefix="vaekernels-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    _say(f"{len(cases)} cases; the record and the log of the processes are in {folder}")
    record, left_out = processes.gather(options, folder)
    # The page is meant to be shared: it holds no paths of this machine.
    text = gpu_report.page(record.rows, record.machine, left_out).replace(str(Path.cwd()), ".")
    text = text.replace(str(Path.home()), "~")
    compared = gpu_report.compared
    change = None if earlier is None else compare(compared(record.rows), compared(earlier))

    def draw(folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        gpu_report.plot(record.rows, folder / "gpu-bench.svg", record.machine)
        return [folder / "gpu-bench.svg"]

    _finish(options, record.rows, record.machine, text, change, draw)
    return 0 if record.rows else 1


def _finish(
    options: argparse.Namespace,
    rows: Sequence[Row],
    described: dict[str, str],
    text: str,
    change: str | None,
    draw: Callable[[Path], Sequence[Path]],
) -> None:
    """Saved first, for standard output may be closed; printed even if it cannot be saved."""
    drawn: Sequence[Path] = ()
    try:
        if options.csv:
            write_csv(options.csv, rows, described)
        if options.markdown:
            write_atomically(options.markdown, text)
        if options.plots and rows:
            drawn = draw(options.plots)
    finally:
        print(text)
        if change is not None:
            print(change, end="\n\n")
    for path in drawn:
        print(path)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Times the latent layer on this machine.")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="six cases, forward and backward together")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--rounds",
        type=_positive,
        help="timings of each contender, fewer where they take long (default: 21; on a GPU 11)",
    )
    parser.add_argument(
        "--largest", type=_positive, help="leave out cases of more latent elements (default: 2^26; GPU 2^28)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write every figure to this file")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables to this file")
    parser.add_argument(
        "--plots", type=Path, metavar="PATH", help="draw plots into this folder (needs matplotlib)"
    )
    parser.add_argument("--compare", type=Path, metavar="PATH", help="an earlier --csv to compare with")
    on_gpu = parser.add_argument_group("with --device cuda")
    on_gpu.add_argument(
        "--seconds",
        type=_positive,
        help=f"limit for all cases; those left out are named (default: {processes.SECONDS:.0f})",
    )
    on_gpu.add_argument(
        "--record", type=Path, metavar="PATH", help="keep the processes' measurements and log in this folder"
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name}: {str(error).splitlines()[0]}")
    if device.type == "meta":
        parser.error("--device meta: it computes nothing that could be timed")
    return device


def _defaults(parser: argparse.ArgumentParser, options: argparse.Namespace, on_gpu: bool) -> None:
    """What depends on the device; and no option that it does not know."""
    for name in ("threads",) if on_gpu else ("seconds", "record"):
        if getattr(options, name) is not None:
            parser.error(f"--{name}: not with --device {options.device}")
    options.rounds = options.rounds or (11 if on_gpu else 21)
    options.largest = options.largest or (2**28 if on_gpu else 2**26)
    options.seconds = options.seconds or processes.SECONDS


def _cases(parser: argparse.ArgumentParser, options: argparse.Namespace, on_gpu: bool) -> list[Case]:
    all_cases = QUICK if options.quick else GPU_CASES if on_gpu else CASES
    cases = [case for case in all_cases if case.numel <= options.largest]
    if not cases:
        smallest = min(case.numel for case in all_cases)
        parser.error(f"--largest {options.largest}: the smallest case has {smallest} latent elements")
    return cases


def _earlier(parser: argparse.ArgumentParser, path: Path | None, kind: type[R]) -> list[R] | None:
    try:
        return None if path is None else read_csv(path, kind)
    except (OSError, ValueError, csv.Error) as error:
        parser.error(f"--compare: {error}")


def _check_outputs(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in ("csv", "markdown", "plots"):
        path = getattr(options, name)
        try:
            there = path is None or path.exists() or path.absolute().parent.is_dir()
        except OSError as error:
            parser.error(f"--{name} {path}: {error.strerror}")
        if name != "plots" and not there:
            parser.error(f"--{name} {path}: there is no folder {path.parent}")
    if options.plots is not None and find_spec("matplotlib") is None:
        parser.error("--plots: the package matplotlib is missing; pip install 'vaekernels[train]'")
    if options.plots is not None and options.plots.exists() and not options.plots.is_dir():
        parser.error(f"--plots {options.plots}: it is not a folder")


def _fewer_threads(rounds: int, device: torch.device, largest: int) -> list[Row]:
    """Ours and eager at 1, 2, 4 ... threads, below the number that is in use."""
    rows: list[Row] = []
    most = torch.get_num_threads()
    counts = [n for n in (2**i for i in range((os.cpu_count() or 1).bit_length())) if n < most]
    steps = [(count, case) for count in counts for case in THREAD_CASES if case.numel <= largest]
    begun = time.monotonic()
    try:
        for number, (count, case) in enumerate(steps):
            torch.set_num_threads(count)
            left = time_left(begun, number, len(steps), sys.stderr)
            _say(f"{count} of {most} threads: {case.name} ...{left}")
            rows += measure(case, rounds=rounds, device=device, compiled=False, passes=("both",))
    finally:
        torch.set_num_threads(most)
    return rows


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)
