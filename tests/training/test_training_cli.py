"""The command `train`."""

from __future__ import annotations

import io
import json
import random
import signal
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("typer", reason="the trainer needs vaekernels[train]")
pytest.importorskip("rich", reason="the trainer needs vaekernels[train]")

import numpy as np
import torch
from rich.console import Console
from tiny_runs import (
    epochs_of,
    tiny_data,  # noqa: F401 (the fixture)
    tiny_images,
)
from typer.testing import CliRunner

from vaekernels.collapse import Estimate
from vaekernels.training import checkpoint, display
from vaekernels.training import data as datasets
from vaekernels.training.cli import app
from vaekernels.training.config import DataConfig
from vaekernels.training.data import Data
from vaekernels.training.errors import CheckpointError
from vaekernels.training.evaluate import Evaluation
from vaekernels.training.latents import ELBO
from vaekernels.training.run import CHECKPOINT, CONFIG, METRICS

pytestmark = [
    pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning"),
    pytest.mark.usefixtures("tiny_data"),
]


# --- the command line

SMALL = ["--epochs", "2", "--latent-dim", "3", "--batch-size", "32", "--device", "cpu"]
SMALL += ["--set", "engine.tensorboard=false"]


def call(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code == status, result.output
    return result.output


@pytest.mark.parametrize("name", ["docstrings", "digits"])
def test_train_prints_and_keeps_the_evaluation(name: str) -> None:
    output = call(
        "train", name, *SMALL, "--free-bits", "0.2", "--beta", "0.5", "--anneal", "1", "--out", "run"
    )
    assert "weight: 0 to 0.5" in output and "effective beta = 0.5" in output
    assert "free bits: 0.2 nats per dimension (0.6 in all)" in output
    assert "sum over" in output and "likelihood" in output
    assert "rate (KL, unclamped)" in output and "active units" in output and "dims 0-2" in output
    assert max(map(len, output.splitlines())) <= 80
    metrics = json.loads(Path("run", METRICS).read_text())
    assert metrics["settings"]["objective"]["free_bits"] == 0.2
    assert metrics["effective_beta"] == 0.5
    assert len(metrics["data"]["sha256"]) == 64
    heldout = metrics["heldout"]
    assert len(heldout["rate_per_dim"]) == 3
    told = f"the bound on I(x;z), after every epoch, took {metrics['mi_seconds']:.2f} s"
    assert told in " ".join(output.split()) and 0 < metrics["mi_seconds"] < metrics["seconds"]
    assert (
        heldout["delta_shuffle"]["low"]
        <= heldout["delta_shuffle"]["value"]
        <= heldout["delta_shuffle"]["high"]
    )
    assert heldout["nelbo"] == pytest.approx(heldout["nll"] + heldout["rate"])


def test_train_then_resume() -> None:
    call("train", "digits", *SMALL, "--run-dir", "run")
    call("train", "--resume", "run", "--epochs", "3")
    assert epochs_of(Path("run")) == [1, 2, 3]
    message = call("train", "--resume", "run", "--beta", "2", "--seed", "5", status=2)
    assert (
        "objective.beta = 1.0, not 2.0, engine.seed = 0, not 5; a resumed run keeps its settings" in message
    )
    assert "already holds a run" in call("train", "digits", *SMALL, "--run-dir", "run", status=1)
    assert "leave out the preset and --config" in call("train", "docstrings", "--resume", "run", status=2)


def test_runs_that_begin_in_one_second_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20250101-000000")
    for seed in "123":
        call("train", "digits", *SMALL, "--seed", seed)
    for number, seed in (("", 1), ("-2", 2), ("-3", 3)):
        run = Path("runs", f"digits-20250101-000000{number}")
        assert f"seed = {seed}\n" in (run / CONFIG).read_text() and epochs_of(run) == [1, 2]


def test_ctrl_c_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    forward = ELBO.forward

    def interrupted(self: ELBO, *arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *arguments)

    monkeypatch.setattr(ELBO, "forward", interrupted)
    assert "stopped at step 3, all saved; to go on: vaekernels train --resume run" in call(
        "train", "digits", *SMALL, "--run-dir", "run", status=130
    )
    call("train", "--resume", "run")
    assert epochs_of(Path("run")) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["mnist"], 2, "error: unknown preset 'mnist'; known: docstrings, "),
        (["docstring"], 2, "error: unknown preset 'docstring'; did you mean docstrings?"),
        ([], 2, "error: name a preset: docstrings, "),
        (
            ["digits", "--set", "objective.bta=1"],
            2,
            "error: unknown setting objective.bta; did you mean objective.beta?",
        ),
        (["digits", "--set", "beta"], 2, "error: --set takes TABLE.KEY=VALUE"),
        (["digits", "--config", "no.toml"], 2, "error: cannot read no.toml: No such file or directory"),
        (
            ["digits", "--config", "bad.toml"],
            2,
            "error: bad.toml: unknown setting modle; did you mean model?",
        ),
        (
            ["digits", "--beta", "2", "--set", "objective.pi_target=4"],
            2,
            "error: objective.beta has no meaning with",
        ),
        (
            ["digits", "--set", "model.kind=gru"],
            2,
            "error: model.kind 'gru' is for text, data 'digits' is 4x4 images",
        ),
        (["idx:no/such"], 1, "error: cannot read no/such: No such file or directory"),
        (["digits", "--beta", "-1"], 2, "error: beta must be at least 0, got -1.0"),
        (
            ["digits", "--clamp", "row", "--free-bits", "1"],
            2,
            "error: clamp must be one of batch, sample; got 'row'",
        ),
        (["digits", "--free-bits", "nan"], 2, "error: free_bits must be finite, got nan"),
        (["digits", "--threads", "0"], 2, "error: threads must be at least 1, got 0"),
        (["digits", "--device", "gpu"], 2, "error: device must be one of auto, cpu, cuda, mps; got 'gpu'"),
        (["--resume", "nowhere"], 1, "error: no run in nowhere (it has no config.toml)"),
        (
            ["digits", "--resume", "a", "--run-dir", "b"],
            2,
            "error: --resume goes on in the folder of the run",
        ),
        (["digits", "--run-dir", "file/run"], 1, "error: cannot make file/run: Not a directory"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments: list[str], status: int, message: str) -> None:
    Path("file").write_text("")
    Path("bad.toml").write_text("modle.kind = 'mlp'")
    output = call("train", *arguments, status=status)
    assert output.startswith(message) and len(output.splitlines()) == 1
    assert not Path("runs").exists()


def sealed(state: object, path: Path) -> None:
    torch.save(state, path)
    checkpoint.seal(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no checkpoint at"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is damaged or no checkpoint"),
        (lambda path: path.write_bytes(b"hello"), "is damaged or no checkpoint"),
        (lambda path: path.write_bytes(b""), "is damaged or no checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "it has no checksum at its end"),
        (lambda path: torch.save(torch.load(path), path), "it has no checksum at its end"),
        (lambda path: sealed({"model": {}}, path), "is not a vaekernels checkpoint of format 5"),
        (lambda path: sealed(Path("evil"), path), "is damaged or no checkpoint"),
    ],
)
def test_bad_checkpoints(damage: Callable[[Path], object], message: str) -> None:
    call("train", "digits", *SMALL, "--run-dir", "run")
    damage(Path("run", CHECKPOINT))
    output = call("train", "--resume", "run", status=1)
    assert message in output and len(output.splitlines()) == 1


def test_a_byte_that_changed_anywhere_in_a_checkpoint_is_noticed() -> None:
    call("train", "digits", *SMALL, "--run-dir", "run")
    path = Path("run", CHECKPOINT)
    whole = path.read_bytes()
    assert zipfile.ZipFile(path).comment.startswith(b"sha256:"), "still a zip archive like any other"
    draw = random.Random(0)
    ends = [*range(64), *range(len(whole) - 256, len(whole))]
    for position in (*ends, *draw.sample(range(len(whole)), 400)):
        spoilt = bytearray(whole)
        spoilt[position] ^= 1 << draw.randrange(8)
        path.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match=r"run/checkpoint\.pt is damaged"):
            checkpoint.load(path)
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2] ^= 1
    path.write_bytes(spoilt)
    for command in (("train", "--resume", "run"), ("diagnose", "run", "-n", "8")):
        output = call(*command, status=1)
        assert output.startswith("error: run/checkpoint.pt is damaged: its checksum does not match")
        assert len(output.splitlines()) == 1
    path.write_bytes(whole)
    call("train", "--resume", "run")


def test_a_checkpoint_of_other_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    call("train", "digits", *SMALL, "--run-dir", "run")

    def other(config: DataConfig, say: Callable[[str], None]) -> Data:
        return replace(tiny_images(config, say), sha256="f" * 64)

    monkeypatch.setitem(datasets.DATASETS, "digits", other)
    assert "was trained on other digits data" in call("train", "--resume", "run", status=1)


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    call("train", "digits", *SMALL, "--run-dir", "run")
    path = Path("run", CHECKPOINT)
    state = torch.load(path, weights_only=True)
    del state["model"]["decoder.net.0.weight"]
    sealed(state, path)
    assert "does not fit run/config.toml" in call("train", "--resume", "run", status=1).replace("\n", " ")


def test_a_config_changed_under_the_run_is_refused() -> None:
    call("train", "digits", *SMALL, "--run-dir", "run")
    path = Path("run", CONFIG)
    path.write_text(path.read_text().replace("latent_dim = 3", "latent_dim = 4"))
    assert "model.latent_dim = 3, not 4" in call("train", "--resume", "run", status=2)
    path.write_text("[data")
    assert "error: run/config.toml is not a TOML file" in call("train", "--resume", "run", status=2)


def test_settings_come_from_preset_file_options_and_set_in_this_order() -> None:
    lines = "model.kind = 'row-gru'", "model.latent_dim = 5", "optim.lr = 0.01", "objective.beta = 3"
    Path("mine.toml").write_text("\n".join([*lines, "objective.free_bits = 1"]))
    arguments = ["--config", "mine.toml", *SMALL, "--beta", "2", "--set", "objective.free_bits=0.5"]
    call("train", "digits", *arguments, "--run-dir", "run")
    settings = json.loads(Path("run", METRICS).read_text())["settings"]
    assert settings["data"]["name"] == "digits" and settings["model"]["likelihood"] == "bernoulli"
    assert settings["model"]["kind"] == "row-gru" and settings["optim"]["lr"] == 0.01
    assert settings["model"]["latent_dim"] == 3, "an option is over the file"
    assert (settings["objective"]["beta"], settings["objective"]["free_bits"]) == (2.0, 0.5)
    # the file a run keeps is a config like any other
    call("train", "--config", "run/config.toml", "--run-dir", "again")
    assert Path("again", CONFIG).read_text() == Path("run", CONFIG).read_text()
    first, second = (json.loads(Path(run, METRICS).read_text())["heldout"] for run in ("run", "again"))
    assert first == second


def test_a_reduction_mismatch_is_warned_about() -> None:
    output = call("train", "digits", *SMALL, "--set", "objective.reconstruction=mean", "--run-dir", "run")
    assert "so effective beta = 16" in output.replace("\n", " ")
    assert "warning: the reconstruction is a mean over 16 data dims" in output.replace("\n", " ")


def test_own_files_train_from_the_command_line() -> None:
    Path("corpus.txt").write_text("\n".join(f"word {i % 7} and word {i % 5}" for i in range(60)))
    output = call("train", "text:corpus.txt", *SMALL, "--set", "model.hidden=8")
    assert "text:corpus.txt: 54 + 6 held-out sentences" in output.replace("\n", " ")
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("text-corpus.txt-") and (run / METRICS).is_file()


def test_a_folder_that_cannot_be_written_is_one_line() -> None:
    Path("file").write_text("")
    assert call("train", "digits", *SMALL, "--run-dir", "file/run", status=1) == (
        "error: cannot make file/run: Not a directory\n"
    )


def test_a_run_finds_its_data_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they were moved and the new place is given; data that have changed are refused."""
    np.savez("x.npz", x=np.random.default_rng(0).random((60, 6)) > 0.5)
    call("train", "npz:x.npz", *SMALL, "--run-dir", "run")
    run = str(Path("run").absolute())
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    call("train", "--resume", run, "--epochs", "3")
    call("diagnose", run, "-n", "54", "-k", "3", "--no-train")
    moved = (tmp_path / "x.npz").rename(tmp_path / "y.npz")
    assert f"the data of {run} are no longer at {tmp_path}/x.npz; if they were moved" in call(
        "train", "--resume", run, "--epochs", "4", status=1
    )
    call("train", "--resume", run, "--epochs", "4", "--set", f"data.name=npz:{moved}")
    call("diagnose", run, "-n", "54", "-k", "3", "--no-train")
    np.savez(moved, x=np.random.default_rng(1).random((60, 6)) > 0.5)
    said = call("train", "--resume", run, "--epochs", "5", status=1)
    assert f"{moved} has changed since {run} was trained on it" in said
    assert "has changed since" in call("diagnose", run, status=1)


def test_a_finished_run_says_so_and_is_not_shortened() -> None:
    call("train", "digits", *SMALL, "--run-dir", "run")
    said = call("train", "--resume", "run").replace("\n", " ")
    assert "this run is finished: all 2 epochs are trained; to train longer, --epochs 4" in said
    said = call("train", "--resume", "run", "--epochs", "1", status=2)
    assert (
        said.startswith("error: the run in run has trained 2 epochs, epochs is 1") and said.count("\n") == 1
    )
    assert "optim]" in Path("run", CONFIG).read_text() and "epochs = 2" in Path("run", CONFIG).read_text()


def test_help_shows_the_defaults_of_the_presets() -> None:
    said = " ".join(call("train", "--help").replace("│", " ").split())
    assert "Latent dimensions (default: 16; synthetic-text 2, digits 8" in said
    assert "channel (of model.latent_channels)" in said and "docs/" not in said


def test_a_damaged_checkpoint_is_no_reason_to_run_code_from_it() -> None:
    call("train", "digits", *SMALL, "--run-dir", "run")
    sealed({"config": Path("evil")}, Path("run", CHECKPOINT))
    said = call("train", "--resume", "run", status=1)
    assert "is damaged or no checkpoint (UnpicklingError)" in said and "weights_only" not in said


@pytest.mark.parametrize("width", [60, 80, 100, 132, 200])
@pytest.mark.parametrize("dims", [1, 16, 128])
def test_tables_fit_the_terminal(width: int, dims: int) -> None:
    """Without an ellipsis, whatever the size of the numbers."""
    for size in (1.0, 29.31, 12345.67):
        estimate = Estimate(63557.7 * size, -54.03, 863.17)
        evaluation = Evaluation(
            30, 6.5, 63557.7 * size, 64e3, estimate, 16, estimate, (size,) * dims, (size,) * dims
        )
        file = io.StringIO()
        console = Console(file=file, width=width)
        for each in display.evaluation_tables(evaluation, width):
            console.print(each)
        lines = file.getvalue().splitlines()
        assert max(map(len, lines)) <= width and "…" not in file.getvalue()
        assert sum(line.count(f" {size:.2f} ") for line in lines) == 2 * dims


def test_lines_in_a_file_are_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, lines in ((None, 1), ("80", 3)):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns:
            monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr(sys, "stdout", file := io.StringIO())
        display.console().print("word " * 40)
        assert len(file.getvalue().splitlines()) == lines
