"""The loss of a batch spread over processes: one all-reduce of sums, then the clamp on the global rates."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaekernels import reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Settings(NamedTuple):
    """The options that every rank must have the same, or the losses of the ranks are of different things.
    `weight` is data: a rank without one has ones. `free_bits`: None, the number, or the shape of the tensor,
    whose values may change in place."""

    free_bits: float | tuple[int, ...] | None
    clamp: str
    penalty: str
    reduction: str
    batch_dims: int
    group_dims: tuple[int, ...] | None
    parameterization: str
    logvar_bounds: tuple[float, float] | None
    prior: bool
    balance: float | None
    shape_of_groups: tuple[int, ...] = ()
    latent_elements: int | None = None
    """counts for reduction="mean" alone"""
    dtype: torch.dtype | None = None


# What the ranks of a group have agreed on. They forget together, since all have made the same calls.
_agreed: weakref.WeakKeyDictionary[ProcessGroup, set[Settings]] = weakref.WeakKeyDictionary()
_REMEMBERED = 4096
_BYTES = 2048  # of the settings as text: more than the longest


def require_same_settings(
    group: ProcessGroup, settings: Settings, threshold: Tensor | float | None, like: Tensor
) -> None:
    """ValueError, on every rank, where the ranks' settings differ. Settings that this rank has seen before in
    this group cost a look-up; others one small all-gather and a wait for it. The values of a threshold
    that is a tensor are compared then, and not again.

    Ranks that come with different settings where one has seen its own and another has not wait for one
    another until the group's timeout, as with any collectives that differ.
    """
    known = _agreed.get(group)
    if known is not None and settings in known:
        return
    import torch.distributed as dist

    ranks = dist.get_world_size(group)
    if ranks > 1:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a graph can hold no wait; the calls that warm it up have compared
        own = {name: _told(value) for name, value in settings._asdict().items()}
        if isinstance(threshold, Tensor):
            own["free_bits"] = _told(threshold.tolist())
        text = json.dumps(own).encode().ljust(_BYTES)
        mine = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(like.device)
        gathered = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(gathered, mine, group=group)
        told = [json.loads(bytes(each.tolist())) for each in gathered]
        if differing := [name for name in own if any(each[name] != told[0][name] for each in told)]:
            listed = "; ".join(f"{name} is {_by_rank([each[name] for each in told])}" for name in differing)
            raise ValueError(
                f"process_group: every rank must be called with the same options, and they differ: {listed} "
                "(ranks of the group)"
            )
    if known is None:
        known = _agreed[group] = set()
    elif len(known) >= _REMEMBERED:
        known.clear()
    known.add(settings)


def _told(value: object) -> str:
    """A value in at most 60 characters, different for different values."""
    text = str(value)
    if len(text) <= 60:
        return text
    return f"{text[:40]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _by_rank(values: list[str]) -> str:
    """0.1 on ranks 0, 2 and 0.5 on rank 1"""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return " and ".join(
        f"{value} on rank{'s' * (len(on) > 1)} {', '.join(on[:8])}{', ...' * (len(on) > 8)}"
        for value, on in ranks.items()
    )


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
    settings: Settings | None,
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
    only. `settings`: compared with those of the other ranks; None while compiling, where nothing is.
    """
    if settings is not None:
        settings = settings._replace(
            shape_of_groups=tuple(sums.shape),
            latent_elements=latent_numel if reduction == "mean" else None,
            dtype=sums.dtype,
        )
        require_same_settings(group, settings, threshold, sums)
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


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks, in their order. Backward sums the gradients of all ranks: with the mean over the
    ranks that DDP takes, that is the gradient of the mean of the ranks' losses."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
        import torch.distributed as dist

        ctx.group, ctx.counts, ctx.rank = group, counts, dist.get_rank(group)
        # Collectives take one size from all ranks.
        padded = local.new_zeros((max(counts), *local.shape[1:]))
        padded[: local.shape[0]] = local
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=group)
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        import torch.distributed as dist

        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        begin = sum(ctx.counts[: ctx.rank])
        return total[begin : begin + ctx.counts[ctx.rank]], None, None


def gather_posteriors(
    mu: Tensor, logvar: Tensor, group: ProcessGroup, options: str
) -> tuple[Tensor, Tensor, int]:
    """The posteriors of all ranks, and the number of those of lower ranks than this one. ValueError, on every
    rank, where dimensions, dtypes or `options`, a text, differ."""
    import torch.distributed as dist

    digest = int.from_bytes(hashlib.sha256(f"{options}, {mu.dtype}".encode()).digest()[:7], "big")
    mine = torch.tensor([mu.shape[0], mu.shape[1], digest], device=mu.device)
    told = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(told, mine, group=group)
    rows = [each.tolist() for each in told]
    if any(each[1:] != rows[0][1:] for each in rows):
        raise ValueError(
            "process_group: every rank must be called with the same options, dtype and dimensions, and they "
            f"differ; the dimensions are {_by_rank([str(each[1]) for each in rows])}, and this rank has "
            f"{options}, {mu.dtype}"
        )
    counts = [each[0] for each in rows]
    gathered: Tensor = _GatherRows.apply(  # type: ignore[no-untyped-call]
        torch.cat((mu, logvar), 1), counts, group
    )
    dims = mu.shape[1]
    return gathered[:, :dims], gathered[:, dims:], sum(counts[: dist.get_rank(group)])


def mean_over_ranks(sums: Tensor, rows: int, group: ProcessGroup) -> Tensor:
    """Sums over the rows of all ranks, divided by their number. The gradients carry the factor R."""
    total: Tensor = _AllReduceSum.apply(  # type: ignore[no-untyped-call]
        torch.cat((sums, sums.new_full((1,), rows))), group
    )
    return total[:-1] / total[-1].detach()
