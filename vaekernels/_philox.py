"""The random numbers of the reference: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, in plain PyTorch.

The same words as `csrc/philox.h`, bit for bit. The stream is frozen: key = seed, counter words (0, 1) =
offset / 4, counter words (2, 3) = index of the quad of four elements. A word is held in an int64, because
PyTorch has no arithmetic on uint32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _high_and_low(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # The product may exceed 2^63 and wrap; its 64 bits are right all the same, and the mask drops the sign
    # that the shift drew in.
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK


def _quads(rng: Tensor, count: int, first_quad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each of `count` quads, each int64 [count]."""
    quad = torch.arange(count, dtype=torch.int64, device=rng.device) + first_quad
    seed, offset = rng[0], rng[1]
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    # Seed and offset are bit patterns: the masks turn arithmetic shifts into logical ones.
    c0, c1 = (offset >> 2) & _MASK, (offset >> 34) & 0x3FFFFFFF
    c2, c3 = quad & _MASK, (quad >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _high_and_low(c0, _MULTIPLIERS[0])
        high1, low1 = _high_and_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def philox_words(rng: Tensor, n: int, first_quad: int = 0) -> Tensor:
    """int64 [n], each 0..2^32-1: word i is word i % 4 of quad `first_quad` + i // 4."""
    return torch.stack(_quads(rng, (n + 3) // 4, first_quad), -1).reshape(-1)[:n]


def _box_muller(x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # For u > 1/2 the logarithm is taken from 1 - u, which is exact in the word: so the small radii keep their
    # digits.
    upper = x > 0x7FFFFFFF
    nearer = (torch.where(upper, _MASK - x, x).to(dtype) + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.where(upper, torch.log1p(-nearer), torch.log(nearer)))
    # As a signed word the angle lies in [-pi, pi), where float32 resolves it best.
    signed = torch.where(y > 0x7FFFFFFF, y - 2**32, y)
    angle = signed.to(dtype) * (2.0 * math.pi * 2.0**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normals(rng: Tensor, count: int, dtype: torch.dtype, device: torch.device, first: int = 0) -> Tensor:
    """The standard normals of elements `first` .. `first + count - 1`, flat.

    As in the kernels, those of float64 are computed in it and others in float32, then rounded to `dtype`.
    """
    first_quad, skip = first // 4, first % 4
    x0, x1, x2, x3 = _quads(rng.to(device), (skip + count + 3) // 4, first_quad)
    # Half types have no room for 2^-32.
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = *_box_muller(x0, x1, compute), *_box_muller(x2, x3, compute)
    flat = torch.stack(pairs, -1).reshape(-1).to(dtype)
    if torch.compiler.is_compiling():
        # A slice makes the tracer prove that count <= 4 * ((count + 3) // 4), and it cannot.
        return flat[torch.arange(count, device=device) + skip]
    return flat[skip : skip + count]


def _seed_from_randint(device: torch.device, generator: torch.Generator | None) -> Tensor:
    if device.type == "cpu":
        # 64 bits of the generator; the operator flips the sign that the range's lower end, as an addend,
        # flipped.
        word = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator)
        return word ^ -(2**63)
    # Four times 16 bits: a range that randint serves on every device.
    parts = torch.randint(0, 1 << 16, (4,), dtype=torch.int64, device=device, generator=generator)
    return parts[0] | (parts[1] << 16) | (parts[2] << 32) | (parts[3] << 48)


def rng_state(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """int64 [2] (seed, offset) on `like`'s device, taken from the generator, which moves on.

    CPU: 64 fresh bits and offset 0. CUDA: the generator's own seed and offset, which advances by 4.
    Elsewhere, while tracing and while a CUDA graph is captured: a seed drawn by `torch.randint` and offset 0.
    """
    if like.is_cuda and _has_concrete_state():
        return _cuda_state(like.device, generator)
    seed = _seed_from_randint(like.device, generator)
    return torch.stack((seed, torch.zeros_like(seed)))


def _has_concrete_state() -> bool:
    # A number read from the generator would be a constant of the trace or of the graph.
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.cuda.is_current_stream_capturing()
    )


def _cuda_state(device: torch.device, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    seed = generator.initial_seed()
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed, offset], dtype=torch.int64, device=device)
