"""How Lightning Fabric writes a checkpoint file."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

__all__ = ["SavesInPlace"]


class SavesInPlace(TorchCheckpointIO):
    """Writes a checkpoint where it is to lie, and nowhere else. Fabric's own way goes by a file in the folder
    for temporary files, which stays there when the process is killed."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        # By way of memory, as Fabric does: what fails is then the file's writing, with an OSError.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).write_bytes(content.getbuffer())
