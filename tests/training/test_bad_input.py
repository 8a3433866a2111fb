"""Input that nobody means to give: one line on standard error, status 1 or 2, nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("typer", reason="the trainer needs vaekernels[train]")
pytest.importorskip("rich", reason="the trainer needs vaekernels[train]")

import torch
from tiny_runs import settings, tiny_data, trainer  # noqa: F401 (the fixture)
from typer.testing import CliRunner

import vaekernels
from vaekernels import bench, cli
from vaekernels.training import diagnosis, logs
from vaekernels.training.cli import app
from vaekernels.training.config import presets
from vaekernels.training.config import settings as texts
from vaekernels.training.errors import ConfigError
from vaekernels.training.models import build
from vaekernels.training.run import CHECKPOINT, LOG, open_run

pytestmark = pytest.mark.usefixtures("tiny_data")

LONG = "x" * 300
SMALL = ["--epochs", "1", "--latent-dim", "2", "--batch-size", "32", "--device", "cpu"]
SMALL += ["--set", "engine.tensorboard=false", "--set", "model.hidden=4"]


def refused(*arguments: str) -> str:
    """The one line that is said."""
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # paths
        (["train", "digits", *SMALL, "--out", LONG], f"cannot make {LONG}: File name too long"),
        (["train", "--resume", LONG], f"cannot read {LONG}/config.toml: File name too long"),
        (["diagnose", LONG], f"cannot read {LONG}/config.toml: File name too long"),
        (["demo", "digits", "--epochs", "1", "--out", LONG], "File name too long"),
        (["train", "digits", "--config", LONG], f"cannot read {LONG}: File name too long"),
        (["train", "text:caf\udce9"], "name must be UTF-8, got 'text:caf\\udce9'"),
        (["train", "digits", "--set", "data.array=\udce9"], "array must be UTF-8, got '\\udce9'"),
        # what is no file
        (["train", "text:/dev/zero"], "cannot read /dev/zero: not a regular file"),
        (["train", "digits", "--config", "/dev/zero"], "cannot read /dev/zero: not a regular file"),
        (["train", "idx:pipe"], "cannot read pipe: not a regular file"),
        (["train", "digits", "--config", "pipe"], "cannot read pipe: not a regular file"),
        # TOML
        (["train", "digits", "--config", "deep.toml"], "deep.toml is not a TOML file: "),
        (["train", "digits", "--config", "nested.toml"], "nested.toml: beta must be of type float"),
        (["train", "digits", "--set", "objective.beta=" + "[" * 5000], "beta must be of type float"),
        (["train", "digits", "--set", "objective=3"], "--set takes TABLE.KEY=VALUE"),
        # numbers
        (
            ["train", "digits", "--set", "model.hidden=1000000000"],
            "hidden must be at most 1048576, got 1000000000",
        ),
        (["train", "digits", "--set", "model.hidden=1" + "0" * 400], "hidden must be at most 1048576"),
        (["train", "docstrings", "--set", "model.hidden=1048576"], "error: the model has "),
        (["train", "digits", "--set", "objective.beta=1" + "0" * 400], "beta must be finite, got inf"),
        (
            ["train", "digits", "--batch-size", "1" + "0" * 400],
            "batch_size must be at most 9223372036854775807",
        ),
        (["train", "digits", "--threads", "0"], "threads must be at least 1, got 0"),
        (["train", "digits", "--threads", "1000000"], "threads must be at most 1024, got 1000000"),
        (["diagnose", "run", "--threads", "0"], "threads must be at least 1, got 0"),
        (["demo", "digits", "--threads", "0"], "threads must be at least 1, got 0"),
        (["demo", "digits", "--threads", "-3"], "threads must be at least 1, got -3"),
        (["demo", "digits", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["diagnose", "run", "--device", "gpu"], "device must be one of auto, cpu, cuda, mps; got 'gpu'"),
    ],
)
def test_one_line(arguments: list[str], message: str) -> None:
    os.mkfifo("pipe")
    Path("deep.toml").write_text("x = " + "[" * 5000 + "]" * 5000)
    Path("nested.toml").write_text("[objective]\nbeta = [[[1]]]\n")
    trainer(settings("digits"), Path("run")).fit()
    assert message in refused(*arguments)


# --- a checkpoint that holds other types than it should


ODD: list[object] = [None, 3, "x", [], {}, [1], {"a": 1}, {"step": "x"}, torch.zeros(2), float("inf"), True]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "key",
    [
        "model",
        "latents",
        "optimizer",
        "schedules",
        "strategy",
        "monitor",
        "progress",
        "random",
        "data",
        "config",
    ],
)
def test_odd_types_in_a_checkpoint(key: str) -> None:
    trainer(settings("digits", "objective.pi_target=2"), Path("run")).fit()
    path = Path("run", CHECKPOINT)
    state = torch.load(path, weights_only=True)
    used = {"model", "progress", "data"}
    assert set(state) - {"format"} >= {key}
    for value in ODD:
        if key == "strategy" and value in ([], {}) and not isinstance(value, torch.Tensor):
            continue  # what it is
        torch.save({**state, key: value}, path)
        for command in (["train", "--resume", "run"], ["diagnose", "run", "-n", "20", "-k", "2"]):
            if command[0] == "train" or key in used:
                refused(*command)


@pytest.mark.parametrize(
    "progress",
    [
        {"epoch": "1"},
        {"epoch": 1.5},
        {"epoch": -1},
        {"step": None},
        {"step": float("inf")},
        {"seconds": "long"},
        {"seconds": float("nan")},
        {"sums": {}},
        {"sums": 3},
        {"sums": {"examples": 0.0, "nll": "x", "rate": 0.0, "kl": 0.0}},
        {"more": 1},
    ],
)
def test_odd_progress_in_a_checkpoint(progress: dict[str, Any]) -> None:
    trainer(settings("digits"), Path("run")).fit()
    path = Path("run", CHECKPOINT)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "progress": {**state["progress"], **progress}}, path)
    refused("train", "--resume", "run")


# --- a log that is damaged

DAMAGE = [
    b"\xff\xfe\x00 not text\n",
    b"null\n",
    b"[1, 2]\n",
    b'"epoch"\n',
    b"[" * 100_000 + b"\n",
    b'{"kind": "epoch", "step": "x"}\n',
    b'{"kind": "epoch", "step": 3}\n',
    b'{"kind": "epoch", "step": 3, "weight": null, "train": [], "heldout": 7}\n',
    b'{"kind": ["epoch"], "step": 3}\n',
    b"\n",
    bytes(4096) + b"\n",
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log(damage: bytes) -> None:
    trainer(settings("digits"), Path("run")).fit()
    path = Path("run", LOG)
    content = path.read_bytes()
    first, *rest = content.splitlines(keepends=True)
    whole = logs.read(path)
    path.write_bytes(first + damage + b"".join(rest))
    with pytest.warns(UserWarning, match=r"log.jsonl: damaged lines left out: 1, the first of them line 2"):
        assert logs.read(path) == whole
    with pytest.warns(UserWarning, match="damaged"):
        assert diagnosis.curves(open_run(Path("run"), print))
    path.write_bytes(content + b'{"kind": "epo')
    assert logs.read(path) == whole, "a last line that was not written to its end is no damage"


def test_a_log_that_is_no_file() -> None:
    trainer(settings("digits"), Path("run")).fit()
    Path("run", LOG).unlink()
    os.mkfifo(Path("run", LOG))
    assert "cannot read run/log.jsonl: not a regular file" in refused(
        "train", "--resume", "run", "--epochs", "4"
    )


# --- models that are too large


@pytest.mark.parametrize(
    "name", [name for name in presets.PRESETS if name.startswith(("digits-", "docstrings"))]
)
def test_a_model_that_fits_no_machine(name: str) -> None:
    config = texts.changed(presets.PRESETS[name], {"model": {"hidden": 2**20}})
    with pytest.raises(
        ConfigError, match=r"the model has [\d,]+ parameters, which take [\d,]+ GiB in training"
    ):
        trainer(config, Path("run"))


def test_what_is_built_is_the_same_as_without_a_look_at_its_size() -> None:
    run = trainer(settings("digits"), Path("run"))
    torch.manual_seed(5)
    one = build(run.config.model, run.data)
    torch.manual_seed(5)
    from vaekernels.training import models

    other = models._build(run.config.model, run.data)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
)
def test_too_little_memory_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("vaekernels.training.trainer.Trainer.fit", fails)
    assert "too little memory for this model and these data" in refused("train", "digits", *SMALL)


# --- the benchmark


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--csv", LONG], "File name too long"),
        (["--plots", LONG], "File name too long"),
        (["--compare", LONG], "File name too long"),
        (["--compare", "pipe"], "not a regular file"),
        (["--compare", "/dev/zero"], "not a regular file"),
        (["--compare", "short.csv"], "short.csv, line 2"),
        (["--compare", "nul.csv"], "--compare"),
        (["--device", "gpu"], "--device gpu"),
    ],
)
def test_bench(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    names = list(bench.Row.__annotations__)
    Path("short.csv").write_text(",".join(names) + "\nx\n")
    Path("nul.csv").write_bytes(",".join(names).encode() + b"\n" + b"x" * 200_000 + b"\n")
    with pytest.raises(SystemExit) as ended:
        bench.main(["--quick", *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and "Traceback" not in said


# --- Ctrl-C


ENTRY = [sys.executable, "-c", "import sys, _vaekernels_command as command; sys.exit(command.main())"]


def started(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(vaekernels.__file__).parents[1])}
    return subprocess.Popen(
        [*ENTRY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )


def test_ctrl_c_during_imports(tmp_path: Path) -> None:
    """Whenever it comes, a library that takes every exception of an import for a missing module too."""
    (tmp_path / "torch.py").write_text(
        "import sys, time\nprint('importing', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError('no torch')\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(vaekernels.__file__).parents[1])])
    }
    run = subprocess.Popen(
        [*ENTRY, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    assert run.stdout is not None and run.stdout.readline() == "importing\n"
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=60)[1] == "stopped\n" and run.returncode == 130


@pytest.mark.parametrize("module", ["vaekernels.training.cli", "vaekernels.bench"])
def test_ctrl_c_while_a_command_is_imported(module: str) -> None:
    code = f"""
import signal, sys
from vaekernels import cli
def swallows(name):
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass
    raise ModuleNotFoundError("no rich", name="rich")
cli.import_module = swallows
sys.exit(cli.main({["bench" if module.endswith("bench") else "train"]}))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(vaekernels.__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, text=True)
    assert (found.returncode, found.stderr) == (130, "stopped\n")


@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("vaekernels.bench.measure", ["bench", "--quick", "--no-compile"]),
        ("vaekernels.training.diagnosis.diagnose", ["diagnose", "run"]),
        ("vaekernels.training.demo.outcome.diagnosis.diagnose", ["demo", "docstrings", "--epochs", "1"]),
        ("vaekernels.training.data.load", ["train", "digits"]),
        ("vaekernels.training.gallery.look", ["diagnose", "run", "-n", "20", "-k", "2"]),
        ("vaekernels.cli.diagnosis", ["doctor"]),
    ],
)
def test_ctrl_c_is_one_word(
    where: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(settings("digits"), Path("run")).fit()

    def stopped(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(where, stopped)
    try:
        status = cli.main(arguments)
    except SystemExit as ended:
        status = ended.code  # type: ignore[assignment]
    lines = capsys.readouterr().err.splitlines()
    assert status == 130 and lines[-1] == "stopped" and "Traceback" not in lines
