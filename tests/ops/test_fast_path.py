"""Which calls the CUDA kernels' fast paths take: one that slips off them is still right, only slow."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vaekernels import _build

EXPECTED = """\
[1024,128] f32: plain column
[1024,4] f32: plain column
[1024,6] f32: general column
[1024,8] bf16: plain column
[1024,4] bf16: general column
[1024,128] f64: general column
packed [1024,2*4] f32: plain column
packed [1024,2*8] bf16: plain column
packed [1024,2*4] bf16: general column
packed [64,2*4,64,64] bf16: plain row
[64,4,7,7] f32: general row
channels_last [8,16,32,32] bf16: plain column
packed channels_last [8,2*8,32,32] bf16: plain column
one group [64,4096] f32: plain row
z alone, one long row: plain row
KL alone: plain column
misaligned mu: general column
mu and scale differently strided: general column
expanded over the batch: plain column
every other column: general column
weights: plain column
log_std: plain column
std: plain column
clamp by sample: general column
two samples: plain column
two samples, too large to be read twice: general column
[2^24-1,1024] bf16: plain column
[2^24,1024] bf16: general column
"""


def test_which_calls_are_plain(tmp_path: Path):
    try:
        compiler = _build.find_compiler(tmp_path)
    except _build.BuildProblem as problem:
        pytest.skip(f"{problem}. {problem.remedy}")
    program = tmp_path / "fast_path"
    source = Path(__file__).with_name("fast_path.cpp")
    command = [*compiler, "-std=c++20", "-O1", f"-I{_build.source_dir()}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    assert result.stdout == EXPECTED
