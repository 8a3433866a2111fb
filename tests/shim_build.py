"""Compiles the host shim (tests/shim) with the CUDA kernels, plain and with sanitizers, and loads it.
With sanitizers the CPU kernels, too, under the program of tests/problems.cpp.

Everything goes to build/shim/ and is compiled again only where a source or a command changed. Nothing here
needs CUDA, its headers or a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from vaekernels import _build

SHIM = Path(__file__).parent / "shim"
FOLDER = Path(__file__).parent.parent / "build" / "shim"


class Build(NamedTuple):
    """Flags of the kernels, and what tells the shim which sanitizer it has to speak to."""

    device: tuple[str, ...]
    shim: tuple[str, ...] = ()


def _fused() -> tuple[str, ...]:
    """Multiplications and additions are fused as on the GPU, where this CPU can."""
    flags = ("-fexpensive-optimizations", "-ffp-contract=fast")
    with contextlib.suppress(OSError):
        if " fma " in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            return (*flags, "-mfma")
    return flags


# With sanitizers optimization costs more time in the compiler (27 s instead of 7 for forward.cu with ASan and
# UBSan) than it saves afterwards.
BUILDS = {
    "plain": Build(("-O1", *_fused())),
    "asan": Build(
        ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DSHIM_ASAN"), ("-DSHIM_ASAN",)
    ),
    "tsan": Build(("-O0", "-fsanitize=thread"), ("-DSHIM_TSAN",)),
}
# The CPU kernels, and the program that poses them random problems.
PROBLEMS = ["problems.cpp", "cpu/forward.cpp", "cpu/backward.cpp"]
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


class Missing(Exception):
    """What this machine lacks to build or to run the shim."""


@functools.cache
def compiler() -> tuple[str, ...]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        return tuple(_build.find_compiler(FOLDER))
    except _build.BuildProblem as problem:
        raise Missing(f"{problem.problem}. {problem.remedy}") from problem


def _csrc() -> Path:
    folder = _build.source_dir()
    assert folder is not None
    return folder


def kernels() -> list[str]:
    return sorted(file.name for file in (_csrc() / "cuda").glob("*.cu"))


def _common() -> list[str]:
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
    # include/ comes first: torch and the toolkit have headers of the same names.
    paths = [f"-I{SHIM / 'include'}", f"-I{SHIM}", f"-I{_csrc()}"]
    return [*compiler(), "-std=c++20", "-g", "-pthread", "-fPIC", "-fvisibility=hidden", *warnings, *paths]


def _jobs(build: str, sources: list[str]) -> list[tuple[Path, list[str]]]:
    """Sources and commands. Kernels and planted faults are instrumented; shim, driver and oracle are not."""
    device, shim = BUILDS[build]
    jobs = []
    for name in sources:
        if name.endswith(".cu"):
            jobs.append((_csrc() / "cuda" / name, [*_common(), *device, "-x", "c++"]))
        elif name == "faults.cpp":
            jobs.append((SHIM / name, [*_common(), *device]))
        elif name in PROBLEMS:
            # What is chosen at run time is chosen before a sanitizer is ready for it.
            folder = _csrc() if name.startswith("cpu/") else SHIM.parent
            jobs.append((folder / name, [*_common(), *device, "-DVK_X86_DISPATCH=0"]))
        elif name == "torch_backend.cpp":
            flags = ["-O0", "-Wno-unused-parameter", *_build._torch_flags(_build.torch_in_use())]
            jobs.append((SHIM / name, [*_common(), *flags]))
        elif name == "driver.cpp":  # does not know TSan, so the plain one is shared
            jobs.append((SHIM / name, [*_common(), "-O1", *(shim if build == "asan" else ())]))
        else:
            jobs.append((SHIM / name, [*_common(), "-O1", *shim]))
    return jobs


def _say(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def _with_log() -> Iterator[None]:
    """Shows what a compiler said, which BuildProblem keeps to itself."""
    try:
        yield
    except _build.BuildProblem as problem:
        raise RuntimeError(f"{problem.problem}\n{problem.log}") from problem


def _objects(build: str, sources: list[str]) -> list[Path]:
    with _with_log():
        return _build.compile_sources(_jobs(build, sources), FOLDER, _say)


def headers() -> dict[str, list[Path]]:
    """The headers that each source reads, those of the system included."""
    found = {}
    for source, command in _jobs("plain", [*kernels(), "shim.cpp", "driver.cpp", "torch_backend.cpp"]):
        rule = subprocess.run(
            [*command, "-M", str(source)], capture_output=True, text=True, check=True
        ).stdout
        found[source.name] = [Path(name) for name in shlex.split(rule.partition(":")[2].replace("\\\n", " "))]
    return found


def _link(name: str, objects: list[Path], flags: list[str]) -> Path:
    command = [*compiler(), "-pthread", *map(str, objects), *flags]
    made = FOLDER / f"{name}-{hashlib.sha256(shlex.join(command).encode()).hexdigest()[:12]}"
    if not made.exists() or any(made.stat().st_mtime_ns < o.stat().st_mtime_ns for o in objects):
        with _with_log():
            _build._run([*command, "-o", str(made)], _say, name)
    return made


def _sanitizers(build: str) -> list[str]:
    return [flag for flag in BUILDS[build].device if flag.startswith("-fsanitize")]


@functools.cache
def runner(build: str) -> tuple[str, ...]:
    """What programs of this build are started with, found with an empty one."""
    if not (flags := _sanitizers(build)):
        compiler()
        return ()
    source = FOLDER / "empty.cpp"
    source.write_text("int main() {}\n", encoding="utf-8")
    program = FOLDER / f"empty-{build}"
    made = subprocess.run(
        [*compiler(), *flags, str(source), "-o", str(program)], capture_output=True, text=True
    )
    if made.returncode != 0:
        raise Missing(f"{compiler()[0]} cannot link with {flags[0]}: {made.stderr.strip()[-300:]}")
    # The shadow memory needs its addresses, which a kernel that spreads them widely may have given away.
    setarch = shutil.which("setarch")
    for start in ([setarch, "-R"] if setarch else [], []):
        tried = subprocess.run([*start, str(program)], capture_output=True, text=True)
        if tried.returncode == 0:
            return tuple(start)
    raise Missing(f"programs with {flags[0]} do not run here: {tried.stderr.strip()[-300:]}")


def program(build: str, name: str) -> Path:
    """`driver`, which has the CUDA kernels, `faults`, or `problems`, which has those of the CPU."""
    runner(build)
    # The shim comes first: of functions that several objects hold the linker takes the first copy, and
    # the shim's must not be instrumented.
    sources = {
        "driver": ["shim.cpp", "driver.cpp", *kernels()],
        "faults": ["shim.cpp", "faults.cpp"],
        "problems": PROBLEMS,
    }[name]
    return _link(f"{name}-{build}", _objects(build, sources), _sanitizers(build))


def run(build: str, name: str, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    command = [*runner(build), str(program(build, name)), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"} | ENVIRONMENT
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
        env=environment,
    )


class Library:
    """The operators over the shim. While `used`, they serve tensors on the CPU."""

    def __init__(self, file: Path) -> None:
        self._library = ctypes.CDLL(str(file))
        self._library.shim_launches.restype = ctypes.c_int64
        self._library.shim_dirty_counters.restype = ctypes.c_int64

    @contextlib.contextmanager
    def used(self, seed: int = 0) -> Iterator[Library]:
        self._library.shim_seed(ctypes.c_uint64(seed))
        self._library.shim_use(True)
        try:
            yield self
            assert self.dirty_counters() == 0, "a kernel left a counter that is not zero"
        finally:
            self._library.shim_use(False)

    def set_seed(self, seed: int) -> None:
        """The schedule of the next launches."""
        self._library.shim_seed(ctypes.c_uint64(seed))

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """As if the calls were captured into a graph."""
        self._library.shim_capture(True)
        try:
            yield
        finally:
            self._library.shim_capture(False)

    def dirty_counters(self) -> int:
        return int(self._library.shim_dirty_counters())

    def launches(self) -> int:
        return int(self._library.shim_launches())


@functools.cache
def library() -> Library:
    objects = _objects("plain", ["torch_backend.cpp", *kernels(), "shim.cpp"])
    folder = Path(torch.__file__).parent / "lib"
    return Library(
        _link("torch_backend", objects, ["-shared", f"-L{folder}", "-lc10", "-ltorch_cpu", "-ltorch"])
    )


def require(build: str = "plain") -> None:
    """Skips with the reason where this machine cannot build the shim or run the sanitizer."""
    if not sys.platform.startswith("linux"):
        pytest.skip(f"the shim is made for Linux, this is {sys.platform}")
    try:
        runner(build)
    except Missing as missing:
        if build == "plain" and os.environ.get("VAEKERNELS_REQUIRE_NATIVE") == "1":
            pytest.fail(f"the shim cannot be built: {missing}")
        pytest.skip(str(missing))
