"""Centred and scaled arrays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Standardized"]

_PART = 1024  # examples
_ROUNDING = 1e-12  # of a mean in float64: a smaller standard deviation is that of a constant


class Standardized(nn.Module):
    """Features less their mean over the training data, divided by their standard deviation, that of each
    column of vectors, of images one for all pixels. Every encoder of arrays begins with it: thousands of
    pixels whose mean is far from 0 saturate its tanh units, and mu is then the same for all x."""

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def undone(self, features: Tensor) -> Tensor:
        return features / self.scale + self.mean

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale

    @torch.no_grad()
    def fit(self, x: Tensor, features: Callable[[Tensor], Tensor]) -> None:
        """Mean and scale of the ``features`` of the examples ``x``, summed in float64 over parts of them."""
        parts = torch.split(x, _PART)
        mean = torch.stack([features(part).double().sum(dim=0) for part in parts]).sum(dim=0) / len(x)
        squares = [(features(part).double() - mean).square().sum(dim=0) for part in parts]
        variance = torch.stack(squares).sum(dim=0) / len(x)
        constant = variance <= (_ROUNDING * mean).square()
        if variance.dim() > 1:
            variance, constant = variance.mean().expand_as(variance), constant.all()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(constant, 1.0, variance.rsqrt()))
