"""A model with its latent layers, which are those of :mod:`vaekernels.nn`: the terms of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from vaekernels import ops
from vaekernels.nn import GaussianLatent, LearnedPriorLatent, Options, Scheduled
from vaekernels.ops import KLDecomposition
from vaekernels.training.models import VAE, LatentLayer, widened

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ELBO", "Drawn", "LatentOptions", "Terms"]


@dataclass(frozen=True)
class LatentOptions:
    """What an objective asks of every latent layer, see :class:`vaekernels.nn.GaussianLatent`. ``group``:
    "dim", "channel" (axis 1 of a latent with positions) or "all"; ``per_example``: a KL per example in place
    of their mean, then without free bits; ``examples``: of the training data, where the terms shall have the
    parts of the KL."""

    free_bits: float | Scheduled | None = None
    clamp: Literal["batch", "sample"] = "batch"
    penalty: Literal["floor", "hinge", "mask"] = "floor"
    group: Literal["dim", "channel", "all"] = "dim"
    balance: float | None = None
    per_example: bool = False
    examples: int | None = None
    process_group: ProcessGroup | None = None

    def layer(self, of: LatentLayer) -> GaussianLatent | LearnedPriorLatent:
        groups = {"dim": of.shape, "channel": of.shape[:1], "all": ()}[self.group]
        options: Options = {
            "free_bits": self.free_bits,
            "clamp": self.clamp,
            "penalty": self.penalty,
            "group_dims": {"dim": None, "channel": 1, "all": ()}[self.group],
            "reduction": "none" if self.per_example else "batchmean",
            "process_group": self.process_group,
        }
        if of.learned_prior:
            return LearnedPriorLatent(groups, balance=self.balance, **options)
        return GaussianLatent(groups, **options)


class Drawn(NamedTuple):
    """The moments of a latent layer in one step, and those of its learned prior; both detached."""

    moments: Tensor
    prior: Tensor | None

    def kl_per_example(self) -> Tensor:
        """Unclamped, nats, [B]."""
        prior = () if self.prior is None else self.prior.chunk(2, dim=1)
        kl: Tensor = ops.gaussian_kl_packed(self.moments, 1, *prior, reduction="none")
        return kl


class Terms(NamedTuple):
    """The terms of the loss of a batch, in nats."""

    nll: Tensor
    """-log p(x|z), summed over data dimensions, mean over the batch, 0-dim."""
    kl: Tensor
    """Of each layer, with free bits, [L]; where the options say per example: [L, B]."""
    rate: Tensor
    """KL of each layer before any clamp, mean over the batch, [L], differentiable."""
    examples: float
    """Of the whole batch, divided by the number of processes: what sums over this process's rows are divided
    by, so that the average over processes is the mean over examples however unevenly they are spread."""
    nll_per_example: Tensor
    """Detached, [B]."""
    drawn: tuple[Drawn, ...]
    """Each layer, for a look at each example."""
    parts: KLDecomposition | None = None
    """Of the mean KL of the only layer, differentiable, where the options ask for them and the batch has two
    examples. By the stratified estimate of Chen et al. 2018: a batch stands for all training data."""


class ELBO(nn.Module):
    """The terms of ``model``: a module, so that Fabric sees the whole computation of a step."""

    def __init__(self, model: VAE, options: LatentOptions) -> None:
        super().__init__()
        self.model = model
        self.latents = nn.ModuleList(options.layer(each) for each in model.latent_layers)
        self._options = options

    def forward(self, x: Tensor, examples: float, generator: torch.Generator | None = None) -> Terms:
        """``examples``: see :class:`Terms`; ``generator``: of the noise of z."""
        drawn: list[Drawn] = []
        kls: list[Tensor] = []
        rates: list[Tensor] = []
        parts: list[KLDecomposition] = []

        def sample(moments: Tensor, prior: Tensor | None = None) -> Tensor:
            moments, given = widened(moments), () if prior is None else (prior,)
            z, kl, rate = self.latents[len(drawn)](moments, *given, generator=generator)
            drawn.append(Drawn(moments.detach(), None if prior is None else prior.detach()))
            kls.append(kl)
            rates.append(rate.sum())
            if self._options.examples is not None:
                parts.extend(self._parts(z, moments, examples, self._options.examples))
            return cast(Tensor, z)

        nll = -self.model(x, sample)
        kl, rate = torch.stack(kls), torch.stack(rates)
        if self._options.per_example:
            rate = kl.sum(dim=1) / examples
        nll_mean, each = nll.sum() / examples, nll.detach()
        return Terms(nll_mean, kl, rate, examples, each, tuple(drawn), parts[0] if parts else None)

    def _parts(self, z: Tensor, moments: Tensor, examples: float, of: int) -> Iterator[KLDecomposition]:
        group = self._options.process_group
        if round(examples * (1 if group is None else group.size())) < 2:
            return  # a last batch of one example, with nothing to compare it with
        mu, logvar = (half.flatten(1) for half in moments.chunk(2, dim=1))
        yield ops.kl_decomposition(
            z.flatten(1), mu, logvar, log_weight=("stratified", of), process_group=group
        )
