"""The autoencoders of MONAI on the fused ops::

    from vaekernels.integrations import monai as fused
    fused.patch()
    reconstruction, z_mu, z_sigma = AutoencoderKL(...)(images)
    loss = l1(reconstruction, images) + 1e-6 * fused.kl_loss(z_mu, z_sigma)

`unpatch` gives the library its own sampling back. It needs ``monai``.
"""

from __future__ import annotations

from typing import Any

from monai.data import MetaTensor
from monai.networks.nets import AutoencoderKL, SPADEAutoencoderKL
from torch import Tensor

from vaekernels import ops

__all__ = ["kl_loss", "patch", "unpatch"]

_MODELS = AutoencoderKL, SPADEAutoencoderKL
_THEIRS = {model: model.sampling for model in _MODELS}


def _sampling(self: Any, z_mu: Tensor, z_sigma: Tensor) -> Tensor:
    """z_mu + z_sigma * eps, in one kernel; a MetaTensor where z_mu is one."""
    z = ops.reparameterize(_plain(z_mu), _plain(z_sigma), parameterization="std")
    return MetaTensor(z).copy_meta_from(z_mu) if isinstance(z_mu, MetaTensor) else z


def kl_loss(z_mu: Tensor, z_sigma: Tensor) -> Tensor:
    """KL(N(z_mu, diag z_sigma^2) || N(0, I)) in nats, summed over all axes but the batch, mean over it: a
    float32 number (float64 for float64).

    z_mu and z_sigma are those of `AutoencoderKL.forward`, whose log-variance is already clamped to [-30, 20].
    It is what MONAI's tutorials write by hand, without their 1e-8 or `log(sigma^2)`.
    """
    return ops.gaussian_kl(_plain(z_mu), _plain(z_sigma), group_dims=(), parameterization="std")


def _plain(t: Tensor) -> Tensor:
    return t.as_tensor() if isinstance(t, MetaTensor) else t


def patch() -> None:
    """`AutoencoderKL` and `SPADEAutoencoderKL`, models that exist already included, sample in one kernel.

    A subclass with a `sampling` of its own keeps it. Given the same noise the numbers are the same; the
    random numbers of a seed differ. Calling it twice changes nothing.
    """
    for model in _MODELS:
        model.sampling = _sampling


def unpatch() -> None:
    """Gives MONAI its own sampling back."""
    for model, theirs in _THEIRS.items():
        model.sampling = theirs
