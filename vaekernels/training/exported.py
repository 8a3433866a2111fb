"""Encoder and decoder of a run as programs of torch.export, which run without this package."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from vaekernels.training.data import Arrays, Data, Text
from vaekernels.training.data.base import EOS
from vaekernels.training.errors import CheckpointError, InputError
from vaekernels.training.models import VAE
from vaekernels.training.models.text import TextVAE
from vaekernels.training.use import Run

__all__ = ["export"]

ABOUT = "vaekernels.json"
"""The name of the extra file in both programs."""


def export(run: Run, out: Path) -> tuple[Path, Path]:
    """Writes two files and returns their paths, for ``model.pt2``: ``model-encoder.pt2``, from examples to
    (mu, logvar), and ``model-decoder.pt2``, from z [B, D] to what ``run.decode`` is made of. Both take any
    number of rows.

    Examples are uint8 levels or float32 [B, *shape], sentences int64 tokens [B, T] (tokens, then EOS 2, then
    PAD 0) with the T of the data. The decoder of text returns tokens, [B, T]. Each file holds, as
    ``vaekernels.json``, the vocabulary or the shape and levels.
    """
    if out.suffix != ".pt2":
        raise InputError(f"--out must end in .pt2, got {out}")
    paths = tuple(out.with_name(f"{out.stem}-{part}.pt2") for part in ("encoder", "decoder"))
    data, model = run.data, run.model.cpu()
    x, z = _like(data), torch.zeros(3, model.latent_dim)
    modules = _Encoder(model), _Words(model, run.length) if isinstance(model, TextVAE) else _Mean(model)
    about = {ABOUT: json.dumps(_about(data))}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Of the weights of recurrent layers, which torch keeps twice. The programs have them.
            warnings.filterwarnings("ignore", "The tensor attributes .*_flat_weights")
            for path, module, given in zip(paths, modules, (x, z), strict=True):
                rows = {0: Dim("rows", min=2)}
                program = torch.export.export(module.eval(), (given,), dynamic_shapes=(rows,))
                torch.export.save(program, path, extra_files=about)
    except OSError as error:
        raise CheckpointError(f"cannot write {error.filename}: {error.strerror}") from error
    finally:
        run.model.to(run.device)
    return paths[0], paths[1]


def _like(data: Data) -> Tensor:
    """Three examples of the shape of the data."""
    x = data.train.new_zeros(3, *data.train.shape[1:])
    if isinstance(data, Text):
        x[:, 0] = EOS
    return x


def _about(data: object) -> dict[str, object]:
    if isinstance(data, Text):
        return {"kind": "text", "vocabulary": list(data.vocabulary), "unit": data.unit}
    assert isinstance(data, Arrays)
    return {"kind": "arrays", "shape": list(data.shape), "levels": data.levels}


class _Encoder(nn.Module):
    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode(x)


class _Mean(nn.Module):
    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        return self.model.generate(z)


class _Words(nn.Module):
    """`TextVAE.generate` with a fixed number of steps: when all sentences have ended depends on the data,
    which a program of torch.export cannot ask."""

    def __init__(self, model: TextVAE, length: int) -> None:
        super().__init__()
        self.model = model
        self.length = length

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([token for token, _ in self.model.greedy(z, self.length)], dim=1)
