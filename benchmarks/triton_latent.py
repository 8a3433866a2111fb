"""The latent layer written by hand in Triton: what someone who knows Triton would write instead of CUDA.

One kernel samples and sums the KL over rows, a small one adds the partial sums and clamps them, and one
kernel is the backward; the noise is drawn anew from a seed (Philox, as `tl.randint4x` has it), so none is
stored. The seed is a number that the host counts up, which costs no launch; a captured graph therefore
repeats its numbers.

A quad of normals belongs to four batch rows and one latent element, so neither direction depends on the
tiles. Their sizes are tried out when a layer is first called. Covers the cases of `vaekernels.bench` without
a learned prior.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.random import uint_to_uniform_float

from vaekernels.bench.cases import Case, Layer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# `tl.randn4x` calls the accurate sine and cosine, whose slow path for large angles takes local memory; the
# GPU's approximations do here, where the angle is below 2 pi. The interpreter has none.
FAST = tl.constexpr(not INTERPRETED)


# ---- kernels ---------------------------------------------------------------------------------------------
# Branches end in `else`: a function of Triton's has one type of result, and skips only the branch not taken.


@triton.jit
def _elements(along, I, S, PER_ELEMENT: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    """Latent elements of a tile, which of them exist, their group, and the tile's number within the group."""
    lane = tl.arange(0, BLOCK)
    if PER_ELEMENT:
        i = along * BLOCK + lane
        return i, i < I, i, 0
    else:
        chunks = tl.cdiv(S, BLOCK)
        group, chunk = along // chunks, along % chunks
        s = chunk * BLOCK + lane
        return group * S + s, s < S, group, chunk


@triton.jit
def _read(base, row, stride, i, inside, B):
    return tl.load(base + row.to(tl.int64) * stride + i, mask=inside & (row < B), other=0.0).to(tl.float32)


@triton.jit
def _write(base, row, stride, i, inside, B, value):
    tl.store(base + row.to(tl.int64) * stride + i, value.to(base.dtype.element_ty), mask=inside & (row < B))


@triton.jit
def _weight(weight, row, B, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        return tl.load(weight + row, mask=row < B, other=0.0)
    else:
        return 1.0


@triton.jit
def _pair(x, y):
    """Two normals from two words (Box-Muller)."""
    u = tl.maximum(uint_to_uniform_float(x), 1.0e-7)
    angle = 6.283185307179586 * uint_to_uniform_float(y)
    r = tl.sqrt(-2.0 * tl.log(u))
    if FAST:
        return r * libdevice.fast_cosf(angle), r * libdevice.fast_sinf(angle)
    else:
        return r * tl.cos(angle), r * tl.sin(angle)


@triton.jit
def _normals(seed, quad):
    x0, x1, x2, x3 = tl.randint4x(seed, quad)
    n0, n1 = _pair(x0, x1)
    n2, n3 = _pair(x2, x3)
    return n0, n1, n2, n3


@triton.jit(do_not_specialize=["seed"])
def forward_kernel(
    mu, logvar, z, partial, weight, seed,
    B, I, S, G, K, in_row, quads, sample,  # noqa: E741
    SAMPLE: tl.constexpr, KL: tl.constexpr, WEIGHTED: tl.constexpr, PER_ELEMENT: tl.constexpr,
    QUADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    along, part = tl.program_id(0), tl.program_id(1)
    i, inside, group, chunk = _elements(along, I, S, PER_ELEMENT, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for q in range(QUADS):
        quad = part * QUADS + q
        b = quad * 4
        m0 = _read(mu, b, in_row, i, inside, B)
        m1 = _read(mu, b + 1, in_row, i, inside, B)
        m2 = _read(mu, b + 2, in_row, i, inside, B)
        m3 = _read(mu, b + 3, in_row, i, inside, B)
        v0 = _read(logvar, b, in_row, i, inside, B)
        v1 = _read(logvar, b + 1, in_row, i, inside, B)
        v2 = _read(logvar, b + 2, in_row, i, inside, B)
        v3 = _read(logvar, b + 3, in_row, i, inside, B)
        s0 = tl.exp(0.5 * v0)
        s1 = tl.exp(0.5 * v1)
        s2 = tl.exp(0.5 * v2)
        s3 = tl.exp(0.5 * v3)
        if KL:
            total += _weight(weight, b, B, WEIGHTED) * (m0 * m0 + s0 * s0 - 1.0 - v0)
            total += _weight(weight, b + 1, B, WEIGHTED) * (m1 * m1 + s1 * s1 - 1.0 - v1)
            total += _weight(weight, b + 2, B, WEIGHTED) * (m2 * m2 + s2 * s2 - 1.0 - v2)
            total += _weight(weight, b + 3, B, WEIGHTED) * (m3 * m3 + s3 * s3 - 1.0 - v3)
        if SAMPLE:
            out = z
            for k in range(K):
                n0, n1, n2, n3 = _normals(seed, (k * quads + quad) * I + i)
                _write(out, b, I, i, inside, B, m0 + s0 * n0)
                _write(out, b + 1, I, i, inside, B, m1 + s1 * n1)
                _write(out, b + 2, I, i, inside, B, m2 + s2 * n2)
                _write(out, b + 3, I, i, inside, B, m3 + s3 * n3)
                out += sample
    if KL:
        if PER_ELEMENT:
            tl.store(partial + part.to(tl.int64) * G + i, 0.5 * total, mask=inside)
        else:
            place = part * tl.cdiv(S, BLOCK) + chunk
            tl.store(partial + place.to(tl.int64) * G + group, 0.5 * tl.sum(total))


@triton.jit
def finish_kernel(
    partial, weight, slope, loss, free_bits, B, G, P,
    WEIGHTED: tl.constexpr, CLAMPED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Rates from the partial sums [P, G]; slope is d loss / d KL of an element with weight 1."""
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    rows = tl.arange(0, BLOCK_P)
    sums = tl.zeros([BLOCK_P, BLOCK_G], tl.float32)
    for first in range(0, P, BLOCK_P):
        at = (first + rows)[:, None]
        sums += tl.load(
            partial + at.to(tl.int64) * G + group[None, :], mask=(at < P) & (group < G)[None, :], other=0.0
        )
    weights = B * 1.0
    if WEIGHTED:
        found = tl.zeros([1024], tl.float32)
        for first in range(0, B, 1024):
            b = first + tl.arange(0, 1024)
            found += tl.load(weight + b, mask=b < B, other=0.0)
        weights = tl.sum(found)
    rate = tl.sum(sums, axis=0) / weights
    open_ = rate >= free_bits if CLAMPED else rate == rate
    value = tl.where(open_, rate, free_bits)
    tl.store(slope + group, tl.where(open_, 1.0 / weights, 0.0), mask=group < G)
    tl.store(loss + tl.program_id(0), tl.sum(tl.where(group < G, value, 0.0)))


@triton.jit(do_not_specialize=["seed"])
def backward_kernel(
    mu, logvar, g_z, g_kl, slope, weight, d_mu, d_logvar, seed,
    B, I, S, G, K, in_row, quads, sample,  # noqa: E741
    SAMPLE: tl.constexpr, KL: tl.constexpr, WEIGHTED: tl.constexpr, PER_ELEMENT: tl.constexpr,
    QUADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    along, part = tl.program_id(0), tl.program_id(1)
    i, inside, group, _ = _elements(along, I, S, PER_ELEMENT, BLOCK)
    scale = 0.0
    if KL:
        if PER_ELEMENT:
            scale = tl.load(g_kl).to(tl.float32) * tl.load(slope + group, mask=inside, other=0.0)
        else:
            scale = tl.load(g_kl).to(tl.float32) * tl.load(slope + group)
    for q in range(QUADS):
        quad = part * QUADS + q
        b = quad * 4
        s0 = tl.exp(0.5 * _read(logvar, b, in_row, i, inside, B))
        s1 = tl.exp(0.5 * _read(logvar, b + 1, in_row, i, inside, B))
        s2 = tl.exp(0.5 * _read(logvar, b + 2, in_row, i, inside, B))
        s3 = tl.exp(0.5 * _read(logvar, b + 3, in_row, i, inside, B))
        zero = tl.zeros([BLOCK], tl.float32)
        a0, a1, a2, a3 = zero, zero, zero, zero  # sums of the gradient over samples
        e0, e1, e2, e3 = zero, zero, zero, zero  # and of gradient times noise
        if SAMPLE:
            given = g_z
            for k in range(K):
                n0, n1, n2, n3 = _normals(seed, (k * quads + quad) * I + i)
                g0 = _read(given, b, I, i, inside, B)
                g1 = _read(given, b + 1, I, i, inside, B)
                g2 = _read(given, b + 2, I, i, inside, B)
                g3 = _read(given, b + 3, I, i, inside, B)
                a0 += g0
                a1 += g1
                a2 += g2
                a3 += g3
                e0 += g0 * n0
                e1 += g1 * n1
                e2 += g2 * n2
                e3 += g3 * n3
                given += sample
        e0 *= s0
        e1 *= s1
        e2 *= s2
        e3 *= s3
        if KL:
            c0 = scale * _weight(weight, b, B, WEIGHTED)
            c1 = scale * _weight(weight, b + 1, B, WEIGHTED)
            c2 = scale * _weight(weight, b + 2, B, WEIGHTED)
            c3 = scale * _weight(weight, b + 3, B, WEIGHTED)
            a0 += c0 * _read(mu, b, in_row, i, inside, B)
            a1 += c1 * _read(mu, b + 1, in_row, i, inside, B)
            a2 += c2 * _read(mu, b + 2, in_row, i, inside, B)
            a3 += c3 * _read(mu, b + 3, in_row, i, inside, B)
            e0 += c0 * (s0 * s0 - 1.0)
            e1 += c1 * (s1 * s1 - 1.0)
            e2 += c2 * (s2 * s2 - 1.0)
            e3 += c3 * (s3 * s3 - 1.0)
        _write(d_mu, b, in_row, i, inside, B, a0)
        _write(d_mu, b + 1, in_row, i, inside, B, a1)
        _write(d_mu, b + 2, in_row, i, inside, B, a2)
        _write(d_mu, b + 3, in_row, i, inside, B, a3)
        _write(d_logvar, b, in_row, i, inside, B, 0.5 * e0)
        _write(d_logvar, b + 1, in_row, i, inside, B, 0.5 * e1)
        _write(d_logvar, b + 2, in_row, i, inside, B, 0.5 * e2)
        _write(d_logvar, b + 3, in_row, i, inside, B, 0.5 * e3)


# ---- launches --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Elements along the latent, quads of batch rows, and warps of a program."""

    block: int
    quads: int
    warps: int


TILES = [
    Tile(256, 1, 4),
    Tile(512, 1, 4),
    Tile(1024, 1, 8),
    Tile(256, 4, 4),
    Tile(512, 4, 8),
    Tile(1024, 8, 8),
]


class Plan:
    """A case as the kernels see it: B rows of I elements, G groups of S."""

    def __init__(self, case: Case) -> None:
        if case.prior:
            raise ValueError("the Triton version has no learned prior")
        self.case = case
        self.B = torch.Size(case.shape[: case.batch_dims]).numel()
        self.I = torch.Size(case.shape[case.batch_dims :]).numel()
        self.S = 1
        if case.group_dims is not None:
            if case.group_dims != case.batch_dims:
                raise ValueError("the Triton version has groups along the first latent axis alone")
            self.S = torch.Size(case.shape[case.group_dims + 1 :]).numel()
        self.G = self.I // self.S
        self.K = case.num_samples or 1
        self.quads = triton.cdiv(self.B, 4)
        self.in_row = self.I * (2 if case.packed else 1)
        self.seeds = itertools.count(int(torch.randint(2**31, ()).item()))
        self.tiles: dict[str, Tile] = {}

    @property
    def per_element(self) -> bool:
        return self.S == 1

    @cached_property
    def candidates(self) -> list[Tile]:
        length = triton.next_power_of_2(self.I if self.per_element else self.S)
        found = []
        for tile in TILES:
            block = min(tile.block, length)
            quads = min(tile.quads, triton.next_power_of_2(self.quads))
            found.append(Tile(block, quads, max(1, min(tile.warps, block // 32))))
        return list(dict.fromkeys(found))

    def along(self, tile: Tile) -> int:
        return (
            triton.cdiv(self.I, tile.block) if self.per_element else self.G * triton.cdiv(self.S, tile.block)
        )

    def grid(self, tile: Tile) -> tuple[int, int]:
        return self.along(tile), triton.cdiv(self.quads, tile.quads)

    def parts(self, tile: Tile) -> int:
        """Partial sums of each group."""
        along, parts = self.grid(tile)
        return parts if self.per_element else parts * (along // self.G)

    def options(self, tile: Tile, sample: bool, kl: bool) -> dict[str, Any]:
        return {
            "SAMPLE": sample, "KL": kl, "WEIGHTED": self.case.mask, "PER_ELEMENT": self.per_element,
            "QUADS": tile.quads, "BLOCK": tile.block, "num_warps": tile.warps,
        }  # fmt: skip

    def tile(self, kernel: str, launch: Callable[[Tile], object]) -> Tile:
        """The fastest of the candidates, timed once."""
        if kernel not in self.tiles:
            candidates = self.candidates
            if INTERPRETED or len(candidates) == 1:
                self.tiles[kernel] = candidates[0]
            else:
                times = {
                    t: triton.testing.do_bench(lambda t=t: launch(t), warmup=5, rep=20) for t in candidates
                }
                self.tiles[kernel] = min(times, key=times.__getitem__)
        return self.tiles[kernel]


class _Latent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, mu: Tensor, logvar: Tensor, weight: Tensor | None, moments: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        case, seed = plan.case, next(plan.seeds)
        z_shape = case.shape if case.num_samples is None else (plan.K, *case.shape)
        z = torch.empty(z_shape, dtype=mu.dtype, device=mu.device) if case.samples else None
        partial = mu.new_empty(0, dtype=torch.float32)
        if case.has_kl:
            most = max(plan.parts(tile) for tile in plan.candidates)
            partial = torch.empty(most * plan.G, dtype=torch.float32, device=mu.device)

        def launch(tile: Tile) -> None:
            forward_kernel[plan.grid(tile)](
                mu, logvar, mu if z is None else z, partial, mu if weight is None else weight, seed,
                plan.B, plan.I, plan.S, plan.G, plan.K, plan.in_row, plan.quads, plan.B * plan.I,
                **plan.options(tile, case.samples, case.has_kl),
            )  # fmt: skip

        tile = plan.tile("forward", launch)
        launch(tile)
        slope = loss = None
        if case.has_kl:
            parts = plan.parts(tile)
            # One program where the sums are few, many where they are not; those leave a sum to torch.
            wide = triton.next_power_of_2(plan.G)
            block_g = min(wide, 1024) if parts * plan.G <= 2**14 else min(wide, 32)
            block_p = min(triton.next_power_of_2(parts), max(1, 4096 // block_g))
            programs = triton.cdiv(plan.G, block_g)
            slope = torch.empty(plan.G, dtype=torch.float32, device=mu.device)
            losses = torch.empty(programs, dtype=torch.float32, device=mu.device)
            finish_kernel[(programs,)](
                partial, mu if weight is None else weight, slope, losses, case.free_bits or 0.0,
                plan.B, plan.G, parts,
                WEIGHTED=case.mask, CLAMPED=case.free_bits is not None, BLOCK_G=block_g, BLOCK_P=block_p,
            )  # fmt: skip
            loss = losses.sum() if programs > 1 else losses.view(())
        ctx.save_for_backward(*([moments] if moments is not None else [mu, logvar]), slope, weight)
        ctx.plan, ctx.seed = plan, seed
        ctx.set_materialize_grads(False)
        return z, loss

    @staticmethod
    def backward(ctx: Any, g_z: Tensor | None, g_kl: Tensor | None) -> tuple[Any, ...]:
        plan: Plan = ctx.plan
        *given, slope, weight = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in given]
        mu, logvar = _halves(given[0]) if plan.case.packed else given
        d_mu, d_logvar = _halves(grads[0]) if plan.case.packed else grads
        sample, kl = g_z is not None, g_kl is not None
        g_z = None if g_z is None else g_z.contiguous()

        def launch(tile: Tile) -> None:
            backward_kernel[plan.grid(tile)](
                mu, logvar, mu if g_z is None else g_z, mu if g_kl is None else g_kl,
                mu if slope is None else slope, mu if weight is None else weight, d_mu, d_logvar, ctx.seed,
                plan.B, plan.I, plan.S, plan.G, plan.K, plan.in_row, plan.quads, plan.B * plan.I,
                **plan.options(tile, sample, kl),
            )  # fmt: skip

        launch(plan.tile("backward", launch))
        if plan.case.packed:
            return None, None, None, None, grads[0]
        return None, grads[0], grads[1], None, None


def _halves(moments: Tensor) -> tuple[Tensor, Tensor]:
    mu, logvar = moments.chunk(2, 1)
    return mu, logvar


def latent(case: Case) -> Layer:
    """The layer of a case. Contiguous tensors, as the benchmark has them."""
    plan = Plan(case)

    def layer(inputs: list[Tensor]) -> list[Tensor]:
        tensors, weight = (inputs[:-1], inputs[-1]) if case.mask else (inputs, None)
        if case.packed:
            with torch.no_grad():
                mu, logvar = _halves(tensors[0])
            outputs = _Latent.apply(plan, mu, logvar, weight, tensors[0])
        else:
            outputs = _Latent.apply(plan, *tensors, weight, None)
        return [t for t in outputs if t is not None]

    return layer
