"""A guard for the CPU kernels' speed that does not look at the clock: instructions per element."""

from __future__ import annotations

import csv
import platform
import shutil
from pathlib import Path

import instruction_counts as counts
import predicted_cycles as cycles
import pytest
from conftest import require_kernels

from vaekernels import _native

KEPT = 0.05
GUARDED = ["sample_kl float32 forward", "sample_kl float32 backward", "sample_kl bfloat16 forward"]


def known_here() -> dict[str, float]:
    if platform.machine() != "x86_64":
        pytest.skip(f"the counts are of x86-64, this is {platform.machine()}")
    require_kernels("cpu")
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed, which counts the instructions")
    version, known = counts.compiler_version(), counts.read()
    if version not in known:
        pytest.skip(f"the counts are of {', '.join(known)}, this is {version}: add it by `make instructions`")
    return known[version]


@pytest.mark.parametrize(
    "kernels",
    [GUARDED, pytest.param([k for k in counts.KERNELS if k not in GUARDED], marks=pytest.mark.slow)],
    ids=["main", "others"],
)
def test_instructions_per_element(kernels: list[str], tmp_path: Path) -> None:
    known = known_here()
    found = counts.count(kernels, tmp_path)
    moved = {k: (known[k], round(found[k], 2)) for k in kernels if abs(found[k] / known[k] - 1) > KEPT}
    assert not moved, f"kernel: (committed, now) {moved}; if that is meant, keep it by `make instructions`"


def test_the_committed_counts_cover_every_kernel() -> None:
    for version, kernels in counts.read().items():
        assert list(kernels) == counts.KERNELS, version


@pytest.mark.parametrize("clone", ["avx2", "avx512"])
def test_instructions_of_the_loops(clone: str) -> None:
    """Read in the library, so that those of an instruction set which this CPU lacks are guarded as well."""
    if platform.machine() != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("the loops are those of x86-64, found by objdump (binutils)")
    require_kernels("cpu")
    version = counts.compiler_version()
    with open(cycles.FILE, newline="") as file:
        kept = [row for row in csv.DictReader(file) if row["clone"] == clone and row["compiler"] == version]
    if not kept:
        pytest.skip(f"no counts of {version} are kept: add them by `make predicted-cycles`")
    known = {row["part"]: float(row["instructions_per_element"]) for row in kept}
    found = {loop.part: loop.instructions for loop in cycles.loops(_native.C.__file__) if loop.clone == clone}
    assert found.keys() == known.keys()
    moved = {part: (known[part], n) for part, n in found.items() if abs(n / known[part] - 1) > KEPT}
    assert not moved, f"part: (committed, now) {moved}; if that is meant, keep it by `make predicted-cycles`"
