"""torch.distributions on the fused ops: a `Normal` whose samples are fused, and a fused KL divergence::

    from vaekernels.integrations.torch_distributions import Normal  # in place of torch.distributions
    posterior = Normal(mean, std)
    z = posterior.rsample()
    kl = torch.distributions.kl_divergence(posterior, Normal(0.0, 1.0)).sum(-1)

`register` fuses the divergence of torch's own class as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import kl

from vaekernels import _checks, ops

__all__ = ["Normal", "kl_normal_normal", "register", "unregister"]

_Pair = tuple[type, type]


class Normal(torch.distributions.Normal):
    """torch.distributions.Normal, with `rsample` and `kl_divergence` as one kernel each, either way.

    `kl_divergence` is fused where one of the two is of this class, without `register`. Random numbers come
    from Philox (`vaekernels.rng_state`): seeds give other numbers than torch's class. `sample` draws as
    `rsample` does, so that both give the same numbers from one seed.
    """

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """loc + scale * eps, reparameterized, in the shape sample_shape + batch_shape."""
        loc, scale = _promoted(self.loc, self.scale)
        shape = torch.Size(sample_shape)
        count = math.prod(shape) if shape else None
        z = ops.reparameterize(loc, scale, num_samples=count, parameterization="std")
        return z.view(shape + self.batch_shape)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """`rsample` without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)


def kl_normal_normal(p: torch.distributions.Normal, q: torch.distributions.Normal) -> Tensor:
    """KL(p || q) of every element, in nats, in the shape to which both broadcast::

        1/2 ((mu_p - mu_q)^2 / sd_q^2 + sd_p^2 / sd_q^2 - 1) - log(sd_p / sd_q)

    The result is in float32 (float64 for float64), also where the parameters are of half precision. Close to
    0 it keeps its digits, as far as the standard deviations do.
    """
    parts = _promoted(p.loc, p.scale, q.loc, q.scale)
    if p.batch_shape != q.batch_shape:
        parts = torch.broadcast_tensors(*parts)  # type: ignore[no-untyped-call]
    return ops.gaussian_kl(
        *parts, batch_dims=min(1, parts[0].ndim), reduction="elementwise", parameterization="std"
    )


def register() -> None:
    """`torch.distributions.kl_divergence` of two Normals becomes the fused kernel in code that stays as it
    is, whatever library it belongs to; Pyro's Normal and `Independent` of Normals included.

    Samples are fused where `Normal` of this module takes the place of torch's. Calling it twice changes
    nothing.
    """
    _set(kl_normal_normal)


def unregister() -> None:
    """Gives torch its own divergence back, except between Normals of this module."""
    _set(_TORCHS)


_BOTH: _Pair = (torch.distributions.Normal, torch.distributions.Normal)
_TORCHS = kl._KL_REGISTRY[_BOTH]


def _set(function: object) -> None:
    kl.register_kl(*_BOTH)(function)  # type: ignore[no-untyped-call]


# Each with each, so that the dispatch on types finds no tie.
for _pair in ((Normal, Normal), (Normal, _BOTH[0]), (_BOTH[0], Normal)):
    kl.register_kl(*_pair)(kl_normal_normal)  # type: ignore[no-untyped-call]


def _promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype, as torch's arithmetic would promote them."""
    dtype = tensors[0].dtype
    if all(t.dtype is dtype for t in tensors) and dtype in _checks.FLOATS:
        return tensors
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    if dtype not in _checks.FLOATS:
        raise TypeError(
            f"the parameters of a Normal must be float32, bfloat16, float16 or float64, got {dtype}; "
            "convert them, e.g. with .float()"
        )
    return tuple(t.to(dtype) for t in tensors)
