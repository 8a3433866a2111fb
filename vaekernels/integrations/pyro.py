"""Pyro on the fused ops::

    from vaekernels.integrations.pyro import Normal  # in place of pyro.distributions.Normal
    z = pyro.sample("latent", Normal(loc, scale).to_event(1))

It needs ``pyro-ppl``.
"""

from __future__ import annotations

from pyro import distributions
from pyro.contrib.forecast import util
from pyro.distributions.torch_distribution import TorchDistributionMixin

from vaekernels.integrations import torch_distributions

__all__ = ["Normal"]


class Normal(torch_distributions.Normal, distributions.Normal, TorchDistributionMixin):
    """pyro.distributions.Normal, with fused samples, in guides and models alike.

    With TraceMeanField_ELBO the KL between two of them, or one and Pyro's own, is fused as well. Trace_ELBO
    takes no analytic KL; what it gains is the sample.
    """


# pyro.contrib.forecast looks the parameters of a distribution up by its exact class.
util.UNIVARIATE_DISTS[Normal] = util.UNIVARIATE_DISTS[distributions.Normal]
