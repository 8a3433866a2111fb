"""The public ops: defaults, argument checks, formulas (nats). `vaekernels._routing` chooses who computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor

from vaekernels import _checks
from vaekernels._routing import draw_state, draws, entry_for, kl_options, sample_options, short_entry

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SampleKL(NamedTuple):
    """What `sample_kl` returns: the sample, the loss term and the unclamped rate of each group, in nats."""

    z: Tensor
    """the sample"""
    kl: Tensor
    """the term of the loss"""
    kl_per_group: Tensor
    """the rates, unclamped and differentiable; log these, and build other objectives from them"""


# What NamedTuple puts in front of this, a function in Python, takes three times as long.
_new_tuple = tuple.__new__


def rng_state(like: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Takes the next random state from a torch generator: int64 [2] (seed, offset) on `like`'s device.

    Given to an op as `rng`, it makes sampling a pure function: equal states give equal samples. The generator
    (the device's default one where None) moves on, so that no two states are alike and `torch.manual_seed`
    reproduces a run. The numbers are those of Philox4x32-10 (Salmon et al. 2011), the same on every device.

    Raises TypeError or ValueError where `like` is no tensor or the generator does not fit it.
    """
    if not isinstance(like, Tensor):
        raise TypeError(f"like must be a torch.Tensor, got {type(like).__name__}")
    if generator is not None:
        _checks.check_random(like, None, generator)
    return draw_state(entry_for(like), like, generator)


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    parameterization: str = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
) -> Tensor:
    """The reparameterized sample z = mu + exp(logvar / 2) * eps, eps ~ N(0, I) (Kingma & Welling 2014).

    Args:
        mu, logvar: the posterior N(mu, diag exp(logvar)), of one shape, dtype (float32, bfloat16, float16 or
            float64) and device. The arithmetic is in float32, for float64 in float64.
        num_samples: K, for z of shape ``[K, *mu.shape]`` from one reading of mu and logvar; None for the
            shape of mu.
        generator: the torch.Generator to draw from instead of the default one. Not while compiling.
        rng: a state from `rng_state`, in place of a generator: the same state gives the same z.
        parameterization: what `logvar` holds: "logvar", "log_std", "std" or "softplus" (the standard
            deviation is log(1 + e^s)). A negative std gives NaN.
        logvar_bounds: (lo, hi), clamps the log-variance; the gradient is zero outside and one on the bounds.

    Returns:
        z, with mu's dtype and the strides of `torch.empty_like(mu)`.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that differ, an unknown string, a bad state.
    """
    short = short_entry()
    if short is not None:
        draw, scale = (num_samples, generator, rng), (parameterization, logvar_bounds)
        if (drawn := short.short_reparameterize(mu, logvar, draw, scale)) is not None:
            return cast(Tensor, drawn)
    _checks.check_pair("mu", mu, "logvar", logvar)
    options = sample_options(mu, num_samples, generator, rng, parameterization, logvar_bounds)
    entry = entry_for(mu)
    if rng is None:
        if draws(entry):
            z: Tensor = entry.reparameterize_draw(mu, logvar, generator=generator, **options)[0]
            return z
        rng = draw_state(entry, mu, generator)
    z = entry.reparameterize(mu, logvar, rng.contiguous(), **options)
    return z


def reparameterize_packed(
    moments: Tensor,
    dim: int = 1,
    *,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    parameterization: str = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
) -> Tensor:
    """`reparameterize` of `mu, logvar = moments.chunk(2, dim)`; its gradient is packed, without a `cat`.

    An odd size along `dim` is a ValueError; everything else is as in `reparameterize`.
    """
    short = short_entry()
    if short is not None:
        draw, scale = (num_samples, generator, rng), (parameterization, logvar_bounds)
        if (drawn := short.short_reparameterize_packed(moments, dim, draw, scale)) is not None:
            return cast(Tensor, drawn)
    _checks.packed_shape(moments, dim)
    options = sample_options(moments, num_samples, generator, rng, parameterization, logvar_bounds)
    entry = entry_for(moments)
    if rng is None:
        if draws(entry):
            z: Tensor = entry.reparameterize_packed_draw(moments, dim, generator=generator, **options)[0]
            return z
        rng = draw_state(entry, moments, generator)
    z = entry.reparameterize_packed(moments, dim, rng.contiguous(), **options)
    return z


@overload
def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = ...,
    prior_logvar: Tensor | None = ...,
    *,
    free_bits: float | Tensor | None = ...,
    clamp: str = ...,
    penalty: str = ...,
    batch_dims: int = ...,
    group_dims: int | Sequence[int] | None = ...,
    weight: Tensor | None = ...,
    balance: float | None = ...,
    reduction: str = ...,
    parameterization: str = ...,
    logvar_bounds: tuple[float, float] | None = ...,
    process_group: ProcessGroup | None = ...,
    return_per_group: Literal[False] = ...,
) -> Tensor: ...


@overload
def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = ...,
    prior_logvar: Tensor | None = ...,
    *,
    free_bits: float | Tensor | None = ...,
    clamp: str = ...,
    penalty: str = ...,
    batch_dims: int = ...,
    group_dims: int | Sequence[int] | None = ...,
    weight: Tensor | None = ...,
    balance: float | None = ...,
    reduction: str = ...,
    parameterization: str = ...,
    logvar_bounds: tuple[float, float] | None = ...,
    process_group: ProcessGroup | None = ...,
    return_per_group: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    free_bits: float | Tensor | None = None,
    clamp: str = "batch",
    penalty: str = "floor",
    batch_dims: int = 1,
    group_dims: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    balance: float | None = None,
    reduction: str = "batchmean",
    parameterization: str = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
    process_group: ProcessGroup | None = None,
    return_per_group: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The KL divergence KL(q || p) of diagonal Gaussians in nats, with free bits, reduced to a loss term.

    For element e of row b, with lv = logvar (Kingma & Welling 2014)::

        KL[b,e] = 1/2 (mu^2 + exp(lv) - 1 - lv)                            prior N(0, I)
        KL[b,e] = 1/2 ((mu-mp)^2 exp(-lp) + exp(lv-lp) - 1 - (lv-lp))      prior N(mp, exp(lp))
        KL[b,g] = sum of KL[b,e] over the elements of group g
        rate[g] = sum_b w_b KL[b,g] / sum_b w_b
        clamp="batch":  sum_g f(rate[g]; free_bits_g)                      (Kingma et al. 2016)
        clamp="sample": sum_b w_b sum_g f(KL[b,g]; free_bits_g) / sum_b w_b

    Args:
        mu, logvar: the posterior, shape ``[*batch, *latent]``, of one dtype (float32, bfloat16, float16 or
            float64) and device. The arithmetic and the results are in float32, for float64 in float64.
        prior_mu, prior_logvar: the prior, in the shape of mu; both or neither, for N(0, I).
        free_bits: the rate of a group, in nats, below which the loss pushes it no further: a non-negative
            number or a tensor that broadcasts to the group shape. A constant: one that requires grad is an
            error. None: no clamp. The gradient of f is 1 from the threshold on, 0 below it, and 0 where the
            rate is NaN.
        clamp: "batch" clamps the mean over the batch, "sample" each row.
        penalty: f(x; t), "floor" max(t, x), "hinge" max(0, x - t) or "mask" x where x >= t, else 0.
        batch_dims: how many leading axes are batch; 0 takes everything as one row.
        group_dims: the axes of mu that index groups. None: every latent element is a group; 1: a channel of
            [B, C, H, W]; (): one group.
        weight: non-negative weights in the batch shape, of any real or bool dtype (a padding mask, importance
            weights). A constant. A row of weight 0 whose KL is not finite gives NaN.
        balance: the share of the gradient that goes to the prior (Hafner et al. 2020): the posterior's is
            scaled by 1 - balance, the prior's by balance, the value stays. Needs a prior.
        reduction: "batchmean" as above; "sum", times sum_b w_b; "mean", divided by the number of latent
            elements; "none", one value per batch row (with free_bits: clamp="sample" only); "elementwise",
            the shape of mu (no free_bits). The last two take neither weight nor process_group.
        parameterization: what `logvar` and `prior_logvar` hold: "logvar", "log_std", "std" or "softplus".
        logvar_bounds: (lo, hi), clamps the posterior's log-variance; the gradient is zero outside, one on the
            bounds.
        process_group: sums over the ranks, by one all-reduce, before the clamp: every rank returns the values
            of the whole batch, however unevenly it is spread. The gradients carry the factor R = world size,
            which DDP's averaging takes out. Backward does not communicate. The other options must be the same
            on every rank, which an eager call compares the first time it comes with them (in compiled code
            nothing does): a floor that changes with each step is cheaper as a tensor.
        return_per_group: also return the rates, in the group shape: unclamped, and differentiable.

    Returns:
        kl, or (kl, kl_per_group). An empty batch, or weights that sum to 0, give NaN ("sum" gives 0).

    Raises:
        TypeError, ValueError: arguments that do not fit each other, unknown strings, options that differ
            between the ranks of process_group, negative or NaN values in free_bits or weight. In CUDA tensors
            such values are not looked for, as that would wait for the device; a bad one gives a NaN loss.
    """
    given = (
        prior_mu, prior_logvar, clamp, penalty, batch_dims, group_dims, weight, balance, reduction,
        parameterization, logvar_bounds, process_group,
    )  # fmt: skip
    short = short_entry()
    if short is not None and (out := short.short_gaussian_kl(mu, logvar, free_bits, given)) is not None:
        return (out[0], out[1]) if return_per_group else out[0]
    _checks.check_pair("mu", mu, "logvar", logvar)
    options, shared = kl_options("mu", mu, mu.shape, free_bits, *given)
    out = entry_for(mu).gaussian_kl(mu, logvar, prior_mu, prior_logvar, **options)
    kl, per_group = (out[0], out[1]) if shared is None else shared.reduce(out[0], out[1])
    return (kl, per_group) if return_per_group else kl


@overload
def gaussian_kl_packed(
    moments: Tensor,
    dim: int = ...,
    prior_mu: Tensor | None = ...,
    prior_logvar: Tensor | None = ...,
    *,
    free_bits: float | Tensor | None = ...,
    clamp: str = ...,
    penalty: str = ...,
    batch_dims: int = ...,
    group_dims: int | Sequence[int] | None = ...,
    weight: Tensor | None = ...,
    balance: float | None = ...,
    reduction: str = ...,
    parameterization: str = ...,
    logvar_bounds: tuple[float, float] | None = ...,
    process_group: ProcessGroup | None = ...,
    return_per_group: Literal[False] = ...,
) -> Tensor: ...


@overload
def gaussian_kl_packed(
    moments: Tensor,
    dim: int = ...,
    prior_mu: Tensor | None = ...,
    prior_logvar: Tensor | None = ...,
    *,
    free_bits: float | Tensor | None = ...,
    clamp: str = ...,
    penalty: str = ...,
    batch_dims: int = ...,
    group_dims: int | Sequence[int] | None = ...,
    weight: Tensor | None = ...,
    balance: float | None = ...,
    reduction: str = ...,
    parameterization: str = ...,
    logvar_bounds: tuple[float, float] | None = ...,
    process_group: ProcessGroup | None = ...,
    return_per_group: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def gaussian_kl_packed(
    moments: Tensor,
    dim: int = 1,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    free_bits: float | Tensor | None = None,
    clamp: str = "batch",
    penalty: str = "floor",
    batch_dims: int = 1,
    group_dims: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    balance: float | None = None,
    reduction: str = "batchmean",
    parameterization: str = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
    process_group: ProcessGroup | None = None,
    return_per_group: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gaussian_kl` of `mu, logvar = moments.chunk(2, dim)`; its gradient is packed, without a `cat`.

    `group_dims` counts the axes of mu. An odd size along `dim` is a ValueError; everything else is as in
    `gaussian_kl`.
    """
    given = (
        prior_mu, prior_logvar, clamp, penalty, batch_dims, group_dims, weight, balance, reduction,
        parameterization, logvar_bounds, process_group,
    )  # fmt: skip
    short = short_entry()
    if (
        short is not None
        and (out := short.short_gaussian_kl_packed(moments, dim, free_bits, given)) is not None
    ):
        return (out[0], out[1]) if return_per_group else out[0]
    shape = _checks.packed_shape(moments, dim)
    options, shared = kl_options("moments", moments, shape, free_bits, *given)
    out = entry_for(moments).gaussian_kl_packed(moments, dim, prior_mu, prior_logvar, **options)
    kl, per_group = (out[0], out[1]) if shared is None else shared.reduce(out[0], out[1])
    return (kl, per_group) if return_per_group else kl


def sample_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    free_bits: float | Tensor | None = None,
    clamp: str = "batch",
    penalty: str = "floor",
    batch_dims: int = 1,
    group_dims: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    balance: float | None = None,
    reduction: str = "batchmean",
    parameterization: str = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
    process_group: ProcessGroup | None = None,
) -> SampleKL:
    """The reparameterized sample and the KL divergence, from one reading of mu and logvar.

    The arguments are those of `reparameterize` and `gaussian_kl`. The rates of the groups are always
    returned.

    Returns:
        SampleKL(z, kl, kl_per_group): z in the dtype and memory format of mu, ``[K, *mu.shape]`` with
            num_samples=K; kl and kl_per_group in float32 (float64 for float64), in nats. kl_per_group is
            never clamped, and differentiable, so that any other objective (a capacity, a controller) can be
            built from it.

    Raises:
        TypeError, ValueError: as `reparameterize` and `gaussian_kl`.
    """
    given = (
        prior_mu, prior_logvar, clamp, penalty, batch_dims, group_dims, weight, balance, reduction,
        parameterization, logvar_bounds, process_group,
    )  # fmt: skip
    short = short_entry()
    if short is not None:
        draw = (num_samples, generator, rng)
        if (out := short.short_sample_kl(mu, logvar, free_bits, given, draw)) is not None:
            return _new_tuple(SampleKL, out)
    _checks.check_pair("mu", mu, "logvar", logvar)
    options, shared = kl_options("mu", mu, mu.shape, free_bits, *given)
    if num_samples is not None:
        _checks.check_num_samples(num_samples)
        options["num_samples"] = num_samples
    if rng is not None or generator is not None:
        _checks.check_random(mu, rng, generator)
    entry = entry_for(mu)
    if rng is None and draws(entry):
        out = entry.sample_kl_draw(mu, logvar, prior_mu, prior_logvar, generator=generator, **options)
    else:
        state = draw_state(entry, mu, generator) if rng is None else rng.contiguous()
        out = entry.sample_kl(mu, logvar, state, prior_mu, prior_logvar, **options)
    if shared is not None:
        return SampleKL(out[0], *shared.reduce(out[1], out[2]))
    return SampleKL(out[0], out[1], out[2])


def sample_kl_packed(
    moments: Tensor,
    dim: int = 1,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    free_bits: float | Tensor | None = None,
    clamp: str = "batch",
    penalty: str = "floor",
    batch_dims: int = 1,
    group_dims: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    balance: float | None = None,
    reduction: str = "batchmean",
    parameterization: str = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
    process_group: ProcessGroup | None = None,
) -> SampleKL:
    """`sample_kl` of `mu, logvar = moments.chunk(2, dim)`; its gradient is packed, without a `cat`.

    `group_dims` counts the axes of mu. An odd size along `dim` is a ValueError; everything else is as in
    `sample_kl`.
    """
    given = (
        prior_mu, prior_logvar, clamp, penalty, batch_dims, group_dims, weight, balance, reduction,
        parameterization, logvar_bounds, process_group,
    )  # fmt: skip
    short = short_entry()
    if short is not None:
        draw = (num_samples, generator, rng)
        if (out := short.short_sample_kl_packed(moments, dim, free_bits, given, draw)) is not None:
            return _new_tuple(SampleKL, out)
    shape = _checks.packed_shape(moments, dim)
    options, shared = kl_options("moments", moments, shape, free_bits, *given)
    if num_samples is not None:
        _checks.check_num_samples(num_samples)
        options["num_samples"] = num_samples
    if rng is not None or generator is not None:
        _checks.check_random(moments, rng, generator)
    entry = entry_for(moments)
    if rng is None and draws(entry):
        out = entry.sample_kl_packed_draw(
            moments, dim, prior_mu, prior_logvar, generator=generator, **options
        )
    else:
        state = draw_state(entry, moments, generator) if rng is None else rng.contiguous()
        out = entry.sample_kl_packed(moments, dim, state, prior_mu, prior_logvar, **options)
    if shared is not None:
        return SampleKL(out[0], *shared.reduce(out[1], out[2]))
    return SampleKL(out[0], out[1], out[2])
