"""What every model of the trainer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vaekernels.training.models.likelihoods import Likelihood
from vaekernels.training.models.standardized import Standardized

__all__ = ["VAE", "ArrayDecoder", "ArrayVAE", "LatentLayer", "Sample", "reset"]


class LatentLayer(NamedTuple):
    """One layer of latents: the shape of an example's mu, and whether its prior is learned or N(0, I)."""

    shape: tuple[int, ...]
    learned_prior: bool = False


class Sample(Protocol):
    """Draws z of one latent layer, and takes note of its KL."""

    def __call__(self, moments: Tensor, prior: Tensor | None = None) -> Tensor:
        """z of the posterior whose mu and logvar are packed along axis 1 of ``moments``; ``prior``: those of
        a learned prior, packed likewise, None for N(0, I)."""
        ...


class VAE(nn.Module, ABC):
    """q(z|x) = N(mu, diag exp(logvar)), prior N(0, I). z is [B, latent_dim] wherever it is seen from outside.

    ``encoder`` and ``decoder`` hold all parameters; what the generative model needs is in ``decoder``.
    """

    latent_dim: int
    encoder: nn.Module
    decoder: nn.Module

    @property
    def latent_layers(self) -> tuple[LatentLayer, ...]:
        """In the order in which :meth:`forward` draws them."""
        return (LatentLayer((self.latent_dim,)),)

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """mu, then logvar, along axis 1."""

    @abstractmethod
    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), summed over data dimensions, [B]."""

    @abstractmethod
    def generate(self, z: Tensor) -> Tensor:
        """What the decoder makes of z: the expected image, or, where the decoder looks back at what it has
        said, the likeliest continuation step by step (a sentence, an image row by row)."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar, [B, latent_dim] each."""
        mu, logvar = self.moments(x).flatten(1).chunk(2, dim=1)
        return mu, logvar

    def forward(self, x: Tensor, sample: Sample) -> Tensor:
        """log p(x|z) of one z per example, drawn by ``sample``, [B]."""
        return self.log_likelihood(x, sample(self.moments(x)))


class ArrayDecoder(nn.Module):
    """A network from z to what a likelihood needs for every data element: [B, width, *shape]."""

    def __init__(self, net: nn.Module, likelihood: Likelihood, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net = net
        self.likelihood = likelihood
        self.shape = shape

    def forward(self, z: Tensor) -> Tensor:
        said: Tensor = self.net(z)
        return said.view(z.shape[0], self.likelihood.width, *self.shape)


class ArrayVAE(VAE):
    """A VAE of images or vectors whose elements are independent given z."""

    decoder: ArrayDecoder

    def __init__(self, encoder: nn.Module, decoder: ArrayDecoder, latent_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.inputs = Standardized(decoder.shape)

    def moments(self, x: Tensor) -> Tensor:
        moments: Tensor = self.encoder(self.inputs(self.decoder.likelihood.features(x)))
        return moments

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return self.decoder.likelihood.log_prob(x, self.decoder(z))

    @torch.no_grad()
    def generate(self, z: Tensor) -> Tensor:
        return self.decoder.likelihood.mean(self.decoder(z))


def reset(module: nn.Module, seed: int) -> None:
    """Initialise every part of ``module`` anew, from ``seed`` alone (torch's default generators are left as
    they are)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in reversed(list(module.modules())):  # what a part says of its own parts comes last
            if callable(initialise := getattr(part, "reset_parameters", None)):
                initialise()
