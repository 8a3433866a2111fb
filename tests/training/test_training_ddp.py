"""Several processes: the run of two is the run of one process that has the whole batch.

One pair of processes runs all scenarios (starting a process costs seconds); each test looks at what they
wrote.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("rich", reason="the trainer needs vaekernels[train]")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_runs import checkpoint_of, log_of, same, settings, stop_at, tiny_images, tiny_text, trainer
from torch import Tensor

import vaekernels as vk
from vaekernels import ops
from vaekernels.training import data as datasets
from vaekernels.training.config import Config
from vaekernels.training.errors import CheckpointError, Interrupted, NonFiniteError
from vaekernels.training.run import RunFolder
from vaekernels.training.seeds import derive

pytestmark = pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning")

WORLD = 2
EVERY_STEP = "engine.log_steps=1 optim.batch_size=9"
# Floors that some dimensions are below and some above, at once or in turn.
SCENARIOS = {
    "per dimension": ("digits", f"objective.free_bits=0.05 {EVERY_STEP}"),
    "per row, one group": (
        "docstrings",
        f"objective.free_bits=0.1 objective.clamp=sample objective.group=all {EVERY_STEP}",
    ),
    "controller": ("docstrings", f"objective.pi_target=0.5 objective.pi_ki=0.05 {EVERY_STEP}"),
    "geco": ("digits", f"objective.geco_target=8 objective.geco_speed=0.01 {EVERY_STEP}"),
    "capacity per example": (
        "digits",
        f"objective.capacity=1 objective.clamp=sample objective.capacity_gamma=2 {EVERY_STEP}",
    ),
    "parts": ("digits", f"objective.tc_beta=4 objective.mi_weight=0.5 {EVERY_STEP}"),
    "ladder": ("digits", f"model.kind=ladder objective.free_bits=0.3 objective.group=all {EVERY_STEP}"),
}


def config_of(scenario: str) -> Config:
    return settings(*SCENARIOS[scenario])


def work(rank: int, folder: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(WORLD),
        LOCAL_WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    torch.set_num_threads(1)
    datasets.DATASETS.update(docstrings=tiny_text, digits=tiny_images)
    results: dict[str, Any] = {}
    try:
        for scenario in SCENARIOS:
            run = trainer(config_of(scenario), Path(folder, scenario))
            evaluation = run.fit()
            results[scenario] = (evaluation.to_json(), run.model.state_dict())
        results["stopped"] = _stopped(rank, Path(folder, "stopped"))
        results["blamed"] = _blamed(rank, Path(folder, "blamed"))
        results["in use"] = _in_use(rank, Path(folder, "in use"))
    except Exception:
        results["failed"] = traceback.format_exc()
    torch.save(results, f"{folder}/{rank}.pt")
    if "failed" not in results:
        dist.barrier()
        dist.destroy_process_group()


def _stopped(rank: int, path: Path) -> int:
    """Ctrl-C reaches one process only."""
    config = config_of("per dimension")
    run = trainer(config, path)
    if rank == 1:
        stop_at(run, 7)
    try:
        run.fit()
    except Interrupted:
        step = run.progress.step
        trainer(config, path, resume=True).fit()
        return step
    return -1


def _blamed(rank: int, path: Path) -> str:
    """One process has the example that goes wrong."""
    run = trainer(config_of("per dimension"), path)
    if rank == 1:
        likelihood = run.model.log_likelihood
        run.model.log_likelihood = lambda x, z: likelihood(x, z) / (torch.arange(len(x)) != 2)  # type: ignore[method-assign]
    try:
        run.fit()
    except NonFiniteError as error:
        return str(error)
    return ""


def _in_use(rank: int, path: Path) -> str:
    """Another process trains in the folder, which the first process alone finds out."""
    config = config_of("per dimension")
    path.mkdir(exist_ok=True)
    lock = RunFolder(path).hold() if rank == 0 else None
    try:
        trainer(config, path)
    except CheckpointError as error:
        return str(error)
    finally:
        if lock is not None:
            lock.release()
    return ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("pair")
    mp.start_processes(work, (str(folder), free_port()), WORLD, start_method="spawn")
    results = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for result in results:
        assert "failed" not in result, result["failed"]
    return folder, results


def one_process(
    own: torch.Generator, noise: list[torch.Generator], seen: list[dict[str, Any]]
) -> Callable[..., vk.SampleKL]:
    """`sample_kl_packed` in which the noise of a row is that which its process draws for it: the same states
    as the pair. What it is given and gives is kept in ``seen``. Calls with another generator than
    ``own``, that of the training, are left as they are."""
    fused = ops.sample_kl_packed

    def sample_kl_packed(
        moments: Tensor, dim: int, *prior: Tensor, generator: torch.Generator, rng: None, **options: Any
    ) -> vk.SampleKL:
        if generator is not own:
            return fused(moments, dim, *prior, generator=generator, rng=rng, **options)
        parts = torch.tensor_split(moments, WORLD)
        z = torch.cat(
            [
                vk.reparameterize_packed(part.contiguous(), generator=each)
                for part, each in zip(parts, noise, strict=True)
            ]
        )
        kl, rate = vk.gaussian_kl_packed(moments, dim, *prior, return_per_group=True, **options)
        seen.append({"moments": moments.detach(), "kl": kl.detach(), **options})
        return vk.SampleKL(z, kl, rate)

    return sample_kl_packed


def single(
    scenario: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any, list[dict[str, Any]]]:
    config = config_of(scenario)
    noise = [torch.Generator().manual_seed(derive(0, "noise", rank)) for rank in range(WORLD)]
    seen: list[dict[str, Any]] = []
    monkeypatch.setitem(datasets.DATASETS, "docstrings", tiny_text)
    monkeypatch.setitem(datasets.DATASETS, "digits", tiny_images)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = trainer(config, path)
        with monkeypatch.context() as patched:
            patched.setattr(ops, "sample_kl_packed", one_process(run.noise, noise, seen))
            evaluation = run.fit()
    finally:
        torch.set_num_threads(threads)
    return evaluation.to_json(), run.model.state_dict(), seen


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_are_one_with_the_whole_batch(
    scenario: str, pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = pair
    evaluation, parameters, _ = single(scenario, tmp_path / "one", monkeypatch)
    one, two = log_of(tmp_path / "one"), log_of(folder / scenario)
    assert len(one) == len(two) == 39
    for mine, theirs in zip(one, two, strict=True):
        for name in ("loss", "nll", "rate", "kl", "weight"):
            if name in mine:
                # float32 sums in another order, through up to 36 steps of Adam
                assert theirs[name] == pytest.approx(mine[name], rel=2e-4, abs=1e-6), (mine["step"], name)
    assert results[0][scenario][0]["nelbo"] == pytest.approx(evaluation["nelbo"], rel=1e-4)
    for name, value in results[0][scenario][1].items():
        assert (value - parameters[name]).abs().max().item() < 5e-4, f"{name}: half a step of Adam"


def test_a_clamp_on_each_process_alone_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The floors of the scenarios bind for some dimensions, and differently on halves of the batch."""
    _, _, seen = single("per dimension", tmp_path, monkeypatch)
    pairs = []
    for each in seen:
        floor = each["free_bits"]
        halves = [
            vk.gaussian_kl_packed(half, free_bits=floor)
            for half in torch.tensor_split(each["moments"], WORLD)
        ]
        pairs.append((float(each["kl"]), float(sum(halves) / WORLD)))
    assert max(abs(whole - halves) / whole for whole, halves in pairs) > 0.02


def test_every_process_has_the_same_model_and_evaluation(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, second) = pair
    for scenario in SCENARIOS:
        assert same(first[scenario], second[scenario])


def test_a_stop_asked_of_one_process_stops_both_and_the_run_goes_on_bit_for_bit(
    pair: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, results = pair
    assert [result["stopped"] for result in results] == [7, 7]
    whole, parts = checkpoint_of(folder / "per dimension"), checkpoint_of(folder / "stopped")
    assert same(whole, parts)
    assert log_of(folder / "per dimension") == log_of(folder / "stopped")
    assert len(whole["random"]) == WORLD and not same(*whole["random"]), "each process has noise of its own"


def test_the_process_with_the_bad_example_is_heard_by_all(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    _, results = pair
    assert results[0]["blamed"] == results[1]["blamed"]
    assert "step 1 (epoch 1, batch 1 of 12): loss" in results[0]["blamed"]
    assert "largest offender: NLL inf of training example" in results[0]["blamed"]
    assert "(row 2 of the batch)" in results[0]["blamed"]


def test_a_folder_in_use_is_refused_in_all_processes(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    _, results = pair
    assert results[0]["in use"] == results[1]["in use"]
    assert "in use; wait for it or stop it, or give another --run-dir" in results[0]["in use"]


def test_a_run_of_two_processes_goes_on_with_one(
    pair: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = pair
    monkeypatch.setitem(datasets.DATASETS, "digits", tiny_images)
    config = settings(*SCENARIOS["per dimension"], **{})
    longer = settings("digits", f"{SCENARIOS['per dimension'][1]} optim.epochs=4")
    run = trainer(longer, folder / "per dimension", resume=True)
    assert run.progress.epoch == 3 and config.optim.epochs == 3
    assert (
        "another number of processes: the noise of z goes on from new seeds"
        in run.console.file.getvalue().replace("\n", " ")
    )  # type: ignore[attr-defined]


# --- the real launchers


def command(*launcher: str, folder: Path, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    arguments = [
        "train",
        "digits",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--free-bits",
        "0.25",
    ]
    arguments += ["--set", "engine.tensorboard=false", "--out", "run", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-m", *launcher, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_and_fabric_start_the_same_run(tmp_path: Path) -> None:
    runs = {}
    torchrun = f"torch.distributed.run --nproc-per-node 2 --master-port {free_port()} -m vaekernels".split()
    for name, launcher, more in (("torchrun", torchrun, ()), ("fabric", ("vaekernels",), ("--devices", "2"))):
        (tmp_path / name).mkdir()
        done = command(*launcher, folder=tmp_path / name, more=more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("all of it is in run") == 1, "one process speaks"
        runs[name] = checkpoint_of(tmp_path / name / "run")
        del runs[name]["config"]  # engine.devices
    assert same(runs["torchrun"], runs["fabric"])
    assert len(runs["fabric"]["random"]) == 2
