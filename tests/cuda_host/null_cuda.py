"""What the null CUDA runtime (runtime.cpp) recorded. A module that imports this is skipped where that runtime
is not loaded: `make test-cuda-host` loads it.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import gpu_problems
import libraries
import torch
from torch import Tensor

_PROCESS = ctypes.CDLL(None)
if not hasattr(_PROCESS, "null_cuda_records"):
    libraries.skip("tests/cuda_host", "no null CUDA runtime is loaded; `make test-cuda-host` loads it")
_PROCESS.null_cuda_records.restype = ctypes.c_char_p

# Threads of a block that a kernel is compiled for.
MOST_THREADS = {
    "forward_kernel": 256,
    "backward_kernel": 256,
    "forward_plain_kernel": 512,
    "backward_plain_kernel": 512,
    "finish_kernel": 1024,
    "words_kernel": 256,
    "write_state_kernel": 1,
}


@dataclass(frozen=True)
class Operation:
    """What a stream was given, or what the host waited for ("wait"). A graph's number is 0 but in its replay,
    a capture's but while capturing."""

    kind: str  # "kernel", "copy", "set", "wait"
    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    device: int
    stream: int
    capture: int
    graph: int

    @property
    def kernel(self) -> str | None:
        """The name of a kernel of ours, without namespaces and template arguments."""
        found = re.search(r"\bvk::cuda::(?:\(anonymous namespace\)::)?(\w+)", self.name)
        return found[1] if found and self.kind == "kernel" else None


@contextmanager
def recording() -> Iterator[list[Operation]]:
    """The list holds, in the end, everything that was done meanwhile."""
    found: list[Operation] = []
    _PROCESS.null_cuda_clear()
    yield found
    for one in json.loads(_PROCESS.null_cuda_records()):
        found.append(Operation(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}))


def records(function: Callable[[], object]) -> list[Operation]:
    """Everything that a call did."""
    with recording() as found:
        function()
    return found


def ours(found: list[Operation]) -> list[Operation]:
    """The launches of our kernels, after a look at their blocks."""
    launches = [one for one in found if one.kernel is not None]
    for one in launches:
        assert one.kernel is not None
        assert one.block[1:] == (1, 1) and one.block[0] <= MOST_THREADS[one.kernel], one
        assert one.kernel == "write_state_kernel" or one.block[0] % 32 == 0, one
    return launches


def assert_launched(
    found: list[Operation], kind: str, stream: torch.cuda.Stream | None = None, count: int = 1
) -> None:
    """So many kernels of ours, "forward" or "backward", on the stream (None: the current one) and its device.
    The host waits for nothing, and nothing is copied; the first call on a stream sets its counters."""
    stream = stream or torch.cuda.current_stream()
    launches = ours(found)
    assert len(launches) == count, launches
    assert [one.kind for one in found].count("set") <= (kind == "forward"), found
    assert {one.kernel for one in launches} <= {f"{kind}_kernel", f"{kind}_plain_kernel"}, launches
    for one in found:
        assert one.kind in ("kernel", "set"), one
        assert (one.stream, one.device) == (stream.cuda_stream, stream.device_index), one
        assert (one.capture, one.graph) == (0, 0), one


def new_stream(gpu: str = "cuda:0") -> torch.cuda.Stream:
    """One that nobody has used before, as torch's own streams, 32 in turn, may have been. Never destroyed."""
    handle = ctypes.c_void_p()
    with torch.cuda.device(gpu):
        assert _PROCESS.cudaStreamCreateWithFlags(ctypes.byref(handle), 1) == 0
    return torch.cuda.ExternalStream(handle.value, device=gpu)


def take_all_memory(gpu: str, cached_for: torch.cuda.Stream) -> ctypes.c_void_p:
    """All of a device, but for 2 MiB that torch's cache has for small tensors on a stream. To be freed."""
    with torch.cuda.device(gpu), torch.cuda.stream(cached_for):
        torch.empty(1, device=gpu)
        memory, (unused, _) = ctypes.c_void_p(), torch.cuda.mem_get_info(gpu)
        assert _PROCESS.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(unused)) == 0
    return memory


def free(memory: ctypes.c_void_p) -> None:
    assert _PROCESS.cudaFree(memory) == 0


def empty_like(t: Tensor, device: str) -> Tensor:
    """Uninitialized, with the strides and the offset of `t`, even where it has gaps or overlaps itself."""
    room = t.untyped_storage().nbytes() // t.element_size()
    memory = torch.empty(room, dtype=t.dtype, device=device)
    view = memory.as_strided(t.shape, t.stride(), t.storage_offset())
    return view.detach().requires_grad_(t.requires_grad)


def latent_on(name: str, dtype: torch.dtype, device: str) -> tuple[gpu_problems.Latent, list[Tensor]]:
    latent = gpu_problems.on(gpu_problems.LATENTS[name], device)
    return latent, gpu_problems.tensors(latent, dtype, device)
