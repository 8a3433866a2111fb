"""torch.distributions on the fused ops: a `Normal` whose samples are fused, and a fused KL divergence::

    from vaekernels.integrations.torch_distributions import Normal  # in place of torch.distributions
    posterior = Normal(mean, std)
    z = posterior.rsample()
    kl = torch.distributions.kl_divergence(posterior, Normal(0.0, 1.0)).sum(-1)

`register` fuses the divergence of torch's own class as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import kl

from vaekernels import _checks, ops

_is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]

__all__ = ["Normal", "kl_normal_normal", "register", "unregister"]


class Normal(torch.distributions.Normal):
    """torch.distributions.Normal, with fused noise in `rsample` and `sample` and a fused `kl_divergence`.

    `kl_divergence` is fused where one of the two is of this class, without `register`, unless a library has
    registered a divergence of its own for the other's class. Random numbers come from Philox
    (`vaekernels.rng_state`): seeds give other numbers than torch's class. `sample` draws as `rsample` does,
    so that both give the same numbers from one seed.

    As there, backward needs the noise alone: loc and scale may change in place after a sample. Without
    validation a negative scale s is taken as loc - |s| eps, and its divergence by its square. Under
    `torch.jit.trace` samples and divergences are torch's own, so that a trace runs without this package and
    TorchScript knows which of its nodes draw.
    """

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """loc + scale * eps, reparameterized, in the shape sample_shape + batch_shape."""
        loc, scale = self.loc, self.scale
        if _is_tracing():
            return super().rsample(torch.Size(sample_shape))
        _promoted_dtype(loc, scale)
        # The noise apart, as the backward pass of a sample in one op needs the scale as it was.
        zero = torch.zeros_like(loc)
        if sample_shape:
            shape = torch.Size(sample_shape)
            eps = ops.reparameterize(zero, zero, num_samples=math.prod(shape)).view(shape + self.batch_shape)
        else:
            eps = ops.reparameterize(zero, zero)
        # In one step and one rounding where torch has one for it.
        return torch.addcmul(loc, scale, eps) if loc.dtype is scale.dtype else loc + scale * eps

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """`rsample` without a gradient, in loc's dtype."""
        with torch.no_grad():
            if _is_tracing():
                return super().sample(torch.Size(sample_shape))  # type: ignore[no-untyped-call, no-any-return]
            return self.rsample(sample_shape).to(self.loc.dtype)


def kl_normal_normal(p: torch.distributions.Normal, q: torch.distributions.Normal) -> Tensor:
    """KL(p || q) of every element, in nats, in the shape to which both broadcast::

        1/2 ((mu_p - mu_q)^2 / sd_q^2 + sd_p^2 / sd_q^2 - 1) - log(sd_p / sd_q)

    The result is in float32 (float64 for float64), also where the parameters are of half precision. Close to
    0 it keeps its digits, as far as the standard deviations do. Where validation is off, so that scales may
    be negative, it goes by their absolute values.
    """
    scales = p.scale, q.scale
    if not (p._validate_args and q._validate_args):
        scales = p.scale.abs(), q.scale.abs()
    parts = _promoted(p.loc, scales[0], q.loc, scales[1])
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
    global _registered
    _registered = True


def unregister() -> None:
    """Gives torch its own divergence back, except where one of the two is a `Normal` of this module."""
    global _registered
    _registered = False


_registered = False
_BOTH = torch.distributions.Normal, torch.distributions.Normal
_TORCHS: Callable[..., Tensor] = kl._KL_REGISTRY[_BOTH]


# In the place of torch's own entry. Entries for pairs with `Normal` would tie, or win, where a library has
# its own for a subclass of torch's.
@kl.register_kl(*_BOTH)  # type: ignore[untyped-decorator, no-untyped-call]
def _kl(p: torch.distributions.Normal, q: torch.distributions.Normal) -> Tensor:
    fused = _registered or isinstance(p, Normal) or isinstance(q, Normal)
    return kl_normal_normal(p, q) if fused and not _is_tracing() else _TORCHS(p, q)


def _promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype, as torch's arithmetic would promote them."""
    dtype = _promoted_dtype(*tensors)
    return tuple(t if t.dtype is dtype else t.to(dtype) for t in tensors)


def _promoted_dtype(first: Tensor, *others: Tensor) -> torch.dtype:
    dtype = first.dtype
    for t in others:
        if t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    if dtype not in _checks.FLOATS:
        raise TypeError(
            f"the parameters of a Normal must be float32, bfloat16, float16 or float64, got {dtype}; "
            "convert them, e.g. with .float()"
        )
    return dtype
