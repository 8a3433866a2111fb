"""The trainer: resumption, interruption, what is refused, evaluation."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("typer", reason="the trainer needs vaekernels[train]")
pytest.importorskip("rich", reason="the trainer needs vaekernels[train]")

import torch
from tiny_runs import (
    checkpoint_of,
    epochs_of,
    log_of,
    same,
    settings,
    stop_at,
    tiny_data,  # noqa: F401 (the fixture)
    trainer,
)
from torch import Tensor

from vaekernels import training
from vaekernels.training import checkpoint
from vaekernels.training.config import settings as texts
from vaekernels.training.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError
from vaekernels.training.evaluate import Evaluation, evaluate, monitor
from vaekernels.training.models import VAE
from vaekernels.training.run import CHECKPOINT, CONFIG, LOCK, LOG, METRICS, RunFolder, new_folder
from vaekernels.training.trainer import Trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning"),
    pytest.mark.usefixtures("tiny_data"),
]


# --- from Python


def test_the_lines_of_the_docstring_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("a", "sentence", "of", "mine", "here")
    lines = [" ".join(some) for some in itertools.permutations(words, 4)]
    Path("slogans.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert training.__doc__ is not None
    space: dict[str, Any] = {}
    exec(textwrap.dedent(training.__doc__.partition("::\n")[2]), space)
    run = space["run"]
    assert isinstance(run, training.Run) and space["mu"].shape == (1, run.model.latent_dim)
    assert isinstance(run.config, training.Config) and isinstance(run.model, VAE)
    assert set(training.__all__) == {"Codes", "Config", "Run", "Trainer", "open_run", "train"}
    with pytest.raises(AttributeError, match=r"'vaekernels\.training' has no attribute 'Trainers'"):
        training.Trainers  # noqa: B018


def test_the_package_alone_imports_neither_the_trainer_nor_what_it_needs() -> None:
    code = "import sys, vaekernels.training; print(*{m.partition('.')[0] for m in sys.modules})"
    home = Path(training.__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=True)
    assert not {"pydantic", "lightning_fabric", "rich", "matplotlib"} & set(found.stdout.split())


def test_commands_that_do_not_train_do_not_wait_for_lightning_and_dynamo() -> None:
    code = (
        "import sys\n"
        "from vaekernels.training import cli, engine\n"
        "print(engine.single_device('cpu'), *({'lightning_fabric', 'torch._dynamo'} & set(sys.modules)))"
    )
    home = Path(training.__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["cpu"]


# --- resumption


RUNS = {
    "text": ("docstrings", "objective.free_bits=0.1 objective.anneal=linear objective.anneal_epochs=1.5"),
    "images": ("digits", "objective.free_bits=0.1 objective.free_bits_decay_epochs=2"),
    "word dropout": ("docstrings", "model.word_dropout=0.5 model.kind=lstm objective.pi_target=2"),
    "ladder": ("digits", "model.kind=ladder objective.kl_balance=0.8 objective.geco_target=8"),
    "batch norm": ("digits", "model.kind=conv model.batch_norm=0.7 objective.capacity=3"),
    "aggressive": ("digits", "strategy.aggressive=true strategy.inner_steps=6 strategy.check_every=2"),
    "parts": ("digits", "objective.tc_beta=4 objective.mi_weight=0.5 objective.anneal=linear"),
    "pretrained": ("docstrings", "strategy.pretrain_epochs=1 objective.anneal=cyclical"),
}


@pytest.mark.parametrize(
    ("run_of", "steps"),
    [("text", (1,)), ("text", (14,)), ("text", (2, 30)), ("images", (3,)), ("images", (15,))]
    + [
        (name, (5, 17, 29))
        for name in ("word dropout", "ladder", "batch norm", "parts", "aggressive", "pretrained")
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    run_of: str, steps: tuple[int, ...], tmp_path: Path
) -> None:
    config = settings(*RUNS[run_of])
    whole = trainer(config, tmp_path / "whole")
    expected = whole.fit()

    run = trainer(config, tmp_path / "parts")
    for step in steps:
        stop_at(run, step)
        with pytest.raises(Interrupted, match=f"stopped at step {step}, all saved"):
            run.fit()
        # whatever the process that resumes has drawn before
        torch.manual_seed(999), random.seed(999), np.random.seed(999)
        run = trainer(config, tmp_path / "parts", resume=True)
        assert run.progress.step == step
    assert run.fit() == expected
    assert same(checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "parts"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_a_checkpoint_between_epochs_is_enough(tmp_path: Path) -> None:
    """Killed without a chance to save: the run goes on from the last checkpoint, wherever that was."""
    config = settings(given="engine.checkpoint_steps=4")
    expected = trainer(config, tmp_path / "whole").fit()
    run = trainer(config, tmp_path / "killed")
    stop_at(run, 23, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert checkpoint_of(tmp_path / "killed")["progress"]["step"] == 20
    assert trainer(config, tmp_path / "killed", resume=True).fit() == expected
    assert same(checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "killed"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed")


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(tmp_path: Path) -> None:
    config = settings()
    other = replace(config, engine=replace(config.engine, seed=1))
    results = [trainer(c, tmp_path / str(i)).fit() for i, c in enumerate((config, config, other))]
    assert results[0] == results[1] != results[2]


def test_lower_precision_trains(tmp_path: Path) -> None:
    config = settings("digits", free_bits=0.1)
    exact = trainer(config, tmp_path / "a").fit()
    lower = replace(config, engine=replace(config.engine, precision="bf16-mixed"))
    assert trainer(lower, tmp_path / "b").fit().nll == pytest.approx(exact.nll, rel=0.02)


def test_a_run_may_be_resumed_for_more_epochs(tmp_path: Path) -> None:
    config = settings()
    longer = replace(config, optim=replace(config.optim, epochs=5))
    trainer(config, tmp_path / "a").fit()
    resumed = trainer(longer, tmp_path / "a", resume=True).fit()
    assert resumed == trainer(longer, tmp_path / "b").fit()
    assert epochs_of(tmp_path / "a") == [1, 2, 3, 4, 5]
    assert texts.load(tmp_path / "a" / CONFIG).optim.epochs == 5


def test_a_finished_run_that_is_resumed_only_evaluates(tmp_path: Path) -> None:
    first = trainer(settings(), tmp_path / "a").fit()
    before = checkpoint_of(tmp_path / "a")
    assert trainer(settings(), tmp_path / "a", resume=True).fit() == first
    assert same(checkpoint_of(tmp_path / "a"), before)


def test_log_lines_after_the_checkpoint_are_dropped_on_resumption(tmp_path: Path) -> None:
    # A run killed between the log and the checkpoint, while it wrote the log.
    config = settings()
    whole = trainer(config, tmp_path / "whole")
    whole.fit()
    run = trainer(config, tmp_path / "killed")
    stop_at(run, 20)
    with pytest.raises(Interrupted):
        run.fit()
    with open(tmp_path / "killed" / LOG, "a") as file:
        file.write(json.dumps({"kind": "step", "epoch": 2, "step": 99}) + '\n{"kind": "epoch", "st')
    trainer(config, tmp_path / "killed", resume=True).fit()
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed")


def tensorboard_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in tags
        if "seconds" not in tag
    }


@pytest.mark.parametrize("every", [1, 5, 7])
@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_whose_checkpoint_was_not_written_is_logged_once(
    epoch: int, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 steps an epoch: the last checkpoint is that of the epoch's last step, or is earlier."""
    # TensorBoard reads event files in the order of their names: the second, the host, the process, and the
    # process's count of writers as plain digits, so that within one second the tenth comes before the ninth.
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(0))
    config = settings(given=f"engine.checkpoint_steps={every} engine.log_steps=7 engine.tensorboard=true")
    trainer(config, tmp_path / "whole").fit()
    run = trainer(config, tmp_path / "killed")
    log_epoch = Trainer._log_epoch

    def killed(self: Trainer, evaluation: Evaluation) -> None:
        log_epoch(self, evaluation)
        if self.progress.epoch + 1 == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_log_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            run.fit()
        run.log.close()
    saved = checkpoint_of(tmp_path / "killed")["progress"]
    assert (saved["epoch"], saved["step"]) == (epoch - 1, 14 * epoch // every * every)
    assert epochs_of(tmp_path / "killed")[-1] == epoch
    resumed = trainer(config, tmp_path / "killed", resume=True)
    resumed.fit()
    assert same(checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "killed"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed")
    assert tensorboard_of(tmp_path / "whole") == tensorboard_of(tmp_path / "killed")


def test_ctrl_c_finishes_the_step_saves_and_gives_the_signal_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run = trainer(settings(), tmp_path)
    stop_at(run, 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match=f"vaekernels train --resume {tmp_path}"):
        run.fit()
    assert checkpoint_of(tmp_path)["progress"]["step"] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_cluster_that_takes_the_machine_back_is_obeyed_like_ctrl_c(tmp_path: Path) -> None:
    run = trainer(settings(), tmp_path)
    stop_at(run, 3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        run.fit()
    assert checkpoint_of(tmp_path)["progress"]["step"] == 3


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    run = trainer(settings(), tmp_path)
    stop_at(run, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert not (tmp_path / CHECKPOINT).exists()


# --- one run, one process


def test_a_folder_where_a_process_trains_is_refused_until_it_has_ended(tmp_path: Path) -> None:
    first = trainer(settings(), tmp_path)
    said = rf"process {os.getpid()} trains in {tmp_path}; wait for it or stop it, or give another --run-dir"
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=said):
            trainer(settings(), tmp_path, resume=resume)
    before = (tmp_path / LOG).read_bytes()
    assert before == b"", "the log of the first is left alone"
    stop_at(first, 3)
    with pytest.raises(Interrupted):
        first.fit()
    second = trainer(settings(), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=said):
        trainer(settings(), tmp_path, resume=True)
    assert second.fit() == trainer(settings(), tmp_path / "whole").fit()
    trainer(settings(), tmp_path, resume=True).fit()


def test_a_folder_is_free_again_after_a_trainer_that_could_not_begin(tmp_path: Path) -> None:
    stopped_run(tmp_path)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"objective\.beta"):
            trainer(settings(beta=2.0), tmp_path, resume=True)
        with pytest.raises(CheckpointError, match="already holds a run"):
            trainer(settings(), tmp_path)
    assert trainer(settings(), tmp_path, resume=True).fit()


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(CheckpointError, match=f"cannot lock {tmp_path / LOCK}: "):
        trainer(settings(), tmp_path)


def test_a_lock_left_by_another_process_names_it(tmp_path: Path) -> None:
    held = RunFolder(tmp_path).hold()
    (tmp_path / LOCK).write_text("4321\nsome host\n")
    with pytest.raises(CheckpointError, match="process 4321 trains in"):
        RunFolder(tmp_path).hold()
    held.release()
    RunFolder(tmp_path).hold().release()


def test_new_folders_are_made_by_one_caller_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_folder(tmp_path / "runs" / "a"), range(64)))
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == sorted(path.name for path in made) == sorted(["a", *(f"a-{n}" for n in range(2, 65))])
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot make .*file/a: Not a directory"):
        new_folder(tmp_path / "file" / "a")


# --- disks that do not take what is written


def stopped_run(path: Path) -> dict[str, Any]:
    run = trainer(settings(), path)
    stop_at(run, 3)
    with pytest.raises(Interrupted):
        run.fit()
    return checkpoint_of(path)


def full(path: Path, state: object) -> None:
    path.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stopped_run(tmp_path)
    resumed = trainer(settings(), tmp_path, resume=True)
    monkeypatch.setattr(resumed.fabric, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device; nothing there was overwritten"):
        resumed.fit()
    assert same(checkpoint_of(tmp_path), before)
    assert {path.name for path in tmp_path.iterdir()} - {LOCK} == {CHECKPOINT, CONFIG, LOG}


def test_a_limit_on_the_size_of_files_is_reported_and_loses_nothing(tmp_path: Path) -> None:
    before = stopped_run(tmp_path)
    resumed = trainer(settings(), tmp_path, resume=True)
    size = (tmp_path / CHECKPOINT).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
        with pytest.raises(CheckpointError, match=r"cannot write .*: .*; nothing there was overwritten"):
            resumed.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert same(checkpoint_of(tmp_path), before)
    assert trainer(settings(), tmp_path, resume=True).fit(), "and the run can still go on"


def test_a_disk_that_fills_up_under_the_log_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(settings(), tmp_path)
    run.folder.log.unlink()
    run.folder.log.mkdir()
    with pytest.raises(CheckpointError, match=f"cannot write {tmp_path / LOG}: Is a directory"):
        run.fit()


@pytest.mark.parametrize("name", [CONFIG, METRICS])
def test_small_files_are_replaced_whole_or_not_at_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_text("old")

    def fails(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(CheckpointError, match=f"cannot write {path}: No space left on device"):
        checkpoint.write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace_ = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace_(a, b))[1])
    stopped_run(tmp_path)
    assert order[-3:] == ["fsync", "replace", "fsync"], "the file, its new name, the folder"


def test_a_checkpoint_is_written_in_its_own_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the folder for temporary files when a run is killed, nobody removes."""
    made = tempfile.mkstemp

    def watched(*arguments: Any, **keywords: Any) -> tuple[int, str]:
        assert keywords.get("dir") == tmp_path
        return made(*arguments, **keywords)

    monkeypatch.setattr(tempfile, "mkstemp", watched)
    run = trainer(settings(), tmp_path)
    run.fit()
    assert checkpoint_of(tmp_path)


def test_a_run_resumed_with_other_settings_is_refused(tmp_path: Path) -> None:
    stopped_run(tmp_path)
    other = settings(beta=2.0)
    with pytest.raises(ConfigError, match=r"has objective.beta = 1.0, not 2.0; a resumed run keeps"):
        trainer(other, tmp_path, resume=True)
    # the same with a config file that was changed under the run
    (tmp_path / CONFIG).write_text(texts.to_toml(other))
    with pytest.raises(ConfigError, match=r"objective.beta = 1.0, not 2.0"):
        trainer(texts.load(tmp_path / CONFIG), tmp_path, resume=True)


# --- losses


def fails_at(run: Trainer, step: int, spoil: Callable[[], None]) -> str:
    """The message of the run that is spoiled in step ``step``, which must not have been taken."""
    optimizer: list[Any] = []

    def poison() -> None:
        optimizer.append(copy.deepcopy(run.optimizer.state_dict()))
        spoil()

    stop_at(run, step, poison)
    with pytest.raises(NonFiniteError) as raised:
        run.fit()
    assert same(run.optimizer.state_dict(), optimizer[0])
    return str(raised.value)


def test_nan_stops_before_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    run = trainer(settings(), tmp_path)
    epoch = len(run.batches)
    said = fails_at(run, epoch + 2, lambda: run.objective.moving["weight"].value.fill_(math.nan))
    assert f"step {epoch + 2} (epoch 2, batch 2 of {epoch}): loss nan, NLL" in said
    assert "largest offender: the weight of the KL is nan" in said
    assert f"the last good checkpoint is {tmp_path / CHECKPOINT}" in said
    assert checkpoint_of(tmp_path)["progress"]["step"] == epoch


def test_the_example_to_blame_is_named(tmp_path: Path) -> None:
    run = trainer(settings("digits"), tmp_path)
    batch = run.batches.order(0)[4]
    moments = run.model.moments

    def spoiled(x: Tensor) -> Tensor:
        values = moments(x)
        values[2, 1] = 3e19  # mu², and with it this example's KL alone, is beyond float32
        return values

    said = fails_at(run, 5, lambda: setattr(run.model, "moments", spoiled))
    assert f"largest offender: KL inf of training example {batch[2]} (row 2 of the batch)" in said

    run = trainer(settings("digits"), tmp_path / "other")
    likelihood = run.model.log_likelihood

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        return likelihood(x, z) / (torch.arange(len(x)) != 6)

    said = fails_at(run, 5, lambda: setattr(run.model, "log_likelihood", log_likelihood))
    assert f"largest offender: NLL inf of training example {batch[6]} (row 6 of the batch)" in said


def test_a_parameter_that_is_not_finite_is_named(tmp_path: Path) -> None:
    run = trainer(settings("digits"), tmp_path)
    weight = run.model.decoder.net[0].weight  # type: ignore[index,union-attr]
    said = fails_at(run, 5, lambda: weight.data[0, :2].fill_(math.nan))
    assert "largest offender: parameter decoder.net.0.weight holds 2 NaN or inf among 24 values" in said


def test_a_gradient_that_is_not_finite_is_not_stepped_along(tmp_path: Path) -> None:
    run = trainer(settings(), tmp_path)
    parameter = run.model.decoder.to_state.bias  # type: ignore[union-attr]
    parameter.register_hook(lambda grad: grad * math.inf)  # type: ignore[operator]
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(NonFiniteError) as raised:
        run.fit()
    assert "step 1 (epoch 1, batch 1 of" in str(raised.value)
    assert "gradient norm nan" in str(raised.value) or "gradient norm inf" in str(raised.value)
    assert "largest offender: the gradient of decoder.to_state.bias holds 8 NaN or inf" in str(raised.value)
    assert same(dict(run.model.state_dict()), before)


def test_parameters_that_blow_up_are_never_saved(tmp_path: Path) -> None:
    config = settings("digits", "optim.lr=1e30 optim.batch_size=1000")
    run = trainer(config, tmp_path)
    with pytest.raises(
        NonFiniteError, match=r"after step 1: on held-out data .* no checkpoint had been written yet"
    ):
        run.fit()
    assert not (tmp_path / CHECKPOINT).exists()


def test_the_weight_follows_training_steps_only(tmp_path: Path) -> None:
    run = trainer(
        settings(beta=2.0, anneal="linear", anneal_epochs=2.0, given="engine.log_steps=1"), tmp_path
    )
    steps = len(run.batches)
    run.fit()  # evaluates after each of its three epochs
    seen = [line["weight"] for line in log_of(tmp_path) if line["kind"] == "step"]
    assert seen == pytest.approx([2.0 * min(1.0, t / (2 * steps)) for t in range(3 * steps)])
    assert run.objective.state_dict() == {"weight": {"steps": 3 * steps}}


def test_the_log_has_steps_and_epochs(tmp_path: Path) -> None:
    run = trainer(settings(given="engine.log_steps=5", free_bits=0.5), tmp_path)
    run.fit()
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(5, 43, 5))
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [14, 28, 42]
    for line in lines:
        if line["kind"] == "step":
            assert line["loss"] == pytest.approx(line["nll"] + line["kl"], rel=1e-5)
            assert line["kl"] >= 1.5 - 1e-6, "clamped: three dimensions at 0.5 nats"
        else:
            assert line["heldout"]["examples"] == 12 and line["train"]["rate"] > 0


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = trainer(settings(given="engine.tensorboard=true engine.log_steps=7"), tmp_path)
    stop_at(run, 20)
    with pytest.raises(Interrupted):
        run.fit()
    trainer(settings(given="engine.tensorboard=true engine.log_steps=7"), tmp_path, resume=True).fit()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {(line["kind"], line["step"]): line for line in log_of(tmp_path)}
    for tag, kind, value in (
        ("step/nll", "step", lambda line: line["nll"]),
        ("epoch/heldout/rate", "epoch", lambda line: line["heldout"]["rate"]),
        ("epoch/heldout/delta_shuffle/low", "epoch", lambda line: line["heldout"]["delta_shuffle"]["low"]),
    ):
        seen = {event.step: event.value for event in events.Scalars(tag)}
        expected = {step: value(line) for (k, step), line in logged.items() if k == kind}
        assert seen == pytest.approx(expected, rel=1e-6)


def test_evaluation_is_at_weight_one_unclamped_and_touches_nothing(tmp_path: Path) -> None:
    run = trainer(settings(beta=3.0, free_bits=5.0, anneal="linear", anneal_epochs=9.0), tmp_path)
    states = torch.get_rng_state(), run.noise.get_state(), run.objective.state_dict()
    run.model.train()
    watch = monitor(run.model, run.data.heldout, steps=400)
    first, _ = evaluate(run.model, watch, 0)
    assert run.model.training
    assert same(states, (torch.get_rng_state(), run.noise.get_state(), run.objective.state_dict()))
    assert first == evaluate(run.model, watch, 0)[0] and watch.history == []
    assert first.nelbo == first.nll + first.rate
    assert first.rate == pytest.approx(sum(first.rate_per_dim), rel=1e-5)
    assert first.rate < 1.0, "the rate is the one before the floor of 5 nats a dimension"
    mu, logvar = run.model.encode(run.data.heldout)
    expected = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).mean(dim=0)
    torch.testing.assert_close(torch.tensor(first.rate_per_dim), expected, rtol=1e-4, atol=1e-6)


def test_evaluation_is_that_of_all_examples_whatever_the_batch(tmp_path: Path) -> None:
    run = trainer(settings("digits", "model.kind=ladder"), tmp_path)
    heldout = run.data.heldout
    watches = (monitor(run.model, heldout, steps=400, batch_size=size) for size in (256, 5))
    whole, parts = (evaluate(run.model, watch, 0)[0] for watch in watches)
    assert whole.rate == pytest.approx(parts.rate, rel=0.1), "the noise differs, the layers' rates do not"
    assert whole.rate_per_dim == pytest.approx(parts.rate_per_dim, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "given", "encodes", "decodes"),
    [
        ("docstrings", "", 1, 2),
        ("digits", "model.kind=conv model.latent_channels=2", 1, 2),
        # its own posterior of the lower layer is that given a sample of the upper one: once more
        ("digits", "model.kind=ladder", 2, 3),
    ],
)
def test_an_evaluation_encodes_every_example_once_and_decodes_it_twice(
    name: str, given: str, encodes: int, decodes: int, tmp_path: Path
) -> None:
    run = trainer(settings(name, given), tmp_path)
    rows = {"encoder": 0, "decoder": 0}

    def counted(part: str) -> Callable[..., None]:
        def count(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            rows[part] += len(inputs[0])

        return count

    run.model.encoder.register_forward_hook(counted("encoder"))
    if name == "docstrings":
        run.model.decoder.register_forward_hook(counted("decoder"))
    else:
        net = run.model.decoder.net
        assert isinstance(net, torch.nn.Module)
        net.register_forward_hook(counted("decoder"))
    evaluation = run._evaluate()
    assert evaluation.examples == len(run.data.heldout) == 12
    assert rows == {"encoder": 12 * encodes, "decoder": 12 * decodes}


def test_a_latent_that_collapses_is_told_of_once_also_when_the_run_is_resumed(tmp_path: Path) -> None:
    config = settings("digits", "optim.epochs=5 optim.lr=1e-9")
    run = trainer(config, tmp_path / "whole")
    for parameter in run.model.encoder.parameters():
        parameter.data.zero_()  # q(z|x) is the prior
    run.monitor.grace_steps = 0
    run.fit()
    said = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert said.replace("\n", " ").count("warning: the latent carries no information since step") == 1
    assert len(run.monitor.history) == 5 and run.monitor.collapsed_at == 42
    longer = replace(config, optim=replace(config.optim, epochs=6))
    again = trainer(longer, tmp_path / "whole", resume=True)
    again.monitor.grace_steps = 0
    assert again.monitor.history == run.monitor.history
    again.fit()
    assert len(again.monitor.history) == 6
    assert "no information" not in again.console.file.getvalue()  # type: ignore[attr-defined]


def test_the_latent_layers_are_those_of_the_library_and_keep_their_running_rates(tmp_path: Path) -> None:
    run = trainer(settings("digits", "model.kind=ladder objective.kl_balance=0.8"), tmp_path)
    assert [type(layer).__name__ for layer in run.elbo.latents] == ["GaussianLatent", "LearnedPriorLatent"]
    run.fit()
    saved = checkpoint_of(tmp_path)["latents"]
    assert int(saved["0.num_batches_tracked"]) == 42 and bool((saved["1.running_rate"] > 0).all())
    assert same(dict(trainer(run.config, tmp_path, resume=True).elbo.latents.state_dict()), saved)
