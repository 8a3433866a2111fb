"""The multimodal VAEs of multivae on the fused ops::

    from vaekernels.integrations import multivae as fused
    fused.patch()

`unpatch` gives the library its own functions back. It needs ``multivae``.
"""

from __future__ import annotations

import torch
from multivae.models.base import base_utils as theirs
from torch import Tensor

from vaekernels import _checks, ops
from vaekernels.integrations._rebind import rebind

__all__ = ["kl_divergence", "patch", "rsample_from_gaussian", "unpatch"]

_THEIR_KL, _THEIR_SAMPLE = theirs.kl_divergence, theirs.rsample_from_gaussian


def kl_divergence(mean: Tensor, log_var: Tensor, prior_mean: Tensor, prior_log_var: Tensor) -> Tensor:
    """KL(N(mean, diag exp(log_var)) || N(prior_mean, diag exp(prior_log_var))) in nats, summed over the last
    axis, in the dtype to which the four promote. They broadcast."""
    parts = _alike(mean, log_var, prior_mean, prior_log_var)
    kl = ops.gaussian_kl(*parts, batch_dims=parts[0].ndim - 1, group_dims=(), reduction="none")
    return kl.to(parts[0].dtype)


def rsample_from_gaussian(
    mu: Tensor, log_var: Tensor, N: int = 1, return_mean: bool = False, flatten: bool = False
) -> Tensor:
    """`N` reparameterized samples, [N, *mu.shape], for N = 1 [*mu.shape]; copies of the mean where
    `return_mean`. `flatten` joins the first two axes."""
    if return_mean:
        z: Tensor = _THEIR_SAMPLE(mu, log_var, N, return_mean, flatten)
        return z
    z = ops.reparameterize(*_alike(mu, log_var), num_samples=None if N == 1 else N)
    return z.flatten(0, 1) if N > 1 and flatten and z.ndim > 2 else z


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one shape and dtype."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    if dtype not in _checks.FLOATS:
        raise TypeError(f"the moments must be float32, bfloat16, float16 or float64, got {dtype}")
    parts: tuple[Tensor, ...] = torch.broadcast_tensors(*tensors)  # type: ignore[no-untyped-call]
    return tuple(t.to(dtype) for t in parts)


def patch() -> None:
    """The models of multivae whose divergence and samples are those of `multivae.models.base.base_utils`
    compute them in one kernel each, models that exist already included.

    Given the same noise the numbers are the same; the random numbers of a seed differ. Calling it twice
    changes nothing.
    """
    rebind("multivae", _THEIR_KL, kl_divergence)
    rebind("multivae", _THEIR_SAMPLE, rsample_from_gaussian)


def unpatch() -> None:
    """Gives multivae its own functions back."""
    rebind("multivae", kl_divergence, _THEIR_KL)
    rebind("multivae", rsample_from_gaussian, _THEIR_SAMPLE)
