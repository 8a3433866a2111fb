"""The commands `doctor` and `build`, and the hand-over of the others to the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import _vaekernels_command
import vaekernels
from vaekernels import _build, _native, cli


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == _build.VERSION
    assert facts["torch"]["version"] == torch.__version__ and facts["torch"]["cuda"] == torch.version.cuda
    for device in ("cpu", "cuda"):
        assert facts[device]["kernels"] == _native.has_kernels(device)
        assert facts[device]["reason"] == _native.explain(device)
    assert set(facts["train"]) == set(cli.TRAIN_MODULES)
    assert (facts["library_folder"] is None) == (_native.C is None) == (facts["build_info"] is None)
    complete = _native.has_kernels("cpu") and (torch.version.cuda is None or _native.has_kernels("cuda"))
    assert status == (0 if complete else 1)


def test_doctor_shows_the_reason_and_the_failed_build(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = _build.Library(
        problem="c++ failed on csrc/ops.cpp", remedy="Mend it", log="ops.cpp:3: error: no"
    )
    _build.Record(_build.VERSION, _build.python_tag(), None, None, library, library).write(tmp_path)
    found = _native.load([tmp_path])
    monkeypatch.setattr(_native, "FOUND", found)
    monkeypatch.setattr(_native, "_AVAILABLE", {"cpu": False, "cuda": False})
    monkeypatch.setattr(_native, "candidates", lambda: [tmp_path])
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "CPU kernels:   no: c++ failed on csrc/ops.cpp. Mend it." in shown
    assert "ops.cpp:3: error: no" in shown


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ((8, 6), "sm_80", True),
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_80 sm_86", False),
        ((9, 0), "sm_80 compute_80", True),
        ((7, 5), "sm_80 compute_80", False),
        ((12, 0), "sm_90 sm_100 compute_100", True),
        ((9, 0), "sm_90a compute_90a", True),
        ((10, 0), "sm_90a compute_90a", False),
        ((10, 3), "compute_100f", True),
        ((12, 0), "compute_100f", False),
    ],
)
def test_which_gpus_a_library_runs_on(capability: tuple[int, int], architectures: str, fits: bool) -> None:
    assert cli.runs_on(capability, architectures) is fits


def test_a_gpu_that_the_library_has_no_code_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = _build.Library("_C_cuda.so", architectures="sm_80 compute_80")
    record = _build.Record(
        _build.VERSION, _build.python_tag(), str(torch.__version__), "13.0", _build.Library("_C.so"), built
    )
    record.write(tmp_path)
    for name in ("_C.so", "_C_cuda.so"):
        (tmp_path / name).touch()
    monkeypatch.setattr(_native, "FOUND", _native.Found(Library(), tmp_path, {"cpu": None, "cuda": None}))
    monkeypatch.setattr(_native, "_AVAILABLE", {"cpu": True, "cuda": True})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(8, 6), (7, 5)][i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ["A10", "T4"][i])
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "GPUs:          A10 (8.6), T4 (7.5)" in shown
    assert "CPU kernels:   yes, for avx2" in shown
    assert "CUDA kernels:  yes, for sm_80 compute_80" in shown
    assert (
        "no code for T4, of compute capability 7.5. Run `TORCH_CUDA_ARCH_LIST=7.5 vaekernels build`" in shown
    )
    assert "A10, of" not in shown
    cli.main(["doctor", "--json"])
    gpus = json.loads(capsys.readouterr().out)["torch"]["gpus"]
    assert gpus == [
        {"name": "A10", "capability": "8.6", "served": True},
        {"name": "T4", "capability": "7.5", "served": False},
    ]


class Library(types.ModuleType):
    """As much of a compiled library as the doctor asks."""

    def __init__(self) -> None:
        super().__init__("_C")

    def build_info(self) -> dict[str, object]:
        return {"torch": str(torch.__version__), "cpu_isa": "avx2"}


def test_a_cache_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli.main(["build"]) == 1
    shown = capsys.readouterr().err
    assert str(tmp_path / "file") in shown and "Set XDG_CACHE_HOME" in shown


def test_the_command_where_torch_is_missing_or_broken(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys, _vaekernels_command as c; sys.exit(c.main())", "doctor"]
    broken = tmp_path / "torch.py"
    for body, words in (
        ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "`pip install torch`"),
        ("raise OSError('libcudart.so.13: cannot open')", "`pip install --force-reinstall torch`"),
    ):
        broken.write_text(body)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
        assert done.stdout == "" and sys.executable in done.stderr


def test_build_shows_the_compilers_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "false")
    assert cli.main(["build"]) == 1
    shown = capsys.readouterr()
    assert "CXX=false does not compile C++20" in shown.out and "exit status 1" in shown.err
    record = _build.Record.read(_build.cache_dir(str(torch.__version__), torch.version.cuda))
    assert record is not None and record.cpu.file is None


def test_a_failed_build_leaves_the_earlier_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _build.cache_dir(str(torch.__version__), torch.version.cuda)
    folder.mkdir(parents=True)
    library = _build.Library("_C.so")
    earlier = _build.Record(
        _build.VERSION, _build.python_tag(), str(torch.__version__), None, library, library
    )
    earlier.write(folder)
    (folder / "_C.so").touch()
    monkeypatch.setenv("CXX", "false")
    assert cli.main(["build"]) == 1
    assert "the earlier build" in capsys.readouterr().err
    assert _build.Record.read(folder) == earlier
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_training_without_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Out of both places where an import is kept, so that the one of this test stays in neither.
    monkeypatch.delattr(vaekernels, "training", raising=False)
    for name in [name for name in sys.modules if name.startswith("vaekernels.training")]:
        monkeypatch.delitem(sys.modules, name)
    # None in sys.modules is how Python marks a module that must not be found.
    monkeypatch.setitem(sys.modules, "typer", None)
    assert cli.main(["train", "digits"]) == 1
    shown = capsys.readouterr().err
    assert "vaekernels train" in shown and "pip install 'vaekernels[train]'" in shown and "typer" in shown


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"vaekernels {_build.VERSION}" in shown
    for command in _vaekernels_command.COMMANDS:
        assert command in shown
    assert cli.main([]) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, "diagnose"),
        (["build", "--help"], 0, "XDG_CACHE_HOME"),
        (["--version"], 0, f"vaekernels {_build.VERSION}"),
        (["docter"], 2, "there is no command 'docter'; did you mean doctor?"),
        (["xyzzy"], 2, "there is no command 'xyzzy'; commands: doctor, build, "),
    ],
)
def test_what_needs_no_torch_is_answered_without_it(
    arguments: list[str], status: int, words: str, tmp_path: Path
) -> None:
    """Nor the trainer's libraries: importing torch takes seconds."""
    for name in ("torch", "typer", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('imported')")
    command = [sys.executable, "-c", "import sys, _vaekernels_command as c; sys.exit(c.main())", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(cli.__file__).parents[1]}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status and words in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert (done.stdout == "") is (status == 2)


def test_the_command_line_of_the_trainer_imports_no_plots() -> None:
    code = (
        "import sys, vaekernels.training.cli; print(sorted({'matplotlib', 'sklearn'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
