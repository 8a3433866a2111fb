"""Random states: every call that draws takes 4 of its generator's offset, in graphs at each replay."""

from __future__ import annotations

import threading
from collections.abc import Callable

import null_cuda
import pytest
import torch
from torch import Tensor

import vaekernels as vk

DRAWING: dict[str, Callable[..., object]] = {
    "reparameterize": lambda x, **k: vk.reparameterize(x, x, **k),
    "reparameterize_packed": lambda x, **k: vk.reparameterize_packed(x, **k),
    "sample_kl": lambda x, **k: vk.sample_kl(x, x, **k),
    "sample_kl_packed": lambda x, **k: vk.sample_kl_packed(x, **k),
    "50 samples": lambda x, **k: vk.sample_kl(x, x, num_samples=50, **k),
    "no samples": lambda x, **k: vk.reparameterize(x, x, num_samples=0, **k),
    "many numbers": lambda x, **k: vk.reparameterize(*2 * [x.repeat(4096, 8)], **k),
    "rng_state": lambda x, **k: vk.rng_state(x, **k),
}
STATE = {"rng": torch.tensor([1, 4])}


def offset(gpu: int = 0) -> int:
    return torch.cuda.default_generators[gpu].get_offset()


@pytest.fixture
def x() -> Tensor:
    torch.cuda.manual_seed_all(11)
    return torch.empty(64, 32, device="cuda:0")


@pytest.mark.parametrize("name", DRAWING)
def test_a_call_takes_four(name, x):
    for i in range(1, 4):
        DRAWING[name](x)
        assert (offset(0), offset(1)) == (4 * i, 0)


@pytest.mark.parametrize("name", DRAWING)
def test_the_generator_is_that_of_the_tensors_device(name, x):
    DRAWING[name](x.to("cuda:1"))
    assert (offset(0), offset(1)) == (0, 4)


@pytest.mark.parametrize("name", DRAWING)
def test_a_generator_of_ones_own(name, x):
    generator = torch.Generator("cuda").manual_seed(77)
    generator.set_offset(400)
    DRAWING[name](x, generator=generator)
    assert (generator.get_offset(), generator.initial_seed(), offset()) == (404, 77, 0)


@pytest.mark.parametrize("name", [name for name in DRAWING if name != "rng_state"])
def test_a_state_that_is_given_takes_nothing(name, x):
    DRAWING[name](x, rng=STATE["rng"].to("cuda"))
    assert (offset(0), offset(1)) == (0, 0)


def test_a_kl_and_a_backward_take_nothing(x):
    vk.gaussian_kl(x, x)
    x.requires_grad_()
    z, kl, _ = vk.sample_kl(x, x)
    assert offset() == 4
    torch.autograd.grad(z.sum() + kl, x)
    assert offset() == 4


def test_a_state_is_restored(x):
    vk.reparameterize(x, x)
    state = torch.cuda.get_rng_state()
    vk.reparameterize(x, x)
    torch.cuda.set_rng_state(state)
    assert offset() == 4
    with torch.random.fork_rng(devices=[0]):
        vk.reparameterize(x, x)
    assert offset() == 4


def test_threads_share_a_generator_without_a_loss(x):
    def work() -> None:
        for _ in range(200):
            vk.reparameterize(x, x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert offset() == 4 * 4 * 200


# ---- graphs ----------------------------------------------------------------------------------------------


def test_a_replay_takes_what_its_calls_take(x):
    """And a capture itself takes nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in DRAWING.values():
            call(x)
    assert offset() == 0
    for i in range(1, 4):
        graph.replay()
        assert offset() == 4 * len(DRAWING) * i
    vk.reparameterize(x, x)
    assert offset() == 4 * len(DRAWING) * 3 + 4


def test_a_captured_draw_is_one_launch(x):
    """Which reads the state where torch keeps it for the graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        vk.reparameterize(x, x)
    found = null_cuda.ours(null_cuda.records(graph.replay))
    assert [one.kernel for one in found] == ["forward_plain_kernel"]


def test_a_registered_generator(x):
    generator = torch.Generator("cuda").manual_seed(42)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        vk.sample_kl(x, x, generator=generator)
    for i in range(1, 4):
        graph.replay()
        assert (generator.get_offset(), offset()) == (4 * i, 0)


def test_a_generator_that_is_first_used_in_a_capture(x):
    """torch registers it, from 2.14 on."""
    generator = torch.Generator("cuda").manual_seed(42)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        vk.sample_kl(x, x, generator=generator)
    assert generator.get_offset() == 0
    graph.replay()
    assert generator.get_offset() == 4


def test_graph_safe_states(x):
    """What activation checkpointing and AOTAutograd save and set: a handle, not a copy."""
    generator = torch.cuda.default_generators[0]
    first = generator.graphsafe_get_state()
    second = generator.clone_state()
    generator.graphsafe_set_state(second)
    vk.reparameterize(x, x)
    assert offset() == 4
    generator.graphsafe_set_state(first)
    assert offset() == 0
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(second)
    with torch.cuda.graph(graph):
        vk.reparameterize(x, x)
        generator.graphsafe_set_state(second)
        vk.reparameterize(x, x)
        vk.reparameterize(x, x)
        generator.graphsafe_set_state(first)
    graph.replay()
    assert (first.get_offset(), second.get_offset(), offset()) == (4, 4 + 8, 4)
