"""Checkpoints: one file that is always whole, tells whether a byte of it changed, and loads without running
code from it.

The file is torch's, a zip archive, and its comment, the last bytes of the file, is the SHA-256 of all bytes
before it. A zip archive has checksums of its own, but torch does not look at them, and they leave out the
directory of the archive and its padding.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist

from vaekernels._files import write_atomically
from vaekernels.training.data import Data, is_own
from vaekernels.training.errors import CheckpointError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = [
    "load",
    "misfit",
    "random_states",
    "require_same_data",
    "restore_random_states",
    "save",
    "write_text",
]

FORMAT = 5
_LABEL = b"sha256:"
_SEAL = len(_LABEL) + 2 * hashlib.sha256().digest_size


def save(fabric: Fabric, path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` so that at every moment the file there is the old one or the new one,
    whole. All processes take part; the first one writes."""
    temporary = path.with_name(path.name + ".tmp")
    failed: CheckpointError | None = None
    try:
        fabric.save(temporary, {"format": FORMAT, **state})
        if fabric.is_global_zero:
            seal(temporary)
            _into_place(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        failed = CheckpointError(
            f"cannot write {path}: {error.strerror or error}; nothing there was overwritten"
        )
        failed.__cause__ = error
    if fabric.broadcast(failed is not None):
        raise failed or CheckpointError(f"cannot write {path}; nothing there was overwritten")


def load(path: Path) -> dict[str, Any]:
    """The state written by :func:`save`, on the CPU. CheckpointError if there is none, if a byte of it has
    changed since, or if it cannot be read."""
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {path}; the run was stopped before it had saved one, or this is no run"
        )
    try:
        with open(path, "rb") as file:  # what is checked is what is loaded, whatever takes its name meanwhile
            _require_sealed(file, path)
            file.seek(0)
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises a dozen types for damaged files
        # Without torch's own words: they advise weights_only=False, which runs code from the file.
        raise CheckpointError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a vaekernels checkpoint of format {FORMAT}")
    return state


def require_same_data(state: dict[str, Any], path: Path, data: Data) -> None:
    """CheckpointError unless the run of the checkpoint was trained on ``data``."""
    trained_on = str(state.get("data"))
    if trained_on != data.sha256:
        hashes = f"sha256 {trained_on[:12]}, here {data.sha256[:12]}"
        if is_own(data.name):
            raise CheckpointError(
                f"{data.name.partition(':')[2]} has changed since {path.parent} was trained on it, or is "
                f"read with other settings ({hashes}): put the file back as it was, or train anew"
            )
        reason = ": docstrings differ between versions of Python" if data.name == "docstrings" else ""
        raise CheckpointError(f"{path} was trained on other {data.name} data ({hashes}){reason}")


def misfit(path: Path, config: Path, error: Exception) -> CheckpointError:
    """What to say, in one line, of a checkpoint whose content is not what its config makes expect."""
    return CheckpointError(f"{path} does not fit {config}: {' '.join(str(error).split())}")


def random_states(fabric: Fabric, noise: torch.Generator) -> list[dict[str, Any]]:
    """Every random state a run depends on, of every process: the noise of z, and the default generators of
    torch, NumPy and Python. (The order of the data is a function of seed and epoch.)"""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    state = {
        "noise": noise.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(fabric.device) if fabric.device.type == "cuda" else None,
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
    }
    if fabric.world_size == 1:
        return [state]
    states: list[dict[str, Any]] = [{}] * fabric.world_size
    dist.all_gather_object(states, state)
    return states


def restore_random_states(fabric: Fabric, states: list[dict[str, Any]], noise: torch.Generator) -> bool:
    """Undo :func:`random_states`. False if the run had another number of processes or another kind of device,
    whose noise cannot go on here: nothing is restored then."""
    if not isinstance(states, list) or not states:
        raise TypeError(f"random is {states!r}, not a list of the states of every process")
    if len(states) != fabric.world_size:
        return False
    state = states[fabric.global_rank]
    if state["noise"].shape != noise.get_state().shape:
        return False
    noise.set_state(state["noise"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and fabric.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], fabric.device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    return True


def write_text(path: Path, text: str) -> None:
    """Replace the text file at ``path``, whole. CheckpointError if that fails, with the old one in place."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def seal(path: Path) -> None:
    """Append the checksum to a file that `torch.save` wrote."""
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", _SEAL))  # the length of the archive's comment, which was none
        file.write(_LABEL + _checksum(file, file.tell()))


def _require_sealed(file: BinaryIO, path: Path) -> None:
    """CheckpointError unless the checksum at the end of the file is that of the rest."""
    length = file.seek(0, os.SEEK_END) - _SEAL
    file.seek(max(length, 0))
    label, written = file.read(len(_LABEL)), file.read()
    if length < 0 or label != _LABEL:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint of format {FORMAT}: it has no checksum at its end"
        )
    if written != _checksum(file, length):
        raise CheckpointError(
            f"{path} is damaged: its checksum does not match its content, so the run cannot go on from it; "
            "restore the file from a copy, or train anew"
        )


def _checksum(file: BinaryIO, length: int) -> bytes:
    """SHA-256 of the first ``length`` bytes, in hexadecimal; the position in the file is kept."""
    position = file.tell()
    file.seek(0)
    found = hashlib.sha256()
    while length > 0 and (block := file.read(min(length, 1 << 20))):
        found.update(block)
        length -= len(block)
    file.seek(position)
    return found.hexdigest().encode()


def _into_place(temporary: Path, path: Path) -> None:
    """Rename once the content is on the disk, and see that the new name is as well."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
