"""A trained run, opened to look at its model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vaekernels.training import checkpoint, engine
from vaekernels.training import data as datasets
from vaekernels.training.config import Config
from vaekernels.training.data import Data
from vaekernels.training.models import VAE, build
from vaekernels.training.run_folder import RunFolder

__all__ = ["Run", "open_run"]


@dataclass(frozen=True)
class Run:
    """``model`` is in eval mode, on ``device``; ``step``: how far it was trained."""

    folder: RunFolder
    config: Config
    data: Data
    model: VAE
    device: torch.device
    step: int


def open_run(path: Path, say: Callable[[str], None], *, device: str | None = None) -> Run:
    """The run in the folder ``path`` as its last checkpoint has it. ``device``: None for that of the run.

    CheckpointError if there is no run, or none that was trained on the data as they are here.
    """
    folder = RunFolder(path)
    config = folder.settings()
    state = checkpoint.load(folder.checkpoint)
    data = datasets.load(config.data, say)
    checkpoint.require_same_data(state, folder.checkpoint, data)
    model = build(config.model, data)
    try:
        model.load_state_dict(state["model"])
        step = int(state["progress"]["step"])
    except Exception as error:  # a dozen types, for what is not of the type that it should be
        raise checkpoint.misfit(folder.checkpoint, folder.config, error) from error
    where = engine.single_device(device or config.engine.device)
    return Run(folder, config, data, model.to(where).eval(), where, step)
