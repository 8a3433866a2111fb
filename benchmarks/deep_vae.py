"""A very deep hierarchical VAE in the manner of VDVAE (Child 2021): 40 stochastic layers from 1x1 to 32x32,
each with a learned prior, top down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from latent_ops import LatentOps
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F

from vaekernels.training.models import DiscretizedLogistic

__all__ = ["PUBLISHED", "SMALL", "DeepVAE", "Sizes", "photographs"]


@dataclass(frozen=True)
class Sizes:
    """``encoder``, ``decoder``: residual blocks and stochastic layers at each resolution."""

    width: int
    bottleneck: int
    latent_channels: int = 16
    encoder: tuple[tuple[int, int], ...] = ((32, 11), (16, 6), (8, 6), (4, 3), (1, 3))
    decoder: tuple[tuple[int, int], ...] = ((1, 2), (4, 4), (8, 6), (16, 10), (32, 18))

    @property
    def layers(self) -> int:
        return sum(count for _, count in self.decoder)

    @property
    def image(self) -> int:
        return self.encoder[0][0]


PUBLISHED = Sizes(width=384, bottleneck=96)
"""The widths of the published CIFAR-10 model."""
SMALL = Sizes(width=64, bottleneck=16)


class _Block(nn.Sequential):
    """1x1, 3x3, 3x3, 1x1 convolutions with a bottleneck. The last starts small where ``depth`` blocks in
    a row are each added to their input, so that the scale stays."""

    def __init__(self, inputs: int, bottleneck: int, outputs: int, resolution: int, depth: int = 1) -> None:
        kernel = 3 if resolution > 2 else 1
        last = nn.Conv2d(bottleneck, outputs, 1)
        with torch.no_grad():
            last.weight *= math.sqrt(1 / depth)
        super().__init__(
            nn.GELU(),
            nn.Conv2d(inputs, bottleneck, 1),
            nn.GELU(),
            nn.Conv2d(bottleneck, bottleneck, kernel, padding="same"),
            nn.GELU(),
            nn.Conv2d(bottleneck, bottleneck, kernel, padding="same"),
            nn.GELU(),
            last,
        )


class _Encoder(nn.Module):
    """Bottom up: what the data say at each resolution."""

    def __init__(self, sizes: Sizes, channels: int) -> None:
        super().__init__()
        depth = sum(count for _, count in sizes.encoder)
        self.first = nn.Conv2d(channels, sizes.width, 3, padding=1)
        self.factors = [a // b for (a, _), (b, _) in pairwise(sizes.encoder)]
        self.stages = nn.ModuleList(
            nn.ModuleList(
                _Block(sizes.width, sizes.bottleneck, sizes.width, size, depth) for _ in range(count)
            )
            for size, count in sizes.encoder
        )

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        h, said = self.first(x), {}
        for stage, factor in zip(self.stages, [1, *self.factors], strict=True):
            h = F.avg_pool2d(h, factor) if factor > 1 else h
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                h = h + block(h)
            said[h.shape[-1]] = h
        return said


class _Stochastic(nn.Module):
    """One latent layer of the way down."""

    def __init__(self, sizes: Sizes, resolution: int) -> None:
        super().__init__()
        width, inner, dims = sizes.width, sizes.bottleneck, sizes.latent_channels
        self.dims = dims
        self.prior = _Block(width, inner, 2 * dims + width, resolution)
        self.posterior = _Block(2 * width, inner, 2 * dims, resolution)
        self.merge = nn.Conv2d(dims, width, 1)
        self.after = _Block(width, inner, width, resolution, sizes.layers)

    def forward(self, h: Tensor, data: Tensor, ops: LatentOps) -> tuple[Tensor, Tensor]:
        prior = self.prior(h)
        mp, lp, more = prior.split([self.dims, self.dims, h.shape[1]], dim=1)
        moments = self.posterior(torch.cat([h, data], dim=1))
        z, kl, _ = ops.sample_kl_packed(moments, 1, mp, lp, group_dims=())
        h = h + more + self.merge(z)
        return h + self.after(h), kl


class DeepVAE(nn.Module):
    def __init__(self, sizes: Sizes, channels: int = 3) -> None:
        super().__init__()
        self.sizes = sizes
        self.likelihood = DiscretizedLogistic(256)
        self.encoder = _Encoder(sizes, channels)
        self.starts = nn.ParameterList(
            nn.Parameter(torch.zeros(1, sizes.width, size, size)) for size, _ in sizes.decoder
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(_Stochastic(sizes, size) for _ in range(count)) for size, count in sizes.decoder
        )
        self.last = nn.Conv2d(sizes.width, self.likelihood.width * channels, 1)

    def forward(self, x: Tensor, ops: LatentOps) -> Tensor:
        """The negative ELBO of uint8 images [B, C, H, W], nats per data dimension."""
        said = self.encoder(self.likelihood.features(x))
        h, rates = None, []
        for start, stage in zip(self.starts, self.stages, strict=True):
            start = start.expand(len(x), -1, -1, -1)
            h = start if h is None else start + F.interpolate(h, size=start.shape[-2:])
            assert isinstance(stage, nn.ModuleList)
            for layer in stage:
                h, rate = layer(h, said[h.shape[-1]], ops)
                rates.append(rate)
        assert h is not None
        out = self.last(h).view(len(x), self.likelihood.width, *x.shape[1:])
        nll = -self.likelihood.log_prob(x, out).mean()
        return (nll + torch.stack(rates).sum()) / x[0].numel()


def photographs(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Patches of scikit-learn's two photographs, uint8 [count, 3, size, size]."""
    images = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    _, height, width, _ = images.shape
    patches = []
    for _ in range(count):
        i, top, left = (
            int(torch.randint(n, (), generator=generator)) for n in (len(images), height - size, width - size)
        )
        patches.append(images[i, top : top + size, left : left + size].permute(2, 0, 1))
    return torch.stack(patches)
