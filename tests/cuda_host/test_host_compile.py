"""torch.compile: which launches the compiled code makes, with CUDA graphs and without, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable

import null_cuda
import pytest
import torch
from torch import Tensor

import vaekernels as vk

SHAPE = (300, 96)


def loss(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    """With kernels of Inductor's before and behind ours."""
    z, kl, rate = vk.sample_kl(2 * mu, logvar + 1, free_bits=0.25)
    return z.square().sum() + kl, rate.detach()


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "sample_kl": lambda mu, logvar: vk.sample_kl(mu, logvar, free_bits=0.25)[:2],
    "sample_kl, clamp=sample": lambda mu, logvar: vk.sample_kl(mu, logvar, free_bits=0.25, clamp="sample"),
    "gaussian_kl": lambda mu, logvar: (vk.gaussian_kl(mu, logvar, free_bits=0.25),),
    "reparameterize": lambda mu, logvar: (vk.reparameterize(mu, logvar),),
    "sample_kl_packed": lambda mu, logvar: vk.sample_kl_packed(mu, free_bits=0.25)[:2],
    "loss": loss,
}
DRAWING = [name for name in FUNCTIONS if name != "gaussian_kl"]
MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.cuda.manual_seed(11)
    yield
    torch._dynamo.reset()


def inputs(gpu: str = "cuda:0") -> list[Tensor]:
    return [torch.empty(SHAPE, device=gpu).requires_grad_() for _ in range(2)]


def shapes(tensors: list[Tensor]) -> list[object]:
    return [(t.shape, t.dtype, t.stride(), t.device) for t in tensors]


def forward_and_backward(function: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> list[Tensor]:
    outputs = list(function(*leaves))
    differentiable = [t for t in outputs if t.requires_grad]
    given = [torch.empty_like(t) for t in differentiable]
    grads = torch.autograd.grad(differentiable, leaves, given, allow_unused=True)
    return [*outputs, *(t for t in grads if t is not None)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_and_backward(name, mode):
    """Warm-up, capture and replays, each with the shapes of an eager call and 4 of the generator's offset."""
    function = FUNCTIONS[name]
    expected = shapes(forward_and_backward(function, inputs()))
    compiled = torch.compile(function, fullgraph=True, mode=mode)
    generator = torch.cuda.default_generators[0]
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        leaves, before = inputs(), generator.get_offset()
        with null_cuda.recording() as found:
            forward_and_backward(compiled, leaves)
        assert generator.get_offset() - before == (4 if name in DRAWING else 0)
    launches = null_cuda.ours(found)
    graphs = mode in ("reduce-overhead", "max-autotune")
    assert {one.graph != 0 for one in launches} == {graphs}
    kernels = [str(one.kernel) for one in launches]
    assert sum("forward" in kernel for kernel in kernels) == 1
    assert sum("backward" in kernel for kernel in kernels) == 1
    others = {kernel for kernel in kernels if "forward" not in kernel and "backward" not in kernel}
    # While compiling, drawing the state is an operator of its own.
    assert others <= {"write_state_kernel", *(["finish_kernel"] if graphs else [])}
    assert ("write_state_kernel" in others) == (name in DRAWING)
    assert {one.kind for one in found} <= {"kernel", "copy"}  # graphs copy what lies elsewhere each time
    torch.compiler.cudagraph_mark_step_begin()
    assert shapes(forward_and_backward(compiled, inputs())) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_gradients(name, mode):
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            found = null_cuda.ours(null_cuda.records(lambda: compiled(*inputs())))
    assert sum("forward" in str(one.kernel) for one in found) == 1


def test_the_second_device():
    compiled = torch.compile(FUNCTIONS["sample_kl"], fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = null_cuda.ours(null_cuda.records(lambda: forward_and_backward(compiled, inputs("cuda:1"))))
    assert {one.device for one in found} == {1} and torch.cuda.current_device() == 0


def test_sizes_that_change():
    compiled = torch.compile(FUNCTIONS["sample_kl"], fullgraph=True, dynamic=True)
    for rows in (300, 48, 7):
        mu = torch.empty(rows, 96, device="cuda").requires_grad_()
        assert forward_and_backward(compiled, [mu, mu])[0].shape == (rows, 96)
