"""What is kept for backward: inputs, 16 bytes of state, G numbers, a bit per (b, g) for clamp="sample"."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import require_kernels

import vaekernels as vk

OPTIONS = {
    "plain": ({}, lambda b, g: 1),
    "batch": ({"free_bits": 0.3}, lambda b, g: g),
    "batch_tensor": ({"free_bits": "tensor"}, lambda b, g: g),
    "sample": ({"free_bits": 0.3, "clamp": "sample"}, lambda b, g: 1),
    "rows": ({"free_bits": 0.3, "clamp": "sample", "reduction": "none"}, lambda b, g: 1),
    "elementwise": ({"reduction": "elementwise"}, lambda b, g: 1),
    "weighted": ({"free_bits": 0.3, "weight": "tensor"}, lambda b, g: g),
}
LAYOUTS = {"BD": ((37, 21), None), "channels": ((6, 5, 7, 3), 1), "whole": ((6, 5, 7, 3), ())}


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_bytes_saved_for_backward(name, layout, dtype, prior, packed, device):
    require_kernels(device)
    shape, group_dims = LAYOUTS[layout]
    rows = shape[0]
    groups = math.prod(shape[1:]) if group_dims is None else math.prod(shape[d] for d in [group_dims] if d)
    options, numbers = OPTIONS[name]
    options = dict(options)
    if options.get("free_bits") == "tensor":
        group_shape = {"BD": (21,), "channels": (5,), "whole": ()}[layout]
        options["free_bits"] = torch.full(group_shape, 0.3, device=device)
    if "weight" in options:
        options["weight"] = torch.ones(rows, device=device)
    leaves = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(4 if prior else 2)]
    inputs = list(leaves)
    if packed:
        inputs[:2] = [torch.cat([leaves[0], leaves[1]], 1).detach().requires_grad_()]
    saved: list[torch.Tensor] = []
    function = vk.sample_kl_packed if packed else vk.sample_kl
    arguments = [inputs[0], 1, *inputs[1:]] if packed else inputs
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = function(*arguments, group_dims=group_dims, **options)
    assert out.z.requires_grad and saved
    known = {
        x.untyped_storage().data_ptr()
        for x in [*inputs, *(v for v in options.values() if torch.is_tensor(v))]
    }
    extra = {x.untyped_storage().data_ptr(): x for x in saved if x.untyped_storage().data_ptr() not in known}
    kept = sum(x.untyped_storage().nbytes() for x in extra.values())
    allowed = 16 + numbers(rows, groups) * (8 if dtype == torch.float64 else 4)
    if options.get("clamp") == "sample":
        allowed += (rows * groups + 7) // 8
    assert kept <= allowed, {tuple(x.shape): x.dtype for x in extra.values()}
    # nothing that is returned keeps z alive for backward
    assert not any(x.untyped_storage().data_ptr() == out.z.untyped_storage().data_ptr() for x in saved)


def test_the_sample_alone_keeps_the_inputs_and_the_state(device):
    require_kernels(device)
    mu, logvar = (torch.randn(37, 21, device=device, requires_grad=True) for _ in range(2))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        vk.reparameterize(mu, logvar)
    known = {mu.data_ptr(), logvar.data_ptr()}
    assert sum(x.untyped_storage().nbytes() for x in saved if x.data_ptr() not in known) == 16


def test_nothing_is_saved_without_gradients(device, backend):
    mu = torch.randn(37, 21, device=device)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        vk.sample_kl(mu, mu, free_bits=0.3)
    assert saved == []


def _in_huge_pages(t):
    """Whether the kernel was asked for huge pages at the middle of t's memory."""
    middle = t.data_ptr() + t.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="no transparent huge pages here",
)
def test_large_results_are_in_huge_pages():
    require_kernels("cpu")
    mu, logvar = torch.zeros(2**12, 2**11), torch.zeros(2**12, 2**11)
    z = vk.reparameterize(mu.requires_grad_(), logvar.requires_grad_())
    (grad,) = torch.autograd.grad(vk.gaussian_kl(mu, logvar), logvar)
    moments = torch.zeros(2, 2**12, 2**11, requires_grad=True)
    (packed,) = torch.autograd.grad(vk.gaussian_kl_packed(moments, dim=0), moments)
    assert [_in_huge_pages(t) for t in (z.detach(), grad, packed)] == [True] * 3
