"""p(x|z) of images and vectors: the log-probability of data under what a decoder says.

A decoder says ``width`` numbers for every data element: [B, width, *shape]. Data come as the data set has
them, [B, *shape]: uint8 of 0 .. levels-1, or real numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaekernels.training.models.standardized import Standardized

__all__ = ["Bernoulli", "Categorical", "DiscretizedLogistic", "Gaussian", "Likelihood"]

_SMALLEST_LOG_SCALE = -7.0  # of the logistic: a seventh of a level of 256, narrower is a point mass


class Likelihood(nn.Module, ABC):
    """``levels``: of the data, None where they are real numbers."""

    width: int

    def __init__(self, levels: int | None) -> None:
        super().__init__()
        self.levels = levels

    def features(self, x: Tensor) -> Tensor:
        """The data as float32 for an encoder: in [0, 1], unless they are real numbers."""
        return x.float() if self.levels is None else x.float() / (self.levels - 1)

    @abstractmethod
    def log_prob(self, x: Tensor, said: Tensor) -> Tensor:
        """log p of each example, nats, summed over its elements, float32 [B]."""

    @abstractmethod
    def mean(self, said: Tensor) -> Tensor:
        """The expected data in the units of ``features``, [B, *shape]."""

    @abstractmethod
    def mode(self, said: Tensor) -> Tensor:
        """The likeliest data in the units of ``features``, [B, *shape]."""


class Bernoulli(Likelihood):
    """Of zeros and ones. (Grey values as targets of a cross-entropy have no probability.)"""

    width = 1

    def log_prob(self, x: Tensor, said: Tensor) -> Tensor:
        logits = said.squeeze(1).float()
        losses = F.binary_cross_entropy_with_logits(logits, self.features(x), reduction="none")
        return -losses.flatten(1).sum(dim=1)

    def mean(self, said: Tensor) -> Tensor:
        return torch.sigmoid(said.squeeze(1).float())

    def mode(self, said: Tensor) -> Tensor:
        return (said.squeeze(1) > 0).float()


class Gaussian(Likelihood):
    """N(mean, sigma²) with one sigma for all elements, fixed or learned. Learned, it decides by itself how
    much of the latent is worth its rate (Lucas et al. 2019; Rybkin et al. 2021). A density: the NLL may be
    negative. With ``columns`` it is the density of vectors standardized by them."""

    width = 1

    def __init__(self, levels: int | None, sigma: float | None, columns: Standardized | None = None) -> None:
        super().__init__(levels)
        self.columns = columns
        self.fixed = sigma
        self.log_sigma = nn.Parameter(torch.zeros(()), requires_grad=sigma is None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_sigma, 0.0 if self.fixed is None else math.log(self.fixed))

    def log_prob(self, x: Tensor, said: Tensor) -> Tensor:
        z = (self.features(x) - said.squeeze(1).float()) * torch.exp(-self.log_sigma)
        densities = -0.5 * z**2 - self.log_sigma - 0.5 * math.log(2 * math.pi)
        return densities.flatten(1).sum(dim=1)

    def features(self, x: Tensor) -> Tensor:
        features = super().features(x)
        return features if self.columns is None else self.columns(features)

    def mean(self, said: Tensor) -> Tensor:
        """The expected data, with ``columns`` in the units of the data."""
        mean = said.squeeze(1).float()
        return mean if self.columns is None else self.columns.undone(mean)

    def mode(self, said: Tensor) -> Tensor:
        return self.mean(said)


class DiscretizedLogistic(Likelihood):
    """The mass that a logistic distribution has on the bin of each level, the outer bins open (Kingma et al.
    2016). Mean and log-scale for every element, in units of ``features``."""

    width = 2

    def log_prob(self, x: Tensor, said: Tensor) -> Tensor:
        assert self.levels is not None
        mean, log_scale = self._said(said)
        precision = torch.exp(-log_scale)
        half = 0.5 / (self.levels - 1)
        centred = self.features(x) - mean
        above, below = (centred + half) * precision, (centred - half) * precision
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), without cancellation
        upper, lower = F.logsigmoid(above), F.logsigmoid(-below)
        inner = upper + lower + torch.log(-torch.expm1(-2 * half * precision))
        level = x.int()
        mass = torch.where(level == 0, upper, torch.where(level == self.levels - 1, lower, inner))
        return mass.flatten(1).sum(dim=1)

    def mean(self, said: Tensor) -> Tensor:
        return self._said(said)[0].clamp(0, 1)

    def mode(self, said: Tensor) -> Tensor:
        assert self.levels is not None
        return (self.mean(said) * (self.levels - 1)).round() / (self.levels - 1)

    @staticmethod
    def _said(said: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = said.float().unbind(dim=1)
        # Starts, with a decoder that says 0, as grey and about as wide as the data.
        return mean + 0.5, (log_scale - 1.5).clamp(min=_SMALLEST_LOG_SCALE)


class Categorical(Likelihood):
    """A probability for each of the levels, for every element."""

    def __init__(self, levels: int) -> None:
        super().__init__(levels)
        self.width = levels

    def log_prob(self, x: Tensor, said: Tensor) -> Tensor:
        return -F.cross_entropy(said.float(), x.long(), reduction="none").flatten(1).sum(dim=1)

    def mean(self, said: Tensor) -> Tensor:
        values = torch.linspace(0, 1, self.width, device=said.device)
        return torch.einsum("bl...,l->b...", torch.softmax(said.float(), dim=1), values)

    def mode(self, said: Tensor) -> Tensor:
        return said.argmax(dim=1).float() / (self.width - 1)
