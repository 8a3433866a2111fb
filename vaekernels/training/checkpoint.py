"""Checkpoints: one file that is always whole, and loads without running code from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from vaekernels.training.errors import CheckpointError

__all__ = ["load", "random_state", "restore_random_state", "save", "write_atomically"]

FORMAT = 1


def save(fabric: Fabric, path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` so that at every moment the file there is the old one or the new one,
    whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        fabric.save(temporary, {"format": FORMAT, **state})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; nothing there was overwritten"
        ) from error


def load(fabric: Fabric, path: Path) -> dict[str, Any]:
    """The state written by :func:`save`, on the CPU. CheckpointError if there is none or it cannot be
    read."""
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {path}; --resume takes the directory of a run that has saved one"
        )
    try:
        state: dict[str, Any] = fabric.load(path, weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged files
        first_line = str(error).split("\n", 1)[0]
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({type(error).__name__}: {first_line})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a vaekernels checkpoint of format {FORMAT}")
    return state


def random_state(noise: torch.Generator) -> dict[str, Any]:
    """Every random state a run depends on: the noise of z and torch's default generators. (The order of the
    data is a function of seed and epoch; Python's and NumPy's generators are not used.)"""
    state: dict[str, Any] = {"noise": noise.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any], noise: torch.Generator) -> bool:
    """Undo :func:`random_state`. False if the noise was drawn on another kind of device, whose states do not
    fit ``noise``: that one is then left as it is."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    if state["noise"].shape != noise.get_state().shape:
        return False
    noise.set_state(state["noise"])
    return True


def write_atomically(path: Path, text: str) -> None:
    """Replace the text file at ``path``."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
