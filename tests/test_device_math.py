"""The GPU's float32 formulas, without a GPU: within their promises with the largest errors PTX admits."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest

from vaekernels import _build

# What the package promises of float32: normals within 1e-5 of the exact Box-Muller pair, the KL near collapse
# within 1e-5 of itself. The gradient of the KL keeps to the same, the standard deviation to 2^-20.
PROMISES = {"normal": 1e-5, "sd": 2**-20, "excess": 1e-5, "growth": 1e-5}


def sanitizes(compiler: list[str], folder: Path) -> bool:
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n", encoding="utf-8")
    command = [*compiler, "-fsanitize=undefined", str(empty), "-o", str(folder / "empty")]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory):
    """report(factor) -> the largest errors when those of the special functions are multiplied by `factor`."""
    folder = tmp_path_factory.mktemp("device_math")
    try:
        compiler = _build.find_compiler(folder)
    except _build.BuildProblem as problem:
        pytest.skip(f"{problem}. {problem.remedy}")
    program = folder / "device_math"
    source = Path(__file__).with_name("device_math.cpp")
    flags = ["-std=c++20", "-O2", "-ffp-contract=fast", f"-I{_build.source_dir()}"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover=all"] if sanitizes(compiler, folder) else []
    subprocess.run([*compiler, *flags, str(source), "-o", str(program)], check=True)

    def call(factor: float) -> dict[str, tuple[float, ...]]:
        result = subprocess.run([str(program), str(factor)], capture_output=True, text=True, check=True)
        found = {}
        for line in result.stdout.splitlines():
            name, *numbers = line.rsplit(" ", 3) if line.startswith("at") else line.split()
            found[name] = tuple(map(float, numbers))
        return found

    return call


def test_errors_keep_to_the_promises(report):
    found = report(1)
    for name, promise in PROMISES.items():
        assert found[name][0] <= promise, f"{name} is off by {found[name][0]}, promised {promise}"


def test_the_errors_of_the_special_functions_are_what_is_measured(report):
    found = report(4)
    assert all(found[name][0] > promise for name, promise in PROMISES.items()), found


def test_words_do_not_depend_on_what_is_computed_beforehand(report):
    assert report(1)["wrong_quads"] == (0,)


def test_exponentials_at_the_ends(report):
    found = report(1)
    e100 = math.exp(100)
    for y, (sd, excess, growth) in {
        "inf": (math.inf, math.inf, math.inf),
        "-inf": (0, math.inf, -1),
        "nan": (math.nan, math.nan, math.nan),
        "0": (1, 0, 0),
        "200": (e100, math.inf, math.inf),  # e^200 is beyond float32, e^100 as well
        "-200": (0, 199, -1),  # e^-100 is subnormal, which the unit takes for 0
    }.items():
        got = found[f"at {y}"]
        expected = (math.inf if sd == e100 else sd, excess, growth)
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True), y
