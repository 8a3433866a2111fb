"""Is the latent used? Measurements that a low, or a high, KL alone cannot fool."""

from __future__ import annotations

from vaekernels.collapse.metrics import (
    ACTIVE_THRESHOLD,
    Estimate,
    active_units,
    bootstrap_mean,
    delta_shuffle,
    derangement,
    moments,
    rate_per_dim,
    shuffle_nll,
)

__all__ = [
    "ACTIVE_THRESHOLD",
    "Estimate",
    "active_units",
    "bootstrap_mean",
    "delta_shuffle",
    "derangement",
    "moments",
    "rate_per_dim",
    "shuffle_nll",
]
