"""What is timed: latent layers in the shapes of real models, and who computes them.

Every contender is the same function of mu and logvar (or of packed moments): it returns z, the loss term or
both. `copy` is not a contender but a lower bound: it moves as many bytes as the layer has to read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import vaekernels as vk

__all__ = [
    "CASES",
    "COPY",
    "FREE_BITS",
    "GPU_CASES",
    "MODEL_CASES",
    "NAMES",
    "OURS",
    "QUICK",
    "SIZES",
    "Case",
    "Layer",
    "Problem",
    "contenders",
    "has_diffusers",
    "serves_diffusers",
]

FREE_BITS = 0.25

OURS, COPY = "vaekernels", "copy"
NAMES = (OURS, "eager", "torch.compile", "torch.distributions", "diffusers", COPY)
"""Everything that is timed, in the order of tables and plots."""

Layer = Callable[[list[Tensor]], list[Tensor]]
"""From the inputs to the outputs that a loss is made of."""


@dataclass(frozen=True)
class Case:
    """One latent layer. `op` is sample_kl, reparameterize or gaussian_kl; `shape` is that of mu."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    op: str = "sample_kl"
    model: str = ""  # whose latent layer this is
    packed: bool = False  # mu and logvar in one tensor, along dim 1
    prior: bool = False  # learned, with gradients
    num_samples: int | None = None
    free_bits: float | None = FREE_BITS  # per dimension, on the batch mean
    batch_dims: int = 1
    group_dims: int | None = None  # the axis that indexes free-bits groups; None: each latent element is one
    mask: bool = False  # weights of the batch rows, zeros and ones, as the last of the inputs

    @property
    def name(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        if self.packed:
            parts.append("packed")
        if self.prior:
            parts.append("learned prior")
        if self.num_samples is not None:
            parts.append(f"K={self.num_samples}")
        if self.group_dims is not None:
            parts.append("per channel")
        if self.mask:
            parts.append("masked")
        return " ".join(parts)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def samples(self) -> bool:
        return self.op != "gaussian_kl"

    @property
    def has_kl(self) -> bool:
        return self.op != "reparameterize"

    def elements_moved(self, backward: bool) -> int:
        """Elements that the layer cannot help reading or writing, forward or backward."""
        given = 4 if self.prior else 2
        z = (self.num_samples or 1) if self.samples else 0
        if not backward:
            return self.numel * (given + z)
        # Backward reads the inputs and z's gradient and writes a gradient for each input. Where only z was
        # wanted, mu is not needed, and its gradient is z's own, unless it has to be summed or packed.
        if self.op == "reparameterize":
            own = self.num_samples is None and not self.packed
            return self.numel * (z + (2 if own else 3))
        return self.numel * (2 * given + z)


@dataclass
class Problem:
    """The tensors of a case."""

    case: Case
    inputs: list[Tensor]
    grads: list[Tensor]  # of z, where there is one; the loss term's is one
    bytes_in: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes_in = sum(t.untyped_storage().nbytes() for t in (*self.inputs, *self.grads))

    @staticmethod
    def of(case: Case, device: torch.device) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def draw(shape: Sequence[int], scale: float) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator, device=device)).to(case.dtype)

        mu, logvar = draw(case.shape, 1.0), draw(case.shape, 0.5)
        inputs = [torch.cat([mu, logvar], 1)] if case.packed else [mu, logvar]
        if case.prior:
            inputs += [draw(case.shape, 1.0), draw(case.shape, 0.5)]
        z_shape = case.shape if case.num_samples is None else (case.num_samples, *case.shape)
        grads = [draw(z_shape, 1.0)] if case.samples else []
        inputs = [t.requires_grad_() for t in inputs]
        if case.mask:
            rows = case.shape[: case.batch_dims]
            inputs.append((torch.rand(rows, generator=generator, device=device) < 0.75).float())
        return Problem(case, inputs, grads)


_SHAPES = [(16, 8), (128, 32), (1024, 128), (2048, 512), (8192, 512), (32768, 512), (131072, 512)]

SIZES = [
    Case(shape, dtype, op, packed=packed)
    for op, packed in (
        ("sample_kl", False),
        ("sample_kl", True),
        ("reparameterize", False),
        ("gaussian_kl", False),
    )
    for dtype in (torch.float32, torch.bfloat16)
    for shape in _SHAPES
]
"""Time against size, from 128 elements to 2^26."""

_MODELS = [
    Case((32, 32), model="text VAE"),
    Case((128, 10), model="scVI"),
    Case((4096, 30), model="scVI, large batch"),
    Case((100, 50), model="IWAE", num_samples=50, free_bits=None),
    Case((50, 50, 32), model="Dreamer", batch_dims=2, prior=True),
    Case((64, 4, 64, 64), model="image VAE"),
    Case((64, 16, 16, 16), model="hierarchical VAE", prior=True),
    Case((8, 4, 64, 64), model="latent diffusion", packed=True, free_bits=None),
    Case((8, 4, 64, 64), op="reparameterize", model="latent diffusion", packed=True),
    Case((8, 4, 64, 64), op="gaussian_kl", model="latent diffusion", packed=True, free_bits=None),
    Case((16, 16, 64, 64), model="latent diffusion, 16 channels", packed=True, free_bits=None),
]
MODEL_CASES = [*_MODELS, *(replace(case, dtype=torch.bfloat16) for case in _MODELS)]

CASES = [*SIZES, *MODEL_CASES]
QUICK = [
    Case((128, 32)),
    Case((1024, 128)),
    Case((64, 4, 64, 64)),
    Case((8192, 512)),
    Case((1024, 128), torch.bfloat16),
    Case((64, 4, 64, 64), torch.bfloat16),
]
_GPU_SHAPES = [
    Case((128, 32)),
    Case((1024, 128)),
    Case((8192, 512)),
    Case((64, 4, 64, 64), group_dims=1),
    Case((8, 16, 128, 128), group_dims=1),
    Case((32, 4, 128, 128), packed=True, free_bits=None),
    Case((16, 64, 512), batch_dims=2, mask=True),
    Case((256, 64), num_samples=50),
    Case((2**15, 512)),
    Case((2**15, 512), op="reparameterize"),
    Case((2**19, 512)),
    Case((2**19, 512), op="reparameterize"),
]
GPU_CASES = [replace(case, dtype=dtype) for case in _GPU_SHAPES for dtype in (torch.float32, torch.bfloat16)]
"""What a GPU is timed on: few enough for ten minutes, from a launch's cost to many times its caches."""


# ---- contenders ------------------------------------------------------------------------------------------


def fused(case: Case) -> Layer:
    options: dict[str, Any] = {}
    if case.samples and case.num_samples is not None:
        options["num_samples"] = case.num_samples
    if case.has_kl and case.free_bits is not None:
        options["free_bits"] = case.free_bits
    if case.has_kl and case.batch_dims != 1:
        options["batch_dims"] = case.batch_dims
    if case.has_kl and case.group_dims is not None:
        options["group_dims"] = case.group_dims
    function: Any = getattr(vk, f"{case.op}_packed" if case.packed else case.op)

    def layer(inputs: list[Tensor]) -> list[Tensor]:
        tensors, more = (inputs[:-1], {"weight": inputs[-1]}) if case.mask else (inputs, {})
        given = [tensors[0], 1, *tensors[1:]] if case.packed else tensors
        out = function(*given, **options, **more)
        return list(out[:2]) if case.op == "sample_kl" else [out]

    return layer


def eager(case: Case) -> Layer:
    """The lines that the op replaces, as most code bases have them."""

    def layer(inputs: list[Tensor]) -> list[Tensor]:
        mu, logvar, prior, weight = _parts(case, inputs)
        out = []
        if case.samples:
            std = torch.exp(0.5 * logvar)
            if case.num_samples is None:
                out.append(mu + torch.randn_like(std) * std)
            else:
                noise = torch.randn(case.num_samples, *mu.shape, dtype=mu.dtype, device=mu.device)
                out.append(mu + noise * std)
        if case.has_kl:
            if prior:
                mp, lp = prior
                kl = 0.5 * (lp - logvar + (logvar.exp() + (mu - mp).pow(2)) / lp.exp() - 1)
            else:
                kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())
            out.append(_loss(case, kl, weight))
        return out

    return layer


def distributions(case: Case) -> Layer:
    """`torch.distributions`: Normal.rsample and kl_divergence."""

    def layer(inputs: list[Tensor]) -> list[Tensor]:
        mu, logvar, prior, weight = _parts(case, inputs)
        q = Normal(mu, torch.exp(0.5 * logvar), validate_args=False)
        out = []
        if case.samples:
            out.append(q.rsample() if case.num_samples is None else q.rsample((case.num_samples,)))
        if case.has_kl:
            if prior:
                p = Normal(prior[0], torch.exp(0.5 * prior[1]), validate_args=False)
            else:
                p = Normal(mu.new_zeros(()), mu.new_ones(()), validate_args=False)
            out.append(_loss(case, kl_divergence(q, p), weight))
        return out

    return layer


def diffusers(case: Case) -> Layer:
    """diffusers' DiagonalGaussianDistribution, which has packed [B, C, H, W] moments and no free bits."""
    distribution: Any = import_module("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution

    def layer(inputs: list[Tensor]) -> list[Tensor]:
        posterior = distribution(inputs[0])
        out = [posterior.sample()] if case.samples else []
        return [*out, posterior.kl().mean()] if case.has_kl else out

    return layer


def serves_diffusers(case: Case) -> bool:
    """Whether `diffusers` can compute the case, installed or not."""
    plain = case.packed and len(case.shape) == 4 and case.num_samples is None and not case.prior
    plain = plain and not case.mask and case.group_dims is None
    return plain and not (case.has_kl and case.free_bits is not None)


def _parts(case: Case, inputs: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    """mu, logvar, the prior's two where it is learned, and the mask."""
    tensors, weight = (inputs[:-1], inputs[-1]) if case.mask else (inputs, None)
    mu, logvar, *prior = (*tensors[0].chunk(2, 1), *tensors[1:]) if case.packed else tensors
    return mu, logvar, prior, weight


def _loss(case: Case, kl: Tensor, weight: Tensor | None) -> Tensor:
    if case.group_dims is not None:
        kl = kl.sum([axis for axis in range(case.batch_dims, kl.dim()) if axis != case.group_dims])
    rows = kl.flatten(0, case.batch_dims - 1)
    if weight is None:
        rate = rows.mean(0)
    else:
        w = weight.flatten()
        rate = (w.view(-1, *[1] * (rows.dim() - 1)) * rows).sum(0) / w.sum()
    return (rate if case.free_bits is None else rate.clamp(min=case.free_bits)).sum()


def contenders(case: Case, *, compiled: bool) -> dict[str, Layer]:
    """Who can compute the case on this machine, ours first."""
    layers = {OURS: fused(case), "eager": eager(case)}
    if compiled:
        # Every case is compiled for itself; the limit on recompilations counts those of all together.
        torch.compiler.reset()
        layers["torch.compile"] = torch.compile(eager(case), fullgraph=True, dynamic=False)
    layers["torch.distributions"] = distributions(case)
    if serves_diffusers(case) and has_diffusers():
        layers["diffusers"] = diffusers(case)
    return layers


def has_diffusers() -> bool:
    return find_spec("diffusers") is not None
