"""One step's latent layers: the samples, and the terms of the loss that come with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

import vaekernels as vk
from vaekernels.training.models import VAE, widened

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ELBO", "KLOptions", "Latents", "Layer", "Terms"]


@dataclass(frozen=True)
class KLOptions:
    """What the KL of every layer is: arguments of :func:`vaekernels.sample_kl`. ``group``: "dim", "channel"
    (axis 1 of a latent with positions) or "all"; ``per_example``: a KL per example in place of their mean,
    then without free bits."""

    free_bits: float | Tensor | None = None
    clamp: Literal["batch", "sample"] = "batch"
    penalty: Literal["floor", "hinge", "mask"] = "floor"
    group: Literal["dim", "channel", "all"] = "dim"
    balance: float | None = None
    per_example: bool = False
    process_group: ProcessGroup | None = None


class Layer(NamedTuple):
    """A latent layer of one step: its moments and prior, detached, for a look at each example."""

    moments: Tensor
    prior: tuple[Tensor, Tensor] | None

    def kl_per_example(self) -> Tensor:
        """Unclamped, nats, [B]."""
        kl: Tensor = vk.gaussian_kl_packed(self.moments, 1, *(self.prior or ()), reduction="none")
        return kl


class Latents:
    """What a model's ``forward`` takes as ``sample``: draws z of one layer after another from ``generator``
    and keeps the KL of each."""

    def __init__(self, options: KLOptions, generator: torch.Generator | None) -> None:
        self.options = options
        self.generator = generator
        self.layers: list[Layer] = []
        self.kl: list[Tensor] = []
        self.rate: list[Tensor] = []

    def __call__(self, moments: Tensor, prior: tuple[Tensor, Tensor] | None = None) -> Tensor:
        options = self.options
        moments = widened(moments)
        z, kl, per_group = vk.sample_kl_packed(
            moments,
            1,
            *(prior or ()),
            generator=self.generator,
            free_bits=options.free_bits,
            clamp=options.clamp,
            penalty=options.penalty,
            group_dims={"dim": None, "channel": 1, "all": ()}[options.group],
            balance=None if prior is None else options.balance,
            reduction="none" if options.per_example else "batchmean",
            process_group=options.process_group,
        )
        self.layers.append(Layer(moments.detach(), prior and (prior[0].detach(), prior[1].detach())))
        self.kl.append(kl)
        self.rate.append(per_group.sum())
        return z


class Terms(NamedTuple):
    """The terms of the loss of a batch, in nats."""

    nll: Tensor
    """-log p(x|z), summed over data dimensions, mean over the batch, 0-dim."""
    kl: Tensor
    """Of each layer, as the objective has it (with free bits, clamped), [L]; per example: [L, B]."""
    rate: Tensor
    """KL of each layer before any clamp, mean over the batch, [L], differentiable."""
    nll_per_example: Tensor
    """Detached, [B]."""
    examples: float
    """Of the whole batch, divided by the number of processes: what sums over this process's rows are divided
    by, so that the average over processes is the mean over examples however unevenly they are spread."""


class ELBO(nn.Module):
    """The terms of ``model``: a module, so that Fabric sees the whole computation of a step."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, latents: Latents, examples: float) -> Terms:
        """``examples``: see :class:`Terms`."""
        nll = -self.model(x, latents)
        kl, rate = torch.stack(latents.kl), torch.stack(latents.rate)
        if latents.options.per_example:
            rate = kl.sum(dim=1) / examples
        return Terms(nll.sum() / examples, kl, rate, nll.detach(), examples)
