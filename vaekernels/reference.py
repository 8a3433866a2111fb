"""The ops in plain PyTorch: the fallback where nothing is compiled, oracle of the tests, double backward.

Differentiable any number of times, usable under `torch.func` and `torch.compile`, on any device. Arguments
are those of the operators `torch.ops.vaekernels.*` and are taken as checked (`vaekernels.ops` checks them).
The formulas are stated in `csrc/gaussian.h` and here, nowhere else: everything is written in the log standard
deviation x = logvar / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from vaekernels import _checks
from vaekernels._philox import normals, philox_words, rng_state

__all__ = [
    "Frozen",
    "aggregate",
    "clamped",
    "compute_dtype",
    "latent",
    "log_density",
    "normals",
    "philox_words",
    "reduce_groups",
    "rng_state",
    "sample_with_torchs_noise",
    "total_weight",
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 is computed in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Frozen:
    """The decisions of the clamp, taken by an earlier forward."""

    gate: Tensor
    open: Tensor

    def groups(self, shape: Sequence[int]) -> Tensor:
        is_open = self.gate > 0
        return (
            is_open.reshape(()).expand(tuple(shape))
            if is_open.numel() == 1
            else is_open.reshape(tuple(shape))
        )

    def cells(self, shape: Sequence[int]) -> Tensor:
        bits = (self.open.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=self.open.device)) & 1
        return bits.reshape(-1)[: math.prod(shape)].reshape(tuple(shape)) > 0


# --- the scale ----------------------------------------------------------------------------------------------


def _log_softplus(s: Tensor) -> Tensor:
    # log(log(1 + e^s)) loses its argument to underflow far down, where it is s - e^s / 2. The inner `where`
    # keeps the unused branch's gradient finite.
    far = s < -20.0
    near = torch.log(_softplus(torch.where(far, 0.0, s)))
    return torch.where(far, s - 0.5 * torch.exp(torch.where(far, s, 0.0)), near)


def _softplus(s: Tensor) -> Tensor:
    # At 40, log(1 + e^s) and s are one number in float64 too.
    return F.softplus(s, beta=1.0, threshold=40.0)


def _scale(
    second: Tensor, parameterization: str, bounds: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """The log standard deviation and the standard deviation that `second` stands for."""
    if parameterization in ("logvar", "log_std"):
        factor = 0.5 if parameterization == "logvar" else 1.0
        x = second * factor
        if bounds is not None:
            # Not torch.clamp, whose gradient is 0 at NaN.
            lo, hi = bounds
            x = torch.where(2.0 * x < lo, 0.5 * lo, torch.where(2.0 * x > hi, 0.5 * hi, x))
        return x, torch.exp(x)
    if parameterization == "std":
        # Added, so that the derivative is that of a positive one, as in the kernels.
        sd = second + torch.where(second < 0.0, math.nan, 0.0)
        log_of: Callable[[Tensor], Tensor] = torch.log
    else:
        sd, log_of = _softplus(second), _log_softplus
    if bounds is None:
        return log_of(second), sd
    lo, hi = bounds
    unbounded = 2.0 * log_of(second.detach())
    below, above = unbounded < lo, unbounded > hi
    # Outside, the argument is replaced before the logarithm, whose slope at sd = 0 would turn a zero gradient
    # to NaN.
    x = log_of(torch.where(below | above, 1.0, second))
    x = torch.where(below, 0.5 * lo, torch.where(above, 0.5 * hi, x))
    # Detached: x is constant there, and the zero gradient of what is not chosen is NaN where x is.
    return x, torch.where(below | above, torch.exp(x.detach()), sd)


# --- the sample ---------------------------------------------------------------------------------------------


def _dense_strides(t: Tensor) -> tuple[int, ...]:
    # `torch.empty_like` itself decides, on a tensor without memory and without functorch's wrapping.
    return torch.empty_like(torch.empty_strided(t.shape, t.stride(), device="meta")).stride()


def _sample(mu: Tensor, sd: Tensor, rng: Tensor, num_samples: int | None, like: Tensor) -> Tensor:
    """mu + sd * eps in `like`'s dtype and memory format, eps indexed by the storage order of the result."""
    shape, strides = tuple(like.shape), _dense_strides(like)
    numel = like.numel()
    if num_samples is not None:
        shape, strides, numel = (num_samples, *shape), (numel, *strides), num_samples * numel
    eps = normals(rng, numel, mu.dtype, mu.device).as_strided(shape, strides)
    z = (eps * sd + mu).to(like.dtype)
    if not torch._C._are_functorch_transforms_active() and z.stride() != strides:
        z = torch.empty_strided(shape, strides, dtype=z.dtype, device=z.device).copy_(z)
    return z


def sample_with_torchs_noise(
    first: Tensor,
    second: Tensor | None,
    dim: int,
    num_samples: int | None,
    parameterization: str = "logvar",
    logvar_bounds: Sequence[float] | None = None,
) -> Tensor:
    """The sample with `torch.randn_like` for its noise, where a graph cannot hold Philox."""
    mu, logvar = first.chunk(2, dim) if second is None else (first, second)
    dtype = compute_dtype(mu.dtype)
    m, (_, sd) = mu.to(dtype), _scale(logvar.to(dtype), parameterization, logvar_bounds)
    if num_samples is not None:
        m = m.expand(num_samples, *m.shape)
    return (torch.randn_like(m) * sd + m).to(mu.dtype)


# --- the divergence -----------------------------------------------------------------------------------------

_SERIES_BELOW = 0.25
_SERIES_LAST = {torch.float32: 8, torch.float64: 15}


def _excess(r: Tensor) -> Tensor:
    """e^r - 1 - r, whose leading digits cancel near 0: there the power series takes over."""
    small = r.abs() < _SERIES_BELOW
    near = torch.where(small, r, 0.0)
    last = _SERIES_LAST[r.dtype]
    series = near / math.factorial(last) + 1.0 / math.factorial(last - 1)
    for k in range(last - 2, 1, -1):
        series = series * near + 1.0 / math.factorial(k)
    # The exporter to ONNX that traces has no expm1.
    growth = torch.expm1(r) if torch._C._get_tracing_state() is None else torch.exp(r) - 1.0
    # The bound keeps inf - inf out at r = inf; e^r is infinite there in either precision.
    return torch.where(small, near * near * series, growth - r.clamp(max=1e4))


def _divergence(mu: Tensor, x: Tensor, prior: tuple[Tensor, Tensor] | None) -> Tensor:
    """KL of every element, in nats. The distance is scaled before it is squared, and overflows no earlier."""
    if prior is None:
        return 0.5 * (mu * mu + _excess(2.0 * x))
    prior_mu, prior_x = prior
    distance = (mu - prior_mu) * torch.exp(-prior_x)
    return 0.5 * (distance * distance + _excess(2.0 * (x - prior_x)))


class _BalancedDivergence(torch.autograd.Function):
    """The divergence, with (1 - balance) of its gradient for the posterior and balance of it for the prior.

    A class of its own because such a gradient is no function's derivative: no composition of ops has it and
    also has its derivative as the second derivative.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(mu: Tensor, x: Tensor, prior_mu: Tensor, prior_x: Tensor, balance: float) -> Tensor:
        return _divergence(mu, x, (prior_mu, prior_x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.balance = inputs[4]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        to_mu, to_x, to_prior_x = _slopes(*ctx.saved_tensors)
        q, p = grads[0] * (1.0 - ctx.balance), grads[0] * ctx.balance
        return q * to_mu, q * to_x, -p * to_mu, p * to_prior_x, None


class _BalancedDivergenceWithTangents(_BalancedDivergence):
    # Apart, since torch.compile takes no autograd.Function that has a jvp.
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        mu, x, prior_mu, prior_x = ctx.saved_tensors
        to_mu, to_x, to_prior_x = _slopes(mu, x, prior_mu, prior_x)
        d_mu, d_x, d_prior_mu, d_prior_x = (0.0 if t is None else t for t in tangents[:4])
        posterior = to_mu * d_mu + to_x * d_x
        return (1.0 - ctx.balance) * posterior + ctx.balance * (to_prior_x * d_prior_x - to_mu * d_prior_mu)


def _slopes(mu: Tensor, x: Tensor, prior_mu: Tensor, prior_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of the divergence by mu (by prior_mu: the negative), x and prior_x."""
    root = torch.exp(-prior_x)
    distance = (mu - prior_mu) * root
    growth = torch.expm1(2.0 * (x - prior_x))
    return distance * root, growth, -(distance * distance + growth)


def _balanced(mu: Tensor, x: Tensor, prior: tuple[Tensor, Tensor], balance: float) -> Tensor:
    compiling = torch.compiler.is_compiling()
    function = _BalancedDivergence if compiling else _BalancedDivergenceWithTangents
    divergence: Tensor = function.apply(mu, x, *prior, balance)  # type: ignore[no-untyped-call]
    return divergence


# --- clamp and reduction ------------------------------------------------------------------------------------


def clamped(x: Tensor, threshold: Tensor | float, penalty: str, is_open: Tensor) -> Tensor:
    """f(x; threshold) with the gradient 1 where `is_open`, else 0. A NaN in x or threshold comes out."""
    closed: Tensor | float = threshold if penalty == "floor" else 0.0
    if penalty != "floor" and isinstance(threshold, Tensor):
        closed = torch.where(threshold.isnan(), threshold, 0.0)
    closed = torch.where(x.detach().isnan(), x.detach(), closed)
    return torch.where(is_open, x - threshold if penalty == "hinge" else x, closed)


def total_weight(weight: Tensor | None, batch_shape: Sequence[int], dtype: torch.dtype) -> Tensor | int:
    """W, the sum of the weights: the number of rows where there are none."""
    return math.prod(batch_shape) if weight is None else weight.to(dtype).sum()


def _times(threshold: Tensor | float, weight: Tensor | int) -> Tensor | float:
    """threshold * weight, and 0 where there is no weight: also of a threshold that is inf."""
    if not isinstance(weight, Tensor):
        return threshold * weight if weight else 0.0
    return torch.where(weight == 0, 0.0, threshold * weight)


def reduce_groups(
    sums: Tensor,
    weight: Tensor | int,
    numerator: Tensor | None,
    *,
    threshold: Tensor | float | None,
    penalty: str,
    reduction: str,
    latent_numel: int,
    frozen_open: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and the rates, from sums over the batch.

    `sums` [group] holds sum_b w_b KL[b,g], `weight` W = sum_b w_b, and `numerator` () the clamped sum over
    rows and groups where the clamp is per sample. "batchmean", "sum" and "mean" only.
    """
    rate = sums / weight
    if numerator is not None:
        loss = numerator if reduction == "sum" else numerator / weight
    else:
        # W f(x; t) = f(W x; W t): so "sum" never divides by a W that may be 0.
        if threshold is None:
            loss = sums.sum() if reduction == "sum" else rate.sum()
        else:
            is_open = rate.detach() >= threshold if frozen_open is None else frozen_open
            # Cut before the division: behind it, the zero gradient of a closed group is NaN where W is 0.
            base = torch.where(is_open, sums, sums.detach())
            if reduction == "sum":
                loss = clamped(base, _times(threshold, weight), penalty, is_open).sum()
            else:
                loss = clamped(base / weight, threshold, penalty, is_open).sum()
        if sums.numel() == 0 and reduction != "sum":
            # No group to bring the NaN of an empty batch into the sum.
            loss = loss + torch.zeros_like(loss) / weight
    return loss / latent_numel if reduction == "mean" else loss, rate


def _reduce(
    kl: Tensor,
    *,
    free_bits: float | None,
    free_bits_per_group: Tensor | None,
    clamp: str,
    penalty: str,
    batch_dims: int,
    group_dims: Sequence[int] | None,
    weight: Tensor | None,
    reduction: str,
    group_sums: bool,
    frozen: Frozen | None,
) -> tuple[Tensor, Tensor]:
    """(loss, rate per group) of the elementwise divergence."""
    shape, ndim = kl.shape, kl.ndim
    groups = tuple(range(batch_dims, ndim) if group_dims is None else sorted(d % ndim for d in group_dims))
    summed = tuple(d for d in range(batch_dims, ndim) if d not in groups)
    batch_shape, group_shape = tuple(shape[:batch_dims]), tuple(shape[d] for d in groups)
    batch_axes, group_axes = tuple(range(batch_dims)), tuple(range(batch_dims, batch_dims + len(groups)))

    # torch.sum takes an empty tuple of axes for all of them.
    cells = kl.sum(summed) if summed else kl
    if weight is not None:
        row_weight = weight.to(kl.dtype).reshape(batch_shape + (1,) * len(groups))
    threshold: Tensor | float | None = free_bits
    if free_bits_per_group is not None:
        threshold = free_bits_per_group.to(kl.dtype).reshape(group_shape)
    per_sample = clamp == "sample" and (
        threshold is not None or (frozen is not None and frozen.open.numel() > 0)
    )

    values, frozen_open = cells, None
    if per_sample:
        if frozen is not None:
            is_open, threshold = frozen.cells(batch_shape + group_shape), 0.0
        else:
            assert threshold is not None
            is_open = cells.detach() >= threshold
        values = clamped(cells, threshold, penalty, is_open)
    elif frozen is not None and clamp == "batch":
        frozen_open, threshold = frozen.groups(group_shape), 0.0

    weighted = cells if weight is None else cells * row_weight
    sums = weighted.sum(batch_axes) if batch_axes else weighted
    numerator = None
    if per_sample and reduction != "none":
        numerator = (values if weight is None else values * row_weight).sum()
    if reduction in ("none", "elementwise"):
        rate = sums / total_weight(None, batch_shape, kl.dtype)
        rows = values.sum(group_axes) if group_axes else values
        loss = rows if reduction == "none" else kl
    else:
        loss, rate = reduce_groups(
            sums,
            total_weight(weight, batch_shape, kl.dtype),
            numerator,
            threshold=threshold,
            penalty=penalty,
            reduction=reduction,
            latent_numel=math.prod(shape[batch_dims:]),
            frozen_open=frozen_open,
        )
    return loss, sums if group_sums else rate


# --- the operators ------------------------------------------------------------------------------------------


def latent(
    first: Tensor,
    second: Tensor | None,
    dim: int,
    rng: Tensor | None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    sample: bool = True,
    kl: bool = True,
    num_samples: int | None = None,
    weight: Tensor | None = None,
    free_bits_per_group: Tensor | None = None,
    free_bits: float | None = None,
    clamp: str = "batch",
    penalty: str = "floor",
    batch_dims: int = 1,
    group_dims: Sequence[int] | None = None,
    balance: float | None = None,
    reduction: str = "batchmean",
    group_sums: bool = False,
    parameterization: str = "logvar",
    logvar_bounds: Sequence[float] | None = None,
    frozen: Frozen | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(z, kl, kl_per_group), None for what is not wanted; the operator `torch.ops.vaekernels.latent`.

    `frozen`: the clamp's decisions of an earlier forward, in place of free bits.
    """
    mu, logvar = first.chunk(2, dim) if second is None else (first, second)
    dtype = compute_dtype(mu.dtype)
    m = mu.to(dtype)
    x, sd = _scale(logvar.to(dtype), parameterization, logvar_bounds)
    z = _sample(m, sd, rng, num_samples, mu) if sample and rng is not None else None
    if not kl:
        return z, None, None
    _checks.check_values(free_bits_per_group, weight)
    if prior_mu is None or prior_logvar is None:
        divergence = _divergence(m, x, None)
    else:
        prior = prior_mu.to(dtype), _scale(prior_logvar.to(dtype), parameterization)[0]
        divergence = _divergence(m, x, prior) if balance is None else _balanced(m, x, prior, balance)
    loss, per_group = _reduce(
        divergence,
        free_bits=free_bits,
        free_bits_per_group=free_bits_per_group,
        clamp=clamp,
        penalty=penalty,
        batch_dims=batch_dims,
        group_dims=group_dims,
        weight=weight,
        reduction=reduction,
        group_sums=group_sums,
        frozen=frozen,
    )
    return z, loss, per_group


def _rng_state(like: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """The operator `torch.ops.vaekernels._rng_state`."""
    return rng_state(like, generator)


# --- the aggregate posterior --------------------------------------------------------------------------------

PAIRS = 1 << 22
"""Densities of one dimension that exist at once: 16 MiB in float32."""


def log_density(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    parameterization: str = "logvar",
    logvar_bounds: Sequence[float] | None = None,
) -> Tensor:
    """log N(z; mu, exp logvar) of every element, in the dtype of the arithmetic."""
    dtype = compute_dtype(mu.dtype)
    return _log_density(
        z.to(dtype), mu.to(dtype), _scale(logvar.to(dtype), parameterization, logvar_bounds)[0]
    )


def _log_density(z: Tensor, mu: Tensor, x: Tensor) -> Tensor:
    # Scaled before it is squared, the distance overflows no earlier than the density does.
    distance = (z - mu) * torch.exp(-x)
    return -0.5 * distance * distance - x - 0.5 * math.log(2.0 * math.pi)


def aggregate(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    per_dim: bool = True,
    log_weight: str = "uniform",
    examples: int = 0,
    leave_one_out: bool = False,
    first: int = 0,
    parameterization: str = "logvar",
    logvar_bounds: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_qz, log_qz_dims, nothing in place of what backward needs); the operator
    `torch.ops.vaekernels.aggregate`.

    In chunks of samples, whose densities backward computes again.
    """
    dtype = compute_dtype(mu.dtype)
    z, m = z.to(dtype), mu.to(dtype)
    x, _ = _scale(logvar.to(dtype), parameterization, logvar_bounds)
    columns = torch.arange(mu.shape[0], device=mu.device)
    # As tensors: the logarithm of a size that is a symbol would make a constant of it.
    count = torch.ones_like(columns, dtype=dtype).sum()
    others = count - 1.0
    base = -others.log() if leave_one_out or log_weight == "stratified" else -count.log()
    if log_weight == "minibatch":
        base = base - math.log(examples)

    def weighed(t: Tensor, begin: int) -> Tensor:
        if not leave_one_out and log_weight != "stratified":
            return t
        own = first + begin + torch.arange(t.shape[0], device=t.device)

        def at(index: Tensor) -> Tensor:
            return (columns == index.unsqueeze(1)).reshape(*t.shape[:2], *(1,) * (t.ndim - 2))

        if leave_one_out:
            return torch.where(at(own), -math.inf, t)
        behind = torch.where(at((own + 1) % mu.shape[0]), t + ((examples - others) / examples).log(), t)
        return torch.where(at(own), t + (others / examples).log(), behind)

    def chunk(z: Tensor, m: Tensor, x: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        t = _log_density(z.unsqueeze(1), m, x)
        whole = torch.logsumexp(weighed(t.sum(2), begin), 1) + base
        if not per_dim:
            return whole, whole.new_empty(0)
        return whole, torch.logsumexp(weighed(t, begin), 1) + base

    # Neither functorch nor forward-mode AD knows checkpoints; a compiler has its own ways to save memory.
    whole_at_once = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
    rows = max(1, PAIRS // max(1, mu.numel()))
    if whole_at_once or z.shape[0] <= rows:
        return *chunk(z, m, x, 0), z.new_empty(0)
    parts = [
        checkpoint(chunk, z[i : i + rows], m, x, i, use_reentrant=False, preserve_rng_state=False)
        for i in range(0, z.shape[0], rows)
    ]
    return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts]), z.new_empty(0)
