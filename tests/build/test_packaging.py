"""Building, finding and refusing the compiled library; the installs themselves are slow tests at the end."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import vaekernels
from vaekernels import _build, _native

REPOSITORY = Path(__file__).resolve().parents[2]
FITTING = _build.Record(
    package=_build.VERSION,
    python=_build.python_tag(),
    torch=str(torch.__version__),
    torch_cuda=torch.version.cuda,
    cpu=_build.Library("_C.so"),
    cuda=_build.Library(problem="nvcc was not found", remedy="Install it"),
)
CUDA_TORCH = _build.Torch("2.13.0+cu130", "13.0", None, "torch", "sm_80 sm_90 sm_120 compute_120", True)


def write(folder: Path, record: _build.Record, library: bytes | None = b"not a library") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record.write(folder)
    if library is not None and record.cpu.file is not None:
        (folder / record.cpu.file).write_bytes(library)
    return folder


def script(file: Path, body: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return str(file)


def fake_nvcc(home: Path, release: str = "13.0", archs: str = "compute_80 compute_90 compute_100") -> str:
    known = archs.replace(" ", "\\n")
    body = f'case "$1" in --version) echo "release {release}, V1";; *) printf "{known}\\n";; esac'
    return script(home / "bin" / "nvcc", body)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("VAEKERNELS_CUDA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- what is refused before it is loaded


def test_a_fitting_record_is_accepted() -> None:
    assert _native.mismatch(FITTING) is None


@pytest.mark.parametrize(
    ("field", "other", "shown"),
    [
        ("torch", "2.11.0+cpu", "torch 2.11.0+cpu"),
        ("torch_cuda", "12.1", "CUDA 12.1"),
        ("python", "cpython-39-x86_64-linux-gnu", "Python cpython-39"),
        ("package", "0.0.1", "vaekernels 0.0.1"),
    ],
)
def test_another_version_is_never_loaded(tmp_path: Path, field: str, other: str, shown: str) -> None:
    record = dataclasses.replace(FITTING, **{field: other})
    # The file is no library: an attempt to load it would show as "loading ... failed".
    found = _native.load([write(tmp_path, record)])
    reason = found.reasons["cpu"]
    assert found.module is None
    assert reason is not None and shown in reason
    assert "vaekernels build" in reason and "failed" not in reason


def test_a_broken_library_is_explained(tmp_path: Path) -> None:
    found = _native.load([write(tmp_path, FITTING)])
    assert found.module is None
    assert "loading" in str(found.reasons["cpu"]) and "failed" in str(found.reasons["cpu"])
    assert "vaekernels build" in str(found.reasons["cpu"])


def test_the_reason_of_the_failed_build_is_kept(tmp_path: Path) -> None:
    library = _build.Library(problem="CXX=false does not compile C++20", remedy="Install g++", log="exit 1")
    found = _native.load([write(tmp_path, dataclasses.replace(FITTING, cpu=library, cuda=library))])
    assert found.reasons["cpu"] == "CXX=false does not compile C++20. Install g++."
    # A torch without CUDA has no use for kernels, whatever else went wrong.
    cuda = found.reasons["cpu"] if torch.version.cuda else "this torch was built without CUDA."
    assert found.reasons["cuda"] == cuda


def test_no_record_and_a_foreign_one_read_as_absent(tmp_path: Path) -> None:
    assert _build.Record.read(tmp_path) is None
    for text in ("", "[]", "{}", '{"cpu": 1, "cuda": 2}', json.dumps({"cpu": {"file": "a"}, "cuda": {}})):
        (tmp_path / _build.RECORD_NAME).write_text(text)
        assert _build.Record.read(tmp_path) is None
    reason = _native.load([tmp_path]).reasons["cpu"]
    assert reason is not None and str(tmp_path) in reason and "vaekernels build" in reason


def test_record_round_trip(tmp_path: Path) -> None:
    FITTING.write(tmp_path)
    assert _build.Record.read(tmp_path) == FITTING


def test_the_newer_of_two_that_fit_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(_native, "_load_module", lambda file: loaded.append(file) or torch)
    package, cache = write(tmp_path / "package", FITTING), write(tmp_path / "user", FITTING)
    for newer, older in ((package, cache), (cache, package)):
        os.utime(older / _build.RECORD_NAME, ns=(10**9, 10**9))
        os.utime(newer / _build.RECORD_NAME, ns=(2 * 10**9, 2 * 10**9))
        assert _native.load([package, cache]).folder == newer
    write(cache, dataclasses.replace(FITTING, torch="2.11.0"))
    assert _native.load([package, cache]).folder == package
    assert [file.parent for file in loaded] == [package, cache, package]


def test_a_build_with_cuda_is_preferred_under_a_cuda_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_native, "_load_module", lambda file: torch)
    monkeypatch.setattr(torch.ops, "load_library", lambda file: None)
    record = dataclasses.replace(FITTING, torch_cuda="13.0")
    package = write(tmp_path / "package", record)
    cache = write(tmp_path / "user", dataclasses.replace(record, cuda=_build.Library("_C_cuda.so")))
    (cache / "_C_cuda.so").touch()
    found = _native.load([package])
    assert found.reasons == {"cpu": None, "cuda": "nvcc was not found. Install it."}
    found = _native.load([package, cache])
    assert found.folder == cache and found.reasons == {"cpu": None, "cuda": None}


# ---- what the user is told


def test_the_reason_and_the_flag_agree() -> None:
    for device in ("cpu", "cuda", "mps"):
        assert _native.has_kernels(device) == (_native.explain(device) is None)
    assert _native.has_kernels("cpu") == (_native.C is not None)
    assert not _native.has_kernels("mps") and "mps" in str(_native.explain("mps"))


def test_the_fallback_warns_once_per_device_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_warned", set())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for device in ("xpu", "xpu", "mps", "xpu"):
            _native.warn_fallback(device)
    assert [w.category for w in seen] == [vaekernels.FallbackWarning] * 2
    assert "xpu" in str(seen[0].message) and "vaekernels doctor" in str(seen[0].message)
    assert seen[0].filename == __file__


def test_compiled_code_warns_while_it_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_warned", set())

    @torch.compile(fullgraph=True, backend="eager")
    def step(x: torch.Tensor) -> torch.Tensor:
        _native.warn_fallback("xpu")
        return x * 2

    with pytest.warns(vaekernels.FallbackWarning, match="xpu"):
        step(torch.ones(3))


def test_version_is_stated_once() -> None:
    assert vaekernels.__version__ == _build.VERSION


def test_import_brings_in_torch_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import vaekernels; "
        "new = {m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "print(sorted(new)); assert not torch.cuda.is_initialized()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['vaekernels']"


# ---- the build


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    said: list[str] = []
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "_C.old.so").touch()
    record = _build.build(tmp_path / "package", tmp_path / "objects", said.append, CUDA_TORCH)
    assert record.cpu.file is None and record.cpu.failed
    assert "CXX=false" in str(record.cpu.problem) and "g++" in str(record.cpu.remedy)
    assert record.cuda.file is None and not record.cuda.failed
    assert any("CXX=false" in line for line in said)
    assert _build.Record.read(tmp_path / "package") == record
    # What an earlier build left must not be taken for this one's.
    assert not list((tmp_path / "package").glob("*.so"))


def test_no_compiler_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(_build.BuildProblem, match="no C"):
        _build.find_compiler(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(_build.BuildProblem, match="no-such-compiler"):
        _build.find_compiler(tmp_path)


def test_missing_python_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "exit 0"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(_build.BuildProblem, match=r"Python\.h") as caught:
        _build.find_compiler(tmp_path)
    assert "python3-dev" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MAX_JOBS", "two", "MAX_JOBS must be a whole number, got 'two'"),
        ("CXXFLAGS", "-DX='1", "CXXFLAGS=-DX='1 is no command line: No closing quotation"),
        ("CXX", "'c++", "CXX='c++ is no command line: No closing quotation"),
    ],
)
def test_a_variable_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "exit 0"))
    monkeypatch.setenv(name, value)
    record = _build.build(tmp_path / "package", tmp_path / "objects", lambda line: None, CUDA_TORCH)
    assert record.cpu.problem == message


def test_old_torch_is_not_compiled_against(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "exit 0"))
    old = dataclasses.replace(CUDA_TORCH, version="2.5.1")
    record = _build.build(tmp_path / "package", tmp_path / "objects", print, old)
    assert "2.5.1 is older than 2.6" in str(record.cpu.problem) and not record.cpu.failed


def test_objects_are_made_again_only_when_something_changed(tmp_path: Path) -> None:
    header, source = tmp_path / "a.h", tmp_path / "a.cpp"
    header.touch()
    source.touch()
    calls = tmp_path / "calls"
    # Called as: c++ FLAG -c SOURCE -MMD -MF DEPENDS -o OBJECT
    compiler = script(
        tmp_path / "c++",
        f'echo x >> {calls}; echo "$8: {source} \\\n {header}" > "$6"; sleep 0.02; touch "$8"',
    )

    def compiled(flag: str) -> int:
        _build.compile_sources([(source, [compiler, flag])], tmp_path, lambda line: None)
        return len(calls.read_text().splitlines())

    assert [compiled("-O2"), compiled("-O2")] == [1, 1]
    assert compiled("-O3") == 2
    later = header.stat().st_mtime_ns + 10**9
    os.utime(header, ns=(later, later))
    assert compiled("-O2") == 3


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_a_build_says_how_far_it_is_and_on_a_terminal_how_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = script(tmp_path / "c++", "sleep 0.02; touch $7")
    jobs = [(tmp_path / f"{name}.cpp", [compiler]) for name in "abc"]
    monkeypatch.setenv("MAX_JOBS", "1")

    def compiled(screen: io.StringIO, folder: str) -> list[str]:
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(sys, "stdout", screen)
        said: list[str] = []
        _build.compile_sources(jobs, tmp_path / folder, said.append)
        return [line.partition(": 0 s, ")[2] for line in said]

    in_file = ["1 of 3 files", "2 of 3 files", "3 of 3 files"]
    assert compiled(io.StringIO(), "file") == in_file
    left = ", about 0 s left"
    assert compiled(Screen(), "screen") == [in_file[0] + left, in_file[1] + left, in_file[2]]


def test_the_time_left_is_that_of_the_steps_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build.time, "monotonic", lambda: 160.0)
    assert _build.time_left(100.0, 2, 3, Screen()) == ", about 30 s left"
    assert _build.time_left(100.0, 1, 4, Screen()) == ", about 3 min left"
    for done, screen in ((0, Screen()), (3, Screen()), (1, io.StringIO())):
        assert _build.time_left(100.0, done, 3, screen) == ""


NAMES = [
    "o'brien",
    "a b",
    "é ü",
    "$HOME",
    "#1",
    "a\\b",
    "a\\ b",
    "a\\\\ b",
    "100%",
    "x: y",
    'q"r',
    "`id`",
    "a;b&c",
]
NAMES += ["tab\there", "a\\#b", "a\\$b", os.fsdecode(b"lat\xe9")]


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_any_name_are_built_in(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "a.cpp").write_text('#include "a.h"\n')
    (folder / "a.h").touch()
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")

    def compiled() -> int:
        said: list[str] = []
        _build.compile_sources([(folder / "a.cpp", [compiler, f"-I{folder}"])], folder, said.append)
        return len(said)

    assert [compiled(), compiled()] == [1, 0]
    later = time.time_ns() + 10**10
    os.utime(folder / "a.h", ns=(later, later))
    assert compiled() == 1


def test_a_rule_for_make_that_names_nothing_is_not_up_to_date(tmp_path: Path) -> None:
    for name in ("a.o", "a.d"):
        (tmp_path / name).touch()
    assert not _build._up_to_date(tmp_path / "a.o", tmp_path / "a.d")
    assert _build.dependencies("x/a.o: a.cpp \\\n  b\\ c.h \\\r\n $$d.h\n\nb c.h:\n")[:3] == [
        "a.cpp",
        "b c.h",
        "$d.h",
    ]


def test_the_standard_is_ours_and_the_other_flags_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-std=c++17 -O2")
    for _, command in _build.cpu_jobs(CUDA_TORCH, ["c++"]):
        assert [flag for flag in command if flag.startswith("-std")][-1] == "-std=c++20"
        assert [flag for flag in command if flag.startswith("-O")][-1] == "-O2"


@pytest.mark.parametrize("march", ["nocona", "haswell"])
def test_kernels_compile_with_another_architecture_in_the_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, march: str
) -> None:
    """GCC does not inline what is compiled for another -march: "target specific option mismatch"."""
    compiler = _build.find_compiler(tmp_path)
    if not _build._chooses_instructions(compiler):
        pytest.skip("the kernels are compiled for one instruction set here")
    monkeypatch.setenv("CXXFLAGS", f"-march={march} -mtune=haswell")
    (command,) = {tuple(command) for _, command in _build.cpu_jobs(CUDA_TORCH, compiler)}
    probe = tmp_path / "numbers.cpp"
    header = REPOSITORY / "csrc" / "cpu" / "numbers.h"
    probe.write_text(
        f'#include "{header}"\n'
        "void f(const vk::cpu::Half* a, float* b) { vk::cpu::load_rows(a, 1, 1, 64, b); }\n"
    )
    done = subprocess.run([*command, "-c", str(probe), "-o", os.devnull], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", ["59.6.0", "65.5.0", "76.1.0"])
def test_an_old_setuptools_is_named_in_one_line(tmp_path: Path, version: str) -> None:
    fake = tmp_path / "setuptools" / "__init__.py"
    fake.parent.mkdir()
    fake.write_text(f"__version__ = {version!r}\nExtension = setup = None\n")
    (fake.parent / "command").mkdir()
    for name in ("__init__", "build_ext", "build_py"):
        (fake.parent / "command" / f"{name}.py").write_text("build_ext = build_py = object\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(REPOSITORY / "setup.py"), "build"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and f"setuptools >= 77 is needed, and {sys.executable} has {version}" in line
    assert '"setuptools>=77"' in (REPOSITORY / "pyproject.toml").read_text()


def test_the_excerpt_starts_at_the_first_error() -> None:
    output = "\n".join(["a.cpp:1: warning: w", "a.cpp:7: error: no", *(f"line {i}" for i in range(99))])
    shown = _build.excerpt(output, lines=5).splitlines()
    assert shown[0] == "a.cpp:7: error: no" and shown[-1] == "(96 more lines)" and len(shown) == 6
    assert _build.excerpt("one\ntwo") == "one\ntwo"


def test_the_cache_is_keyed_by_every_version(tmp_path: Path) -> None:
    folder = _build.cache_dir("2.13.0+cu130", "13.0")
    assert folder is not None and folder.parent == tmp_path / "cache" / "vaekernels"
    for part in (_build.VERSION, "torch2.13.0+cu130", _build.python_tag(), "cuda13.0"):
        assert part in folder.name


# ---- CUDA: what decides, without a GPU


def test_no_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildProblem, match=f"nvcc was not found in CUDA_HOME={tmp_path}") as caught:
        _build.cuda_compiler(CUDA_TORCH)
    assert "CUDA 13" in caught.value.remedy and caught.value.log is None


def test_cuda_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    fake_nvcc(tmp_path)
    assert _build.cuda_compiler(CUDA_TORCH) == str(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("VAEKERNELS_CUDA", "0")
    with pytest.raises(_build.BuildProblem, match="VAEKERNELS_CUDA=0"):
        _build.cuda_compiler(CUDA_TORCH)


def test_nvcc_of_another_major(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    fake_nvcc(tmp_path, release="12.6")
    with pytest.raises(_build.BuildProblem, match=r"CUDA 12\.6 and torch of CUDA 13\.0"):
        _build.cuda_compiler(CUDA_TORCH)


def test_architectures_are_torchs_capped_by_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = fake_nvcc(tmp_path)
    assert _build.cuda_arch_flags(CUDA_TORCH, nvcc, print) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    told = _build._architectures(_build.cuda_arch_flags(CUDA_TORCH, nvcc, print))
    assert told == "sm_80 sm_90 compute_90"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a+PTX")
    assert _build.cuda_arch_flags(CUDA_TORCH, nvcc, print) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Volcano")
    with pytest.raises(_build.BuildProblem, match="Volcano"):
        _build.cuda_arch_flags(CUDA_TORCH, nvcc, print)


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ("Hopper", "sm_90 compute_90"),
        ("Ampere", "sm_80 sm_86 compute_86"),
        ("Ampere+Tegra;Ada", "sm_87 sm_89 compute_89"),
        ("Turing Blackwell+Tegra", "sm_75 compute_75 sm_110"),
        ("8.6+PTX", "sm_86 compute_86"),
        ("9.0a", "sm_90a"),
        ("10.0f;12.1a+PTX", "sm_100f sm_121a compute_121a"),
        ("9.0;9.0", "sm_90"),
        ("Pascal;Volta", "sm_70 compute_70"),
        ("6.1;7.5", "sm_75"),
    ],
)
def test_an_architecture_list_is_read_as_torch_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, made: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    flags = _build.cuda_arch_flags(CUDA_TORCH, fake_nvcc(tmp_path), print)
    assert _build._architectures(flags) == made
    extension = pytest.importorskip("torch.utils.cpp_extension")
    if "f" not in asked:
        assert set(extension._get_cuda_arch_flags()) >= set(flags)


def test_the_names_of_generations_are_torchs() -> None:
    extension = pytest.importorskip("torch.utils.cpp_extension")
    for name in _build.ARCH_NAMES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_CUDA_ARCH_LIST", name)
            flags = [flag for a in _build._named_archs(name) for flag in gencode(a)]
            assert sorted(flags) == extension._get_cuda_arch_flags(), name


def gencode(arch: str) -> list[str]:
    return _build._gencode(arch.partition("+")[0], ptx=arch.endswith("+PTX"))


def test_architectures_too_old_for_the_kernels_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake_nvcc(tmp_path, "12.6", "compute_50 compute_60 compute_70 compute_90")
    torch_126 = dataclasses.replace(CUDA_TORCH, cuda="12.6", cuda_archs="sm_50 sm_60 sm_70 sm_75 sm_90")
    said: list[str] = []
    flags = _build.cuda_arch_flags(torch_126, nvcc, said.append)
    assert _build._architectures(flags) == "sm_70 sm_90 compute_90"
    (line,) = said
    assert "5.0, 6.0" in line and "the kernels need 7.0" in line
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.1;8.0")
    assert _build._architectures(_build.cuda_arch_flags(torch_126, nvcc, said.append)) == "sm_80"
    assert "left out of TORCH_CUDA_ARCH_LIST=6.1;8.0: 6.1;" in said[1]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Pascal")
    with pytest.raises(_build.BuildProblem, match=r"=Pascal has no GPU architecture of 7\.0 or later"):
        _build.cuda_arch_flags(torch_126, nvcc, said.append)


def test_native_takes_the_gpus_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = fake_nvcc(tmp_path)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    for gpus, made in (
        ([[9, 0], [8, 6], [9, 0]], "sm_86 sm_90 compute_90"),
        # Newer than this nvcc: the newest that it knows, whose PTX runs there.
        ([[12, 0]], "sm_100 compute_100"),
    ):
        monkeypatch.setattr(_build, "_ask_torch", lambda what, gpus=gpus: gpus)
        assert _build._architectures(_build.cuda_arch_flags(CUDA_TORCH, nvcc, print)) == made
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    if not torch.cuda.is_available():
        with pytest.raises(_build.BuildProblem, match="torch sees no GPU"):
            _build.cuda_arch_flags(CUDA_TORCH, nvcc, print)


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        (None, []),
        ("g++ -m64", ["-ccbin", "g++"]),
        ("ccache g++", ["-ccbin", "g++"]),
        ("/usr/bin/ccache distcc clang++ -O1", ["-ccbin", "clang++"]),
    ],
)
def test_nvcc_is_given_the_compiler_and_not_what_starts_it(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, taken: list[str]
) -> None:
    if asked is not None:
        monkeypatch.setenv("CXX", asked)
    assert _build._host_compiler() == taken


@pytest.mark.parametrize("name", ["$HOME", "a`b", 'a"b', "a\\b"])
def test_a_folder_that_nvcc_cannot_work_in_is_named(tmp_path: Path, name: str) -> None:
    nvcc = script(tmp_path / "nvcc", f"touch {tmp_path}/called")
    with pytest.raises(_build.BuildProblem, match="cannot compile in") as caught:
        _build.compile_cuda_objects(CUDA_TORCH, nvcc, [], tmp_path / name, print)
    assert str(tmp_path / name) in caught.value.problem and not (tmp_path / "called").exists()


# ---- real installs, each into an environment of its own that borrows this one's torch


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that builds share their objects and leave no trace here."""
    copy = tmp_path_factory.mktemp("tree") / "vaekernels"
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.egg-info", "*.so", "_build.json", "__pycache__"
    )
    shutil.copytree(REPOSITORY, copy, ignore=ignored)
    return copy


class Environment:
    def __init__(self, folder: Path, *, with_torch: bool = True) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.folder, self.python = folder, folder / "bin" / "python"
        if with_torch:
            self.lend_torch()

    def lend_torch(self) -> None:
        inside = next((self.folder / "lib").glob("python*/site-packages"))
        (inside / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def pip(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-deps", "-v"]
        return self._run([*command, "--ignore-installed", *arguments], variables)

    def vaekernels(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self._run([str(self.python), "-m", "vaekernels", *arguments], variables)

    def doctor(self) -> dict[str, dict[str, str | None]]:
        facts: dict[str, dict[str, str | None]] = json.loads(self.vaekernels("doctor", "--json").stdout)
        return facts

    def _run(self, command: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache"), **variables}
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True)


@pytest.mark.slow
def test_install_with_isolation_compiles_against_the_users_torch(tree: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    result = environment.pip(str(tree), VAEKERNELS_BUILD="1")
    assert result.returncode == 0, result.stdout[-4000:]
    assert environment.doctor()["cpu"] == {"kernels": True, "reason": None, "log": None}


@pytest.mark.slow
def test_install_without_isolation(tree: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    result = environment.pip("--no-build-isolation", str(tree), VAEKERNELS_BUILD="1")
    assert result.returncode == 0, result.stdout[-4000:]
    assert environment.doctor()["cpu"]["kernels"]


@pytest.mark.slow
def test_install_without_a_compiler(tree: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    result = environment.pip(str(tree), CXX="false")
    assert result.returncode == 0, result.stdout[-4000:]
    assert "CXX=false" in str(environment.doctor()["cpu"]["reason"])
    code = "import torch, vaekernels; vaekernels.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3))"
    shown = subprocess.run([environment.python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "FallbackWarning" in shown.stderr and "CXX=false" in shown.stderr
    strict = environment.pip(str(tree), CXX="false", VAEKERNELS_BUILD="1")
    assert strict.returncode != 0 and "VAEKERNELS_BUILD=1" in strict.stdout + strict.stderr


@pytest.mark.slow
def test_install_before_torch_then_vaekernels_build(tree: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path, with_torch=False)
    result = environment.pip(str(tree))
    assert result.returncode == 0, result.stdout[-4000:]
    environment.lend_torch()
    cpu = environment.doctor()["cpu"]
    assert not cpu["kernels"]
    assert "torch was not installed" in str(cpu["reason"])
    assert "vaekernels build" in str(cpu["reason"]) and "--no-build-isolation" in str(cpu["reason"])
    built = environment.vaekernels("build")
    assert built.returncode == 0, built.stdout + built.stderr
    assert environment.doctor()["cpu"]["kernels"]


@pytest.mark.slow
def test_editable_install(tree: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    try:
        result = environment.pip("--no-build-isolation", "-e", str(tree), VAEKERNELS_BUILD="1")
        assert result.returncode == 0, result.stdout[-4000:]
        facts = environment.doctor()
        assert facts["cpu"]["kernels"] and facts["package"] == str(tree / "vaekernels")
    finally:
        _build.clear(tree / "vaekernels")


@pytest.mark.slow
def test_sdist_to_wheel(tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (source,) = tmp_path.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, env={**os.environ, "VAEKERNELS_BUILD": "0"})
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(p.relative_to(REPOSITORY)) for p in REPOSITORY.glob("csrc/**/*") if p.is_file()}
    assert {f"vaekernels/{name}" for name in ours} <= inside
    modules = {str(p.relative_to(REPOSITORY)) for p in REPOSITORY.glob("vaekernels/**/*.py")}
    data = {"vaekernels/py.typed", "vaekernels/collapse/report.html.j2", "vaekernels/_build.json"}
    assert modules | data <= inside
    assert not [name for name in inside if name.endswith(".so") or name.startswith("tests")]
    assert any(name.endswith("licenses/LICENSE") for name in inside)
