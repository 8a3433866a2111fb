"""The commands at their edges: what the user's text may hold, what the terminal can show, Ctrl-C."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("typer", reason="the trainer needs vaekernels[train]")
pytest.importorskip("rich", reason="the trainer needs vaekernels[train]")

import numpy as np
from rich.console import Console
from rich.table import Table
from tiny_runs import tiny_data  # noqa: F401 (the fixture)
from typer.testing import CliRunner

import vaekernels
from vaekernels.training import checkpoint, diagnosis, display, waiting
from vaekernels.training import demo as demos
from vaekernels.training.cli import app
from vaekernels.training.demo.demos import Part, _left
from vaekernels.training.demo.outcome import Variant

PACKAGE = Path(vaekernels.__file__).parent
RICH = ["[red]", "[/red]", "[bold]x[/]", "[/nothing]", "[link=http://x]y[/link]", ":warning:"]

SMALL = ["--epochs", "1", "--latent-dim", "2", "--batch-size", "32", "--device", "cpu"]
SMALL += ["--set", "engine.tensorboard=false", "--set", "model.hidden=4", "--threads", "1"]


def call(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


# --- rich markup in the user's text


@pytest.mark.usefixtures("tiny_data")
@pytest.mark.parametrize("text", RICH[:4])
def test_paths_are_printed_as_they_are(text: str) -> None:
    corpus, run, other = Path(f"{text}.txt"), Path(f"runs{text}"), Path(f"no{text}")
    corpus.parent.mkdir(parents=True, exist_ok=True)
    corpus.write_text("\n".join(f"{text} {i % 7} [/b] x" for i in range(60)))
    output = call("train", f"text:{corpus}", *SMALL, "--out", str(run))
    assert f"text:{corpus}: 54 + 6 held-out" in output and f"all of it is in {run}" in output
    assert f"with pictures: {run}/report.html" in call("diagnose", str(run), "-n", "20", "-k", "2")
    assert f"{run} already holds a run" in call("train", "digits", *SMALL, "--out", str(run), status=1)
    assert f"cannot read {other}: No such" in call("train", f"idx:{other}", status=1)
    assert f"no run in {other} " in call("diagnose", str(other), status=1)
    assert f"{text!r}" in call("train", text, status=2)
    assert f"{text!r}" in call("train", "digits", "--set", text, status=2)
    assert f"{text!r}" in call("demo", text, status=2)
    assert text in call("train", "digits", text, status=2)
    assert text in call(text, status=2)


@pytest.mark.usefixtures("tiny_data")
def test_a_demo_prints_sentences_and_paths_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    given = "model.latent_dim=2 model.hidden=4"
    parts = (Part("[/red] title", (Variant("[red]a[/red]", "docstrings", given),)),)
    monkeypatch.setitem(demos.DEMOS, "docstrings", parts)
    few = diagnosis.diagnose
    monkeypatch.setattr(diagnosis, "diagnose", lambda run, **kw: few(run, **{**kw, "n": 20, "k": 2}))
    output = call("demo", "docstrings", "--epochs", "1", "--out", "x[/red]")
    for shown in (
        "[/red] title: nats",
        "1 of 1: [red]a[/red]",
        "side by side, with pictures: x[/red]/demo.html",
    ):
        assert shown in output


@pytest.mark.parametrize("text", RICH)
def test_the_console_shows_text_as_it_is(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console = display.console()
    table = Table(text, title=text)
    table.add_row(text)
    console.print(text)
    console.print(table)
    assert sys.stdout.getvalue().count(text) == 4  # type: ignore[attr-defined]


def test_every_console_and_column_prints_text_as_it_is() -> None:
    """A console made anywhere else, or a column of a progress bar, would read markup."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                plain = {"Console": {"markup", "emoji"}, "TextColumn": {"markup"}}.get(name, set())
                off = {
                    k.arg
                    for k in node.keywords
                    if isinstance(k.value, ast.Constant) and k.value.value is False
                }
                if not plain <= off or name in ("from_markup", "Prompt", "rprint"):
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []


# --- terminals and pipes that are not UTF-8


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    np.savez(folder / "x.npz", x=np.random.default_rng(0).random((60, 6)) > 0.5)
    return folder


def command(*arguments: str, encoding: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    run = [sys.executable, "-m", "vaekernels", *arguments]
    where = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": where}
    return subprocess.run(run, capture_output=True, cwd=folder, env=environment, timeout=300)


@pytest.mark.parametrize("encoding", [pytest.param("cp1252", marks=pytest.mark.slow), "ascii"])
def test_output_that_is_not_utf_8(encoding: str, vectors: Path) -> None:
    run = vectors / f"run-{encoding}"
    train = command("train", "npz:x.npz", *SMALL, "--out", run.name, encoding=encoding, folder=vectors)
    assert train.returncode == 0, train.stderr.decode()
    assert "\\u0394_shuffle" in train.stdout.decode(encoding) and (run / "metrics.json").exists()
    diagnose = command("diagnose", run.name, "-n", "54", "-k", "2", encoding=encoding, folder=vectors)
    assert diagnose.returncode == 0, diagnose.stderr.decode()
    assert "\\u0394_shuffle" in diagnose.stdout.decode(encoding) and (run / "report.html").exists()
    assert command("train", "--help", encoding=encoding, folder=vectors).returncode == 0


def test_bytes_of_a_path_that_are_not_utf_8(vectors: Path) -> None:
    run = os.fsdecode(b"caf\xe9")
    shown = command("train", "npz:x.npz", *SMALL, "--out", run, encoding="utf-8", folder=vectors)
    assert shown.returncode == 0, shown.stderr.decode()
    assert b"all of it is in caf\\udce9" in shown.stdout
    refused = command("train", f"text:{run}/x", *SMALL, encoding="utf-8", folder=vectors)
    assert refused.returncode == 2
    assert refused.stderr == b"error: name must be UTF-8, got 'text:caf\\udce9/x'\n"


class Closed(io.TextIOBase):
    """A standard output that cannot be written."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.usefixtures("tiny_data")
def test_an_epoch_is_saved_before_it_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: (save(*given), done.append("saved")))
    monkeypatch.setattr(Console, "print", lambda self, *given, **options: done.append(str(given[:1])))
    call("train", "digits", *SMALL, "--out", "run")
    line = next(number for number, what in enumerate(done) if "epoch 1/1" in what)
    assert done.index("saved") < line


@pytest.mark.usefixtures("tiny_data")
def test_a_report_is_saved_before_it_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    call("train", "digits", *SMALL, "--out", "run")
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit):
        app(["diagnose", "run", "-n", "20", "-k", "2"])
    assert Path("run", "report.json").exists() and Path("run", "report.html").exists()


# --- progress


def test_what_takes_long_has_a_bar_with_the_time_left_on_a_terminal() -> None:
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(
            file=file, force_terminal=terminal, width=80, markup=False, emoji=False, highlight=False
        )
        assert list(waiting.tracked([1, 2, 3], "reading [red]", console)) == [1, 2, 3]
        assert ("reading [red]" in file.getvalue()) == terminal == ("3/3" in file.getvalue())


def test_a_demo_says_how_long_it_takes() -> None:
    assert _left(0.0, 0, 6) == ""
    assert _left(20.0, 2, 6) == " (about 40 s left)"
    assert _left(100.0, 1, 6) == " (about 8 minutes left)"
