"""compute-sanitizer on every kernel: test_reduced.py runs under each of its tools."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gpu_build
import pytest

from vaekernels.bench.processes import finish

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
REDUCED = Path(__file__).with_name("test_reduced.py")
SECONDS = 110.0
PASSED, FAILED, NOT_POSSIBLE = "passed", "failed", "not possible here"

# What it says of /bin/true as well where it does not work.
NOT_STARTED = "Target application terminated before first instrumented API call"


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or where toolkits keep it."""
    nvcc = gpu_build.build_rules().find_nvcc()
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", str(Path(nvcc).parents[1]) if nvcc else None]
    places = [f"{home}/{folder}/compute-sanitizer" for home in homes if home
              for folder in ("bin", "compute-sanitizer")]  # fmt: skip
    return next(filter(None, map(shutil.which, ("compute-sanitizer", *places))), None)


def verdict(returncode: int | None, output: str) -> tuple[str, str]:
    """By the tool's summary and by pytest's exit status, which it hands on. None: ended after its limit."""
    if returncode is None:
        return FAILED, f"ended after its limit of {SECONDS:.0f} s"
    refusal = re.search(r"^=+ .*(not supported|Unable to|Failed to initialize).*$", output, re.MULTILINE)
    summary = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    if summary is None:
        if NOT_STARTED in output and " passed" not in output and " failed" not in output:
            return NOT_POSSIBLE, "compute-sanitizer starts no program here"
        if refusal is not None:
            return NOT_POSSIBLE, refusal.group(0).strip("= ")
        return FAILED, "the tool printed no summary"
    if found := int(summary.group(1) or summary.group(2)):
        first = re.search(
            r"^=+ (?:Invalid|Error|Warning|Uninit|Barrier|Race|Divergent|Program).*$", output, re.MULTILINE
        )
        return FAILED, f"{found} found" + (f": {first.group(0).strip('= ')}" if first else "")
    return (PASSED, "nothing found") if returncode == 0 else (FAILED, f"exit status {returncode}")


@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_is_found(tool, cuda, tmp_path):
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer was not found on PATH or under CUDA_HOME")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "66", "--print-limit", "20"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # torch probes with calls that may fail
    command += [sys.executable, "-m", "pytest", str(REDUCED), "-q", "-p", "no:cacheprovider", "--color=no"]
    # Every tensor its own allocation, so that a step past its end is one; not where only the order of
    # accesses matters, which leaves a run that may capture graphs.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | alone
        )
        returncode = finish(process, time.time() + SECONDS)
    output = log.read_text(errors="replace")
    status, detail = verdict(returncode, output)
    if status == NOT_POSSIBLE:
        pytest.skip(detail)
    assert status == PASSED, f"{detail}\n{output[-4000:]}"


CLEAN = "========= COMPUTE-SANITIZER\n1 passed\n========= ERROR SUMMARY: 0 errors\n"
OUTSIDE = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
    "=========     at vk::cuda::forward_kernel+0x10\n========= ERROR SUMMARY: 12 errors\n"
)
NO_HAZARD = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
HAZARD = (
    "========= Error: Race reported between Write access at a+0x10\n"
    "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
)
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the manual\n"
DEAD = f"========= Error: process didn't terminate successfully\n========= Error: {NOT_STARTED}\n"


@pytest.mark.parametrize(
    "output, returncode, expected",
    [
        (CLEAN, 0, (PASSED, "nothing found")),
        (NO_HAZARD, 0, (PASSED, "nothing found")),
        (OUTSIDE, 66, (FAILED, "12 found: Invalid __global__ read of size 4 bytes")),
        (HAZARD, 66, (FAILED, "1 found: Error: Race reported between Write access at a+0x10")),
        (CLEAN, 1, (FAILED, "exit status 1")),  # a wrong result under a silent sanitizer
        (REFUSED, 1, (NOT_POSSIBLE, "Error: Device not supported. Please refer to the manual")),
        (DEAD, 255, (NOT_POSSIBLE, "compute-sanitizer starts no program here")),
        (f"1 failed\n{DEAD}", 255, (FAILED, "the tool printed no summary")),
        ("nothing of the kind\n", 0, (FAILED, "the tool printed no summary")),
        ("", None, (FAILED, "ended after its limit of 110 s")),
    ],
)
def test_the_verdict_is_the_summarys(output, returncode, expected):
    assert verdict(returncode, output) == expected
