"""The commands `doctor` and `build`, and the hand-over of the others to the trainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

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
    for command in ("doctor", "build", *cli.TRAIN_COMMANDS):
        assert command in shown
    assert cli.main([]) == 2
