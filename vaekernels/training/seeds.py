"""Seeds for everything that is random in a run, from the one seed of the run."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

__all__ = ["derive", "seed_defaults"]


def derive(seed: int, *use: str | int) -> int:
    """A seed of 32 bits for one use. Hashed, since the CPU generator uses only the low 32 bits of a seed, and
    a sum would give run s in epoch e + 1 the order of run s + 1 in epoch e."""
    mixed = hashlib.sha256(" ".join(map(str, (seed, *use))).encode()).digest()
    return int.from_bytes(mixed[:4], "little")


def seed_defaults(seed: int) -> None:
    """Seed the default generators of torch, NumPy and Python, which models and data may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
