"""Seeds for everything that is random in a run, from the one seed of the run."""

from __future__ import annotations

import hashlib

__all__ = ["derive"]


def derive(seed: int, *use: str | int) -> int:
    """A seed of 32 bits for one use. Hashed, since the CPU generator uses only the low 32 bits of a seed, and
    a sum would give run s in epoch e + 1 the order of run s + 1 in epoch e."""
    mixed = hashlib.sha256(" ".join(map(str, (seed, *use))).encode()).digest()
    return int.from_bytes(mixed[:4], "little")
