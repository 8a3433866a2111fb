"""Real processes that are stopped in the middle: by Ctrl-C, and by kill -9 at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("sklearn", reason="digits need vaekernels[train]")

from tiny_runs import checkpoint_of, log_of, same

from vaekernels.training.run_folder import CHECKPOINT

TRAIN = ["-m", "vaekernels", "train"]
DIGITS = ["digits", "--epochs", "6", "--device", "cpu", "--threads", "1", "--latent-dim", "4"]
# Saves often and at odd moments, so that a kill falls into the writing of checkpoints and logs as well.
DIGITS += ["--free-bits", "0.1", "--anneal", "3", "--set", "engine.checkpoint_steps=3"]
DIGITS += ["--set", "engine.log_steps=1", "--set", "engine.tensorboard=false"]
STEPS = 6 * 26


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
