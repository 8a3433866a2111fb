"""The benchmark: what the fused latent layer is worth against eager code, `torch.compile` and others.

    vaekernels bench [--quick] [--device DEVICE] [--csv FILE] [--plots FOLDER] [--compare FILE]

benchmarks/ runs the same cases under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vaekernels.bench.cases import CASES, MODEL_CASES, QUICK, SIZES, Case, contenders
from vaekernels.bench.measure import PASSES, Row, Timer, measure
from vaekernels.bench.report import compare, machine, plot, read_csv, table, write_csv

__all__ = ["CASES", "MODEL_CASES", "QUICK", "SIZES", "Case", "Row", "Timer", "contenders", "main", "measure"]

THREAD_CASES = [Case((128, 32)), Case((1024, 128)), Case((2048, 512)), Case((8192, 512))]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m vaekernels.bench") -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog=prog, description="Times the latent layer on this machine.")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="six cases, forward and backward together")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=21, help="timings of each contender (default: 21)")
    parser.add_argument("--largest", type=int, default=2**26, help="leave out cases of more latent elements")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, help="write every figure to this file")
    parser.add_argument("--plots", type=Path, help="draw pictures into this folder (needs matplotlib)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier --csv to compare with")
    options = parser.parse_args(arguments)
    earlier: list[Row] | None = None
    if options.compare is not None:
        try:
            earlier = read_csv(options.compare)
        except (OSError, ValueError) as error:
            parser.error(f"--compare: {error}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")

    cases = [case for case in (QUICK if options.quick else CASES) if case.numel <= options.largest]
    passes = ("both",) if options.quick else PASSES
    rows: list[Row] = []
    for number, case in enumerate(cases, 1):
        _say(f"{number}/{len(cases)} {case.op} {case.name}")
        rows += measure(
            case, rounds=options.rounds, device=device, compiled=not options.no_compile, passes=passes
        )
    if device.type == "cpu" and not options.quick and options.threads is None:
        rows += _fewer_threads(options.rounds, device)
    described = machine(device)
    print(", ".join(f"{key} {value}" for key, value in described.items() if value))
    print(f"threads {torch.get_num_threads()}, medians of {options.rounds}\n")
    most = max(r.threads for r in rows)
    for direction in reversed(passes):
        print(table([r for r in rows if r.threads == most], direction), end="\n\n")
    if earlier is not None:
        print(compare(rows, earlier), end="\n\n")
    if options.csv:
        write_csv(options.csv, rows, described)
    if options.plots:
        for path in plot(rows, options.plots, described):
            print(path)
    return 0


def _fewer_threads(rounds: int, device: torch.device) -> list[Row]:
    """Ours and eager at 1, 2, 4 ... threads, below the number that is in use."""
    rows: list[Row] = []
    most = torch.get_num_threads()
    counts = [n for n in (2**i for i in range((os.cpu_count() or 1).bit_length())) if n < most]
    try:
        for count in counts:
            torch.set_num_threads(count)
            for case in THREAD_CASES:
                _say(f"{count} of {most} threads: {case.name}")
                rows += measure(case, rounds=rounds, device=device, compiled=False, passes=("both",))
    finally:
        torch.set_num_threads(most)
    return rows


def _say(line: str) -> None:
    print(f"  {line} ...", file=sys.stderr, flush=True)
