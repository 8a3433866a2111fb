"""From bytes to one call of a public function: tensors with layouts and values, options, cotangents.

Any bytes are a problem, the empty string too, and equal bytes are equal problems. Nothing here needs atheris.
`str(problem)` is Python that makes the problem again, for a test.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
SIZES = (3, 1, 2, 0, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 129, 257)
# How many elements a tensor has at most.
ROOM = (48, 48, 48, 48, 300, 300, 300, 300, 300, 2000, 2000, 34000)  # 16384 is a chunk of the CPU kernels

SPECIAL = (
    *(0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1.0, -1.0, 0.5, 2.0, 0.1, 1e-3, -1e-3),
    # near collapse
    *(1e-6, -1e-6, 1e-12, 1e-20, -1e-20),
    # subnormal numbers and the smallest normal ones of float16, float32 and float64
    *(6e-8, -6e-8, 6.2e-5, 1e-40, -1e-40, 1e-45, 1.1754944e-38, -1.1754944e-38, 9e-39, 5e-324, 2.3e-308),
    # where series, switch-overs and ranges of the kernels end
    *(-16.0, -15.9, -16.1, -20.0, 20.0, 24.0, 25.0, -36.0, 40.0, -40.0, 41.0, 44.3, 44.4, -44.4, 80.0),
    *(87.0, 88.0, 88.3, 88.4, 88.7, 88.8, 89.0, -87.0, -87.4, -88.0, -88.8, -103.0, -104.0),
    *(104.0, 174.0, 176.0, 176.8, 177.5, 178.0, -174.0, -176.0, -177.5, -200.0, 200.0),
    *(350.0, 354.0, 355.0, 709.0, 710.0, -709.0, -745.0, -746.0, 1400.0, 1420.0, 1e4, -1e4),
    # whose squares or products leave the range
    *(256.0, -256.0, 65504.0, -65504.0, 1e9, -1e9, 1.8e19, 1.9e19, -1e20, 1e30, 3e38, -3e38, 3.4028235e38),
    *(-3.4028235e38, 1.3e154, 1e200, 1e308, -1e308, 1.7976931348623157e308),
)


class Source:
    """Bytes, read from the front; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        taken = self.data[self.at : self.at + n]
        self.at += n
        return taken.ljust(n, b"\0")

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int.from_bytes(self.take(1 if n <= 256 else 4), "little") % n

    def choice(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def chance(self, one_in: int) -> bool:
        """Rarely, and never when the bytes are used up."""
        return self.below(one_in) == one_in - 1

    def order(self, n: int) -> list[int]:
        """A permutation of range(n)."""
        left = list(range(n))
        return [left.pop(self.below(len(left))) for _ in range(n)]


# --- tensors ------------------------------------------------------------------------------------------------


def strided(
    bits: Sequence[int], dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int], offset: int = 0
) -> Tensor:
    """A view of a storage whose elements have these bits, as whole numbers with a sign."""
    storage = torch.tensor(list(bits), dtype=WORDS[dtype.itemsize]).view(dtype)
    return storage.as_strided(tuple(shape), tuple(stride), offset)


def storage_of(t: Tensor) -> Tensor:
    """All elements of the storage under a view, as whole numbers."""
    flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())  # type: ignore[call-overload]
    return flat.view(WORDS[t.dtype.itemsize])


def as_python(t: Tensor) -> str:
    """`t` as a call of `strided`."""
    bits = storage_of(t).tolist()
    same = len(bits) > 4 and len(set(bits)) == 1
    text = f"[{bits[0]}] * {len(bits)}" if same else str(bits)
    return f"strided({text}, {t.dtype}, {list(t.shape)}, {list(t.stride())}, {t.storage_offset()})"


def widened(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The same view of the same numbers in another dtype: the strides stay, and what overlaps overlaps."""
    storage = storage_of(t).view(t.dtype).to(dtype)
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def _layout(source: Source, shape: Sequence[int]) -> tuple[list[int], int, int]:
    """Strides, offset and the number of elements of the storage."""
    n = len(shape)
    kind = source.below(8)
    order = list(range(n))
    if kind == 1 and n >= 3:  # channels last
        order = [0, *range(2, n), 1]
    elif kind == 2 and n >= 2:
        order = [n - 1, *range(1, n - 1), 0]
    elif kind >= 3 and kind != 6:
        order = source.order(n)
    gaps = [1] * n
    if kind in (4, 5):
        gaps = [source.choice((1, 1, 2, 3)) for _ in shape]
    stride, step = [0] * n, 1
    for d in reversed(order):
        stride[d] = step * gaps[d]
        step *= max(shape[d], 1) * gaps[d]
    if kind == 5:
        for d in range(n):
            if source.below(3) == 2:
                stride[d] = 0
    if kind == 6:  # windows that overlap
        stride = [source.below(4) for _ in shape]
    if kind == 7:  # axes of one element, or of a tensor without elements, may have any stride
        stride = [
            source.choice((s, 0, 1, 7)) if size == 1 or 0 in shape else s
            for s, size in zip(stride, shape, strict=True)
        ]
    offset = source.choice((0, 0, 0, 1, 5))
    last = sum((size - 1) * s for size, s in zip(shape, stride, strict=True)) if 0 not in shape else -1
    return stride, offset, offset + last + 1


def values(source: Source, n: int, dtype: torch.dtype, positive: bool) -> Tensor:
    """n numbers: normal ones of some scale, with a few chosen one by one; or one number for all."""
    generator = torch.Generator().manual_seed(source.below(256))
    kind = source.below(8)
    if kind == 7:
        flat = torch.full((n,), source.choice(SPECIAL), dtype=torch.float64)
    else:
        scale = source.choice((1.0, 1.0, 0.1, 1e-3, 1e-6, 0.0, 4.0, 30.0, 100.0))
        flat = torch.randn(n, generator=generator, dtype=torch.float64) * scale
        flat = flat + source.choice((0.0, 0.0, 0.0, 1.0, -1.0, -6.0))
        if positive:
            flat = flat.abs()
    flat = flat.to(dtype)
    if n:
        words = flat.view(WORDS[dtype.itemsize])
        for _ in range(source.below(5)):
            at = source.below(n)
            if source.chance(4):
                raw = source.take(dtype.itemsize)
                words[at] = struct.unpack({8: "<q", 4: "<i", 2: "<h"}[dtype.itemsize], raw)[0]
            else:
                flat[at] = torch.tensor(source.choice(SPECIAL), dtype=torch.float64)
    return flat


def tensor(source: Source, shape: Sequence[int], dtype: torch.dtype, positive: bool = False) -> Tensor:
    stride, offset, room = _layout(source, shape)
    if room > 4 * max(ROOM):
        stride, offset, room = list(torch.empty(tuple(shape), device="meta").stride()), 0, math.prod(shape)
    return values(source, room, dtype, positive).as_strided(tuple(shape), stride, offset)


# --- problems -----------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """One call of a public function, and of its backward."""

    op: str
    """reparameterize, gaussian_kl or sample_kl"""
    tensors: list[Tensor]
    """mu and logvar, or moments where `packed`; then prior_mu and prior_logvar, or nothing"""
    packed: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    """of the generator that draws; None where `options` has rng, or nothing is drawn"""
    cotangents: dict[str, Tensor] = field(default_factory=dict)
    """of z, kl and kl_per_group: gradients of those that are here"""
    wanted: list[bool] = field(default_factory=list)
    """which tensors require grad; empty: all"""
    create_graph: bool = False

    @property
    def mu(self) -> Tensor:
        return self.tensors[0] if self.packed is None else self.tensors[0].chunk(2, self.packed)[0]

    def __str__(self) -> str:
        def text(value: Any) -> str:
            if isinstance(value, Tensor):
                return as_python(value)
            if isinstance(value, dict):
                return "{" + ", ".join(f"{k!r}: {text(v)}" for k, v in value.items()) + "}"
            if isinstance(value, list):
                return "[" + ", ".join(map(text, value)) + "]"
            return repr(value).replace("inf", "math.inf").replace("nan", "math.nan")

        fields = ("packed", "options", "seed", "cotangents", "wanted", "create_graph")
        given = [f"{name}={text(getattr(self, name))}" for name in fields if getattr(self, name)]
        if self.packed == 0:
            given.append("packed=0")
        return f"Problem({self.op!r}, {text(self.tensors)}, {', '.join(given)})"


def decode(data: bytes) -> Problem:
    source = Source(data)
    op = source.choice(("sample_kl", "gaussian_kl", "reparameterize"))
    dtype = source.choice(DTYPES)
    shape = [source.choice(SIZES) for _ in range(source.choice((2, 2, 3, 4, 1, 5, 0)))]
    room = source.choice(ROOM)
    for d in range(len(shape)):
        if math.prod(shape) > room:
            shape[d] = min(shape[d], 2)
    parameterization = source.choice(("logvar", "logvar", "log_std", "std", "softplus"))
    positive = parameterization == "std"
    options: dict[str, Any] = {"parameterization": parameterization}
    if source.chance(4):
        ends = sorted(source.choice((-1.03, 0.47, -30.0, -4.0, 2.0, 20.0, 0.0, -1e9, 1e9)) for _ in "12")
        options["logvar_bounds"] = tuple(ends)

    packed = None
    if shape and source.below(4) == 3:
        packed = source.below(2 * len(shape)) - len(shape)
        both = list(shape)
        both[packed] *= 2
        tensors = [tensor(source, both, dtype, positive)]
    else:
        tensors = [tensor(source, shape, dtype), tensor(source, shape, dtype, positive)]
    batch_dims, groups = 0, tuple(shape)
    if op != "reparameterize":
        if source.below(3) == 2:
            tensors += [tensor(source, shape, dtype), tensor(source, shape, dtype, positive)]
            if source.below(3) == 2:
                options["balance"] = source.choice((0.8, 0.0, 1.0, 0.5))
        batch_dims, groups = _objective(source, shape, options)

    seed = None
    if op != "gaussian_kl":
        if source.below(3) == 2:
            seed = source.below(256)
        else:
            state = [
                struct.unpack("<q", source.take(8))[0],
                4 * source.choice((0, 1, 2**30, -(2**40), 2**61 - 1)),
            ]
            options["rng"] = torch.tensor([state[0], 9, state[1]])[::2]
        if source.below(3) == 2:
            options["num_samples"] = source.choice((1, 2, 3, 0, 5, 9))
            if options["num_samples"] * math.prod(shape) > max(ROOM):
                options["num_samples"] = 2

    problem = Problem(op, tensors, packed, options, seed)
    problem.wanted = [source.below(5) != 4 for _ in tensors]
    made = _outputs(op, shape, shape[:batch_dims], groups, options)
    if any(problem.wanted):
        for name, output in made.items():
            if source.below(3) != 2:
                kind = dtype if name == "z" else compute_dtype(dtype)
                problem.cotangents[name] = tensor(source, output, kind)
    problem.create_graph = source.chance(8)
    return problem


def _objective(source: Source, shape: list[int], options: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Adds the options of the KL; returns batch_dims and the group shape."""
    ndim = len(shape)
    batch_dims = source.choice((1, 1, 1, *range(ndim + 1)))
    batch_dims = min(batch_dims, ndim)
    options["batch_dims"] = batch_dims
    axes = list(range(batch_dims, ndim))
    if source.below(2):
        axes = [batch_dims + d for d in source.order(ndim - batch_dims)]
        axes = axes[: source.below(len(axes) + 1)]
        signed = [d - ndim if source.below(2) else d for d in axes]
        options["group_dims"] = signed[0] if len(signed) == 1 and source.below(2) else signed
    groups = tuple(shape[d] for d in sorted(axes))
    options["reduction"] = source.choice(("batchmean", "sum", "mean", "none", "elementwise"))
    weighted = options["reduction"] in ("batchmean", "sum", "mean")
    if options["reduction"] != "elementwise" and source.below(2):
        options["clamp"] = source.choice(("batch", "sample")) if weighted else "sample"
        options["penalty"] = source.choice(("floor", "hinge", "mask"))
        thresholds = (0.1, 0.5, 0.0, 2.0, -0.0, 1e-7, 30.0, 1e30, math.inf, 1e-40)
        if source.below(2):
            options["free_bits"] = source.choice(thresholds)
        else:
            wide = groups[source.below(len(groups) + 1) :]
            wide = tuple(1 if source.below(4) == 3 else size for size in wide)
            kind = source.choice((torch.float32, torch.float64, torch.float16, torch.int64))
            flat = [source.choice(thresholds[: 6 if kind != torch.float32 else None]) for _ in range(5)]
            numbers = torch.tensor(flat).repeat(math.prod(wide) // 5 + 1)[: math.prod(wide)]
            options["free_bits"] = numbers.reshape(wide).to(kind)
    if weighted and source.below(3) == 2:
        kind = source.choice((torch.float32, torch.bool, torch.int64, torch.float64, torch.float16))
        batch = shape[:batch_dims]
        flat = [source.choice((1.0, 0.0, 0.5, 3.0, 1e-3, 1e4)) for _ in range(4)]
        numbers = torch.tensor(flat).repeat(math.prod(batch) // 4 + 1)[: math.prod(batch)]
        weight = numbers.reshape(batch).to(kind)
        if source.below(3) == 2 and weight.dim() >= 2:
            weight = weight.transpose(0, -1).contiguous().transpose(0, -1)
        options["weight"] = weight
    return batch_dims, groups


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _outputs(
    op: str, shape: list[int], batch: list[int], groups: tuple[int, ...], options: dict[str, Any]
) -> dict[str, list[int]]:
    """The shapes of what a call returns."""
    made: dict[str, list[int]] = {}
    if op != "gaussian_kl":
        samples = options.get("num_samples")
        made["z"] = shape if samples is None else [samples, *shape]
    if op != "reparameterize":
        of_kl = {"none": batch, "elementwise": shape}
        made["kl"] = of_kl.get(options["reduction"], [])
        made["kl_per_group"] = list(groups)
    return made
