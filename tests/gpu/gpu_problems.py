"""Latent layers that reach every kernel, and what they give on a device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import vaekernels as vk

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@dataclass(frozen=True)
class Latent:
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    prior: bool = False
    channels_last: bool = False
    op: str = "sample_kl"


# Named for the kernels of csrc/cuda: columns have one element per group and row, rows have many.
LATENTS = {
    "small": Latent((5, 7), {"free_bits": 0.3}),
    "columns": Latent((300, 96), {"free_bits": 0.3}),
    "columns_odd": Latent((257, 33), {"free_bits": 0.3}),
    "many_tiles": Latent((9, 5000), {"free_bits": 0.3}),
    "rows": Latent((7, 6, 30, 30), {"group_dims": 1, "free_bits": 100.0}),
    "rows_odd": Latent((3, 5, 701), {"group_dims": 1, "free_bits": 100.0}),
    "whole": Latent((5, 9001), {"group_dims": (), "free_bits": 1.0}),
    "cells": Latent((70, 24), {"free_bits": 0.3, "clamp": "sample"}),
    "row_sets": Latent((9, 3, 500), {"group_dims": 1, "free_bits": 100.0, "clamp": "sample"}),
    "row_cells": Latent((9, 160, 40), {"group_dims": 1, "free_bits": 15.0, "clamp": "sample"}),
    "row_values": Latent((5, 200, 40), {"group_dims": 1, "reduction": "none"}),
    "per_row": Latent((40, 50), {"reduction": "none"}),
    "elementwise": Latent((40, 50), {"reduction": "elementwise"}),
    "channels_last": Latent((6, 8, 15, 15), {"group_dims": 1, "free_bits": 50.0}, channels_last=True),
    "packed": Latent((6, 4, 16, 16), {"free_bits": 0.3}, packed=True),
    "packed_odd": Latent((6, 3, 5, 7), {"group_dims": 1, "free_bits": 10.0}, packed=True),
    "samples": Latent((30, 20), {"num_samples": 5, "free_bits": 0.3}),
    "prior": Latent((130, 40), {"free_bits": 0.3, "balance": 0.8}, prior=True),
    "weighted": Latent((200, 20), {"weight": torch.linspace(0, 2, 200), "free_bits": 0.3}),
    "bounded": Latent((60, 20), {"logvar_bounds": (-1.0, 0.5), "parameterization": "log_std"}),
    "sample_alone": Latent((1000, 33), op="reparameterize"),
    "kl_alone": Latent((1000, 33), {"free_bits": 0.3}, op="gaussian_kl"),
}


def tensors(latent: Latent, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The op's tensor arguments: drawn on the CPU and copied, so that no other kernel runs."""
    draw = torch.Generator().manual_seed(1)
    shape = list(latent.shape)
    shape[1] *= 2 if latent.packed else 1
    count = 1 if latent.packed else 2
    found = [0.7 * torch.randn(shape, generator=draw) for _ in range(count)]
    found += [0.7 * torch.randn(latent.shape, generator=draw) for _ in range(2 if latent.prior else 0)]
    if latent.channels_last:
        found = [t.contiguous(memory_format=torch.channels_last) for t in found]
    return [t.to(dtype).to(device).requires_grad_() for t in found]


def on(latent: Latent, device: str) -> Latent:
    """With its options on the device, once: a copy to the GPU cannot be captured."""
    return replace(
        latent, options={k: v.to(device) if torch.is_tensor(v) else v for k, v in latent.options.items()}
    )


def call(latent: Latent, inputs: list[Tensor], **more: Any) -> list[Tensor]:
    """The outputs of the op, those that it has of z, kl and the rate."""
    options = latent.options | more
    function = getattr(vk, latent.op + ("_packed" if latent.packed else ""))
    given = [inputs[0], 1, *inputs[1:]] if latent.packed else inputs
    if latent.op == "gaussian_kl":
        options.pop("rng", None)
        return list(function(*given, return_per_group=True, **options))
    out = function(*given, **options)
    return [out] if latent.op == "reparameterize" else list(out)


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """With the strides of the outputs: others would be copied first, by a kernel of torch's."""
    draw = torch.Generator().manual_seed(2)
    found = []
    for output in outputs:
        like = torch.empty_strided(output.shape, output.stride(), dtype=output.dtype)
        found.append(like.copy_(torch.randn(output.shape, generator=draw)).to(output.device))
    return found


def run(latent: Latent, dtype: torch.dtype, device: str, rng: Tensor) -> list[Tensor]:
    """Outputs and gradients, on the CPU."""
    latent, inputs = on(latent, device), tensors(latent, dtype, device)
    outputs = call(latent, inputs, rng=rng.to(device))
    grads = torch.autograd.grad(outputs, inputs, cotangents(outputs))
    return [t.detach().cpu() for t in (*outputs, *grads)]


def assert_same(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Up to the order of additions, and normals that agree within 1e-5."""
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 2e-2}[dtype]
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = float(b.double().abs().max().clamp(min=1))
        torch.testing.assert_close(
            a,
            b,
            rtol=tolerance,
            atol=tolerance * scale,
            equal_nan=True,
            msg=lambda m, i=i: f"result {i}: {m}",
        )
