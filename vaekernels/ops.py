"""The public ops: their types and defaults, their formulas (nats), one example each.

`vaekernels._dispatch` checks the arguments and chooses who computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from vaekernels import _checks, _dispatch, _distributed, reference
from vaekernels._dispatch import KL, PACKED, SAMPLE, _is_dynamo_compiling, entry

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

Clamp = Literal["batch", "sample"]
Penalty = Literal["floor", "hinge", "mask"]
Reduction = Literal["batchmean", "sum", "mean", "none", "elementwise"]
Parameterization = Literal["logvar", "log_std", "std", "softplus"]
LogWeight = int | tuple[Literal["stratified"], int]


class KLOptions(TypedDict, total=False):
    """The options of `gaussian_kl` and `sample_kl`, which state their meaning."""

    free_bits: float | Tensor | None
    clamp: Clamp
    penalty: Penalty
    batch_dims: int
    group_dims: int | Sequence[int] | None
    weight: Tensor | None
    balance: float | None
    reduction: Reduction
    parameterization: Parameterization
    logvar_bounds: tuple[float, float] | None
    process_group: ProcessGroup | None


class SampleKL(NamedTuple):
    """What `sample_kl` returns: the sample, the loss term and the rate of each group, in nats."""

    z: Tensor
    """the sample"""
    kl: Tensor
    """the term of the loss"""
    kl_per_group: Tensor
    """the KL of each group, which is its rate, unclamped and differentiable; log these, and build other
    objectives from them"""


class KLDecomposition(NamedTuple):
    """What `kl_decomposition` returns: the three parts of the mean KL to N(0, I), in nats."""

    mutual_information: Tensor
    """E[log q(z|x) - log q(z)], the index-code mutual information"""
    total_correlation: Tensor
    """E[log q(z) - sum_d log q(z_d)], how far the dimensions are from independent"""
    dimension_wise_kl: Tensor
    """sum_d E[log q(z_d) - log p(z_d)], how far each dimension is from the prior"""


_new_tuple = tuple.__new__


def _named(out: tuple[Tensor, ...]) -> SampleKL:
    """SampleKL(*out) in half of the time, and as that where torch.compile traces: that of torch 2.6 cannot
    trace `tuple.__new__`."""
    return SampleKL(*out) if _is_dynamo_compiling() else _new_tuple(SampleKL, out)


def rng_state(like: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Takes the next random state from a torch generator: int64 [2] (seed, offset) on `like`'s device.

    Given to an op as `rng`, it makes sampling a pure function: equal states give equal samples. The generator
    (the device's default one where None) moves on, so that no two states are alike and `torch.manual_seed`
    reproduces a run. The numbers are those of Philox4x32-10 (Salmon et al. 2011), the same on every device.
    They go by storage order, that of z's elements in memory: equal values in another memory format
    (channels_last, a transposed mu) get other noise from the same state. Where that must not be, give the op
    contiguous tensors, as `vaekernels.distributions.DiagonalGaussian` does with a state or a generator.

    Raises TypeError or ValueError where `like` is no tensor or the generator does not fit it.

    >>> state = rng_state(torch.zeros(2), generator=torch.Generator().manual_seed(1))
    >>> z = [reparameterize(torch.zeros(2), torch.zeros(2), rng=state) for _ in range(2)]
    >>> torch.equal(*z)
    True
    """
    if not isinstance(like, Tensor):
        raise TypeError(f"like must be a torch.Tensor, got {type(like).__name__}")
    if generator is not None:
        _checks.check_random(like, None, generator)
    return _dispatch.rng_state(like, generator)


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    parameterization: Parameterization = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
) -> Tensor:
    """The reparameterized sample z = mu + exp(logvar / 2) * eps, eps ~ N(0, I) (Kingma & Welling 2014).

    Args:
        mu, logvar: the posterior N(mu, diag exp(logvar)), of one shape, dtype (float32, bfloat16, float16 or
            float64) and device. The arithmetic is in float32, for float64 in float64. Under `torch.autocast`
            tensors of several dtypes are promoted to the widest, as in torch's arithmetic; outside it they
            are an error. This holds for every op.
        num_samples: K, for z of shape ``[K, *mu.shape]`` from one reading of mu and logvar; None for the
            shape of mu.
        generator: the torch.Generator to draw from instead of the default one. Not while compiling.
        rng: a state from `rng_state`, in place of a generator: the same state gives the same z for tensors of
            one memory format, see `rng_state`.
        parameterization: what `logvar` holds: "logvar", "log_std", "std" or "softplus" (the standard
            deviation is log(1 + e^s)). A negative std gives NaN.
        logvar_bounds: (lo, hi), clamps the log-variance; the gradient is zero outside and one on the bounds.

    Returns:
        z, with mu's dtype and the strides of `torch.empty_like(mu)`.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that differ, an unknown string, a bad state.

    >>> mu, logvar = torch.zeros(128, 32), torch.zeros(128, 32)
    >>> reparameterize(mu, logvar).shape, reparameterize(mu, logvar, num_samples=5).shape
    (torch.Size([128, 32]), torch.Size([5, 128, 32]))
    """
    z: Tensor
    z, _, _ = entry()(
        SAMPLE, mu, logvar, 1, None, None, None, num_samples, generator, rng,
        parameterization=parameterization, logvar_bounds=logvar_bounds,
    )  # fmt: skip
    return z


def reparameterize_packed(
    moments: Tensor,
    dim: int = 1,
    *,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    rng: Tensor | None = None,
    parameterization: Parameterization = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
) -> Tensor:
    """`reparameterize` of `mu, logvar = moments.chunk(2, dim)`; its gradient is packed, without a `cat`.

    Args:
        moments: mu, then logvar, side by side along `dim`; float32, bfloat16, float16 or float64.
        dim: the axis that holds both.
        num_samples: K, for z of shape ``[K, *mu.shape]``; None for the shape of mu.
        generator: the torch.Generator to draw from instead of the default one. Not while compiling.
        rng: a state from `rng_state`, in place of a generator: the same state gives the same z.
        parameterization: what the second half holds: "logvar", "log_std", "std" or "softplus".
        logvar_bounds: (lo, hi), clamps the posterior's log-variance.

    Returns:
        z, in the shape of mu, as from `reparameterize`.

    Raises:
        TypeError, ValueError: an odd size along `dim`; else as `reparameterize`.

    >>> reparameterize_packed(torch.zeros(8, 2 * 4, 16, 16)).shape
    torch.Size([8, 4, 16, 16])
    """
    z: Tensor
    z, _, _ = entry()(
        SAMPLE | PACKED, moments, None, dim, None, None, None, num_samples, generator, rng,
        parameterization=parameterization, logvar_bounds=logvar_bounds,
    )  # fmt: skip
    return z


@overload
def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = ...,
    prior_logvar: Tensor | None = ...,
    *,
    return_per_group: Literal[False] = ...,
    **options: Unpack[KLOptions],
) -> Tensor: ...


@overload
def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = ...,
    prior_logvar: Tensor | None = ...,
    *,
    return_per_group: Literal[True],
    **options: Unpack[KLOptions],
) -> tuple[Tensor, Tensor]: ...


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    free_bits: float | Tensor | None = None,
    clamp: Clamp = "batch",
    penalty: Penalty = "floor",
    batch_dims: int = 1,
    group_dims: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    balance: float | None = None,
    reduction: Reduction = "batchmean",
    parameterization: Parameterization = "logvar",
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

    >>> mu, logvar = torch.ones(4, 2), torch.zeros(4, 2)  # each element has a KL of 1/2
    >>> gaussian_kl(mu, logvar), gaussian_kl(mu, logvar, free_bits=0.75)
    (tensor(1.), tensor(1.5000))
    >>> gaussian_kl(mu, logvar, free_bits=0.75, return_per_group=True)[1]  # the rates stay unclamped
    tensor([0.5000, 0.5000])
    """
    kl: Tensor
    rate: Tensor
    _, kl, rate = entry()(
        KL, mu, logvar, 1, prior_mu, prior_logvar, weight, free_bits=free_bits, clamp=clamp,
        penalty=penalty, batch_dims=batch_dims, group_dims=group_dims, balance=balance, reduction=reduction,
        parameterization=parameterization, logvar_bounds=logvar_bounds, process_group=process_group,
    )  # fmt: skip
    return (kl, rate) if return_per_group else kl


@overload
def gaussian_kl_packed(
    moments: Tensor,
    dim: int = ...,
    prior_mu: Tensor | None = ...,
    prior_logvar: Tensor | None = ...,
    *,
    return_per_group: Literal[False] = ...,
    **options: Unpack[KLOptions],
) -> Tensor: ...


@overload
def gaussian_kl_packed(
    moments: Tensor,
    dim: int = ...,
    prior_mu: Tensor | None = ...,
    prior_logvar: Tensor | None = ...,
    *,
    return_per_group: Literal[True],
    **options: Unpack[KLOptions],
) -> tuple[Tensor, Tensor]: ...


def gaussian_kl_packed(
    moments: Tensor,
    dim: int = 1,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    free_bits: float | Tensor | None = None,
    clamp: Clamp = "batch",
    penalty: Penalty = "floor",
    batch_dims: int = 1,
    group_dims: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    balance: float | None = None,
    reduction: Reduction = "batchmean",
    parameterization: Parameterization = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
    process_group: ProcessGroup | None = None,
    return_per_group: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gaussian_kl` of `mu, logvar = moments.chunk(2, dim)`; its gradient is packed, without a `cat`.

    Formulas and details of the arguments: `gaussian_kl`.

    Args:
        moments: mu, then logvar, side by side along `dim`; float32, bfloat16, float16 or float64.
        dim: the axis that holds both. `group_dims` counts the axes of mu.
        prior_mu, prior_logvar: the prior, in the shape of mu; both or neither, for N(0, I).
        free_bits: the rate of a group, in nats, below which the loss pushes it no further; None: no clamp.
        clamp: "batch" clamps the mean over the batch, "sample" each row.
        penalty: "floor" max(t, x), "hinge" max(0, x - t) or "mask" x where x >= t, else 0.
        batch_dims: how many leading axes are batch.
        group_dims: the axes of mu that index groups; None: every latent element is a group, (): one group.
        weight: non-negative weights in the batch shape.
        balance: the share of the gradient that goes to the prior.
        reduction: "batchmean", "sum", "mean", "none" or "elementwise".
        parameterization: what the second half and `prior_logvar` hold: "logvar", "log_std", "std" or
            "softplus".
        logvar_bounds: (lo, hi), clamps the posterior's log-variance.
        process_group: the ranks whose rows are one batch.
        return_per_group: also return the rates, in the group shape: unclamped, and differentiable.

    Returns:
        kl, or (kl, kl_per_group), as from `gaussian_kl`.

    Raises:
        TypeError, ValueError: an odd size along `dim`; else as `gaussian_kl`.

    >>> gaussian_kl_packed(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    tensor(1.)
    """
    kl: Tensor
    rate: Tensor
    _, kl, rate = entry()(
        KL | PACKED, moments, None, dim, prior_mu, prior_logvar, weight, free_bits=free_bits, clamp=clamp,
        penalty=penalty, batch_dims=batch_dims, group_dims=group_dims, balance=balance, reduction=reduction,
        parameterization=parameterization, logvar_bounds=logvar_bounds, process_group=process_group,
    )  # fmt: skip
    return (kl, rate) if return_per_group else kl


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
    clamp: Clamp = "batch",
    penalty: Penalty = "floor",
    batch_dims: int = 1,
    group_dims: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    balance: float | None = None,
    reduction: Reduction = "batchmean",
    parameterization: Parameterization = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
    process_group: ProcessGroup | None = None,
) -> SampleKL:
    """The reparameterized sample and the KL divergence, from one reading of mu and logvar.

    Formulas and details of the arguments: `reparameterize` and `gaussian_kl`.

    Args:
        mu, logvar: the posterior, of one shape ``[*batch, *latent]``, dtype (float32, bfloat16, float16 or
            float64) and device.
        prior_mu, prior_logvar: the prior, in the shape of mu; both or neither, for N(0, I).
        num_samples: K, for z of shape ``[K, *mu.shape]``; None for the shape of mu.
        generator: the torch.Generator to draw from instead of the default one. Not while compiling.
        rng: a state from `rng_state`, in place of a generator: the same state gives the same z.
        free_bits: the rate of a group, in nats, below which the loss pushes it no further; None: no clamp.
        clamp: "batch" clamps the mean over the batch, "sample" each row.
        penalty: "floor" max(t, x), "hinge" max(0, x - t) or "mask" x where x >= t, else 0.
        batch_dims: how many leading axes are batch.
        group_dims: the axes of mu that index groups; None: every latent element is a group, (): one group.
        weight: non-negative weights in the batch shape.
        balance: the share of the gradient that goes to the prior.
        reduction: "batchmean", "sum", "mean", "none" or "elementwise".
        parameterization: what `logvar` and `prior_logvar` hold: "logvar", "log_std", "std" or "softplus".
        logvar_bounds: (lo, hi), clamps the posterior's log-variance.
        process_group: the ranks whose rows are one batch.

    Returns:
        SampleKL(z, kl, kl_per_group): z in the dtype and memory format of mu, ``[K, *mu.shape]`` with
            num_samples=K; kl and kl_per_group in float32 (float64 for float64), in nats. kl_per_group is
            never clamped, and differentiable, so that any other objective (a capacity, a controller) can be
            built from it.

    Raises:
        TypeError, ValueError: as `reparameterize` and `gaussian_kl`.

    >>> z, kl, kl_per_group = sample_kl(torch.zeros(128, 32), torch.zeros(128, 32), free_bits=0.25)
    >>> z.shape, kl, kl_per_group.sum()
    (torch.Size([128, 32]), tensor(8.), tensor(0.))
    """
    out = entry()(
        SAMPLE | KL, mu, logvar, 1, prior_mu, prior_logvar, weight, num_samples, generator, rng,
        free_bits=free_bits, clamp=clamp, penalty=penalty, batch_dims=batch_dims, group_dims=group_dims,
        balance=balance, reduction=reduction, parameterization=parameterization,
        logvar_bounds=logvar_bounds, process_group=process_group,
    )  # fmt: skip
    return _named(out)


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
    clamp: Clamp = "batch",
    penalty: Penalty = "floor",
    batch_dims: int = 1,
    group_dims: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    balance: float | None = None,
    reduction: Reduction = "batchmean",
    parameterization: Parameterization = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
    process_group: ProcessGroup | None = None,
) -> SampleKL:
    """`sample_kl` of `mu, logvar = moments.chunk(2, dim)`; its gradient is packed, without a `cat`.

    Formulas and details of the arguments: `reparameterize` and `gaussian_kl`.

    Args:
        moments: mu, then logvar, side by side along `dim`; float32, bfloat16, float16 or float64.
        dim: the axis that holds both. `group_dims` counts the axes of mu.
        prior_mu, prior_logvar: the prior, in the shape of mu; both or neither, for N(0, I).
        num_samples: K, for z of shape ``[K, *mu.shape]``; None for the shape of mu.
        generator: the torch.Generator to draw from instead of the default one. Not while compiling.
        rng: a state from `rng_state`, in place of a generator: the same state gives the same z.
        free_bits: the rate of a group, in nats, below which the loss pushes it no further; None: no clamp.
        clamp: "batch" clamps the mean over the batch, "sample" each row.
        penalty: "floor" max(t, x), "hinge" max(0, x - t) or "mask" x where x >= t, else 0.
        batch_dims: how many leading axes are batch.
        group_dims: the axes of mu that index groups; None: every latent element is a group, (): one group.
        weight: non-negative weights in the batch shape.
        balance: the share of the gradient that goes to the prior.
        reduction: "batchmean", "sum", "mean", "none" or "elementwise".
        parameterization: what the second half and `prior_logvar` hold: "logvar", "log_std", "std" or
            "softplus".
        logvar_bounds: (lo, hi), clamps the posterior's log-variance.
        process_group: the ranks whose rows are one batch.

    Returns:
        SampleKL(z, kl, kl_per_group), as from `sample_kl`.

    Raises:
        TypeError, ValueError: an odd size along `dim`; else as `sample_kl`.

    >>> z, kl, kl_per_group = sample_kl_packed(torch.zeros(8, 2 * 4, 16, 16), group_dims=1, free_bits=0.25)
    >>> z.shape, kl, kl_per_group.shape
    (torch.Size([8, 4, 16, 16]), tensor(1.), torch.Size([4]))
    """
    out = entry()(
        SAMPLE | KL | PACKED, moments, None, dim, prior_mu, prior_logvar, weight, num_samples, generator, rng,
        free_bits=free_bits, clamp=clamp, penalty=penalty, batch_dims=batch_dims, group_dims=group_dims,
        balance=balance, reduction=reduction, parameterization=parameterization,
        logvar_bounds=logvar_bounds, process_group=process_group,
    )  # fmt: skip
    return _named(out)


def log_aggregate_posterior(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    log_weight: LogWeight | None = None,
    leave_one_out: bool = False,
    per_dim: bool = True,
    parameterization: Parameterization = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The log-density of samples under the aggregate posterior, the mixture of a batch's posteriors, in nats.

    For samples i, posteriors j and dimensions d, with lv = logvar::

        t[i,j,d]         = -1/2 ((z[i,d] - mu[j,d])^2 exp(-lv[j,d]) + lv[j,d] + log(2 pi))
        log_qz[i]        = logsumexp_j(sum_d t[i,j,d] + lw[i,j])
        log_qz_dims[i,d] = logsumexp_j(t[i,j,d] + lw[i,j])

    Differentiable in z, mu and logvar. The kernels take time O(N M D) and memory O((N + M) D): no densities
    of pairs are kept, and backward computes them again.

    Args:
        z: samples [N, D], of mu's dtype and device.
        mu, logvar: the posteriors [M, D], of one dtype (float32, bfloat16, float16 or float64) and device.
            The arithmetic and the results are in float32, for float64 in float64.
        log_weight: lw. None: -log M, the mixture of these posteriors. The number n of examples of the data
            set that the batch was drawn from: -log(M n), the minibatch-weighted estimate of the mixture over
            the data set. ("stratified", n): the stratified one, -log n for j = i, log((n - m) / (n m)) for
            the posterior behind it (the first one behind the last) and -log m for the others, with m = M - 1
            (Chen et al. 2018, appendix C). The last needs row i of z to be drawn from posterior i, M >= 2 and
            n >= M.
        leave_one_out: leaves out j = i, with lw = -log(M - 1). Needs row i of z to be drawn from posterior i,
            M >= 2 and log_weight None.
        per_dim: whether log_qz_dims is wanted; without, only one exponential per pair is computed.
        parameterization: what `logvar` holds: "logvar", "log_std", "std" or "softplus".
        logvar_bounds: (lo, hi), clamps the log-variance; the gradient is zero outside and one on the bounds.
        process_group: the posteriors of all its ranks, while z stays the rank's own: M counts all of them.
            Forward gathers them, which waits for the device; backward sums their gradients over the ranks, so
            every rank has to run it. With DDP's averaging that is the gradient of the mean of the ranks'
            losses. Not while compiling.

    Returns:
        (log_qz, log_qz_dims) of shapes [N] and [N, D]; without per_dim the second is empty, [0]. Pairs that
        are far apart underflow to 0. A NaN in a posterior is in every sample's result.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.

    >>> z = torch.tensor([[0.0], [10.0]])
    >>> log_qz, _ = log_aggregate_posterior(z, mu=z, logvar=torch.zeros(2, 1))
    >>> log_qz  # log(1/2) + log N(0; 0, 1) each, the other posterior being far
    tensor([-1.6121, -1.6121])
    """
    return _dispatch.aggregate(
        z, mu, logvar, log_weight=log_weight, leave_one_out=leave_one_out, per_dim=per_dim,
        parameterization=parameterization, logvar_bounds=logvar_bounds, process_group=process_group,
    )  # fmt: skip


def mutual_information(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    log_weight: LogWeight | None = None,
    leave_one_out: bool = False,
    parameterization: Parameterization = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The mutual information of example and code, estimated from one sample of each posterior, in nats.

    mean_i (log q(z_i|x_i) - log q(z_i)), the second from `log_aggregate_posterior` (Hoffman & Johnson 2016).
    With log_weight None it is at most log M, M being the number of posteriors: a lower bound in expectation;
    with leave_one_out an upper bound (Poole et al. 2019).

    Args:
        z: row i is a sample of posterior i, [N, D].
        mu, logvar: the posteriors, [N, D].
        log_weight, leave_one_out, parameterization, logvar_bounds: as in `log_aggregate_posterior`.
        process_group: the mean over the rows of all ranks, each rank returning the same value. The gradients
            carry the factor R = world size, which DDP's averaging takes out.

    Returns:
        A scalar, float32 or, for float64, float64; differentiable. NaN of an empty batch.

    Raises:
        TypeError, ValueError: as `log_aggregate_posterior`; z in another shape than mu.

    >>> mu = torch.tensor([[0.0], [100.0]])
    >>> mutual_information(mu, mu, torch.zeros(2, 1))  # two codes that cannot be confused: log 2
    tensor(0.6931)
    """
    z, mu, logvar = _checks.promoted(z, mu, logvar)
    log_qzx = _own_log_density(z, mu, logvar, parameterization, logvar_bounds)
    log_qz, _ = _dispatch.aggregate(
        z, mu, logvar, log_weight=log_weight, leave_one_out=leave_one_out, per_dim=False,
        parameterization=parameterization, logvar_bounds=logvar_bounds, process_group=process_group,
    )  # fmt: skip
    return _mean_rows((log_qzx.sum(1) - log_qz).unsqueeze(1), process_group)[0]


def kl_decomposition(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    log_weight: LogWeight | None = None,
    leave_one_out: bool = False,
    parameterization: Parameterization = "logvar",
    logvar_bounds: tuple[float, float] | None = None,
    process_group: ProcessGroup | None = None,
) -> KLDecomposition:
    """The mean KL to N(0, I) in three parts, estimated from one sample of each posterior, in nats.

    With q(z) and q(z_d) from `log_aggregate_posterior` (Hoffman & Johnson 2016, Chen et al. 2018)::

        mutual_information = mean_i (log q(z_i|x_i) - log q(z_i))
        total_correlation  = mean_i (log q(z_i) - sum_d log q(z_i,d))
        dimension_wise_kl  = mean_i sum_d (log q(z_i,d) - log p(z_i,d))

    Their sum is mean_i (log q(z_i|x_i) - log p(z_i)), the KL up to the noise of the samples. The loss of the
    beta-TCVAE is mutual_information + beta total_correlation + dimension_wise_kl.

    Args:
        z: row i is a sample of posterior i, [N, D].
        mu, logvar: the posteriors, [N, D].
        log_weight, leave_one_out, parameterization, logvar_bounds: as in `log_aggregate_posterior`.
        process_group: as in `mutual_information`.

    Returns:
        KLDecomposition, three scalars, float32 or, for float64, float64; differentiable.

    Raises:
        TypeError, ValueError: as `mutual_information`.

    >>> mu = torch.tensor([[0.0, 0.0], [9.0, 9.0]])  # the second dimension repeats the first
    >>> parts = kl_decomposition(mu, mu, torch.zeros(2, 2))
    >>> parts.mutual_information, parts.total_correlation
    (tensor(0.6931), tensor(0.6931))
    """
    z, mu, logvar = _checks.promoted(z, mu, logvar)
    log_qzx = _own_log_density(z, mu, logvar, parameterization, logvar_bounds)
    log_qz, log_qz_dims = _dispatch.aggregate(
        z, mu, logvar, log_weight=log_weight, leave_one_out=leave_one_out, per_dim=True,
        parameterization=parameterization, logvar_bounds=logvar_bounds, process_group=process_group,
    )  # fmt: skip
    product = log_qz_dims.sum(1)
    prior = reference.log_density(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
    parts = torch.stack((log_qzx.sum(1) - log_qz, log_qz - product, product - prior), 1)
    return KLDecomposition(*_mean_rows(parts, process_group).unbind())


def _own_log_density(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    parameterization: Parameterization,
    logvar_bounds: tuple[float, float] | None,
) -> Tensor:
    _checks.check_aggregate(z, mu, logvar, "log q(z|x)")
    _checks.check_choice("parameterization", parameterization, _checks.PARAMETERIZATIONS)
    bounds = None if logvar_bounds is None else _checks.check_bounds(logvar_bounds)
    return reference.log_density(z, mu, logvar, parameterization, bounds)


def _mean_rows(rows: Tensor, process_group: ProcessGroup | None) -> Tensor:
    if process_group is None:
        return rows.mean(0)
    return _distributed.mean_over_ranks(rows.sum(0), rows.shape[0], process_group)


# What torch.fx.symbolic_trace takes as one call. It cannot look inside: shapes and values decide there.
_TRACED = (
    "gaussian_kl",
    "gaussian_kl_packed",
    "kl_decomposition",
    "log_aggregate_posterior",
    "mutual_information",
    "reparameterize",
    "reparameterize_packed",
    "rng_state",
    "sample_kl",
    "sample_kl_packed",
)
for _name in _TRACED:
    torch.fx.wrap(_name)
