"""The models of scvi-tools on the fused ops::

    from vaekernels.integrations import scvi as fused
    fused.patch()
    scvi.model.SCVI(adata).train()

`unpatch` gives the library torch's class back. It needs ``scvi-tools``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import scvi
import torch

from vaekernels.integrations._rebind import rebind
from vaekernels.integrations.torch_distributions import Normal

__all__ = ["Normal", "patch", "unpatch"]


class _Distributions(ModuleType):
    """torch.distributions, with the fused `Normal`."""

    Normal = Normal

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributions, name)


_DISTRIBUTIONS = _Distributions(torch.distributions.__name__)


def patch() -> None:
    """SCVI, LinearSCVI, SCANVI, TOTALVI, PEAKVI and every other model of scvi-tools whose posteriors are
    Normals of torch train through the fused ops.

    The name `Normal` is rebound to `vaekernels.integrations.torch_distributions.Normal` where it means
    torch's in a module of scvi, alone or as `dist.Normal` of a module `dist`, so models that exist already
    are served too. A name that a function imports for itself stays torch's: those are priors and likelihoods,
    and the divergence of a fused posterior from such a prior is fused. Given the same noise the numbers are
    the same; the random numbers of a seed differ. Their JAX models, and posteriors read back from minified
    data, stay what they are. Calling it twice changes nothing.
    """
    rebind(scvi.__name__, torch.distributions.Normal, Normal)
    rebind(scvi.__name__, torch.distributions, _DISTRIBUTIONS)


def unpatch() -> None:
    """Gives scvi torch's own class back."""
    rebind(scvi.__name__, Normal, torch.distributions.Normal)
    rebind(scvi.__name__, _DISTRIBUTIONS, torch.distributions)
