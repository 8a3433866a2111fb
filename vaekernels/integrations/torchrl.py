"""Dreamer's world model of torchrl with the fused KL::

    from vaekernels.integrations.torchrl import DreamerModelLoss  # in place of torchrl.objectives
    loss = DreamerModelLoss(world_model, free_nats=3, balance=0.8)

It needs ``torchrl``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchrl.objectives import dreamer

from vaekernels import ops

__all__ = ["DreamerModelLoss"]


class DreamerModelLoss(dreamer.DreamerModelLoss):
    """torchrl.objectives.DreamerModelLoss: the same arguments, keys and numbers, the KL in one kernel.

    Args:
        balance: the share of the KL's gradient that goes to the prior (KL balancing, Hafner et al. 2020),
            which torchrl does not have; None: the plain gradient of both.
    """

    def __init__(self, world_model: Any, *, balance: float | None = None, **options: Any) -> None:
        super().__init__(world_model, **options)
        self.balance = balance

    def kl_loss(
        self, prior_mean: Tensor, prior_std: Tensor, posterior_mean: Tensor, posterior_std: Tensor
    ) -> Tensor:
        """The KL of the posterior to the prior in nats, with `free_nats` as free bits::

            delayed_clamp: max(free_nats, mean of KL), else mean of max(free_nats, KL)

        KL is that of a whole latent, or of each element with `global_average`.
        """
        axes = posterior_mean.ndim
        return ops.gaussian_kl(
            posterior_mean,
            posterior_std,
            prior_mean,
            prior_std,
            free_bits=float(self.free_nats),
            clamp="batch" if self.delayed_clamp else "sample",
            batch_dims=axes if self.global_average else axes - 1,
            group_dims=(),
            balance=self.balance,
            parameterization="std",
        )
