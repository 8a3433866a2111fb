"""The built CPU library, disassembled: loops with packed FMA that call no scalar mathematics."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest
from conftest import require_kernels

from vaekernels import _native

# what GCC writes where it could not inline or vectorise; the double kernels call libm by design
SCALAR_CALLS = re.compile(
    r"\bcallq?\b.*<_*(exp2?|expm1|log|log1p|log2|sin|cos|sincos|sqrt|fma|pow|tanh)f(_finite)?(@.*)?>"
)
CLONES = {"arch_x86_64_v3": "ymm", "arch_x86_64_v4": "zmm"}
FMA = r"vfn?m(add|sub)(132|213|231)"


@pytest.fixture(scope="module")
def functions() -> dict[str, list[str]]:
    """The instructions of every function of the library that has a clone for an instruction set."""
    require_kernels("cpu")
    if platform.machine() != "x86_64":
        pytest.skip(f"clones for instruction sets exist on x86-64 only, this is {platform.machine()}")
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump (binutils) is not installed")
    command = [objdump, "-d", "--no-show-raw-insn", "-M", "intel", _native.C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    body: list[str] | None = None
    for line in listing.splitlines():
        if line.endswith(">:"):
            name = line.split("<", 1)[1][:-2]
            body = found.setdefault(name, []) if any(clone in name for clone in CLONES) else None
        elif body is not None and line.strip():
            body.append(line)
    return {name: lines for name, lines in found.items() if "resolver" not in name}


@pytest.mark.parametrize("clone", CLONES)
def test_clones_exist_and_use_packed_fma(clone, kernels, functions):
    bodies = {name: lines for name, lines in functions.items() if clone in name}
    assert bodies, f"no function of the library is cloned for {clone}"
    register = CLONES[clone]
    for width, suffix in (("float", "ps"), ("double", "pd")):
        # how many functions do the arithmetic of this type at all, and how many do it packed
        packed = [
            name
            for name, lines in bodies.items()
            if re.search(rf"{FMA}{suffix}\s+{register}", "\n".join(lines))
        ]
        assert packed, f"no packed {width} FMA on {register} registers in the {clone} clones"


@pytest.mark.parametrize("clone", CLONES)
def test_the_arithmetic_is_packed_and_not_scalar(clone, kernels, functions):
    """In every cloned float function that computes much: packed FMA and no scalar one."""
    computing = 0
    for name, lines in functions.items():
        text = "\n".join(lines)
        packed = len(re.findall(rf"{FMA}ps\s+{CLONES[clone]}", text))
        scalar = len(re.findall(rf"{FMA}ss\s", text))
        if clone in name and packed + scalar >= 12:  # below that: the remainders of small helpers
            computing += 1
            assert packed > 0 and scalar == 0, f"{name}: {packed} packed and {scalar} scalar FMA"
    assert computing >= 8, f"only {computing} functions of the {clone} clones compute"


@pytest.mark.parametrize("clone", CLONES)
def test_no_scalar_mathematics_is_called(clone, kernels, functions):
    calls = [
        (name, line.split("\t")[-1].strip())
        for name, lines in functions.items()
        if clone in name
        for line in lines
        if SCALAR_CALLS.search(line)
    ]
    assert not calls, calls[:5]


def test_the_pattern_finds_such_calls():
    for line in (
        "call 1040 <expf@plt>",
        "callq 1040 <__expf_finite@plt>",
        "call 10 <fmaf@plt>",
        "call 10 <sincosf>",
    ):
        assert SCALAR_CALLS.search(line)
    assert not SCALAR_CALLS.search("call 1040 <memcpy@plt>")


def test_the_library_says_which_clone_runs_here(kernels):
    info = _native.C.build_info()
    assert info["cpu_isa"] in ("avx512", "avx2", "baseline")
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(next(line for line in file if line.startswith("flags")).split())
    except (OSError, StopIteration):
        pytest.skip("/proc/cpuinfo does not tell the CPU's flags")
    v3 = {"avx2", "fma", "bmi2", "f16c", "movbe"} <= flags
    v4 = v3 and {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags
    assert info["cpu_isa"] == ("avx512" if v4 else "avx2" if v3 else "baseline")
