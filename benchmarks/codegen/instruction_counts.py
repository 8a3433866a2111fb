"""Instructions per latent element of the CPU kernels, counted by valgrind: `make instructions` keeps them.

The clock of a shared machine moves by half from one minute to the next; this does not. valgrind knows AVX2,
not AVX-512, so it is the AVX2 kernels that run. The numbers are those of one compiler.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from vaekernels import _build

FILE = Path(__file__).parents[1] / "results" / "instructions.csv"
KERNELS = [
    f"{op} {dtype} {direction}"
    for op in ("sample_kl", "reparameterize", "gaussian_kl", "sample_kl prior", "sample_kl channels")
    for dtype in ("float32", "bfloat16", "float16")
    for direction in ("forward", "backward")
    if dtype == "float32" or op == "sample_kl"
]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or ""]


def compiler_version() -> str:
    said = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    name, version = said.split()[0], re.search(r"\d+\.\d+(\.\d+)?", said.splitlines()[0].rpartition(")")[2])
    return f"{name} {version.group() if version else 'unknown'}"


def count(kernels: list[str], folder: Path) -> dict[str, float]:
    """Instructions per element of each kernel."""
    csrc = _build.source_dir()
    assert csrc is not None
    program = folder / "instruction_counts"
    sources = [
        Path(__file__).with_suffix(".cpp"),
        csrc / "cpu" / "forward.cpp",
        csrc / "cpu" / "backward.cpp",
    ]
    subprocess.run(
        [*compiler(), *_build.CXX_FLAGS, f"-I{csrc}", *map(str, sources), "-o", str(program)], check=True
    )

    def instructions(kernel: str, times: int) -> tuple[int, int]:
        counted = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
        done = subprocess.run(
            [*counted, str(program), kernel, str(times)], capture_output=True, text=True, check=True
        )
        found = re.search(r"I\s+refs:\s+([\d,]+)", done.stderr)
        assert found, done.stderr
        return int(found.group(1).replace(",", "")), int(done.stdout)

    per_element = {}
    for kernel in kernels:
        once, elements = instructions(kernel, 1)
        thrice, _ = instructions(kernel, 3)
        per_element[kernel] = (thrice - once) / (2 * elements)
    return per_element


def read() -> dict[str, dict[str, float]]:
    """compiler -> kernel -> instructions per element, as committed."""
    known: dict[str, dict[str, float]] = {}
    with FILE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            known.setdefault(row["compiler"], {})[row["kernel"]] = float(row["instructions_per_element"])
    return known


def write(known: dict[str, dict[str, float]]) -> None:
    with FILE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["compiler", "kernel", "instructions_per_element"])
        for version, kernels in sorted(known.items()):
            writer.writerows([version, kernel, f"{value:.2f}"] for kernel, value in kernels.items())


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        found = count(KERNELS, Path(scratch))
    table = read() if FILE.exists() else {}
    before = table.get(compiler_version(), {})
    for kernel, value in found.items():
        change = f"  was {before[kernel]:.2f}" if kernel in before else ""
        print(f"{kernel:36} {value:7.2f}{change}")
    write(table | {compiler_version(): found})
    print(f"written to {FILE}", file=sys.stderr)
