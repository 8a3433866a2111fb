"""Is the latent used? Measurements that a low, or a high, KL alone cannot fool, of any model given as two
functions::

    report = vaekernels.collapse.diagnose(encode, log_likelihood, heldout)
    print(report)
    report.save("diagnosis")

`CollapseMonitor` watches a model while it trains; `vaekernels.collapse.metrics` has the single measures.
"""

from __future__ import annotations

from vaekernels.collapse.diagnosis import diagnose
from vaekernels.collapse.estimate import Estimate, bootstrap_mean
from vaekernels.collapse.examples import flatten_latents, whiten_latents
from vaekernels.collapse.extras import Curve, Extras, TextTable
from vaekernels.collapse.metrics import (
    ACTIVE_THRESHOLD,
    active_units,
    delta_shuffle,
    derangement,
    moments,
    rate_per_dim,
    shuffle_nll,
)
from vaekernels.collapse.monitor import CollapseMonitor, CollapseWarning, Reading
from vaekernels.collapse.report import Report
from vaekernels.collapse.verdict import Dim

__all__ = [
    "ACTIVE_THRESHOLD",
    "CollapseMonitor",
    "CollapseWarning",
    "Curve",
    "Dim",
    "Estimate",
    "Extras",
    "Reading",
    "Report",
    "TextTable",
    "active_units",
    "bootstrap_mean",
    "delta_shuffle",
    "derangement",
    "diagnose",
    "flatten_latents",
    "moments",
    "rate_per_dim",
    "shuffle_nll",
    "whiten_latents",
]
