"""The autoencoders of diffusers on the fused ops::

    from vaekernels.integrations import diffusers as fused
    fused.patch()
    posterior = AutoencoderKL.from_pretrained(...).encode(x).latent_dist
    z, kl = posterior.sample_kl()

`unpatch` gives the library its own class back.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Original

from vaekernels.distributions import DiagonalGaussian
from vaekernels.integrations._rebind import rebind

__all__ = ["DiagonalGaussianDistribution", "patch", "unpatch"]


class DiagonalGaussianDistribution(DiagonalGaussian, Original):
    """`vaekernels.distributions.DiagonalGaussian`, which is also an instance of diffusers' class."""

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False) -> None:
        # Not that of diffusers' class, which computes std and var whether they are needed or not.
        DiagonalGaussian.__init__(self, parameters, deterministic)


def patch() -> None:
    """AutoencoderKL, and every image and video autoencoder of diffusers that has this posterior, train and
    encode through the fused ops.

    The name `DiagonalGaussianDistribution` is rebound in all modules of diffusers, so models that exist
    already are served too. Given the same noise the numbers are the same; the random numbers of a seed
    differ, see `vaekernels.distributions.DiagonalGaussian` for what else does. Where `kl` sums over the axes
    [1, 2, 3] there, here it sums over all axes but the batch, which on video is the right sum.

    The audio autoencoders Oobleck and MiniMax have posteriors of their own, and keep them. Calling it twice
    changes nothing.
    """
    rebind("diffusers", Original, DiagonalGaussianDistribution)


def unpatch() -> None:
    """Gives diffusers its own class back. Posteriors made meanwhile stay what they are."""
    rebind("diffusers", DiagonalGaussianDistribution, Original)
