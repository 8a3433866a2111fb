"""The models of scvi-tools on the fused ops::

    from vaekernels.integrations import scvi as fused
    fused.patch()
    scvi.model.SCVI(adata).train()

`unpatch` gives the library torch's class back. It needs ``scvi-tools``.
"""

from __future__ import annotations

import scvi
import torch

from vaekernels.integrations._rebind import rebind
from vaekernels.integrations.torch_distributions import Normal

__all__ = ["Normal", "patch", "unpatch"]


def patch() -> None:
    """SCVI, LinearSCVI, SCANVI, TOTALVI, PEAKVI and every other model of scvi-tools whose posteriors are
    Normals of torch train through the fused ops.

    The name `Normal` is rebound to `vaekernels.integrations.torch_distributions.Normal` where it means
    torch's in a module of scvi, so models that exist already are served too. Given the same noise the numbers
    are the same; the random numbers of a seed differ. Their JAX models, and posteriors read back from
    minified data, stay what they are. Calling it twice changes nothing.
    """
    rebind(scvi.__name__, torch.distributions.Normal, Normal)


def unpatch() -> None:
    """Gives scvi torch's own class back."""
    rebind(scvi.__name__, Normal, torch.distributions.Normal)
