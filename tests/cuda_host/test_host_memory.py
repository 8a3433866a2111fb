"""No tensor of ours outlives a call: not in torch's cache, in a graph's pool or in a user's one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import gpu_problems
import null_cuda
import pytest
import torch
from torch import Tensor

import vaekernels as vk

NAMES = list(gpu_problems.LATENTS)


@pytest.fixture(autouse=True)
def backward_in_this_thread():
    """A thread of autograd's lets go of what it held a moment after the backward."""
    with torch.autograd.set_multithreading_enabled(False):
        yield


def step(latent: gpu_problems.Latent, inputs: list[Tensor], **more: object) -> None:
    """Forward and backward; nothing is kept."""
    outputs = gpu_problems.call(latent, inputs, **more)
    torch.autograd.grad(outputs, inputs, [torch.empty_like(t) for t in outputs])


def kept(function: Callable[[], object], gpu: int = 0) -> int:
    """Bytes on the device that live on after a call."""
    before = torch.cuda.memory_allocated(gpu)
    function()
    return torch.cuda.memory_allocated(gpu) - before


@pytest.mark.parametrize("gpu", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("name", NAMES)
def test_the_first_call_of_a_stream_keeps_nothing(name, gpu):
    latent, inputs = null_cuda.latent_on(name, torch.float32, gpu)
    with torch.cuda.stream(null_cuda.new_stream(gpu)):
        assert kept(lambda: step(latent, inputs), torch.device(gpu).index) == 0


def test_a_thousand_streams_keep_nothing():
    """However many there are, a call keeps to its stream and needs at most three launches."""
    runtime = ctypes.CDLL(None)
    latent, inputs = null_cuda.latent_on("columns", torch.float32, "cuda")
    handles = [ctypes.c_void_p() for _ in range(1000)]

    def calls() -> None:
        for handle in handles:
            assert runtime.cudaStreamCreateWithFlags(ctypes.byref(handle), 1) == 0
            with torch.cuda.stream(torch.cuda.ExternalStream(handle.value)):
                found = null_cuda.ours(null_cuda.records(lambda: gpu_problems.call(latent, inputs)))
            assert 1 <= len(found) <= 3
            assert {one.stream for one in found} == {handle.value}

    try:
        assert kept(calls) == 0
    finally:
        for handle in handles:
            assert runtime.cudaStreamDestroy(handle) == 0


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_in_a_users_pool(name):
    latent, inputs = null_cuda.latent_on(name, torch.float32, "cuda")
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool), torch.cuda.stream(null_cuda.new_stream()):
        step(latent, inputs)
    active = [segment["active_size"] for segment in pool.snapshot()]
    assert active and sum(active) == 0


def test_a_first_call_where_the_device_has_no_memory_left():
    """What torch has cached serves the outputs. The sums are finished by a kernel, as in a capture, and by
    counters as soon as there is memory for them."""
    latent, inputs = null_cuda.latent_on("columns", torch.float32, "cuda:1")
    stream = null_cuda.new_stream("cuda:1")
    rest = null_cuda.take_all_memory("cuda:1", cached_for=stream)
    with torch.cuda.stream(stream):
        found = null_cuda.ours(null_cuda.records(lambda: gpu_problems.call(latent, inputs)))
        assert [one.kernel for one in found] == ["forward_plain_kernel", "finish_kernel"]
        null_cuda.free(rest)
        gpu_problems.call(latent, inputs)
        found = null_cuda.records(lambda: gpu_problems.call(latent, inputs))
        null_cuda.assert_launched(found, "forward")


def test_outputs_are_in_the_pool_they_are_asked_of():
    mu = torch.empty(64, 32, device="cuda")
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        z, kl, rate = vk.sample_kl(mu, mu)
    segments = [(s["address"], s["address"] + s["total_size"]) for s in pool.snapshot()]
    for t in (z, kl, rate):
        assert any(first <= t.data_ptr() < end for first, end in segments)
    assert sum(s["active_size"] for s in pool.snapshot()) > 0
    del z, kl, rate, t


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_in_the_pool_of_a_graph(name):
    """By the warm-up in it, as of torch.compile(mode="reduce-overhead"), and by the capture."""
    latent, inputs = null_cuda.latent_on(name, torch.float32, "cuda")
    stream, pool = null_cuda.new_stream(), torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream):
        torch._C._cuda_beginAllocateCurrentStreamToPool(0, pool)
        step(latent, inputs)
        torch._C._cuda_endAllocateToPool(0, pool)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        step(latent, inputs)
    active = [segment["active_size"] for segment in torch.cuda.memory_snapshot(pool)]
    assert active and sum(active) == 0
    graph.replay()
    torch._C._cuda_releasePool(0, pool)
