"""A guard for the CPU kernels' speed that does not look at the clock: instructions per element."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import instruction_counts as counts
import pytest
from conftest import require_kernels

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
