"""Real processes that are stopped in the middle: by Ctrl-C, and by kill -9 at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("sklearn", reason="digits need vaekernels[train]")

from filelock import FileLock
from tiny_runs import checkpoint_of, epochs_of, log_of, same

from vaekernels.training.errors import CheckpointError
from vaekernels.training.run import CHECKPOINT, LOCK, RunFolder

TRAIN = ["-m", "vaekernels", "train"]
DIGITS = ["digits", "--epochs", "6", "--device", "cpu", "--threads", "1", "--latent-dim", "4"]
# Saves often and at odd moments, so that a kill falls into the writing of checkpoints and logs as well.
DIGITS += ["--free-bits", "0.1", "--anneal", "3", "--set", "engine.checkpoint_steps=3"]
DIGITS += ["--set", "engine.log_steps=1", "--set", "engine.tensorboard=false"]
STEPS = 6 * 26
IN_USE = "trains in run; wait for it or stop it, or give another --run-dir\n"


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *TRAIN, *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def step_of(run: Path) -> int:
    try:
        return int(log_of(run)[-1]["step"])
    except (OSError, IndexError, ValueError):
        return 0


def stop_after(process: subprocess.Popen[str], run: Path, step: int, how: signal.Signals) -> int:
    """Sends the signal once the log has reached ``step``; returns the exit status."""
    deadline = time.monotonic() + 300
    while step_of(run) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(how)
    process.communicate(timeout=300)
    return process.returncode


@pytest.mark.slow
def test_a_run_killed_at_five_random_moments_equals_one_that_was_not(tmp_path: Path) -> None:
    finish(start(tmp_path, *DIGITS, "--out", "whole"))
    draw = random.Random(20240607)
    points = sorted(draw.sample(range(4, STEPS - 4), 5))
    run = tmp_path / "killed"
    process = start(tmp_path, *DIGITS, "--out", "killed")
    for number, step in enumerate(points):
        how = signal.SIGINT if number == 2 else signal.SIGKILL
        status = stop_after(process, run, step, how)
        assert status == (130 if how is signal.SIGINT else -signal.SIGKILL)
        saved = checkpoint_of(run)["progress"]["step"]  # whole, whenever the kill came
        assert step - 4 <= saved <= STEPS
        process = start(tmp_path, "--resume", "killed")
    finish(process)
    assert same(checkpoint_of(tmp_path / "whole"), checkpoint_of(run))
    assert log_of(tmp_path / "whole") == log_of(run)


def test_a_run_killed_before_its_first_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    process = start(tmp_path, *DIGITS, "--set", "engine.checkpoint_steps=none", "--out", "run")
    assert stop_after(process, tmp_path / "run", 3, signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "run" / CHECKPOINT).exists()
    process = start(tmp_path, "--resume", "run")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.startswith("error: no checkpoint at run/checkpoint.pt; the run was stopped before")


def test_of_processes_that_resume_one_run_at_once_one_goes_on_and_the_others_say_why_not(
    tmp_path: Path,
) -> None:
    finish(start(tmp_path, *DIGITS, "--epochs", "1", "--out", "run"))
    resumed = [start(tmp_path, "--resume", "run", "--epochs", "3") for _ in range(3)]
    said = [process.communicate(timeout=300)[1] for process in resumed]
    went_on = [process.pid for process in resumed if process.returncode == 0]
    # One may come so late that the run is over: it evaluates, and changes nothing.
    assert went_on and {process.returncode for process in resumed} <= {0, 1}
    for process, errors in zip(resumed, said, strict=True):
        if process.returncode == 1:
            assert any(errors == f"error: process {pid} {IN_USE}" for pid in went_on), errors
    log = log_of(tmp_path / "run")
    assert epochs_of(tmp_path / "run") == [1, 2, 3]
    assert [line["step"] for line in log if line["kind"] == "step"] == list(range(1, 3 * 26 + 1))


@pytest.mark.parametrize("before", ["", "123\n"], ids=["no earlier process", "an earlier process"])
def test_who_has_only_just_taken_the_folder_is_named(before: str, tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.write_text(before)
    with FileLock(path, timeout=0):
        late = threading.Timer(0.2, path.write_text, ["456\n"])
        late.start()
        with pytest.raises(CheckpointError, match="process 456 trains in"):
            RunFolder(tmp_path).hold()
        late.join()


KILLED_AFTER_THE_LINE_OF_EPOCH_2 = """
import os, runpy, signal
from vaekernels.training.trainer import Trainer
log_epoch = Trainer._log_epoch
def killed(self, evaluation):
    log_epoch(self, evaluation)
    if self.progress.epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer._log_epoch = killed
runpy.run_module("vaekernels", run_name="__main__", alter_sys=True)
"""


def test_a_run_killed_between_the_line_of_an_epoch_and_its_checkpoint_has_that_epoch_once(
    tmp_path: Path,
) -> None:
    # 26 steps an epoch: step 52, the last of epoch 2, is in a checkpoint when its line is written.
    short = ["digits", "--epochs", "3", "--device", "cpu", "--threads", "1", "--latent-dim", "4"]
    short += ["--set", "engine.checkpoint_steps=13", "--set", "engine.tensorboard=false"]
    finish(start(tmp_path, *short, "--out", "whole"))
    command = [sys.executable, "-c", KILLED_AFTER_THE_LINE_OF_EPOCH_2, *TRAIN[2:], *short, "--out", "killed"]
    died = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert epochs_of(tmp_path / "killed") == [1, 2]
    assert checkpoint_of(tmp_path / "killed")["progress"]["step"] == 52
    finish(start(tmp_path, "--resume", "killed"))
    assert epochs_of(tmp_path / "killed") == [1, 2, 3]
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed")
