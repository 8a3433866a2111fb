"""Weights, floors and targets that change while a model trains; each works alone, in any training loop::

    weight = Linear(1.0, steps=10 * steps_per_epoch, device=device)
    for x in loader:
        ...
        (nll + weight.value * kl).backward()
        optimizer.step()
        weight.step()          # after backward, and only here: evaluation never advances it

``value`` is one 0-dim float32 tensor for the life of the object, changed in place: compiled code does not
recompile, and a replayed CUDA graph sees the new number. Nothing here waits for the device.

Schedules are functions of the number of steps taken: :class:`Constant`, :class:`Linear`, :class:`Logistic`,
:class:`Cosine`, :class:`Cyclical`, :class:`Warmup`, :class:`Capacity`, :class:`FreeBits`. Controllers look at
what the model did: :class:`PIController` at the rate, :class:`GECO` at the reconstruction.
"""

from __future__ import annotations

from vaekernels.schedules.annealing import (
    Capacity,
    Constant,
    Cosine,
    Cyclical,
    FreeBits,
    Linear,
    Logistic,
    Schedule,
    Warmup,
)
from vaekernels.schedules.controllers import GECO, Controller, PIController

__all__ = [
    "GECO",
    "Capacity",
    "Constant",
    "Controller",
    "Cosine",
    "Cyclical",
    "FreeBits",
    "Linear",
    "Logistic",
    "PIController",
    "Schedule",
    "Warmup",
]
