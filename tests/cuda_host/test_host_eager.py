"""Eager calls: one kernel forward and one backward, of the right shapes, on the right device and stream."""

from __future__ import annotations

from dataclasses import replace

import gpu_problems
import null_cuda
import pytest
import torch
from cases import COVERING, DTYPES, problem_of
from designs import name_of
from torch import Tensor

import vaekernels as vk
from vaekernels import _native

# Groups that interleave in memory with the axes that are summed: z and the KL are launches of their own.
INTERLEAVED = {"BD_transposed", "BTD_transposed", "NHWC_elements", "BCHW_channel_col"}


def layout(t: Tensor) -> tuple[object, ...]:
    return t.dtype, tuple(t.shape), t.stride()


def test_the_kernels_serve_two_gpus():
    assert _native.explain("cuda") is None
    assert torch.cuda.device_count() >= 2 and torch.cuda.current_device() == 0


@pytest.mark.parametrize("gpu", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("case", COVERING, ids=name_of)
def test_every_pair_of_options(case, gpu):
    """Outputs and gradients have the dtypes, shapes and strides of the CPU kernels' ones."""
    here = problem_of(case)
    there = replace(
        here,
        leaves=[null_cuda.empty_like(t, gpu) for t in here.leaves],
        rng=here.rng.to(gpu),
        objective={k: v.to(gpu) if torch.is_tensor(v) else v for k, v in here.objective.items()},
    )
    found = {}
    for problem in (here, there):
        leaves = [t.detach().requires_grad_() for t in problem.leaves]
        with null_cuda.recording() as forward:
            outputs = [t for t in problem.run(leaves) if t is not None]
        cotangents = [torch.empty_like(t) for t in outputs]
        with null_cuda.recording() as backward:
            grads = torch.autograd.grad(outputs, leaves, cotangents)
        found[problem is there] = [layout(t) for t in (*outputs, *grads)]
        if problem is there:
            assert all(t.device == torch.device(gpu) for t in (*outputs, *grads))
            stream = torch.cuda.current_stream(gpu)
            count = 2 if case["op"] == "sample_kl" and case["layout"] in INTERLEAVED else 1
            null_cuda.assert_launched(forward, "forward", stream, count)
            null_cuda.assert_launched(backward, "backward", stream, count)
        else:
            assert forward == backward == []
    assert found[True] == found[False]
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", gpu_problems.LATENTS)
def test_every_kernel(name, dtype):
    """Sizes that take many blocks; the state is drawn from the generator, in the same launch."""
    latent, inputs = null_cuda.latent_on(name, dtype, "cuda")
    gpu_problems.call(latent, inputs)  # the first call on a stream also sets its counters
    with null_cuda.recording() as found:
        outputs = gpu_problems.call(latent, inputs)
    null_cuda.assert_launched(found, "forward")
    converted = name == "weighted" and dtype == torch.float64  # the weights, which are float32
    assert len(found) == 1 + converted
    cotangents = [torch.empty_like(t) for t in outputs]
    found = null_cuda.records(lambda: torch.autograd.grad(outputs, inputs, cotangents))
    null_cuda.assert_launched(found, "backward")
    assert len(found) == 1 + converted


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 2, 3, 4), (3, 4, 0, 5)], ids=str)
def test_without_elements(shape):
    mu = torch.empty(shape, device="cuda").requires_grad_()
    outputs = vk.sample_kl(mu, mu)
    twin = torch.empty(shape).requires_grad_()
    assert [layout(t) for t in outputs] == [layout(t) for t in vk.sample_kl(twin, twin)]
    (grad,) = torch.autograd.grad(outputs.z.sum() + outputs.kl, mu)
    assert layout(grad) == layout(mu)


@pytest.mark.parametrize("shape", [(2**31 + 8,), (3, 2**30)], ids=str)
def test_more_elements_than_32_bits_count(shape):
    """Of memory that nobody touches; the grid stays within its limits, which the runtime checks."""
    mu = torch.empty(1, dtype=torch.float16, device="cuda").expand(shape)
    null_cuda.assert_launched(null_cuda.records(lambda: vk.gaussian_kl(mu, mu, group_dims=())), "forward")


def test_the_words_of_the_generator():
    rng = torch.tensor([1, 0], device="cuda")
    found = null_cuda.ours(null_cuda.records(lambda: torch.ops.vaekernels._philox_words(rng, 4097, 3)))
    assert [one.kernel for one in found] == ["words_kernel"]


def test_double_backward_is_plain_pytorch():
    mu = torch.empty(16, 8, device="cuda").requires_grad_()
    z, kl, _ = vk.sample_kl(mu, mu)
    (grad,) = torch.autograd.grad(z.sum() + kl, mu, create_graph=True)
    found = null_cuda.records(lambda: torch.autograd.grad(grad.sum(), mu))
    assert all(one.device == 0 for one in found)


def test_inference_mode_and_autocast():
    mu = torch.empty(16, 8, device="cuda")
    with torch.inference_mode():
        null_cuda.assert_launched(null_cuda.records(lambda: vk.sample_kl(mu, mu)), "forward")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = vk.sample_kl(mu, mu)
    assert out.z.dtype == out.kl.dtype == torch.float32


def test_nobody_waits():
    """Also by torch's own account, which knows of waits inside its operators."""
    mu = torch.empty(64, 32, device="cuda").requires_grad_()
    given = [torch.empty(64, 32, device="cuda"), torch.empty((), device="cuda")]
    torch.cuda.set_sync_debug_mode("error")
    try:
        z, kl, _ = vk.sample_kl(mu, mu, free_bits=0.25)
        torch.autograd.grad([z, kl], mu, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
