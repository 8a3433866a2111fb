"""The cells of the matrix: how people install, and what goes wrong.

A cell does what a user does and returns what the user then has: an environment where everything works, or the
words that say what is missing and what fixes it.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from environments import OTHER_TORCH, TORCH, UV, Environment, Failed, Matrix, NotPossible

from vaekernels import _build

NO_CUDA = {"VAEKERNELS_CUDA": "0"}
OLDER_TORCHES = ("2.6.0", "2.8.0", "2.10.0")
# Files of tests/ops. What a version lacks is skipped there, with the reason.
OPS_TESTS = ("values", "gradients", "compile", "export", "tracing")


@dataclass(frozen=True)
class Outcome:
    """``message``: what the user sees, to be compared with the approved text; None where all works."""

    facts: str
    message: str | None = None


@dataclass(frozen=True)
class Cell:
    name: str
    title: str
    try_it: Callable[[Matrix], Outcome]


CELLS: list[Cell] = []


def cell(name: str, title: str) -> Callable[[Callable[[Matrix], Outcome]], Callable[[Matrix], Outcome]]:
    def added(try_it: Callable[[Matrix], Outcome]) -> Callable[[Matrix], Outcome]:
        CELLS.append(Cell(name, title, try_it))
        return try_it

    return added


def works(environment: Environment, *, cuda: bool = False) -> Outcome:
    """The kernels are loaded and give the right loss; nothing is said that the user did not ask for."""
    facts = environment.facts()
    if not facts.kernels or facts.warning or (cuda and not facts.cuda):
        raise Failed(f"no kernels\n{facts.warning}\n{facts.doctor}")
    versions = facts.versions
    told = f"Python {versions['python']}, torch {versions['torch']}"
    return Outcome(told + (f", {versions['architectures']}" if cuda else ""))


def message(environment: Environment, *, cpu: bool = False, install: str = "") -> Outcome:
    """What is said where kernels are missing: by the first op, if those of the CPU are, and by the doctor."""
    facts = environment.facts()
    if facts.kernels != cpu or facts.status != 1:
        raise Failed(f"kernels {facts.kernels}, doctor's exit status {facts.status}\n{facts.doctor}")
    kept = [
        line for line in facts.doctor.splitlines() if re.match(r"(CPU kernels|CUDA kernels|library):", line)
    ]
    log = facts.doctor.partition("\n\n")[2]
    parts = [
        install,
        f"FallbackWarning: {facts.warning}" if facts.warning else "",
        "$ vaekernels doctor\n" + "\n".join(kept),
        log,
    ]
    text = "\n\n".join(part.strip() for part in parts if part.strip())
    versions = facts.versions
    return Outcome(
        f"Python {versions['python']}, torch {versions['torch']}", plain(environment, text, versions)
    )


def plain(environment: Environment, text: str, versions: dict[str, str]) -> str:
    """``text`` without what differs from machine to machine and from one version to the next."""
    matrix = environment.matrix
    for path, name in (
        (environment.home, "<environment>"),
        (matrix.folder / "source", "<source>"),
        (matrix.folder, "<folder>"),
        (versions.get("torch"), "<torch>"),
        (_build.VERSION, "<version>"),
    ):
        if path:
            text = text.replace(str(path), name)
    text = re.sub(r"lib/python3\.\d+/", "lib/python/", text)
    text = re.sub(re.escape(TORCH) + r"(\+\w+)?", "<torch of the build>", text)
    cuda = versions.get("CUDA", "none")
    text = text.replace(f"CUDA {cuda}", "CUDA <cuda>").replace(f"CUDA {cuda.split('.')[0]} ", "CUDA <major> ")
    text = re.sub(r"(?<=yes, for )\w+$", "<instruction set>", text, flags=re.MULTILINE)
    return text.replace(_build.python_tag(), "<python>").rstrip() + "\n"


# ---- Pythons and installers; uv does not see a lent torch and would bring another, without --no-deps


def python_cell(version: str) -> None:
    @cell(f"python-{version}", f"Python {version}, `pip install .` with build isolation")
    def _(matrix: Matrix) -> Outcome:
        made = matrix.environment(f"python-{version}", version)
        made.pip(matrix.source(), VAEKERNELS_BUILD="1", **NO_CUDA)
        return works(made)


for each in ("3.10", "3.11", "3.12", "3.13"):
    python_cell(each)


@cell("pip-no-isolation", "`pip install --no-build-isolation .`; no ninja anywhere")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("pip-no-isolation")
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('ninja') is not None)"
    made.run([made.python, "-c", code])
    # A program of that name fails the build, if it is called.
    trap = script(made.home / "trap" / "ninja", "exit 77")
    path = f"{trap.parent}{os.pathsep}{os.environ['PATH']}"
    made.pip("--no-build-isolation", matrix.source(), PATH=path, VAEKERNELS_BUILD="1", **NO_CUDA)
    return works(made)


@cell("pip-editable", "`pip install --no-build-isolation -e .`")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("pip-editable")
    try:
        made.pip("--no-build-isolation", "-e", matrix.source(), VAEKERNELS_BUILD="1", **NO_CUDA)
        return works(made)
    finally:
        _build.clear(matrix.source() / "vaekernels")


@cell("uv-no-isolation", "`uv pip install --no-build-isolation .`")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("uv-no-isolation")
    made.uv("--no-deps", "--no-build-isolation", matrix.source(), VAEKERNELS_BUILD="1", **NO_CUDA)
    return works(made)


@cell("uv", "`uv pip install .`: its isolation hides the environment's torch")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("uv")
    made.uv("--no-deps", matrix.source(), **NO_CUDA)
    return message(made)


@cell("uv-then-build", "the same, then `vaekernels build`")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("uv-then-build")
    made.uv("--no-deps", matrix.source(), **NO_CUDA)
    made.command("build", status=None, **NO_CUDA)
    return works(made)


@cell("old-setuptools", "`pip install --no-build-isolation .` with setuptools 65.5, which Python 3.11 brings")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("old-setuptools", torch=None)
    made.uv("setuptools==65.5.0", "wheel")
    told = made.pip("--no-deps", "--no-build-isolation", matrix.source(), status=1)
    ours = "\n".join(line.strip() for line in told.splitlines() if "vaekernels: " in line)
    return Outcome("Python 3.11", plain(made, f"$ pip install --no-build-isolation .\n{ours}", {}))


@cell("wheel-elsewhere", "sdist, a wheel of it, installed elsewhere")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("wheel-elsewhere")
    made.pip("--no-index", "--no-deps", wheel(matrix))
    return works(made)


def wheel(matrix: Matrix) -> Path:
    """A wheel of the sdist, for Python 3.11 and the torch of the base."""
    folder = matrix.folder / "dist"
    if not list(folder.glob("*.whl")):
        matrix.run([UV, "build", "-q", "--sdist", "-o", folder, matrix.source()])
        (sdist,) = folder.glob("*.tar.gz")
        made = matrix.environment("wheel")
        made.run(
            [made.python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, sdist],
            VAEKERNELS_BUILD="1",
            **NO_CUDA,
        )
    (found,) = folder.glob("*.whl")
    return found


# ---- torch


@cell("other-torch", f"a wheel built for torch {TORCH}, under torch {OTHER_TORCH}")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("other-torch", torch=OTHER_TORCH)
    made.pip("--no-index", "--no-deps", wheel(matrix))
    return message(made)


@cell("torch-later", "installed before torch")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("torch-later", torch=None)
    made.pip("--no-deps", matrix.source())
    made.lend(matrix.base("3.11"))
    return message(made)


@cell("no-torch", "`vaekernels doctor` without torch")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("no-torch", torch=None)
    made.pip("--no-deps", matrix.source(), VAEKERNELS_BUILD="0")
    return Outcome("Python 3.11", plain(made, "$ vaekernels doctor\n" + made.command("doctor", status=1), {}))


def headers_cell(version: str) -> None:
    @cell(f"headers-{version}", f"csrc passes `-fsyntax-only` with the headers of torch {version}")
    def _(matrix: Matrix) -> Outcome:
        """The headers of the wheel for macOS, the smallest; they are those of all platforms."""
        folder = matrix.folder / f"headers-{version}"
        platform = ["--python-platform", "aarch64-apple-darwin", "--python-version", "3.11"]
        matrix.run(
            [UV, "pip", "install", "-q", "--no-deps", "--target", folder, *platform, f"torch=={version}"],
            MACOSX_DEPLOYMENT_TARGET="14.0",
        )
        torch = _build.Torch(version, None, None, str(folder / "torch"), "", True)
        scratch = matrix.folder / "headers"
        scratch.mkdir(exist_ok=True)
        jobs = [(f, [*c, "-fsyntax-only"]) for f, c in _build.cpu_jobs(torch, _build.find_compiler(scratch))]
        nvcc = _build.find_nvcc()
        if nvcc is not None:
            jobs += [(f, [*c, "-Xcompiler", "-fsyntax-only"]) for f, c in _build.cuda_host_jobs(torch, nvcc)]
        try:
            _build.compile_sources(jobs, scratch, lambda line: None)
        except _build.BuildProblem as problem:
            raise Failed(f"{problem}\n{problem.log}") from problem
        finally:
            shutil.rmtree(folder)
        return Outcome(f"{len(jobs)} files" + ("" if nvcc else ", not csrc/cuda: there is no nvcc"))


for each in (*OLDER_TORCHES, "2.11.0", OTHER_TORCH, "2.14.1", "2.15.0"):
    headers_cell(each)


def older_torch_cell(version: str) -> None:
    @cell(f"torch-{version}", f"torch {version}: the tests of {', '.join(OPS_TESTS)}")
    def _(matrix: Matrix) -> Outcome:
        made = matrix.environment(f"torch-{version}", torch=version)
        made.pip(matrix.source(), VAEKERNELS_BUILD="1", **NO_CUDA)
        outcome = works(made)
        made.pip("pytest", "hypothesis", "scipy")
        files = [matrix.source() / "tests" / "ops" / f"test_{name}.py" for name in OPS_TESTS]
        told = made.run(
            [made.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not cpu-shim", *files],
            VAEKERNELS_REQUIRE_NATIVE="1",
        )
        return Outcome(f"{outcome.facts}; {told.splitlines()[-1].strip('= ')}")


for each in OLDER_TORCHES:
    older_torch_cell(each)


# ---- compilers


@cell("no-compiler", "no C++ compiler")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("no-compiler")
    made.pip(matrix.source(), PATH=str(made.home / "bin"))
    return message(made)


@cell("compiler-fails", "a compiler that fails: `CXX=false pip install .`")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("compiler-fails")
    made.pip(matrix.source(), CXX="false")
    return message(made)


@cell("compiler-required", "the same with `VAEKERNELS_BUILD=1`")
def _(matrix: Matrix) -> Outcome:
    made = matrix.environment("compiler-required")
    told = made.pip(matrix.source(), status=1, CXX="false", VAEKERNELS_BUILD="1")
    ours = "\n".join(line.strip() for line in told.splitlines() if "vaekernels: " in line)
    return Outcome("Python 3.11", plain(made, f"$ pip install .\n{ours}", {"torch": TORCH}))


@cell("no-python-headers", "Python without its C headers")
def _(matrix: Matrix) -> Outcome:
    found = Path(sysconfig.get_path("include"), "Python.h")
    if found.is_file():
        raise NotPossible("the Pythons here have their headers; tests/build/test_packaging.py tries it")
    made = matrix.environment("no-python-headers")
    made.pip(matrix.source())
    return message(made)


# ---- CUDA


def needs_cuda(matrix: Matrix) -> str:
    """nvcc, where there is one and the torch of the base has CUDA."""
    nvcc = _build.find_nvcc()
    if nvcc is None:
        raise NotPossible("there is no nvcc on this machine")
    base = matrix.base("3.11")
    if not (base / "torch" / "lib" / "libtorch_cuda.so").is_file():
        raise NotPossible("the torch that the index gives this machine has no CUDA")
    return nvcc


@cell("cuda", "nvcc on PATH; `CUDA_HOME` and `TORCH_CUDA_ARCH_LIST` unset; no GPU needed")
def _(matrix: Matrix) -> Outcome:
    needs_cuda(matrix)
    made = matrix.environment("cuda")
    made.pip(matrix.source(), VAEKERNELS_BUILD="1")
    return works(made, cuda=True)


@cell("no-nvcc", "a CUDA torch and no nvcc")
def _(matrix: Matrix) -> Outcome:
    needs_cuda(matrix)
    made = matrix.environment("no-nvcc")
    made.pip(matrix.source(), CUDA_HOME=str(made.home / "cuda"))
    return message(made, cpu=True)


@cell("nvcc-of-another-major", "an nvcc of CUDA 12 and a torch of CUDA 13")
def _(matrix: Matrix) -> Outcome:
    needs_cuda(matrix)
    made = matrix.environment("nvcc-of-another-major")
    # The compiler itself, of which only the version is asked, is in no package of the index.
    nvcc = script(
        made.home / "cuda" / "bin" / "nvcc", 'echo "Cuda compilation tools, release 12.9, V12.9.86"'
    )
    made.pip(matrix.source(), CUDA_HOME=str(nvcc.parent.parent))
    return message(made, cpu=True)


@cell("arch-list-misspelt", "`TORCH_CUDA_ARCH_LIST=Hoper`")
def _(matrix: Matrix) -> Outcome:
    needs_cuda(matrix)
    made = matrix.environment("arch-list-misspelt")
    made.pip(matrix.source(), TORCH_CUDA_ARCH_LIST="Hoper")
    return message(made, cpu=True)


def script(file: Path, body: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file
