"""From the arguments of a public op to the operator `latent`, and to who computes it.

Eager calls go to the compiled entry, compiled code to the registered operators, and what neither serves (no
kernels for the device, an active `torch.func` transform, forward-mode AD) to `vaekernels.reference`. All
agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vaekernels import _checks, _distributed, _native, reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What a call of `latent` wants, and the form of its tensors.
SAMPLE, KL, PACKED = 1, 2, 4

_transforms_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # a third of the time of is_compiling
_jit_tracing = torch._C._get_tracing_state


def entry() -> Callable[..., tuple[Any, Any, Any]]:
    """Who takes a call, with the arguments of `latent`: the compiled library, or `latent` itself.

    The compiled entry keeps the outcome of `checked`, so that a second call with the same options, shapes,
    dtypes and devices is not checked again, and calls `latent` where it cannot serve, as while
    `torch.jit.trace` records or for the fake tensors of an export.
    """
    # The kernels' C++ autograd functions know neither functorch nor forward-mode AD.
    if _native.C is None or _transforms_active() or forward_ad._current_level >= 0 or _is_dynamo_compiling():
        return latent
    compiled: Callable[..., tuple[Any, Any, Any]] = _native.C.latent
    return compiled


def _exports_to_onnx() -> bool:
    """Whether one of torch's two exporters traces this call: ONNX has none of our operators."""
    return (_is_compiling() or _jit_tracing() is not None) and torch.onnx.is_in_onnx_export()


def operators_for(t: Tensor) -> Any:
    """Who computes for `t`: `torch.ops.vaekernels`, or `vaekernels.reference`, whose functions are alike."""
    if _transforms_active() or forward_ad._current_level >= 0 or _exports_to_onnx():
        return reference
    device = "cpu" if t.is_cpu else t.device.type
    if _native.has_kernels(device) or (device == "meta" and _native.C is not None):
        return torch.ops.vaekernels
    if device != "meta":
        _native.warn_fallback(device)
    return reference


def rng_state(like: Tensor, generator: torch.Generator | None) -> Tensor:
    state: Tensor = operators_for(like)._rng_state(like, generator=generator)
    return state


def latent(
    want: int,
    first: Tensor,
    second: Tensor | None,
    dim: int,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    weight: Tensor | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    /,
    *,
    process_group: ProcessGroup | None = None,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """(z, kl, kl_per_group), None for what `want` does not name: SAMPLE, KL or both.

    `first` is mu and `second` the logvar; with PACKED in `want`, `first` holds both along `dim`. The options
    are those of the public ops.
    """
    if _checks.autocast_dtype(first, second, prior_mu, prior_logvar):
        first, second, prior_mu, prior_logvar = _checks.promoted(first, second, prior_mu, prior_logvar)
        return entry()(
            want, first, second, dim, prior_mu, prior_logvar, weight, num_samples, generator, rng,
            process_group=process_group, **options,
        )  # fmt: skip
    sample, kl = bool(want & SAMPLE), bool(want & KL)
    dim = _checks.index("dim", dim)
    if num_samples is not None:
        num_samples = _checks.check_num_samples(num_samples)
    operator_options = check(
        want, first, second, dim, prior_mu, prior_logvar, weight, num_samples, generator, rng,
        process_group=process_group, **options,
    )  # fmt: skip
    shared = None
    if process_group is not None:
        shape = mu_shape(want, first, dim)
        has_prior = prior_mu is not None
        operator_options, shared = _local_options(operator_options, shape, weight, has_prior, process_group)
    operators = operators_for(first)
    if sample and _exports_to_onnx():
        if rng is not None or generator is not None:
            raise ValueError(
                "rng and generator must be None in an ONNX export: ONNX has its own random numbers and none "
                "from a state; drop the argument, or export mu and logvar and sample outside"
            )
        scale = {
            name: operator_options[name]
            for name in ("parameterization", "logvar_bounds")
            if name in operator_options
        }
        drawn = reference.sample_with_torchs_noise(first, second, dim, num_samples, **scale)
        if not kl:
            return drawn, None, None
        operator_options.update(sample=False, weight=weight)
        return drawn, *operators.latent(first, second, dim, None, prior_mu, prior_logvar, **operator_options)[
            1:3
        ]
    # Not by |=, which torch.compile of torch 2.6 cannot trace.
    operator_options.update(sample=sample, kl=kl, num_samples=num_samples, weight=weight)
    if sample and rng is None and operators is not reference and not _is_compiling():
        out = operators.latent_draw(first, second, dim, generator, prior_mu, prior_logvar, **operator_options)
    else:
        if sample and rng is None:
            rng = operators._rng_state(first, generator=generator)
        out = operators.latent(first, second, dim, rng, prior_mu, prior_logvar, **operator_options)
    z = out[0] if sample else None
    if not kl:
        return z, None, None
    return (z, *(out[1:3] if shared is None else shared.reduce(out[1], out[2])))


def checked(want: int, first: Any, /, *given: Any, **options: Any) -> dict[str, Any] | None:
    """What `check` finds, for the compiled entry to keep; None where that cannot serve the call."""
    if options.get("process_group") is not None or not isinstance(first, Tensor):
        return None
    device = "cpu" if first.is_cpu else first.device.type
    if not (_native.has_kernels(device) or device == "meta"):
        return None
    if _checks.autocast_dtype(first, given[0], *given[2:4]):
        return None
    return check(want, first, *given, **options)


def check(
    want: int,
    first: Tensor,
    second: Tensor | None,
    dim: int,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    weight: Tensor | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    /,
    *,
    free_bits: float | Tensor | None = None,
    clamp: str = "batch",
    penalty: str = "floor",
    batch_dims: int = 1,
    group_dims: int | Sequence[int] | None = None,
    balance: float | None = None,
    reduction: str = "batchmean",
    parameterization: str = "logvar",
    logvar_bounds: Sequence[float] | None = None,
    process_group: ProcessGroup | None = None,
) -> dict[str, Any]:
    """Refuses what does not fit; returns the options as the operators take them, without those at default."""
    if not want & PACKED:
        _checks.check_pair("mu", first, "logvar", second)
    name, shape = "moments" if want & PACKED else "mu", mu_shape(want, first, dim)
    options: dict[str, Any] = {}
    if parameterization != "logvar":
        _checks.check_choice("parameterization", parameterization, _checks.PARAMETERIZATIONS)
        options["parameterization"] = parameterization
    if logvar_bounds is not None:
        options["logvar_bounds"] = _checks.check_bounds(logvar_bounds)
    if num_samples is not None:
        _checks.check_num_samples(num_samples)
    if rng is not None or generator is not None:
        _checks.check_random(first, rng, generator)
    if not want & KL:
        return options

    ndim = len(shape)
    batch_dims = _checks.check_batch_dims(ndim, batch_dims)
    if batch_dims != 1:
        options["batch_dims"] = batch_dims
    if clamp != "batch":
        _checks.check_choice("clamp", clamp, _checks.CLAMPS)
        options["clamp"] = clamp
    if penalty != "floor":
        _checks.check_choice("penalty", penalty, _checks.PENALTIES)
        options["penalty"] = penalty
    if reduction != "batchmean":
        _checks.check_choice("reduction", reduction, _checks.REDUCTIONS)
        _checks.check_reduction(reduction, clamp, free_bits, weight, process_group)
        options["reduction"] = reduction
    has_prior = prior_mu is not None or prior_logvar is not None
    if has_prior:
        _checks.check_prior(shape, name, first, prior_mu, prior_logvar)
    if balance is not None:
        options["balance"] = _checks.check_balance(balance, has_prior)
    if group_dims is not None:
        options["group_dims"] = _checks.group_axes(ndim, batch_dims, group_dims)
    if weight is not None:
        _checks.check_weight(weight, shape[:batch_dims], first)
    if _checks.is_array(free_bits):
        free_bits = torch.as_tensor(free_bits, device=first.device)
    if isinstance(free_bits, Tensor):
        axes = options.get("group_dims")
        group_shape = shape[batch_dims:] if axes is None else [shape[axis] for axis in axes]
        options["free_bits_per_group"] = _checks.free_bits_tensor(free_bits, group_shape, first)
    elif free_bits is not None:
        options["free_bits"] = _checks.free_bits_number(free_bits)
    return options


def mu_shape(want: int, first: Tensor, dim: int) -> Sequence[int]:
    return _checks.packed_shape(first, dim) if want & PACKED else first.shape


class Shared(NamedTuple):
    """What the ranks of a process group do with their sums, see `_distributed.reduce_ranks`."""

    group: ProcessGroup
    options: dict[str, Any]

    def reduce(self, numerator: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        return _distributed.reduce_ranks(numerator, sums, self.group, **self.options)


def _local_options(
    options: dict[str, Any],
    shape: Sequence[int],
    weight: Tensor | None,
    has_prior: bool,
    process_group: ProcessGroup,
) -> tuple[dict[str, Any], Shared]:
    """The options by which each rank delivers plain sums, and what is then done with them."""
    clamp, batch_dims = options.get("clamp", "batch"), options.get("batch_dims", 1)
    # A clamp on the batch mean has to wait for the sums of the other ranks.
    take = options.pop if clamp == "batch" else options.get
    number, per_group = take("free_bits", None), take("free_bits_per_group", None)
    penalty, reduction = options.get("penalty", "floor"), options.get("reduction", "batchmean")
    axes = options.get("group_dims")
    settings = None
    if not _is_compiling():  # a comparison is a wait for the other ranks, and nothing that a graph can hold
        settings = _distributed.Settings(
            number if per_group is None else tuple(per_group.shape),
            clamp,
            penalty,
            reduction,
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
            "weight": weight,
            "batch_shape": shape[:batch_dims],
            "latent_numel": math.prod(shape[batch_dims:]),
            "threshold": number if per_group is None else per_group,
            "clamp": clamp,
            "penalty": penalty,
            "reduction": reduction,
        },
    )
    return {**options, "reduction": "sum", "group_sums": True}, shared


def aggregate(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    log_weight: int | tuple[str, int] | None,
    leave_one_out: bool,
    per_dim: bool,
    parameterization: str,
    logvar_bounds: Sequence[float] | None,
    process_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """(log_qz, log_qz_dims) of `ops.log_aggregate_posterior`, whose arguments these are."""
    z, mu, logvar = _checks.promoted(z, mu, logvar)
    kind, examples = _checks.log_weight_of(log_weight)
    own = _checks.own_posterior(kind, leave_one_out)
    _checks.check_aggregate(z, mu, logvar, own)
    options: dict[str, Any] = {"per_dim": per_dim, "log_weight": kind, "examples": examples}
    options.update(leave_one_out=leave_one_out, parameterization=parameterization)
    _checks.check_choice("parameterization", parameterization, _checks.PARAMETERIZATIONS)
    if logvar_bounds is not None:
        options["logvar_bounds"] = _checks.check_bounds(logvar_bounds)
    first = 0
    if process_group is not None:
        if _is_compiling():
            raise ValueError(
                "process_group must be None while compiling: how many posteriors the other ranks have is "
                "known only when the call runs; call this outside the compiled function"
            )
        mu, logvar, first = _distributed.gather_posteriors(mu, logvar, process_group, str(options))
    _checks.check_posteriors(mu.shape[0], mu.shape[1], examples, own)
    log_qz, log_qz_dims, _ = operators_for(z).aggregate(z, mu, logvar, first=first, **options)
    return log_qz, log_qz_dims
