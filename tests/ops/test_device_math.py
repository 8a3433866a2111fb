"""The float32 formulas within their promises: the CPU's, and the GPU's with the largest errors PTX admits."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import oracle
import pytest
import torch

from vaekernels import _build

PROMISES = {device: oracle.ACCURACY[device, torch.float32] for device in ("cpu", "cuda")}
MEASURED = ("normal", "exp", "excess", "growth")


def sanitizes(compiler: list[str], folder: Path) -> bool:
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n", encoding="utf-8")
    command = [*compiler, "-fsanitize=undefined", str(empty), "-o", str(folder / "empty")]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory):
    """report(device, factor) -> the device's largest errors; those of the GPU's special functions are
    multiplied by `factor`."""
    folder = tmp_path_factory.mktemp("device_math")
    try:
        compiler = _build.find_compiler(folder)
    except _build.BuildProblem as problem:
        pytest.skip(f"{problem}. {problem.remedy}")
    source = Path(__file__).with_name("device_math.cpp")
    flags = ["-std=c++20", "-O2", "-ffp-contract=fast", f"-I{_build.source_dir()}"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover=all"] if sanitizes(compiler, folder) else []
    halves = {"cpu": ["-DHOST_HALF"], "cuda": []}
    for device, define in halves.items():
        command = [*compiler, *flags, *define, str(source), "-o", str(folder / device)]
        subprocess.run(command, check=True)

    def call(device: str = "cuda", factor: float = 1) -> dict[str, tuple[float, ...]]:
        result = subprocess.run(
            [str(folder / device), str(factor)], capture_output=True, text=True, check=True
        )
        found = {}
        for line in result.stdout.splitlines():
            name, *numbers = line.rsplit(" ", 3) if line.startswith("at") else line.split()
            found[name] = tuple(map(float, numbers))
        return found

    return call


@pytest.mark.parametrize("half", ["cpu", "cuda"])
def test_errors_keep_to_the_promises(half, report):
    found, promised = report(half), PROMISES[half]._asdict()
    for name in MEASURED:
        assert found[name][0] <= promised[name], (
            f"{name} is off by {found[name][0]}, promised {promised[name]}"
        )


def test_the_errors_of_the_special_functions_are_what_is_measured(report):
    found, promised = report("cuda", 4), PROMISES["cuda"]._asdict()
    assert all(found[name][0] > promised[name] for name in MEASURED), found


def test_words_do_not_depend_on_what_is_computed_beforehand(report):
    assert report()["wrong_quads"] == (0,)


def test_exponentials_at_the_ends(report):
    found = report()
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
