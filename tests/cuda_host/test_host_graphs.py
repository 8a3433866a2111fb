"""Captured graphs: which launches they hold, warm-ups, captures that are given up."""

from __future__ import annotations

import gc
import threading

import gpu_problems
import null_cuda
import pytest
import torch
from torch import Tensor

import vaekernels as vk

NAMES = list(gpu_problems.LATENTS)
STATE = torch.tensor([3, 4], device="cuda")
# What one block computes it finishes itself; in these nothing is summed.
WITHOUT_SUMS = {"elementwise", "sample_alone"}


def step(latent: gpu_problems.Latent, inputs: list[Tensor], **more: object) -> list[Tensor]:
    outputs = gpu_problems.call(latent, inputs, **more)
    grads = torch.autograd.grad(outputs, inputs, [torch.empty_like(t) for t in outputs])
    # Detached: a graph of autograd that lives on would keep the stream of its capture.
    return [*(t.detach() for t in outputs), *grads]


def assert_forward_and_backward(found: list[null_cuda.Operation], name: str) -> None:
    """A forward, a kernel that finishes its sums in place of counters, a backward; nothing of torch's."""
    launches = null_cuda.ours(found)
    assert len(launches) == len(found), found
    kernels = [str(one.kernel).removesuffix("_kernel").removesuffix("_plain") for one in launches]
    complete = name in WITHOUT_SUMS or launches[0].grid[:2] == (1, 1)
    assert kernels == ["forward", *([] if complete else ["finish"]), "backward"]


@pytest.mark.parametrize("gpu", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name, gpu):
    latent, inputs = null_cuda.latent_on(name, torch.float32, gpu)
    rng = torch.tensor([3, 4], device=gpu)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(gpu)
    with null_cuda.recording() as done, torch.cuda.device(gpu), torch.cuda.graph(graph, stream=stream):
        step(latent, inputs, rng=rng)
    found = [one for one in done if one.capture]
    assert_forward_and_backward(found, name)
    assert {(one.stream, one.device) for one in found} == {(stream.cuda_stream, stream.device_index)}
    other = torch.cuda.Stream(gpu)
    with torch.cuda.stream(other):
        found = [one for one in null_cuda.records(graph.replay) if one.graph]
    assert_forward_and_backward(found, name)
    assert {(one.stream, one.device) for one in found} == {(other.cuda_stream, other.device_index)}


def test_elsewhere_a_call_is_not_captured():
    """A capture on one stream changes nothing for calls on another: they are one launch, with counters."""
    latent, inputs = null_cuda.latent_on("columns", torch.float32, "cuda")
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"), torch.cuda.stream(side):
        found = null_cuda.records(lambda: gpu_problems.call(latent, inputs, rng=STATE))
        null_cuda.assert_launched(found, "forward", side)


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_on_a_side_stream(name):
    """As the manual of torch.cuda.graph has it, with random states from the generator."""
    latent, inputs = null_cuda.latent_on(name, torch.float32, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(latent, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(latent, inputs)
    for _ in range(2):
        graph.replay()
    assert all(t.device == torch.device("cuda:0") for t in outputs)


def test_a_first_call_while_another_thread_captures():
    """What the call allocates for the stream does not break the capture, in the mode that forbids it."""
    latent, inputs = null_cuda.latent_on("columns", torch.float32, "cuda")
    stream = null_cuda.new_stream()
    with torch.cuda.stream(stream):
        held = torch.empty(1, device="cuda")  # so that torch's cache keeps 2 MiB for the stream
    graph = torch.cuda.CUDAGraph()
    wrong: list[object] = []

    def work() -> None:
        try:
            with torch.cuda.stream(stream):
                found = null_cuda.records(lambda: gpu_problems.call(latent, inputs, rng=STATE))
                assert [one.kernel for one in null_cuda.ours(found)] == ["forward_plain_kernel"]
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=work)
    with torch.cuda.graph(graph):
        gpu_problems.call(latent, inputs, rng=STATE)
        thread.start()
        thread.join()
    assert not wrong
    graph.replay()
    del held


def test_a_capture_forks_a_side_stream():
    latent, inputs = null_cuda.latent_on("columns", torch.float32, "cuda")
    inputs = [t.detach() for t in inputs]
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with null_cuda.recording() as done, torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            gpu_problems.call(latent, inputs, rng=STATE)
        gpu_problems.call(latent, inputs, rng=STATE)
        torch.cuda.current_stream().wait_stream(side)
    found = null_cuda.ours([one for one in done if one.capture])
    kernels = [str(one.kernel) for one in found]
    assert kernels == ["forward_plain_kernel", "finish_kernel"] * 2
    assert len({one.stream for one in found}) == 2 and len({one.capture for one in found}) == 1


def test_graphs_that_share_a_pool():
    latent, inputs = null_cuda.latent_on("columns", torch.float32, "cuda")
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        step(latent, inputs)
    with torch.cuda.graph(second, pool=first.pool()):
        step(latent, inputs)
    for graph in (first, second, first):
        graph.replay()


class Layer(torch.nn.Module):
    def forward(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z, kl, _ = vk.sample_kl(mu, logvar, free_bits=0.3)
        return z, kl


def test_make_graphed_callables():
    """Forward and backward in graphs of their own, after warm-ups in their pool."""
    inputs = [torch.empty(300, 96, device="cuda").requires_grad_() for _ in range(2)]
    torch.cuda.manual_seed(5)
    layer = torch.cuda.make_graphed_callables(Layer(), tuple(inputs))
    before = torch.cuda.default_generators[0].get_offset()
    with null_cuda.recording() as found:
        outputs = layer(*inputs)
    kernels = [one.kernel for one in null_cuda.ours(found)]
    assert kernels == ["forward_plain_kernel", "finish_kernel"]
    given = [torch.empty_like(t) for t in outputs]
    found = null_cuda.records(lambda: torch.autograd.grad(outputs, inputs, given))
    assert [one.kernel for one in null_cuda.ours(found)] == ["backward_plain_kernel"]
    assert torch.cuda.default_generators[0].get_offset() == before + 4


def assert_usable() -> None:
    """The library and torch after a capture that failed."""
    assert not torch.cuda.is_current_stream_capturing()
    latent, inputs = null_cuda.latent_on("columns", torch.float32, "cuda")
    null_cuda.assert_launched(
        null_cuda.records(lambda: gpu_problems.call(latent, inputs, rng=STATE)), "forward"
    )


def test_a_graph_that_is_never_replayed():
    latent, inputs = null_cuda.latent_on("columns", torch.float32, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu_problems.call(latent, inputs, rng=STATE)
    del graph
    gc.collect()
    assert_usable()


def test_an_exception_while_capturing():
    latent, inputs = null_cuda.latent_on("columns", torch.float32, "cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(KeyError), torch.cuda.graph(graph):
        gpu_problems.call(latent, inputs, rng=STATE)
        raise KeyError
    assert_usable()


def test_a_capture_that_became_invalid():
    """A call of ours in it says so, in CUDA's words, and nothing is left behind."""
    latent, inputs = null_cuda.latent_on("columns", torch.float32, "cuda")
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    try:
        with pytest.raises(RuntimeError, match="during capture"), torch.cuda.graph(graph, stream=stream):
            gpu_problems.call(latent, inputs, rng=STATE)
            with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
                stream.synchronize()
            with pytest.raises(RuntimeError, match="during capture"):
                gpu_problems.call(latent, inputs, rng=STATE)
    finally:
        # torch leaves the capture's stream the current one when the end of a capture fails.
        torch.cuda.set_stream(torch.cuda.default_stream())
    assert_usable()
