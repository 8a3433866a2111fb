"""Installs the package in every way that people install it, in fresh environments: `make install-matrix`.

Every cell works, or says what is missing and what fixes it, in the words kept in approved/. A cell with other
words, and any that shows a traceback, fails. The table goes to benchmarks/results/install-matrix.md.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import json
import platform
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cells import CELLS, Cell, Outcome
from environments import REPOSITORY, UV, Failed, Matrix, NotPossible

from vaekernels import _build

APPROVED = Path(__file__).with_name("approved")
RESULTS = REPOSITORY / "benchmarks" / "results" / "install-matrix.md"


@dataclass(frozen=True)
class Result:
    name: str
    status: str
    told: str
    seconds: float
    problem: str | None = None


def attempt(cell: Cell, matrix: Matrix, approve: bool) -> Result:
    start = time.monotonic()
    problem = None
    try:
        outcome = cell.try_it(matrix)
        status, told = "works" if outcome.message is None else "message", outcome.facts
        problem = compare(cell, outcome, approve)
    except NotPossible as reason:
        status, told = "not possible here", str(reason)
    except Failed as failure:
        status, told, problem = "FAILED", "see the output", str(failure)
    if problem is not None:
        status = "FAILED"
    return Result(cell.name, status, told, time.monotonic() - start, problem)


def compare(cell: Cell, outcome: Outcome, approve: bool) -> str | None:
    """How the message differs from the approved one; None where it does not. ``approve``: it becomes that."""
    file = APPROVED / f"{cell.name}.txt"
    if outcome.message is None:
        return f"{file} is there, and the cell works: remove it" if file.exists() else None
    if approve:
        file.write_text(outcome.message, encoding="utf-8")
    known = file.read_text(encoding="utf-8") if file.exists() else ""
    changed = difflib.unified_diff(
        known.splitlines(), outcome.message.splitlines(), "approved", "seen", lineterm=""
    )
    return "\n".join(changed) or None


def known_results(folder: Path) -> dict[str, Result]:
    """Those of earlier runs in this folder."""
    file = folder / "results.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return {row["name"]: Result(**row) for row in rows}


def keep(folder: Path, results: dict[str, Result]) -> None:
    rows = [asdict(result) for result in results.values()]
    (folder / "results.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def report(results: dict[str, Result]) -> str:
    """The table, with the messages below it."""
    version = r"\d+\.\d+(?:\.\d+)*"
    nvcc = _build.find_nvcc()
    words = {
        "uv": first(version, [UV, "--version"]),
        "c++": first(version, ["c++", "--version"]),
        "nvcc": _build.nvcc_version(nvcc) if nvcc else "none",
    }
    lines = [
        "# Install matrix",
        "",
        f"`make install-matrix`, {datetime.date.today()}, {platform.system()} {platform.machine()}, "
        + ", ".join(f"{name} {told}" for name, told in words.items())
        + ". Every cell is a fresh environment. *works*: the kernels compute the first fused loss, and it is "
        "right. *message*: the package runs on plain PyTorch, or the command ends, and says why and what "
        "fixes it, in the words below.",
        "",
        "| cell | result | with |",
        "| --- | --- | --- |",
    ]
    for cell in CELLS:
        result = results[cell.name]
        status = f"[message](#{cell.name})" if result.status == "message" else result.status
        lines.append(f"| {cell.title} | {status} | {result.told} |")
    for cell in CELLS:
        if results[cell.name].status == "message":
            text = (APPROVED / f"{cell.name}.txt").read_text(encoding="utf-8").rstrip()
            lines += ["", f"## {cell.name}", "", "```text", text, "```"]
    return "\n".join(lines) + "\n"


def first(pattern: str, command: list[str]) -> str:
    told = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(pattern, told)
    return found.group() if found else "none"


def main() -> int:
    names = [cell.name for cell in CELLS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "cells", nargs="*", metavar="CELL", help=f"some of: {', '.join(names)} (default: all)"
    )
    parser.add_argument("--approve", action="store_true", help="keep the messages seen as the approved ones")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to work; it stays, and with it the results: the table is made when every cell has one\n"
        "(default: a temporary folder)",
    )
    chosen = parser.parse_args()
    if unknown := set(chosen.cells) - set(names):
        parser.error(f"no cell is named {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="install-matrix-"))
    folder.mkdir(parents=True, exist_ok=True)
    matrix = Matrix(folder.resolve())
    known, now = known_results(matrix.folder), []
    try:
        for cell in CELLS:
            if chosen.cells and cell.name not in chosen.cells:
                continue
            last = known[cell.name] = attempt(cell, matrix, chosen.approve)
            now.append(last)
            keep(matrix.folder, known)
            print(f"{last.seconds:5.0f} s  {last.status:18} {cell.name}: {last.told}", flush=True)
            if last.problem is not None:
                print(last.problem, flush=True)
    finally:
        if chosen.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    failed = [result.name for result in now if result.problem is not None]
    if set(names) <= set(known) and all(known[name].problem is None for name in names):
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(report(known), encoding="utf-8")
    print(f"{len(now) - len(failed)} passed, {len(failed)} failed {' '.join(failed)}".rstrip())
    return 1 if failed else 0
