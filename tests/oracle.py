"""A float64 statement of the formulas, independent of the package.

Nothing here imports vaekernels. `objective` follows the definitions of the public docstrings letter by letter
(and slowly); `usual=True` computes the same with the code that people write, in whatever dtype it is given,
which is the yardstick of the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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


def cells_of(
    mu: Tensor,
    lv: Tensor,
    mp: Tensor | None,
    lp: Tensor | None,
    balance: float | None,
    usual: bool = False,
) -> Tensor:
    """The KL of every element."""
    if balance is None:
        return kl_elements(mu, lv, mp, lp, usual)
    assert mp is not None and lp is not None
    posterior = (1 - balance) * kl_elements(mu, lv, mp.detach(), lp.detach(), usual)
    return posterior + balance * kl_elements(mu.detach(), lv.detach(), mp, lp, usual)


def reduced(
    cells: Tensor,
    *,
    free_bits: float | Tensor | None = None,
    clamp: str = "batch",
    penalty: str = "floor",
    batch_dims: int = 1,
    group_dims: Sequence[int] | int | None = None,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
) -> tuple[Tensor, Tensor]:
    """kl and the rate per group, from the KL of every element."""
    groups = group_axes(cells.dim(), batch_dims, group_dims)
    batch_shape = cells.shape[:batch_dims]
    group_shape = [cells.shape[d] for d in groups]
    summed = [d for d in range(batch_dims, cells.dim()) if d not in groups]
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
        lam = torch.as_tensor(free_bits, dtype=rows.dtype, device=cells.device).expand(group_shape)
    n_latent = math.prod(cells.shape[batch_dims:])
    if reduction == "elementwise":
        return cells, rate
    if lam is not None and clamp == "sample":
        rows = clamped(rows, lam, penalty)
    per_row = rows.sum(dim=list(range(1, rows.dim()))) if group_shape else rows
    if reduction == "none":
        return per_row.reshape(batch_shape), rate
    if lam is not None and clamp == "batch":
        loss = clamped(rate, lam, penalty).sum()
        numerator = loss * total if rows.shape[0] else 0.0 * total
    else:
        numerator = (w * per_row).sum()
        loss = numerator / total
    if reduction == "sum":
        return numerator, rate
    if reduction == "mean":
        return loss / n_latent, rate
    assert reduction == "batchmean"
    return loss, rate


def objective(
    mu: Tensor,
    second: Tensor,
    prior_mu: Tensor | None = None,
    prior_second: Tensor | None = None,
    *,
    eps: Tensor | None = None,
    balance: float | None = None,
    parameterization: str = "logvar",
    logvar_bounds: Sequence[float] | None = None,
    usual: bool = False,
    **reduction: Any,
) -> Result:
    """z, kl and the rate per group, differentiable by autograd. `reduction`: the options of `reduced`."""
    lv = log_variance(second, parameterization, logvar_bounds)
    lp = None if prior_second is None else log_variance(prior_second, parameterization)
    cells = cells_of(mu, lv, prior_mu, lp, balance, usual)
    z = None if eps is None else sample(mu, second, eps, parameterization, logvar_bounds)
    return Result(z, *reduced(cells, **reduction))


# --- judging ------------------------------------------------------------------------------------------------


class Accuracy(NamedTuple):
    """The largest errors of the elementary functions: relative ones, and the absolute one of a normal."""

    exp: float
    growth: float
    """of e^(2x) - 1"""
    excess: float
    """of e^(2x) - 1 - 2x"""
    normal: float
    rounding: float
    """of one operation of arithmetic"""


# What the package promises: csrc/math.h and csrc/philox.h state what they keep to, and
# tests/ops/test_device_math.py measures it. The GPU's exponential, sine and logarithm are approximations.
ACCURACY = {
    ("cuda", torch.float32): Accuracy(2**-20, 1e-5, 1e-5, 1e-5, 2**-24),
    ("cpu", torch.float32): Accuracy(2**-20, 1.5e-6, 1.5e-6, 2e-6, 2**-24),
    ("cuda", torch.float64): Accuracy(1e-15, 2e-15, 4e-15, 1e-13, 2**-53),
    ("cpu", torch.float64): Accuracy(1e-15, 2e-15, 4e-15, 1e-13, 2**-53),
}


def accuracy(device: str | torch.device, dtype: torch.dtype) -> Accuracy:
    """That of tensors of `dtype`: all but float64 are computed in float32."""
    return ACCURACY[torch.device(device).type, torch.float64 if dtype == torch.float64 else torch.float32]


class Errors(NamedTuple):
    """Bounds of the errors, in float64: of the outputs, and of the gradient of every tensor argument."""

    z: Tensor | None
    kl: Tensor
    rate: Tensor
    gradients: list[Tensor]


def errors(
    mu: Tensor,
    second: Tensor,
    prior_mu: Tensor | None = None,
    prior_second: Tensor | None = None,
    *,
    accuracy: Accuracy,
    eps: Tensor | None = None,
    own_normals: bool = False,
    cotangents: Sequence[Tensor | None] = (None, None, None),
    balance: float | None = None,
    parameterization: str = "logvar",
    logvar_bounds: Sequence[float] | None = None,
    **reduction: Any,
) -> Errors:
    """How far z, kl, the rate and the gradients may be off, to first order in the errors of `accuracy`.

    Every term of a formula counts with its own size, so that terms may cancel. With x the log standard
    deviation, a = (mu - mp) e^(-xp) and t = x - xp:

      KL        = (a^2 + excess(t)) / 2
      by mu     = grad_z + c a e^(-xp)                          by prior_mu: without grad_z
      by x      = grad_z eps e^x + c growth(t)                  by xp: c (growth(t) + a^2)

    where c is the derivative of the loss by the element's KL. `eps` and the arguments are float64;
    `own_normals`: the results come from normals of their own, of which `eps` are the exact values.
    `cotangents`: of z, kl and the rate.
    """
    unit, held = 4 * accuracy.rounding, parameterization in ("std", "softplus")

    def scale(tensor: Tensor, bounds: Sequence[float] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x, |dx / d tensor| and the error of x: of tensors that hold the deviation, that of a logarithm."""
        tensor = tensor.detach().requires_grad_()
        with torch.enable_grad():
            x = log_variance(tensor, parameterization, bounds) / 2
        slope = torch.autograd.grad(x.sum(), tensor)[0].abs()
        x = x.detach()
        return x, slope, unit * (x.abs() + held) + (accuracy.exp if parameterization == "softplus" else 0)

    mu = mu.detach()
    x, slope, dx = scale(second, logvar_bounds)
    sd = torch.exp(x)
    mp = xp = dxp = prior_slope = torch.zeros_like(mu)
    if prior_mu is not None and prior_second is not None:
        mp = prior_mu.detach()
        xp, prior_slope, dxp = scale(prior_second, None)
    root = torch.exp(-xp)
    a = ((mu - mp) * root).abs()
    da = a * (accuracy.exp + dxp + unit)
    of_square = 2 * a * da + da**2
    t = x - xp
    growth, steep = torch.expm1(2 * t).abs(), torch.exp(2 * t)
    dt = 2 * (dx + dxp + unit * t.abs())
    excess = torch.where(t.abs() < 0.1, 2 * t * t * (1 + t.abs()), torch.expm1(2 * t) - 2 * t)
    cells = (a**2 + excess) / 2
    of_cells = (of_square + accuracy.excess * excess + growth * dt + steep * dt**2) / 2 + unit * cells

    unclamped = {k: v for k, v in reduction.items() if k not in ("free_bits", "clamp", "penalty")}
    of_kl, of_rate = reduced(of_cells, **unclamped)
    of_z = None
    if eps is not None:
        of_sd = accuracy.exp + dx + unit
        of_z = unit * mu.abs() + eps.abs() * sd * of_sd + (accuracy.normal * sd if own_normals else 0.0)

    grad_z, *of_loss = cotangents
    pulled = noise = normal = torch.zeros_like(mu)
    if grad_z is not None and eps is not None:
        samples = (0,) if grad_z.dim() > mu.dim() else ()
        pulled, noise = grad_z.abs(), (grad_z * eps).abs()
        if samples:
            pulled, noise = pulled.sum(0), noise.sum(0)
        normal = pulled * accuracy.normal if own_normals else normal
    c = torch.zeros_like(mu)
    if any(g is not None for g in of_loss):
        leaf = cells.clone().requires_grad_()
        with torch.enable_grad():
            outputs = reduced(leaf, **reduction)
        used = [(o, g.abs()) for o, g in zip(outputs, of_loss, strict=True) if g is not None]
        (c,) = torch.autograd.grad([o for o, _ in used], leaf, [g for _, g in used])
    cq, cp = (c, c) if balance is None else ((1 - balance) * c, balance * c)
    of_pull = root * da + a * root * (accuracy.exp + dxp + unit)
    of_growth = accuracy.growth * growth + steep * dt + unit * (growth + a**2)
    of_noise = (noise * (accuracy.exp + dx + unit) + normal) * sd
    gradients = [
        unit * pulled + cq * of_pull,
        slope * (of_noise + cq * of_growth),
        cp * of_pull,
        prior_slope * cp * (of_growth + of_square),
    ]
    return Errors(of_z, of_kl, of_rate, gradients if prior_mu is not None else gradients[:2])


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of |x| in dtype, in float64."""
    info = torch.finfo(dtype)
    x = x.abs().double().clamp(min=info.tiny)
    return 2.0 ** torch.floor(torch.log2(x)) * info.eps


def assert_accurate(
    ours: Tensor,
    exact: Tensor,
    eager: Tensor,
    error: Tensor,
    *,
    ulps: int = 4,
    what: str = "result",
) -> None:
    """|ours - float64| <= 2 |eager - float64| + `error` + `ulps` ULP.

    Eager's error is the largest of its tensor (flash-attention's rule): an element may be right by luck.
    `error` is what `errors` gives; the ULP is that of ours.dtype at the exact value. Where the exact value is
    inf or NaN, ours must be the same.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    got, exact, eager = ours.detach().double().cpu(), exact.detach().cpu(), eager.detach().double().cpu()
    finite = torch.isfinite(exact)
    assert torch.equal(got[~finite].nan_to_num(0.5), exact[~finite].nan_to_num(0.5)), (
        f"{what}: inf and NaN differ"
    )
    if not finite.any():
        return
    eager_error = (eager - exact)[finite].abs()
    allowed = 2 * eager_error[torch.isfinite(eager_error)].max() if torch.isfinite(eager_error).any() else 0.0
    allowed = allowed + error.detach().cpu()[finite]
    # the oracle of float64 is itself float64: its own rounding counts there
    allowed = allowed + (ulps if ours.dtype != torch.float64 else 4 * ulps) * ulp(exact[finite], ours.dtype)
    off = (got - exact)[finite].abs()
    worst = int(torch.argmax(off / allowed))
    assert bool((off <= allowed).all()), (
        f"{what}: got {got[finite][worst]:.9g}, float64 says {exact[finite][worst]:.9g}: "
        f"error {off[worst]:.3g}, allowed {allowed[worst]:.3g}"
    )
