"""From the arguments of a public op to the options of an operator, and to who computes it.

Eager calls go to the compiled entry, compiled code to the registered operators, and what neither serves (no
kernels for the device, an active `torch.func` transform, forward-mode AD) to `vaekernels.reference`. All
agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vaekernels import _checks, _distributed, _native, reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_transforms_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling


def entry_for(t: Tensor) -> Any:
    """Who serves `t`: the compiled entry, the registered operators, or the reference."""
    # The kernels' C++ autograd functions know neither functorch nor forward-mode AD.
    if _transforms_active() or forward_ad._current_level >= 0:
        return reference
    device = "cpu" if t.is_cpu else t.device.type
    if _native.has_kernels(device) or (device == "meta" and _native.C is not None):
        return torch.ops.vaekernels if _is_compiling() else _native.C
    if device != "meta":
        _native.warn_fallback(device)
    return reference


def short_entry() -> Any:
    """The compiled library, whose `short_*` forms serve calls at default options; None where they may not."""
    if _transforms_active() or forward_ad._current_level >= 0 or _is_compiling():
        return None
    return _native.C


def draws(entry: Any) -> bool:
    """True for the compiled entry, whose `*_draw` forms take the state and use it in one call."""
    return entry is not None and entry is _native.C


def draw_state(entry: Any, like: Tensor, generator: torch.Generator | None) -> Tensor:
    state: Tensor = (
        reference.rng_state(like, generator)
        if entry is reference
        else entry._rng_state(like, generator=generator)
    )
    return state


def sample_options(
    like: Tensor,
    num_samples: int | None,
    generator: torch.Generator | None,
    rng: Tensor | None,
    parameterization: str,
    logvar_bounds: tuple[float, float] | None,
) -> dict[str, Any]:
    """The checked options of `reparameterize`, as the operators take them, without those at default."""
    options: dict[str, Any] = {}
    if num_samples is not None:
        _checks.check_num_samples(num_samples)
        options["num_samples"] = num_samples
    if parameterization != "logvar":
        _checks.check_choice("parameterization", parameterization, _checks.PARAMETERIZATIONS)
        options["parameterization"] = parameterization
    if logvar_bounds is not None:
        options["logvar_bounds"] = _checks.check_bounds(logvar_bounds)
    if rng is not None or generator is not None:
        _checks.check_random(like, rng, generator)
    return options


class Shared(NamedTuple):
    """What the ranks of a process group do with their sums, see `_distributed.reduce_ranks`."""

    group: ProcessGroup
    options: dict[str, Any]

    def reduce(self, numerator: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        return _distributed.reduce_ranks(numerator, sums, self.group, **self.options)


def kl_options(
    name: str,
    like: Tensor,
    shape: Sequence[int],
    free_bits: float | Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    clamp: str,
    penalty: str,
    batch_dims: int,
    group_dims: int | Sequence[int] | None,
    weight: Tensor | None,
    balance: float | None,
    reduction: str,
    parameterization: str,
    logvar_bounds: tuple[float, float] | None,
    process_group: ProcessGroup | None,
) -> tuple[dict[str, Any], Shared | None]:
    """The checked options of `gaussian_kl`, as the operators take them, without those at default.

    `shape` is that of mu. Only what differs from the default costs a test and a conversion here: with small
    tensors that is a good part of the whole call.
    """
    options: dict[str, Any] = {}
    ndim = len(shape)
    if batch_dims != 1 or ndim == 0 or type(batch_dims) is not int:
        _checks.check_batch_dims(ndim, batch_dims)
        options["batch_dims"] = batch_dims
    if clamp != "batch":
        _checks.check_choice("clamp", clamp, _checks.CLAMPS)
        options["clamp"] = clamp
    if penalty != "floor":
        _checks.check_choice("penalty", penalty, _checks.PENALTIES)
        options["penalty"] = penalty
    if parameterization != "logvar":
        _checks.check_choice("parameterization", parameterization, _checks.PARAMETERIZATIONS)
        options["parameterization"] = parameterization
    if reduction != "batchmean":
        _checks.check_choice("reduction", reduction, _checks.REDUCTIONS)
        _checks.check_reduction(reduction, clamp, free_bits, weight, process_group)
        options["reduction"] = reduction
    if logvar_bounds is not None:
        options["logvar_bounds"] = _checks.check_bounds(logvar_bounds)
    has_prior = prior_mu is not None or prior_logvar is not None
    if has_prior:
        _checks.check_prior(shape, name, like, prior_mu, prior_logvar)
    if balance is not None:
        options["balance"] = _checks.check_balance(balance, has_prior)
    if group_dims is not None:
        options["group_dims"] = _checks.group_axes(ndim, batch_dims, group_dims)
    if weight is not None:
        _checks.check_weight(weight, shape[:batch_dims], like)
        options["weight"] = weight
    if free_bits is not None:
        if isinstance(free_bits, Tensor):
            axes = options.get("group_dims")
            group_shape = shape[batch_dims:] if axes is None else [shape[axis] for axis in axes]
            options["free_bits_per_group"] = _checks.free_bits_tensor(free_bits, group_shape, like)
        else:
            options["free_bits"] = _checks.free_bits_number(free_bits)
    if process_group is None:
        return options, None
    return _local_options(options, shape, batch_dims, clamp, penalty, has_prior, process_group)


def _local_options(
    options: dict[str, Any],
    shape: Sequence[int],
    batch_dims: int,
    clamp: str,
    penalty: str,
    has_prior: bool,
    process_group: ProcessGroup,
) -> tuple[dict[str, Any], Shared]:
    """The options by which each rank delivers plain sums, and what is then done with them."""
    # A clamp on the batch mean has to wait for the sums of the other ranks.
    take = options.pop if clamp == "batch" else options.get
    number, per_group = take("free_bits", None), take("free_bits_per_group", None)
    axes = options.get("group_dims")
    settings = None
    if not _is_compiling():  # a comparison is a wait for the other ranks, and nothing that a graph can hold
        settings = _distributed.Settings(
            number if per_group is None else tuple(per_group.shape),
            clamp,
            penalty,
            options.get("reduction", "batchmean"),
            batch_dims,
            None if axes is None else tuple(axes),
            options.get("parameterization", "logvar"),
            options.get("logvar_bounds"),
            has_prior,
            options.get("balance"),
        )
    shared = Shared(
        process_group,
        {
            "settings": settings,
            "weight": options.get("weight"),
            "batch_shape": shape[:batch_dims],
            "latent_numel": math.prod(shape[batch_dims:]),
            "threshold": number if per_group is None else per_group,
            "clamp": clamp,
            "penalty": penalty,
            "reduction": options.get("reduction", "batchmean"),
        },
    )
    return {**options, "reduction": "sum", "group_sums": True}, shared
