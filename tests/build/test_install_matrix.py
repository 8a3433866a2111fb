"""The install matrix takes too long for `make test`; here, that its parts fit together and can fail."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "install_matrix"
TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "install-matrix.md"


@pytest.fixture(scope="module")
def runner() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("runner")
    finally:
        sys.path.remove(str(FOLDER))


def test_every_cell_is_in_the_table_with_its_approved_words(runner: ModuleType) -> None:
    table = TABLE.read_text(encoding="utf-8")
    rows = {}
    for cell in runner.CELLS:
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {cell.title} | ")]
        rows[cell.name] = row.split(" | ")[1]
    assert all(row in ("works", "not possible here", f"[message](#{name})") for name, row in rows.items())
    approved = {file.stem: file.read_text(encoding="utf-8") for file in runner.APPROVED.glob("*.txt")}
    assert set(approved) == {name for name, row in rows.items() if row.startswith("[message]")}
    assert all(text.rstrip() in table for text in approved.values())


def test_other_words_than_the_approved_ones_fail(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "APPROVED", tmp_path)
    (tmp_path / "no-nvcc.txt").write_text("nvcc was not found. Install it.\n")
    told = {"text": "nvcc was not found. Install it.\n"}
    cell = runner.Cell("no-nvcc", "no nvcc", lambda matrix: runner.Outcome("torch", told["text"]))
    assert runner.attempt(cell, None, approve=False).status == "message"
    told["text"] = "nvcc was not found.\n"
    changed = runner.attempt(cell, None, approve=False)
    assert changed.status == "FAILED" and "-nvcc was not found. Install it." in changed.problem
    assert runner.attempt(cell, None, approve=True).status == "message"
    works = runner.Cell("no-nvcc", "no nvcc", lambda matrix: runner.Outcome("torch"))
    assert "remove it" in runner.attempt(works, None, approve=False).problem


def test_a_traceback_or_another_exit_status_fails(runner: ModuleType, tmp_path: Path) -> None:
    environments = importlib.import_module("environments")
    matrix = environments.Matrix(tmp_path)
    assert matrix.run([sys.executable, "-c", "print('fine')"]) == "fine\n"
    with pytest.raises(environments.Failed, match="a traceback"):
        matrix.run([sys.executable, "-c", "1 / 0"], status=None)
    with pytest.raises(environments.Failed, match="exit status 3 in place of 0"):
        matrix.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_what_the_caller_has_set_reaches_no_cell(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environments = importlib.import_module("environments")
    for name in ("CUDA_HOME", "CXX", "TORCH_CUDA_ARCH_LIST", "VAEKERNELS_BUILD", "PYTHONPATH"):
        monkeypatch.setenv(name, "set by the caller")
    code = "import os; print([k for k, v in os.environ.items() if v == 'set by the caller'])"
    assert environments.Matrix(tmp_path).run([sys.executable, "-c", code]) == "[]\n"
