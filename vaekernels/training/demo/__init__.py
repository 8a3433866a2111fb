"""VAEs that collapse, and the same ones cured, side by side: trained, diagnosed and shown."""

from __future__ import annotations

from vaekernels.training.demo.demos import DEMOS, show
from vaekernels.training.demo.outcome import Outcome, Variant

__all__ = ["DEMOS", "Outcome", "Variant", "show"]
