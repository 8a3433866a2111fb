"""The benchmark: what the fused latent layer is worth against eager code, `torch.compile` and others.

    vaekernels bench [--quick] [--device DEVICE] [--csv FILE] [--plots FOLDER] [--compare FILE]

benchmarks/ runs the same cases under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from vaekernels.bench.cases import (
    CASES,
    MODEL_CASES,
    QUICK,
    SIZES,
    Case,
    contenders,
    has_diffusers,
    serves_diffusers,
)
from vaekernels.bench.measure import PASSES, Row, Timer, measure
from vaekernels.bench.pictures import plot
from vaekernels.bench.report import compare, machine, memory, read_csv, table, write_csv

__all__ = ["CASES", "MODEL_CASES", "QUICK", "SIZES", "Case", "Row", "Timer", "contenders", "main", "measure"]

THREAD_CASES = [Case((128, 32)), Case((1024, 128)), Case((2048, 512)), Case((8192, 512))]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m vaekernels.bench") -> int:
    """Runs the command; returns its exit status."""
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    # Everything that can be wrong is found before the first timing: a full run takes an hour.
    device = _device(parser, options.device)
    cases = _cases(parser, options)
    earlier = _earlier(parser, options.compare)
    _check_outputs(parser, options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if any(map(serves_diffusers, cases)) and not has_diffusers():
        print("  diffusers is not installed and is left out", file=sys.stderr)

    passes = ("both",) if options.quick else PASSES
    rows: list[Row] = []
    for number, case in enumerate(cases, 1):
        _say(f"{number}/{len(cases)} {case.op} {case.name}")
        rows += measure(
            case, rounds=options.rounds, device=device, compiled=not options.no_compile, passes=passes
        )
    if device.type == "cpu" and not options.quick and options.threads is None:
        rows += _fewer_threads(options.rounds, device, options.largest)
    described = machine(device)
    try:
        if options.csv:  # saved first, for standard output may be closed; printed even if it cannot be saved
            write_csv(options.csv, rows, described)
        drawn = plot(rows, options.plots, described) if options.plots else []
    finally:
        _print(rows, passes, described, earlier)
    for path in drawn:
        print(path)
    return 0


def _print(
    rows: Sequence[Row], passes: Sequence[str], described: dict[str, str], earlier: list[Row] | None
) -> None:
    print(", ".join(f"{key} {value}" for key, value in described.items() if value))
    fewest, most = min(r.rounds for r in rows), max(r.rounds for r in rows)
    rounds = f"{most}" if fewest == most else f"{fewest} to {most}"
    print(f"threads {torch.get_num_threads()}, medians of {rounds}\n")
    for direction in reversed(passes):
        print(table([r for r in rows if r.threads == torch.get_num_threads()], direction), end="\n\n")
    print(memory(r for r in rows if r.threads == torch.get_num_threads()), end="\n\n")
    if earlier is not None:
        print(compare(rows, earlier), end="\n\n")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Times the latent layer on this machine.")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="six cases, forward and backward together")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=21,
        help="timings of each contender, fewer where they take long (default: 21)",
    )
    parser.add_argument(
        "--largest", type=_positive, default=2**26, help="leave out cases of more latent elements"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, help="write every figure to this file")
    parser.add_argument("--plots", type=Path, help="draw pictures into this folder (needs matplotlib)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier --csv to compare with")
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


def _cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    all_cases = QUICK if options.quick else CASES
    cases = [case for case in all_cases if case.numel <= options.largest]
    if not cases:
        smallest = min(case.numel for case in all_cases)
        parser.error(f"--largest {options.largest}: the smallest case has {smallest} latent elements")
    return cases


def _earlier(parser: argparse.ArgumentParser, path: Path | None) -> list[Row] | None:
    try:
        return None if path is None else read_csv(path)
    except (OSError, ValueError, csv.Error) as error:
        parser.error(f"--compare: {error}")


def _check_outputs(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for path in filter(None, (options.csv, options.plots)):
        try:
            path.exists()
        except OSError as error:
            parser.error(f"{path}: {error.strerror}")
    if options.csv is not None and not options.csv.absolute().parent.is_dir():
        parser.error(f"--csv {options.csv}: there is no folder {options.csv.parent}")
    if options.plots is not None and find_spec("matplotlib") is None:
        parser.error("--plots: the package matplotlib is missing; pip install 'vaekernels[train]'")
    if options.plots is not None and options.plots.exists() and not options.plots.is_dir():
        parser.error(f"--plots {options.plots}: it is not a folder")


def _fewer_threads(rounds: int, device: torch.device, largest: int) -> list[Row]:
    """Ours and eager at 1, 2, 4 ... threads, below the number that is in use."""
    rows: list[Row] = []
    most = torch.get_num_threads()
    counts = [n for n in (2**i for i in range((os.cpu_count() or 1).bit_length())) if n < most]
    try:
        for count in counts:
            torch.set_num_threads(count)
            for case in THREAD_CASES:
                if case.numel <= largest:
                    _say(f"{count} of {most} threads: {case.name}")
                    rows += measure(case, rounds=rounds, device=device, compiled=False, passes=("both",))
    finally:
        torch.set_num_threads(most)
    return rows


def _say(line: str) -> None:
    print(f"  {line} ...", file=sys.stderr, flush=True)
