"""The loss of a batch spread over processes: one all-reduce of sums, then the clamp on the global rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vaekernels import reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _AllReduceSum(torch.autograd.Function):
    """The sum over the ranks. Its gradient is R, which DDP's averaging takes out; backward is local."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        import torch.distributed as dist

        ctx.ranks = dist.get_world_size(group)
        if torch.compiler.is_compiling():
            from torch.distributed import _functional_collectives as functional

            reduced: Tensor = functional.all_reduce(local, "sum", group)
            return reduced
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.ranks, None


def reduce_ranks(
    numerator: Tensor,
    sums: Tensor,
    group: ProcessGroup,
    *,
    weight: Tensor | None,
    batch_shape: Sequence[int],
    latent_numel: int,
    threshold: Tensor | float | None,
    clamp: str,
    penalty: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The global (kl, kl_per_group), on every rank, from this rank's sums over its rows.

    `sums` [group] holds sum_b w_b KL[b,g]; `numerator` () the clamped sum, which counts for clamp="sample"
    only.
    """
    local_weight = reference.total_weight(weight, batch_shape, sums.dtype)
    if not isinstance(local_weight, Tensor):
        local_weight = sums.new_full((), local_weight)
    total: Tensor = _AllReduceSum.apply(  # type: ignore[no-untyped-call]
        torch.cat((sums.reshape(-1), numerator.reshape(1), local_weight.reshape(1))), group
    )
    return reference.reduce_groups(
        total[:-2].reshape(sums.shape),
        total[-1].detach(),
        total[-2] if clamp == "sample" and threshold is not None else None,
        threshold=threshold,
        penalty=penalty,
        reduction=reduction,
        latent_numel=latent_numel,
    )
