"""VAEs that collapse, and the same ones cured, side by side: trained, diagnosed and shown."""

from __future__ import annotations

from vaekernels.training.demo.outcome import Outcome, Variant
from vaekernels.training.demo.show import DEMOS, show

__all__ = ["DEMOS", "Outcome", "Variant", "show"]
