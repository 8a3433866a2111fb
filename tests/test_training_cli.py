"""The commands `train` and `demo`."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("typer", reason="the trainer needs vaekernels[train]")
pytest.importorskip("rich", reason="the trainer needs vaekernels[train]")

import torch
from tiny_runs import (
    log_of,
    tiny_data,  # noqa: F401 (the fixture)
    tiny_images,
)
from typer.testing import CliRunner

from vaekernels.collapse import Estimate
from vaekernels.training import data as datasets
from vaekernels.training import demo
from vaekernels.training.cli import app
from vaekernels.training.config import (
    DataConfig,
    ModelConfig,
)
from vaekernels.training.data.base import Data
from vaekernels.training.evaluate import evaluate
from vaekernels.training.loop import CHECKPOINT, CONFIG, METRICS
from vaekernels.training.models import ELBO, build

pytestmark = [
    pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning"),
    pytest.mark.usefixtures("tiny_data"),
]


# --- the command line

SMALL = ["--epochs", "2", "--latent-dim", "3", "--batch-size", "32", "--device", "cpu"]


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
    assert "rate (KL, unclamped)" in output and "active units" in output and "dims 0-2" in output
    assert max(map(len, output.splitlines())) <= 80
    metrics = json.loads(Path("run", METRICS).read_text())
    assert metrics["settings"]["objective"]["free_bits"] == 0.2
    assert metrics["settings"]["effective_beta"] == 0.5
    assert len(metrics["data"]["sha256"]) == 64
    heldout = metrics["heldout"]
    assert len(heldout["rate_per_dim"]) == 3
    assert (
        heldout["delta_shuffle"]["low"]
        <= heldout["delta_shuffle"]["value"]
        <= heldout["delta_shuffle"]["high"]
    )
    assert heldout["nelbo"] == pytest.approx(heldout["nll"] + heldout["rate"])


def test_train_then_resume() -> None:
    call("train", "digits", *SMALL, "--run-dir", "run")
    call("train", "--resume", "run", "--epochs", "3")
    assert [line["epoch"] for line in log_of(Path("run"))] == [1, 2, 3]
    message = call("train", "--resume", "run", "--beta", "2", "--seed", "5", status=2)
    assert (
        "objective.beta = 1.0, not 2.0, engine.seed = 0, not 5; a resumed run keeps its settings" in message
    )
    assert "already holds a run" in call("train", "digits", *SMALL, "--run-dir", "run", status=1)
    assert "data.name = 'digits', not 'docstrings'" in call(
        "train", "docstrings", "--resume", "run", status=2
    )


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
    assert len(log_of(Path("run"))) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["mnist"], 1, "error: unknown data set 'mnist'; known: docstrings, digits"),
        ([], 1, "error: name a data set: docstrings, digits"),
        (["digits", "--beta", "-1"], 2, "error: beta must be at least 0, got -1.0"),
        (["digits", "--clamp", "row"], 2, "error: clamp must be one of batch, sample; got 'row'"),
        (["digits", "--free-bits", "nan"], 2, "error: free_bits must be finite, got nan"),
        (["digits", "--threads", "0"], 2, "error: threads must be at least 1, got 0"),
        (["digits", "--device", "gpu"], 2, "error: device must be one of auto, cpu, cuda, mps; got 'gpu'"),
        (["--resume", "nowhere"], 1, "error: no run in nowhere (it has no config.json)"),
        (
            ["digits", "--resume", "a", "--run-dir", "b"],
            2,
            "error: --resume goes on in the directory of the run",
        ),
        (["digits", "--run-dir", "file/run"], 1, "error: cannot make file/run: Not a directory"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments: list[str], status: int, message: str) -> None:
    Path("file").write_text("")
    output = call("train", *arguments, status=status)
    assert output.startswith(message) and len(output.splitlines()) == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no checkpoint at"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is damaged or no checkpoint"),
        (lambda path: path.write_bytes(b"hello"), "is damaged or no checkpoint"),
        (lambda path: torch.save({"model": {}}, path), "is not a vaekernels checkpoint of format 1"),
        (lambda path: torch.save(Path("evil"), path), "is damaged or no checkpoint"),
    ],
)
def test_bad_checkpoints(damage: Callable[[Path], object], message: str) -> None:
    call("train", "digits", *SMALL, "--run-dir", "run")
    damage(Path("run", CHECKPOINT))
    output = call("train", "--resume", "run", status=1)
    assert message in output and len(output.splitlines()) == 1


def test_a_checkpoint_of_other_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    call("train", "digits", *SMALL, "--run-dir", "run")

    def other(config: DataConfig, say: Callable[[str], None]) -> Data:
        return replace(tiny_images(config, say), sha256="f" * 64)

    monkeypatch.setitem(datasets.DATASETS, "digits", other)
    assert "was trained on other digits data" in call("train", "--resume", "run", status=1)


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    call("train", "digits", *SMALL, "--run-dir", "run")
    config = json.loads(Path("run", CONFIG).read_text())
    config["model"]["hidden"] = 7
    Path("run", CONFIG).write_text(json.dumps(config))
    assert "does not fit run/config.json" in call("train", "--resume", "run", status=1).replace("\n", " ")


def test_demo_compares_two_runs_side_by_side() -> None:
    output = call("demo", "--epochs", "1", "--run-dir", "demo")
    for part in (
        "beta 1",
        "free bits 0.25",
        "active units",
        "Δ_shuffle",
        "NELBO",
        "distinct among 200 prior samples",
    ):
        assert part in output
    assert max(map(len, output.splitlines())) <= 80
    assert (Path("demo", "beta-1", METRICS)).is_file() and (Path("demo", "free-bits-0.25", METRICS)).is_file()
    both = [json.loads(Path("demo", run, CONFIG).read_text()) for run in ("beta-1", "free-bits-0.25")]
    assert [config["objective"].pop("free_bits") for config in both] == [None, 0.25]
    assert both[0] == both[1], "the two runs differ in free bits alone"


def test_unknown_demo_lists_the_known() -> None:
    assert "error: unknown demo 'mnist'; known: docstrings" in call("demo", "mnist", status=2)


def test_the_closing_words_follow_the_figures() -> None:
    delta = Estimate
    data = datasets.load(DataConfig("docstrings"), lambda text: None)
    base = evaluate(build(ModelConfig(latent_dim=3, hidden=8, embedding=4), data), data.heldout)

    def outcome(title: str, value: float, nelbo: float, samples: list[str]) -> demo.Outcome:
        measured = replace(base, delta_shuffle=delta(value, value - 0.01, value + 0.01), nelbo=nelbo)
        return demo.Outcome(title, measured, 1.0, [], samples)

    dead, alive = outcome("beta 1", 0.0, 50.0, ["a"] * 3), outcome("free bits", 5.0, 52.0, ["a", "b", "c"])
    cured = demo.conclusion(dead, alive)
    assert cured.startswith("The first model has collapsed.")
    assert "its decoder ignores z" in cured and "its decoder uses z" in cured
    assert "3 prior samples give 1 distinct sentence." in cured
    assert cured.endswith("The cure costs likelihood: its NELBO is 2.00 nats per sentence worse.")
    assert demo.conclusion(dead, dead).endswith(
        "have not cured it in this run. The NELBO changes by +0.00 nats per sentence."
    )
    assert demo.conclusion(alive, alive).startswith("The first model has not collapsed in this run.")
