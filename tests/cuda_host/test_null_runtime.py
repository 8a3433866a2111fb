"""The null CUDA runtime itself: it refuses what CUDA refuses, so that the tests on it can fail."""

from __future__ import annotations

import ctypes

import null_cuda
import pytest
import torch

CUDA = ctypes.CDLL(None)
INVALID_VALUE, INVALID_CONFIGURATION, INVALID_RESOURCE = 1, 9, 400
UNSUPPORTED, INVALIDATED, ISOLATION = 900, 901, 905


@pytest.fixture
def kernel() -> ctypes.c_void_p:
    """A kernel without code."""
    function = ctypes.c_void_p()
    assert CUDA.cuModuleGetFunction(ctypes.byref(function), None, b"_ZN2vk4cuda15backward_kernelEv") == 0
    yield function
    CUDA.cudaGetLastError()


def launch(
    kernel: ctypes.c_void_p, grid: int, block: int, shared: int = 0, stream: int = 0, grid_y: int = 1
) -> int:
    sizes = (grid, grid_y, 1, block, 1, 1, shared)
    return CUDA.cuLaunchKernel(kernel, *sizes, ctypes.c_void_p(stream), None, None)


def test_a_launch_is_recorded(kernel):
    stream = null_cuda.new_stream("cuda:1")
    with torch.cuda.device(1):
        found = null_cuda.records(lambda: launch(kernel, 3, 64, 128, stream.cuda_stream))
    expected = null_cuda.Operation(
        "kernel", "vk::cuda::backward_kernel()", (3, 1, 1), (64, 1, 1), 128, 1, stream.cuda_stream, 0, 0
    )
    assert found == [expected] and found[0].kernel == "backward_kernel"


@pytest.mark.parametrize(
    "sizes",
    [(0, 32), (1, 0), (1, 1025), (1, 32, 48 * 1024 + 1), (1, 32, 0, 0, 65536)],
    ids=str,
)
def test_a_launch_beyond_the_limits(kernel, sizes):
    found = null_cuda.records(lambda: launch(kernel, *sizes))
    assert found == [] and CUDA.cudaGetLastError() == INVALID_CONFIGURATION
    assert launch(kernel, 1, 1024, 48 * 1024, 0, 65535) == 0


def test_a_launch_on_a_stream_of_another_device(kernel):
    stream = null_cuda.new_stream("cuda:1")
    assert launch(kernel, 1, 32, 0, stream.cuda_stream) == INVALID_RESOURCE


def test_a_launch_on_a_stream_that_was_destroyed(kernel):
    handle = ctypes.c_void_p()
    assert CUDA.cudaStreamCreateWithFlags(ctypes.byref(handle), 1) == 0
    assert launch(kernel, 1, 32, 0, handle.value) == 0
    assert CUDA.cudaStreamDestroy(handle) == 0
    assert launch(kernel, 1, 32, 0, handle.value) == INVALID_RESOURCE


def forbidden(stream: torch.cuda.Stream, name: str) -> int:
    pointer = ctypes.c_void_p()
    event = ctypes.c_void_p()
    assert CUDA.cudaEventCreateWithFlags(ctypes.byref(event), 0) == 0
    handle = ctypes.c_void_p(stream.cuda_stream)
    if name == "cudaStreamWaitEvent":  # for an event from outside
        assert CUDA.cudaEventRecord(event, None) == 0
    calls = {
        "cudaMalloc": lambda: CUDA.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(512)),
        "cudaFree": lambda: CUDA.cudaFree(pointer),
        "cudaMemcpy": lambda: CUDA.cudaMemcpy(None, None, ctypes.c_size_t(0), 0),
        "cudaStreamSynchronize": lambda: CUDA.cudaStreamSynchronize(handle),
        "cudaStreamQuery": lambda: CUDA.cudaStreamQuery(handle),
        "cudaDeviceSynchronize": lambda: CUDA.cudaDeviceSynchronize(),
        "cudaStreamWaitEvent": lambda: CUDA.cudaStreamWaitEvent(handle, event, 0),
    }
    return calls[name]()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cudaMalloc", UNSUPPORTED),
        ("cudaFree", UNSUPPORTED),
        ("cudaMemcpy", UNSUPPORTED),
        ("cudaStreamSynchronize", UNSUPPORTED),
        ("cudaStreamQuery", UNSUPPORTED),
        ("cudaDeviceSynchronize", UNSUPPORTED),
        ("cudaStreamWaitEvent", ISOLATION),
    ],
)
def test_what_a_capture_forbids_makes_it_invalid(name, expected):
    stream = null_cuda.new_stream()
    handle, graph, status = ctypes.c_void_p(stream.cuda_stream), ctypes.c_void_p(), ctypes.c_int()
    assert CUDA.cudaStreamBeginCapture(handle, 0) == 0
    assert forbidden(stream, name) == expected
    assert CUDA.cudaStreamIsCapturing(handle, ctypes.byref(status)) == 0 and status.value == 2
    assert CUDA.cudaStreamEndCapture(handle, ctypes.byref(graph)) == INVALIDATED and graph.value is None
    assert CUDA.cudaGetLastError() == INVALIDATED
    assert CUDA.cudaStreamIsCapturing(handle, ctypes.byref(status)) == 0 and status.value == 0


def test_a_captured_launch_is_made_by_the_replay(kernel):
    stream, other = null_cuda.new_stream(), null_cuda.new_stream()
    handle, graph, executable = (
        ctypes.c_void_p(stream.cuda_stream),
        ctypes.c_void_p(),
        ctypes.c_void_p(),
    )
    assert CUDA.cudaStreamBeginCapture(handle, 0) == 0
    (captured,) = null_cuda.records(lambda: launch(kernel, 2, 32, 0, stream.cuda_stream))
    assert captured.capture != 0 and captured.graph == 0
    assert CUDA.cudaStreamEndCapture(handle, ctypes.byref(graph)) == 0
    assert CUDA.cudaGraphInstantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)) == 0
    on = ctypes.c_void_p(other.cuda_stream)
    (replayed,) = null_cuda.records(lambda: CUDA.cudaGraphLaunch(executable, on))
    assert replayed.capture == 0 and replayed.graph != 0
    assert (replayed.stream, replayed.grid) == (other.cuda_stream, (2, 1, 1))


@pytest.mark.parametrize("gpu", ["cuda:0", "cuda:1"])
def test_memory_keeps_what_is_copied_to_it(gpu):
    numbers = torch.arange(1000)
    there = numbers.to(gpu)
    assert there.device == torch.device(gpu)
    assert torch.equal(there.cpu(), numbers)
    found = null_cuda.records(lambda: there.to("cuda:0" if gpu == "cuda:1" else "cuda:1"))
    assert "copy" in {one.kind for one in found}


def test_a_wait_is_recorded():
    found = null_cuda.records(torch.cuda.synchronize)
    assert [(one.kind, one.name) for one in found] == [("wait", "cudaDeviceSynchronize")]
    found = null_cuda.records(lambda: torch.empty((), device="cuda").item())
    assert "wait" in {one.kind for one in found}


def test_memory_ends():
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(9 * 2**30, dtype=torch.uint8, device="cuda")
