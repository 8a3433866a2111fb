"""A float64 statement of the formulas, independent of the package.

Nothing here imports vaekernels. `objective` follows the definitions of the public docstrings letter by letter
(and slowly); `usual=True` computes the same with the code that people write, in whatever dtype it is given,
which is the yardstick of the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF_WORD = np.uint64(32)


# --- random numbers -----------------------------------------------------------------------------------------


def philox_quads(seed: int, offset: int, quads: np.ndarray) -> np.ndarray:
    """Philox4x32-10 of the quads, as uint64 [n, 4] of 32-bit words. Seed and offset are bit patterns."""
    seed, offset = seed % 2**64, offset % 2**64
    quads = quads.astype(np.uint64)
    position = offset // 4
    c0 = np.full(quads.shape, position & 0xFFFFFFFF, np.uint64)
    c1 = np.full(quads.shape, position >> 32, np.uint64)
    c2, c3 = quads & LOW, quads >> HALF_WORD
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = MULTIPLIER[0] * c0, MULTIPLIER[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> HALF_WORD) ^ c1 ^ np.uint64(k0),
            p1 & LOW,
            (p0 >> HALF_WORD) ^ c3 ^ np.uint64(k1),
            p0 & LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def words(seed: int, offset: int, n: int, first_quad: int = 0) -> np.ndarray:
    quads = np.arange((n + 3) // 4, dtype=np.uint64) + np.uint64(first_quad)
    return philox_quads(seed, offset, quads).reshape(-1)[:n]


def box_muller(quads: np.ndarray) -> np.ndarray:
    """[n, 4] words to [n, 4] float64 normals: words (0, 1) give elements 0 and 1, words (2, 3) the others."""
    u = (quads[:, 0::2].astype(np.float64) + 0.5) * 2.0**-32
    angle = 2.0 * np.pi * quads[:, 1::2].astype(np.float64) * 2.0**-32
    r = np.sqrt(-2.0 * np.log(u))
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=-1).reshape(-1, 4)


def flat_normals(seed: int, offset: int, n: int) -> np.ndarray:
    return box_muller(philox_quads(seed, offset, np.arange((n + 3) // 4, dtype=np.uint64))).reshape(-1)[:n]


def normals_like(mu: Tensor, rng: Tensor, num_samples: int | None = None) -> Tensor:
    """The normals of a sample with mu's layout: in the storage order of dense z, sample after sample."""
    seed, offset = rng.tolist()
    k = 1 if num_samples is None else num_samples
    flat = torch.from_numpy(flat_normals(seed, offset, k * mu.numel()))
    strides = torch.empty_like(mu).stride()
    each = [flat[i * mu.numel() : (i + 1) * mu.numel()].as_strided(mu.shape, strides) for i in range(k)]
    if num_samples is None:
        return each[0]
    return torch.stack(each) if each else flat.new_empty((0, *mu.shape))


# --- the latent layer ---------------------------------------------------------------------------------------


class Result(NamedTuple):
    z: Tensor | None
    kl: Tensor
    rate: Tensor


def log_variance(second: Tensor, parameterization: str, bounds: Sequence[float] | None = None) -> Tensor:
    if parameterization == "logvar":
        lv = second
    elif parameterization == "log_std":
        lv = 2 * second
    elif parameterization == "std":
        lv = 2 * torch.log(second)
    elif parameterization == "softplus":
        lv = 2 * torch.log(torch.log1p(torch.exp(second)))
    else:
        raise AssertionError(parameterization)
    return lv if bounds is None else torch.clamp(lv, bounds[0], bounds[1])


def second_of(lv: Tensor, parameterization: str) -> Tensor:
    """The inverse of log_variance: what the encoder would have put out for this log-variance."""
    if parameterization == "logvar":
        return lv
    if parameterization == "log_std":
        return lv / 2
    std = torch.exp(lv / 2)
    return std if parameterization == "std" else torch.log(torch.expm1(std))


def sample(
    mu: Tensor,
    second: Tensor,
    eps: Tensor,
    parameterization: str = "logvar",
    bounds: Sequence[float] | None = None,
) -> Tensor:
    if bounds is None and parameterization == "std":
        return mu + second * eps
    if bounds is None and parameterization == "softplus":
        return mu + torch.log1p(torch.exp(second)) * eps
    return mu + torch.exp(0.5 * log_variance(second, parameterization, bounds)) * eps


def kl_elements(mu: Tensor, lv: Tensor, mp: Tensor | None, lp: Tensor | None, usual: bool) -> Tensor:
    if usual:
        if mp is None or lp is None:
            return 0.5 * (mu.pow(2) + lv.exp() - 1 - lv)
        return 0.5 * ((mu - mp).pow(2) / lp.exp() + (lv - lp).exp() - 1 - (lv - lp))
    if mp is None or lp is None:
        return 0.5 * (mu**2 + (torch.expm1(lv) - lv))
    x = lv - lp
    return 0.5 * (((mu - mp) * torch.exp(-lp / 2)) ** 2 + (torch.expm1(x) - x))


def clamped(x: Tensor, lam: Tensor, penalty: str) -> Tensor:
    """f(x; lambda). The comparison is `x < lambda`, so NaN stays NaN and the gradient at a tie is one."""
    if penalty == "floor":
        return torch.where(x < lam, lam, x)
    if penalty == "hinge":
        return torch.where(x < lam, 0.0 * x.detach(), x - lam)
    if penalty == "mask":
        return torch.where(x < lam, 0.0 * x.detach(), x)
    raise AssertionError(penalty)


def group_axes(ndim: int, batch_dims: int, group_dims: Sequence[int] | int | None) -> list[int]:
    if group_dims is None:
        return list(range(batch_dims, ndim))
    dims = [group_dims] if isinstance(group_dims, int) else list(group_dims)
    return sorted(d % ndim for d in dims)


def objective(
    mu: Tensor,
    second: Tensor,
    prior_mu: Tensor | None = None,
    prior_second: Tensor | None = None,
    *,
    eps: Tensor | None = None,
    free_bits: float | Tensor | None = None,
    clamp: str = "batch",
    penalty: str = "floor",
    batch_dims: int = 1,
    group_dims: Sequence[int] | int | None = None,
    weight: Tensor | None = None,
    balance: float | None = None,
    reduction: str = "batchmean",
    parameterization: str = "logvar",
    logvar_bounds: Sequence[float] | None = None,
    usual: bool = False,
) -> Result:
    """z, kl and the rate per group, differentiable by autograd."""
    lv = log_variance(second, parameterization, logvar_bounds)
    lp = None if prior_second is None else log_variance(prior_second, parameterization)
    if balance is None:
        cells = kl_elements(mu, lv, prior_mu, lp, usual)
    else:
        assert prior_mu is not None and lp is not None
        cells = (1 - balance) * kl_elements(mu, lv, prior_mu.detach(), lp.detach(), usual)
        cells = cells + balance * kl_elements(mu.detach(), lv.detach(), prior_mu, lp, usual)
    z = None if eps is None else sample(mu, second, eps, parameterization, logvar_bounds)

    groups = group_axes(mu.dim(), batch_dims, group_dims)
    batch_shape = mu.shape[:batch_dims]
    group_shape = [mu.shape[d] for d in groups]
    summed = [d for d in range(batch_dims, mu.dim()) if d not in groups]
    per_cell = cells.sum(dim=summed) if summed else cells
    rows = per_cell.reshape([math.prod(batch_shape), *group_shape])
    w = torch.ones(rows.shape[0], dtype=rows.dtype, device=rows.device)
    if weight is not None:
        w = weight.to(rows.dtype).reshape(-1)
    total = w.sum()
    spread = w.reshape([-1] + [1] * len(group_shape))
    rate = (spread * rows).sum(0) / total

    lam = None
    if free_bits is not None:
        lam = torch.as_tensor(free_bits, dtype=rows.dtype, device=mu.device).expand(group_shape)
    n_latent = math.prod(mu.shape[batch_dims:])
    if reduction == "elementwise":
        return Result(z, cells, rate)
    if lam is not None and clamp == "sample":
        rows = clamped(rows, lam, penalty)
    per_row = rows.sum(dim=list(range(1, rows.dim()))) if group_shape else rows
    if reduction == "none":
        return Result(z, per_row.reshape(batch_shape), rate)
    if lam is not None and clamp == "batch":
        loss = clamped(rate, lam, penalty).sum()
        numerator = loss * total if rows.shape[0] else 0.0 * total
    else:
        numerator = (w * per_row).sum()
        loss = numerator / total
    if reduction == "sum":
        return Result(z, numerator, rate)
    if reduction == "mean":
        return Result(z, loss / n_latent, rate)
    assert reduction == "batchmean"
    return Result(z, loss, rate)


# --- judging ------------------------------------------------------------------------------------------------


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of |x| in dtype, in float64."""
    info = torch.finfo(dtype)
    x = x.abs().double().clamp(min=info.tiny)
    return 2.0 ** torch.floor(torch.log2(x)) * info.eps


def assert_accurate(
    ours: Tensor,
    exact: Tensor,
    eager: Tensor,
    *,
    magnitude: Tensor | None = None,
    ulps: int = 4,
    what: str = "result",
) -> None:
    """|ours - float64| <= 2 |eager - float64| + `ulps` ULP.

    Eager's error is the largest of its tensor (flash-attention's rule): an element may be right by luck. The
    ULP is that of ours.dtype at the exact value, or at `magnitude` where terms cancel. Where the exact value
    is inf or NaN, ours must be the same.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    got, exact, eager = ours.detach().double().cpu(), exact.detach().cpu(), eager.detach().double().cpu()
    finite = torch.isfinite(exact)
    assert torch.equal(got[~finite].nan_to_num(0.5), exact[~finite].nan_to_num(0.5)), (
        f"{what}: inf and NaN differ"
    )
    if not finite.any():
        return
    size = exact.abs() if magnitude is None else torch.maximum(exact.abs(), magnitude.detach().cpu())
    eager_error = (eager - exact)[finite].abs()
    allowed = 2 * eager_error[torch.isfinite(eager_error)].max() if torch.isfinite(eager_error).any() else 0.0
    # the oracle of float64 is itself float64: its own rounding counts there
    allowed = allowed + (ulps if ours.dtype != torch.float64 else 4 * ulps) * ulp(size[finite], ours.dtype)
    error = (got - exact)[finite].abs()
    worst = int(torch.argmax(error / allowed))
    assert bool((error <= allowed).all()), (
        f"{what}: got {got[finite][worst]:.9g}, float64 says {exact[finite][worst]:.9g}: "
        f"error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
    )
