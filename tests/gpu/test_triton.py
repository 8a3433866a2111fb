"""The Triton version that the benchmark compares with computes what it should.

With TRITON_INTERPRET=1 on the CPU, by Triton's interpreter; else on the GPU.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

import vaekernels as vk
from vaekernels.bench.cases import Case, Problem

pytest.importorskip("triton")
import triton_latent

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = [
    Case((9, 13)),
    Case((130, 5)),
    Case((9, 40), torch.bfloat16),
    Case((6, 3, 5, 7), group_dims=1),
    Case((5, 2, 40, 30), group_dims=1),
    Case((6, 4, 3, 3), packed=True, free_bits=None),
    Case((3, 5, 8), batch_dims=2, mask=True),
    Case((10, 6), num_samples=3),
    Case((9, 13), op="reparameterize"),
    Case((9, 13), op="gaussian_kl"),
]
LARGE = [
    Case((1024, 128)),
    Case((8192, 512), torch.bfloat16),
    Case((64, 4, 64, 64), group_dims=1),
    Case((8, 16, 128, 128), torch.bfloat16, group_dims=1),
    Case((32, 4, 128, 128), packed=True, free_bits=None),
    Case((16, 64, 512), batch_dims=2, mask=True),
    Case((256, 64), num_samples=50),
    Case((32768, 512), op="reparameterize"),
]
CASES = SMALL if INTERPRETED else SMALL + LARGE


@pytest.fixture
def place(request) -> str:
    if not INTERPRETED:
        return request.getfixturevalue("cuda")
    import numpy as np

    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"numpy {np.__version__} does not take Triton's interpreter's arrays for loop bounds")
    return "cpu"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_values_and_gradients(case, place):
    problem = Problem.of(case, torch.device(place))
    layer = triton_latent.latent(case)
    outputs = layer(problem.inputs)
    leaves = [t for t in problem.inputs if t.requires_grad]
    ones = [torch.ones_like(o) for o in outputs[len(problem.grads) :]]
    grads = torch.autograd.grad(outputs, leaves, [*problem.grads, *ones])
    mu, logvar = leaves[0].detach().chunk(2, 1) if case.packed else (t.detach() for t in leaves)
    got = grads[0].chunk(2, 1) if case.packed else grads
    expected = [torch.zeros_like(t, dtype=torch.float64) for t in (mu, logvar)]
    step = torch.finfo(case.dtype).eps

    if case.has_kl:
        options = {"batch_dims": case.batch_dims, "group_dims": case.group_dims, "free_bits": case.free_bits}
        if case.mask:
            options["weight"] = problem.inputs[-1]
        twins = [t.double().requires_grad_() for t in (mu, logvar)]
        kl = vk.gaussian_kl(*twins, **options)
        torch.testing.assert_close(outputs[-1].double(), kl.detach(), rtol=2e-5, atol=1e-6)
        expected = list(torch.autograd.grad(kl, twins))
    if case.samples:
        z, g = outputs[0].detach().double(), problem.grads[0].double()
        sd = torch.exp(0.5 * logvar.double())
        eps = (z - mu.double()) / sd
        assert_standard_normal(eps)
        rows = (0,) if case.num_samples is not None else ()
        product = 0.5 * g * sd * eps
        expected[0] = expected[0] + (g.sum(rows) if rows else g)
        expected[1] = expected[1] + (product.sum(rows) if rows else product)
    # eps is read off z, which was rounded to the dtype.
    spread = step * (4 + float(expected[1].abs().max())) * math.sqrt(case.num_samples or 1) * 4
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4 * step, atol=spread + 1e-5)


def assert_standard_normal(eps: torch.Tensor) -> None:
    """Mean, variance and kurtosis within five standard errors, and no number twice in a row or column."""
    n = eps.numel()
    assert abs(float(eps.mean())) < 5 / math.sqrt(n)
    assert abs(float(eps.square().mean()) - 1) < 5 * math.sqrt(2 / n) + 1e-2
    assert abs(float(eps.pow(4).mean()) - 3) < 5 * math.sqrt(96 / n) + 5e-2
    if n <= 10**5:
        # bfloat16 rounds many to the same; more than half of them alike would be a repeated stream.
        assert len(eps.unique()) > n / 2


@pytest.mark.parametrize("case", [SMALL[0], SMALL[7]], ids=["one", "many"])
def test_each_call_draws_afresh(case, place):
    problem = Problem.of(case, torch.device(place))
    layer = triton_latent.latent(case)
    assert not torch.equal(layer(problem.inputs)[0], layer(problem.inputs)[0])


def test_what_it_does_not_have_is_refused():
    with pytest.raises(ValueError, match="learned prior"):
        triton_latent.latent(Case((4, 4), prior=True))
    with pytest.raises(ValueError, match="first latent axis"):
        triton_latent.latent(Case((4, 4, 4), group_dims=2))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("per_element, weighted", [(True, True), (False, False)])
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel", "finish_kernel"])
def test_compiles_for_hopper(kernel, per_element, weighted, dtype):
    """Down to machine code, which takes no GPU."""
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(triton_latent, kernel)
    constants = {"SAMPLE": True, "KL": True, "WEIGHTED": weighted, "PER_ELEMENT": per_element, "QUADS": 2,
                 "BLOCK": 512, "CLAMPED": True, "BLOCK_G": 32, "BLOCK_P": 128}  # fmt: skip
    pointers = {"partial", "weight", "slope", "loss", "g_kl"}
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = "*fp32"
        elif name in ("mu", "logvar", "z", "g_z", "d_mu", "d_logvar"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "fp32" if name == "free_bits" else "i32"
    source = ASTSource(function, signature, {k: v for k, v in constants.items() if k in function.arg_names})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert len(made.asm["cubin"]) > 0
    assert "__local_depot" not in made.asm["ptx"]
