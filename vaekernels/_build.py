"""Compiles csrc/ into the two libraries of the package and records what they were built against.

Used by ``setup.py``, which loads this file alone (torch may be absent there), and by ``vaekernels build``.
So it imports the standard library only, and torch inside functions.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, TextIO, TypeAlias

VERSION = "0.1.0"
OLDEST_TORCH = (2, 6)
RECORD_NAME = "_build.json"
BUILD_COMMAND = "vaekernels build"
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")
"""Programs that start the compiler named behind them: CXX="ccache g++"."""
OLDEST_ARCH = 70
"""Compute capability 7.0, for `__grid_constant__` and for atomics with an order of memory."""
# As torch.utils.cpp_extension has them, in its order: a longer name before one that it contains.
ARCH_NAMES = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
CUDA_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
# torch's headers ask for C++20 from 2.14 on, and no build tool is relied on to pass it.
STANDARD = "-std=c++20"
CXX_FLAGS = [
    # Left out of -Wall: GCC's false alarm inside torch's SmallVector, and how other compilers pass wide
    # vectors, which here only inlined functions are given.
    *(STANDARD, "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized", "-Wno-psabi"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    # Calls into torch without a stub in between: a small forward and backward takes 3 % less.
    "-fno-plt",
]
# at::parallel_for is a template that runs serially where its caller was compiled without OpenMP. The runtime
# that gets linked is torch's own: both go by the name libgomp.so.1. Apple's clang has none.
OPENMP_FLAGS = [] if sys.platform == "darwin" else ["-fopenmp"]
NVCC_FLAGS = [
    *(STANDARD, "-O3", "--threads", "0"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wno-maybe-uninitialized"),
]
# For the kernels in development: local memory is memory beside the registers, a hundred times slower.
NO_LOCAL_MEMORY = "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error"


Job: TypeAlias = tuple[Path, list[str]]
"""A source and the command that compiles it, all but its name and the object's."""


class BuildProblem(Exception):
    """Why a library was not built, what the user can do about it, and the tool's own words where one ran."""

    def __init__(self, problem: str, remedy: str, log: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.remedy, self.log = problem, remedy, log


@dataclass(frozen=True)
class Library:
    """One library of the package: its file name, or why there is none. ``architectures``: of the GPUs that it
    has code for ("sm_80 sm_90"), and of the PTX ("compute_90") that later ones compile when they load it."""

    file: str | None = None
    problem: str | None = None
    remedy: str | None = None
    log: str | None = None
    architectures: str | None = None

    @classmethod
    def missing(cls, problem: BuildProblem) -> Library:
        return cls(None, problem.problem, problem.remedy, problem.log)

    @property
    def failed(self) -> bool:
        """True where a compiler ran and failed, False where there was nothing to build with or for."""
        return self.log is not None


def _is_unicode(text: str) -> bool:
    """False where it has halves of surrogate pairs, which cannot be printed."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@dataclass(frozen=True)
class Record:
    """What lies next to the libraries as JSON and is read before they are loaded."""

    package: str
    python: str
    torch: str | None
    torch_cuda: str | None
    cpu: Library
    cuda: Library

    def write(self, folder: Path) -> None:
        # The names of folders in a compiler's words need not be Unicode, and `read` takes nothing else.
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False).encode("utf-8", "replace")
        (folder / RECORD_NAME).write_bytes(text + b"\n")

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """The record in `folder`; None where there is none or it is not one of ours."""
        try:
            fields: dict[str, Any] = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
            libraries = [Library(**fields.pop(name)) for name in ("cpu", "cuda")]
            record = cls(**fields, cpu=libraries[0], cuda=libraries[1])
            told = [*vars(libraries[0]).values(), *vars(libraries[1]).values(), *fields.values()]
            whole = all(isinstance(one, str) and _is_unicode(one) for one in told if one is not None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return record if whole and record.package is not None and record.python is not None else None


@dataclass(frozen=True)
class Torch:
    """What compiling against a torch takes to know about it."""

    version: str
    cuda: str | None
    hip: str | None
    root: str
    cuda_archs: str
    cxx11_abi: bool


def torch_in_use() -> Torch:
    """Describes the torch that this process imports. Makes no CUDA call."""
    import torch

    flags = getattr(torch._C, "_cuda_getArchFlags", None)
    return Torch(
        version=str(torch.__version__),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        root=os.path.dirname(os.path.abspath(torch.__file__)),
        cuda_archs=(flags() or "") if flags is not None else "",
        cxx11_abi=bool(torch.compiled_with_cxx11_abi()),
    )


def find_torch() -> Torch:
    """Describes the torch of the interpreter that builds, also from inside pip's build isolation."""
    return Torch(**_ask_torch("torch"))


def _ask_torch(what: str) -> Any:
    """What `main` prints for this word under the torch of the interpreter that builds.

    pip isolates a build with PYTHONPATH alone, so the same interpreter without it sees the user's packages.
    """
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    words = ""
    for env in (dict(os.environ), plain):
        result = subprocess.run(
            [sys.executable, os.path.abspath(__file__), what],
            env=env,
            cwd=os.path.abspath(os.sep),  # not where a folder may be named torch
            capture_output=True,
            text=True,
        )
        if result.returncode == 0:
            return json.loads(result.stdout.strip().splitlines()[-1])
        words = result.stderr.strip()
    if "No module named 'torch'" in words:
        raise BuildProblem(
            "torch was not installed where the package was built",
            f"Once torch is installed, run `{BUILD_COMMAND}`, "
            "or install again with `--no-build-isolation` (pip and uv have it)",
        )
    last = words.splitlines()[-1] if words else f"exit status {result.returncode}"
    raise BuildProblem(
        f"torch cannot be imported: {last}", f"Reinstall torch, then run `{BUILD_COMMAND}`", words
    )


def source_dir() -> Path | None:
    """csrc/: inside the installed package, or beside the package in a source tree."""
    here = Path(__file__).resolve().parent
    return next((p for p in (here / "csrc", here.parent / "csrc") if p.is_dir()), None)


def python_tag() -> str:
    """Python's version, machine and ABI, such as cpython-311-x86_64-linux-gnu."""
    return EXTENSION_SUFFIXES[0].split(".")[1]


def user_cache() -> Path | None:
    """The folder of the user's caches: XDG_CACHE_HOME, else ~/.cache; None where there is no home, as for a
    user of a container that its passwd does not know. As the XDG specification says, what is not absolute is
    ignored: it would be taken from the working directory, which is anybody's."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    home = os.path.expanduser("~")
    if os.path.isabs(given):
        return Path(given)
    return Path(home, ".cache") if os.path.isabs(home) else None


NO_CACHE = "there is no folder for caches: this user has no home directory"
NO_CACHE_REMEDY = "Set XDG_CACHE_HOME to a folder of your own"


def cache_dir(torch_version: str, torch_cuda: str | None) -> Path | None:
    """Where `vaekernels build` puts its result, and `_native` looks for it; None where `user_cache` is."""
    root = user_cache()
    if root is None:
        return None
    return root / "vaekernels" / f"{VERSION}-torch{torch_version}-{python_tag()}-cuda{torch_cuda or '_none'}"


def clear(folder: Path) -> None:
    """Removes the libraries and the record of an earlier build."""
    for old in (*folder.glob("_C*.so"), folder / RECORD_NAME):
        old.unlink(missing_ok=True)


def build(target: Path, scratch: Path, say: Callable[[str], None], torch: Torch | None = None) -> Record:
    """Builds what can be built into `target` and writes the record.

    A missing tool or a failed build raises nothing: the record says so. `scratch` keeps the objects; those
    whose sources, headers and flags did not change are not compiled again.
    """
    target.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    clear(target)
    cpu = cuda = Library()
    try:
        torch = torch or find_torch()
        say(f"torch {torch.version} in {torch.root}")
        cpu = Library(_build_cpu(torch, target, scratch, say))
    except BuildProblem as problem:
        cpu = Library.missing(problem)
        cuda = Library(problem="the CPU library, which it needs, was not built", remedy=problem.remedy)
        say(f"vaekernels: no compiled kernels: {problem}. {problem.remedy}.")
    if torch is not None and cpu.file is not None:
        try:
            cuda = _build_cuda(torch, target, scratch, say)
        except BuildProblem as problem:
            cuda = Library.missing(problem)
            say(f"vaekernels: no CUDA kernels: {problem}. {problem.remedy}.")
    record = Record(
        VERSION, python_tag(), torch.version if torch else None, torch.cuda if torch else None, cpu, cuda
    )
    record.write(target)
    return record


def _build_cpu(torch: Torch, target: Path, scratch: Path, say: Callable[[str], None]) -> str:
    compiler = find_compiler(scratch)
    objects = compile_sources(cpu_jobs(torch, compiler), scratch, say)
    file = "_C" + EXTENSION_SUFFIXES[0]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    libraries = [f"-L{torch.root}/lib", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    extra = _words("LDFLAGS")
    _run(
        [*compiler, *shared, *OPENMP_FLAGS, *map(str, objects), *libraries, *extra, "-o", str(target / file)],
        say,
        file,
    )
    return file


def cpu_jobs(torch: Torch, compiler: Sequence[str]) -> list[Job]:
    """What the CPU library is compiled from, and how. The user's flags win, but for the standard and the
    architecture: conda's compilers come with a CXXFLAGS that names an older standard, and a -march."""
    flags = [*CXX_FLAGS, *OPENMP_FLAGS, *_torch_flags(torch), *_words("CXXFLAGS"), STANDARD]
    if _chooses_instructions(compiler):
        # GCC clears small structs by `rep stos`, whose start takes longer: 1 to 3 % of a small call.
        flags += ["-march=x86-64", "-mmemset-strategy=unrolled_loop:256:noalign,libcall:-1:noalign"]
    sources = [p for p in _sources("*.cpp") if "cuda" not in p.parts[-2:-1]]
    return [(source, [*compiler, *flags]) for source in sources]


def _build_cuda(torch: Torch, target: Path, scratch: Path, say: Callable[[str], None]) -> Library:
    nvcc = cuda_compiler(torch)
    archs = cuda_arch_flags(torch, nvcc, say)
    objects = compile_cuda_objects(torch, nvcc, archs, scratch, say)
    file = "_C_cuda.so"
    libraries = [f"-L{torch.root}/lib", "-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch_cuda", "-ltorch"]
    command = [nvcc, "-shared", "-cudart", "shared", *archs, *map(str, objects), *libraries]
    _run([*command, "-o", str(target / file)], say, file)
    return Library(file, architectures=_architectures(archs))


def compile_cuda_objects(
    torch: Torch, nvcc: str, flags: Sequence[str], scratch: Path, say: Callable[[str], None]
) -> list[Path]:
    """Compiles csrc/cuda, kernels with `flags`. Against a torch without CUDA as well, to objects only."""
    for folder in (str(_csrc()), str(scratch), torch.root):
        if odd := set('$`"\\') & set(folder):
            raise BuildProblem(
                f"nvcc, which puts names of files into command lines, cannot compile in {folder}: "
                f"its name has {' '.join(sorted(odd))}",
                f"Move it, or for `{BUILD_COMMAND}` set XDG_CACHE_HOME to another folder",
            )
    command = [nvcc, *_host_compiler(), *NVCC_FLAGS, f"-I{_csrc()}", *flags]
    kernels: list[Job] = [(source, command) for source in _sources("cuda/*.cu")]
    return compile_sources([*kernels, *cuda_host_jobs(torch, nvcc)], scratch, say)


def cuda_host_jobs(torch: Torch, nvcc: str) -> list[Job]:
    """Those files of csrc/cuda that know torch; no kernels."""
    host = [nvcc, *_host_compiler(), *NVCC_FLAGS, *_torch_flags(torch)]
    if torch.cuda is None:
        # A CPU wheel lacks the header that CMake generates for c10/cuda.
        host.append("-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE")
    return [(source, host) for source in _sources("cuda/*.cpp")]


def _host_compiler() -> list[str]:
    """-ccbin with the compiler of $CXX: one program, without the launcher and the flags around it."""
    programs = [word for word in _words("CXX") if os.path.basename(word) not in LAUNCHERS]
    return ["-ccbin", programs[0]] if programs else []


def _words(variable: str) -> list[str]:
    """What an environment variable holds, split as a shell would."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildProblem(
            f"{variable}={os.environ[variable]} is no command line: {error}", "Correct or unset it"
        ) from None


def _chooses_instructions(compiler: Sequence[str]) -> bool:
    """Whether the kernels are compiled for several instruction sets, as csrc/cpu/isa.h says: by GCC on x86-64
    Linux. It inlines nothing of another -march into them."""
    command = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(command, capture_output=True, text=True).stdout
    return all(f"#define {name} " in macros for name in ("__x86_64__", "__gnu_linux__")) and (
        "#define __clang__ " not in macros
    )


def find_compiler(scratch: Path) -> list[str]:
    """The C++ compiler ($CXX, else c++, g++, clang++), after compiling a line of C++20 with it."""
    if sys.platform == "win32":
        raise BuildProblem("there are no build rules for Windows", "Use the Windows Subsystem for Linux")
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    compiler = _words("CXX") or ([found] if found else [])
    remedy = (
        "Set CXX to a C++20 compiler, such as g++, or unset it"
        if os.environ.get("CXX")
        else "Install a C++20 compiler (Debian, Ubuntu: `apt-get install g++`; conda: `conda install gxx`; "
        "macOS: `xcode-select --install`)"
    )
    remedy += f", then run `{BUILD_COMMAND}`"
    if not compiler:
        raise BuildProblem("no C++ compiler was found (c++, g++, clang++ or $CXX)", remedy)
    probe = scratch / "probe.cpp"
    probe.write_text("#include <concepts>\nstatic_assert(std::integral<int>);\n", encoding="utf-8")
    command = [*compiler, STANDARD, "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildProblem(
            f"the compiler `{shlex.join(compiler)}` does not start: {error}", remedy
        ) from error
    if result.returncode != 0:
        name = f"CXX={shlex.join(compiler)}" if os.environ.get("CXX") else f"the compiler {compiler[0]}"
        words = result.stderr.strip() or f"exit status {result.returncode} and no message"
        raise BuildProblem(f"{name} does not compile C++20", remedy, words)
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise BuildProblem(
            f"Python.h is missing in {sysconfig.get_path('include')}",
            "Install Python's headers (Debian, Ubuntu: `apt-get install python3-dev`), "
            f"then run `{BUILD_COMMAND}`",
        )
    return compiler


def find_nvcc() -> str | None:
    """nvcc under $CUDA_HOME or $CUDA_PATH, on PATH, or under /usr/local/cuda. GPUs play no part."""
    for name in CUDA_VARIABLES:
        if os.environ.get(name):
            return shutil.which(os.path.join(os.environ[name], "bin", "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _nvcc_places() -> str:
    """Where `find_nvcc` looks."""
    told = next((name for name in CUDA_VARIABLES if os.environ.get(name)), None)
    return f"in {told}={os.environ[told]}" if told else "on PATH or in /usr/local/cuda"


def cuda_compiler(torch: Torch) -> str:
    """The nvcc to build with for this torch, or the reason why there is nothing to build."""
    if os.environ.get("VAEKERNELS_CUDA") == "0":
        raise BuildProblem("VAEKERNELS_CUDA=0 was set for the build", f"Run `{BUILD_COMMAND}` without it")
    if torch.hip is not None:
        raise BuildProblem("there are no kernels for ROCm", "The CPU kernels and plain PyTorch are used")
    if torch.cuda is None:
        raise BuildProblem(
            f"torch {torch.version} was built without CUDA",
            f"With a CUDA build of torch and its toolkit installed, run `{BUILD_COMMAND}`",
        )
    nvcc = find_nvcc()
    major = torch.cuda.split(".")[0]
    remedy = f"Install the CUDA {major} toolkit, set CUDA_HOME to it, then run `{BUILD_COMMAND}`"
    if nvcc is None:
        raise BuildProblem(f"nvcc was not found {_nvcc_places()}", remedy)
    version = nvcc_version(nvcc)
    if version.split(".")[0] != major:
        raise BuildProblem(f"{nvcc} is of CUDA {version} and torch of CUDA {torch.cuda}", remedy)
    return nvcc


def nvcc_version(nvcc: str) -> str:
    found = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    return found.group(1) if found else "unknown version"


def cuda_arch_flags(torch: Torch, nvcc: str, say: Callable[[str], None]) -> list[str]:
    """-gencode flags: TORCH_CUDA_ARCH_LIST, as torch reads it, else what both torch and nvcc know, plus PTX
    for the last. What is older than the kernels need is left out, with a line that says so."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    known = sorted({int(arch) for arch in re.findall(r"compute_(\d+)", _output([nvcc, "--list-gpu-arch"]))})
    if asked:
        archs = [*_native_archs(known)] if asked == "native" else _named_archs(asked)
        told = f"TORCH_CUDA_ARCH_LIST={asked}"
    else:
        listed = {int(arch) for arch in re.findall(r"sm_(\d+)\b", torch.cuda_archs)}
        archs = [str(arch) for arch in sorted(listed.intersection(known))]
        archs[-1:] = [f"{arch}+PTX" for arch in archs[-1:]]
        told = f"torch's list ({torch.cuda_archs or 'none'})"
    wanted = [arch for arch in archs if _number(arch) >= OLDEST_ARCH]
    oldest = _dotted(OLDEST_ARCH)
    if old := [_dotted(_number(arch)) for arch in archs if arch not in wanted]:
        say(f"vaekernels: left out of {told}: {', '.join(old)}; the kernels need {oldest}")
    if not wanted:
        raise BuildProblem(
            f"{told} has no GPU architecture of {oldest} or later that {nvcc} knows",
            f"Set TORCH_CUDA_ARCH_LIST, such as '8.0;9.0+PTX', then run `{BUILD_COMMAND}`",
        )
    # A name twice would be an error of nvcc.
    flags = [flag for arch in wanted for flag in _gencode(arch.partition("+")[0], ptx=arch.endswith("+PTX"))]
    return list(dict.fromkeys(flags))


def _named_archs(asked: str) -> list[str]:
    """The entries of a TORCH_CUDA_ARCH_LIST as "90", "90a" and "90+PTX"."""
    for name, archs in ARCH_NAMES.items():
        asked = asked.replace(name, archs)
    found = []
    for arch in asked.replace(";", " ").split():
        parsed = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if parsed is None:
            raise BuildProblem(
                f"TORCH_CUDA_ARCH_LIST has {arch!r}",
                "Give compute capabilities such as '8.0;9.0+PTX', generations such as 'Hopper', or 'native', "
                f"then run `{BUILD_COMMAND}`",
            )
        found.append("".join(part or "" for part in parsed.groups()))
    return found


def _native_archs(known: Sequence[int]) -> list[str]:
    """Those of the GPUs here, no newer than nvcc knows, with PTX for the last."""
    gpus = {min(10 * major + minor, *known[-1:]) for major, minor in _ask_torch("gpus")}
    if not gpus:
        raise BuildProblem(
            "TORCH_CUDA_ARCH_LIST=native, and torch sees no GPU here",
            f"Give compute capabilities such as '8.0;9.0+PTX', then run `{BUILD_COMMAND}`",
        )
    return [f"{arch}+PTX" if arch == max(gpus) else str(arch) for arch in sorted(gpus)]


def _number(arch: str) -> int:
    """90 of "90", "90a" and "90+PTX"."""
    return int(re.match(r"\d+", arch)[0])  # type: ignore[index]


def _dotted(number: int) -> str:
    return f"{number // 10}.{number % 10}"


def _gencode(arch: str, *, ptx: bool) -> list[str]:
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    return [*flags, f"-gencode=arch=compute_{arch},code=compute_{arch}"] if ptx else flags


def _architectures(gencode: Sequence[str]) -> str:
    """What -gencode flags make: "sm_80 sm_90 compute_90"."""
    return " ".join(flag.rpartition("code=")[2] for flag in gencode)


def _csrc() -> Path:
    folder = source_dir()
    if folder is None:
        raise BuildProblem("csrc/ is missing", "Install the package again")
    return folder


def _sources(pattern: str) -> list[Path]:
    found = sorted(_csrc().glob(pattern) if "/" in pattern else _csrc().rglob(pattern))
    if not found:
        raise BuildProblem(f"there is no {pattern} in {_csrc()}", "Install the package again")
    return found


def _torch_flags(torch: Torch) -> list[str]:
    """Preprocessor flags. Of all pybind11 headers it is torch's that are found, first and before Python's."""
    if tuple(int(n) for n in re.findall(r"\d+", torch.version)[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildProblem(
            f"torch {torch.version} is older than {oldest}", f"Upgrade torch, then run `{BUILD_COMMAND}`"
        )
    include = f"{torch.root}/include"
    system = [include, f"{include}/torch/csrc/api/include", sysconfig.get_path("include")]
    return [
        f"-I{_csrc()}",
        *(flag for path in system for flag in ("-isystem", path)),
        "-DTORCH_EXTENSION_NAME=_C",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}",
        f'-DVAEKERNELS_TORCH_VERSION="{torch.version}"',
    ]


def compile_sources(jobs: Sequence[Job], scratch: Path, say: Callable[[str], None]) -> list[Path]:
    """Runs the compile commands side by side (MAX_JOBS, else one per core) and returns the objects."""
    asked = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not asked.strip().isdigit():
        raise BuildProblem(f"MAX_JOBS must be a whole number, got {asked!r}", "Unset it or set it to one")
    workers = max(1, min(int(asked), len(jobs)))
    begun, done = time.monotonic(), itertools.count(1)

    def counted() -> str:
        number = next(done)
        return f", {number} of {len(jobs)} files{time_left(begun, number, len(jobs))}"

    def one(job: Job) -> Path:
        source, command = job
        # The command is part of the name, so an object made with other flags is never taken for this one.
        mark = hashlib.sha256(os.fsencode("\0".join([*command, str(source)]))).hexdigest()[:12]
        made = scratch / f"{source.stem}-{mark}.o"
        depends = made.with_suffix(".d")
        if not _up_to_date(made, depends):
            dependencies = ["-MMD", "-MF", str(depends)]
            _run(
                [*command, "-c", str(source), *dependencies, "-o", str(made)],
                say,
                f"{source.parent.name}/{source.name}",
                counted,
            )
        else:
            next(done)
        return made

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(one, job) for job in jobs]
        try:
            return [future.result() for future in pending]
        except BuildProblem:
            pool.shutdown(cancel_futures=True)
            raise


def _up_to_date(made: Path, depends: Path) -> bool:
    try:
        born = made.stat().st_mtime_ns
        names = dependencies(os.fsdecode(depends.read_bytes()))
        return bool(names) and all(os.stat(name).st_mtime_ns < born for name in names)
    except (OSError, ValueError):
        return False


def dependencies(rule: str) -> list[str]:
    """The files behind the colon of a compiler's rule for make. Make quotes in its own way, not as a shell
    does: a space behind 2 n + 1 backslashes belongs to the name, with n of them; $$ is $ and \\# is #."""
    names: list[str] = []
    name = ""
    for part in re.findall(r"\\+[ \t]|\\\r?\n|\s|\$\$|\\#|.", rule):
        if part[0] == "\\" and part[-1] in " \t":
            name += "\\" * ((len(part) - 1) // 2)
            if len(part) % 2 == 0:
                name += part[-1]
                continue
        elif not part.isspace() and part[-1] != "\n":
            name += part[-1]
            continue
        names, name = [*names, name], ""
    names = [one for one in [*names, name] if one]
    target = next((i for i, one in enumerate(names) if one.endswith(":")), len(names))
    return names[target + 1 :]


def time_left(begun: float, done: int, total: int, stream: TextIO | None = None) -> str:
    """At the pace since ``begun`` (of time.monotonic), as ", about 2 min left". Empty where ``stream``,
    standard output unless given, is no terminal, and where no step is done or none is left."""
    if not 0 < done < total or not (stream or sys.stdout).isatty():
        return ""
    seconds = (time.monotonic() - begun) / done * (total - done)
    return f", about {seconds:.0f} s left" if seconds < 100 else f", about {seconds / 60:.0f} min left"


def _run(
    command: Sequence[str], say: Callable[[str], None], what: str, more: Callable[[], str] = lambda: ""
) -> None:
    """``more``: behind what is said of a success."""
    start = time.monotonic()
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if result.returncode != 0:
        raise BuildProblem(
            f"{os.path.basename(command[0])} failed on {what}",
            f"Fix what the compiler names (`vaekernels doctor` shows it), then run `{BUILD_COMMAND}`",
            f"{shlex.join(command)}\n{excerpt(result.stdout) or f'exit status {result.returncode}'}",
        )
    if result.stdout.strip():
        say(result.stdout.rstrip())
    say(f"  {what}: {time.monotonic() - start:.0f} s{more()}")


def excerpt(output: str, lines: int = 40) -> str:
    """The part of a compiler's output to show: from the first error on, else the end."""
    every = output.strip().splitlines()
    start = next(
        (i for i, line in enumerate(every) if re.search(r"\berror\b|cannot find|undefined", line)), None
    )
    shown = every[-lines:] if start is None else every[start : start + lines]
    left = len(every) - len(shown)
    return "\n".join([*shown, f"({left} more lines)"] if left else shown)


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""


def main(arguments: Sequence[str]) -> int:
    """Tools for the build itself, run as a script.

    `torch` prints the torch of this interpreter as JSON, `gpus` the compute capabilities of the GPUs; `nvcc`
    succeeds where there is one; `cuda-objects DIR` compiles the CUDA sources for sm_90 and PTX, and links
    nothing.
    """
    # Python puts the folder of a script first, and there the package's modules would shadow others' by name.
    sys.path.pop(0)
    if arguments[0] == "torch":
        print(json.dumps(asdict(torch_in_use())))
        return 0
    if arguments[0] == "gpus":
        import torch

        count = torch.cuda.device_count()
        print(json.dumps([torch.cuda.get_device_capability(i) for i in range(count)]))
        return 0
    nvcc = find_nvcc()
    if arguments[0] == "nvcc":
        return int(nvcc is None)
    if nvcc is None:
        print("cuda-objects: nvcc was not found: put it on PATH or set CUDA_HOME", file=sys.stderr)
        return 1
    folder = Path(arguments[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.monotonic()
    try:
        flags = [*_gencode("90", ptx=True), NO_LOCAL_MEMORY]
        objects = compile_cuda_objects(torch_in_use(), nvcc, flags, folder, print)
    except BuildProblem as problem:
        print(f"cuda-objects: {problem}\n{problem.log or ''}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    print(f"cuda-objects: {len(objects)} objects with nvcc {nvcc_version(nvcc)} in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
