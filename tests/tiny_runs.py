"""Runs of the trainer that take a second: data of a hundredth of the size, and what to compare of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import vaekernels as vk
from vaekernels.training import data as datasets
from vaekernels.training.config import (
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
)
from vaekernels.training.config import settings as texts
from vaekernels.training.data import Arrays, Data, Text
from vaekernels.training.data.base import SPECIALS, digest, encode_sentences, split
from vaekernels.training.run import CHECKPOINT, LOG
from vaekernels.training.trainer import Trainer


def tiny_text(config: DataConfig, say: Callable[[str], None]) -> Data:
    words = [f"w{i}" for i in range(12)]
    rows = torch.randint(12, (120, 9), generator=torch.Generator().manual_seed(7)).tolist()
    sentences = [[words[i] for i in row[: 5 + n % 4]] for n, row in enumerate(rows)]
    vocabulary = (*SPECIALS, *words)
    x = encode_sentences(sentences, vocabulary)
    train, heldout = split(x)
    return Text(config.name, train, heldout, digest(x, vocabulary), vocabulary)


def tiny_images(config: DataConfig, say: Callable[[str], None]) -> Data:
    x = (torch.rand(120, 1, 4, 4, generator=torch.Generator().manual_seed(7)) < 0.3).to(torch.uint8)
    train, heldout = split(x)
    return Arrays(config.name, train, heldout, digest(x), levels=2)


@pytest.fixture
def tiny_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The real names with data of a hundredth of the size, in an empty working directory."""
    monkeypatch.setitem(datasets.DATASETS, "docstrings", tiny_text)
    monkeypatch.setitem(datasets.DATASETS, "digits", tiny_images)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only wait for other threads
    yield
    torch.set_num_threads(threads)


def settings(name: str = "docstrings", given: str = "", **objective: Any) -> Config:
    """``given``: more settings, as ``model.kind=conv strategy.aggressive=true``."""
    config = Config(
        DataConfig(name),
        ModelConfig(latent_dim=3, hidden=8, embedding=4),
        ObjectiveConfig(**objective),
        optim=OptimConfig(epochs=3, batch_size=8),
        engine=EngineConfig(device="cpu", tensorboard=False),
    )
    return texts.changed(config, texts.parse_set(given.split()))


def trainer(config: Config, run: Path, *, resume: bool = False) -> Trainer:
    data = datasets.load(config.data, lambda text: None)
    return Trainer(config, data, run, Console(file=StringIO(), width=80), resume=resume)


def trained(name: str, given: str = "", folder: str = "run") -> vk.training.Run:
    """A run in ``folder``, trained and opened."""
    trainer(settings(name, given), Path(folder)).fit()
    return vk.training.open_run(folder, say=lambda text: None)


def stop_at(run: Trainer, step: int, stop: Callable[[], None] | None = None) -> None:
    """Makes ``run`` be stopped during its step number ``step``."""
    forward = run.model.forward

    def counted(*arguments: Any) -> Any:
        if run.progress.step + 1 == step and run.model.training:
            (stop or run.request_stop)()
        return forward(*arguments)

    run.model.forward = counted  # type: ignore[method-assign]


def same(a: object, b: object) -> bool:
    """Bit for bit, through nested containers."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))  # type: ignore[arg-type]
    return a == b


def checkpoint_of(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / CHECKPOINT, weights_only=True)
    del state["progress"]["seconds"], state["monitor"]["mi_seconds"]
    return state


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of the log, without what the clock says."""
    lines = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


def epochs_of(run: Path) -> list[int]:
    return [line["epoch"] for line in log_of(run) if line["kind"] == "epoch"]
