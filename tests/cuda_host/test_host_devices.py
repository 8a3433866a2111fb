"""Two devices, many streams: every launch is on the current stream of its tensors' device."""

from __future__ import annotations

import re
import threading
from functools import partial

import gpu_problems
import null_cuda
import pytest
import torch
from torch import Tensor

import vaekernels as vk

NAMES = list(gpu_problems.LATENTS)


def check_both_ways(name: str, gpu: str, stream: torch.cuda.Stream) -> None:
    latent, inputs = null_cuda.latent_on(name, torch.float32, gpu)
    with null_cuda.recording() as forward:
        outputs = gpu_problems.call(latent, inputs)
    null_cuda.assert_launched(forward, "forward", stream)
    given = [torch.empty_like(t) for t in outputs]
    with torch.cuda.stream(torch.cuda.Stream("cuda:0")):  # backward goes to the forward's stream
        backward = null_cuda.records(lambda: torch.autograd.grad(outputs, inputs, given))
    null_cuda.assert_launched(backward, "backward", stream)


@pytest.mark.parametrize("name", NAMES)
def test_the_second_device_while_the_first_is_current(name):
    check_both_ways(name, "cuda:1", torch.cuda.default_stream("cuda:1"))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_first_device_while_the_second_is_current(name):
    with torch.cuda.device(1):
        check_both_ways(name, "cuda:0", torch.cuda.default_stream("cuda:0"))
        assert torch.cuda.current_device() == 1


@pytest.mark.parametrize("gpu", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("name", NAMES)
def test_a_side_stream(name, gpu):
    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream), torch.cuda.device(0):
        check_both_ways(name, gpu, stream)


@pytest.mark.parametrize("gpu", ["cuda:0", "cuda:1"])
def test_a_stream_that_torch_did_not_make(gpu):
    stream = null_cuda.new_stream(gpu)
    with torch.cuda.stream(stream):
        check_both_ways("columns", gpu, stream)


def test_tensors_of_a_device_go_to_its_stream_when_one_of_the_other_is_current():
    first, second = torch.cuda.Stream("cuda:0"), torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(first), torch.cuda.stream(second):
        check_both_ways("columns", "cuda:0", first)
        check_both_ways("columns", "cuda:1", second)


def test_threads_have_streams_of_their_own():
    """Every thread's launches are on its stream, though all share the library's state."""
    wrong: list[object] = []
    streams = [torch.cuda.Stream(f"cuda:{i % 2}") for i in range(4)]

    def work(stream: torch.cuda.Stream) -> None:
        try:
            with torch.cuda.stream(stream):
                latent, inputs = null_cuda.latent_on("columns", torch.float32, str(stream.device))
                for _ in range(20):
                    outputs = gpu_problems.call(latent, inputs)
                    torch.autograd.grad(outputs, inputs, [torch.empty_like(t) for t in outputs])
        except Exception as error:
            wrong.append(error)

    def run() -> None:
        threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    found = null_cuda.ours(null_cuda.records(run))
    assert not wrong
    for stream in streams:
        kernels = [one for one in found if one.stream == stream.cuda_stream]
        assert len(kernels) == 40 and {one.device for one in kernels} == {stream.device_index}


def on(device: str, *shape: int) -> Tensor:
    return torch.empty(shape, device=device)


STATE = torch.tensor([1, 0])
WRONG = {
    "logvar on the other device": (
        lambda x: vk.sample_kl(x, on("cuda:1", 8, 8)),
        "mu and logvar must be on one device, got cuda:0 and cuda:1; move one, e.g. logvar.to(mu.device)",
    ),
    "logvar on the CPU": (
        lambda x: vk.reparameterize(x, on("cpu", 8, 8)),
        "mu and logvar must be on one device, got cuda:0 and cpu; move one, e.g. logvar.to(mu.device)",
    ),
    "mu on the CPU": (
        lambda x: vk.gaussian_kl(on("cpu", 8, 8), x),
        "mu and logvar must be on one device, got cpu and cuda:0; move one, e.g. logvar.to(mu.device)",
    ),
    "rng on the other device": (
        lambda x: vk.sample_kl(x, x, rng=STATE.to("cuda:1")),
        "rng must be on the tensors' device, cuda:0, got cuda:1; move it there",
    ),
    "rng on the CPU": (
        lambda x: vk.sample_kl_packed(x, rng=STATE),
        "rng must be on the tensors' device, cuda:0, got cpu; move it there",
    ),
    "weight on the other device": (
        lambda x: vk.gaussian_kl(x, x, weight=on("cuda:1", 8)),
        "weight must be on the tensors' device, cuda:0, got cuda:1; move it there",
    ),
    "weight on the CPU": (
        lambda x: vk.gaussian_kl(x, x, weight=torch.ones(8)),
        "weight must be on the tensors' device, cuda:0, got cpu; move it there",
    ),
    "free_bits on the other device": (
        lambda x: vk.gaussian_kl(x, x, free_bits=on("cuda:1", 8)),
        "free_bits must be on the tensors' device, cuda:0, got cuda:1; move it there or give a number",
    ),
    "prior on the other device": (
        lambda x: vk.gaussian_kl(x, x, on("cuda:1", 8, 8), on("cuda:1", 8, 8)),
        "prior_mu and mu must be on one device, got cuda:1 and cuda:0",
    ),
    "prior on two devices": (
        lambda x: vk.gaussian_kl(x, x, x, on("cuda:1", 8, 8)),
        "prior_mu and prior_logvar must be on one device, got cuda:0 and cuda:1; "
        "move one, e.g. prior_logvar.to(prior_mu.device)",
    ),
    "generator of the CPU": (
        lambda x: vk.reparameterize(x, x, generator=torch.Generator()),
        "generator must be on the tensors' device, cuda:0, got one on cpu; "
        "make it with torch.Generator('cuda:0')",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_device_is_named_before_anything_is_launched(name):
    call, message = WRONG[name]
    x = on("cuda:0", 8, 8)
    with null_cuda.recording() as found, pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(x)
    assert null_cuda.ours(found) == []


# By the operators themselves, which check their own arguments.
TENSORS = {
    "latent": ["first", "second", "rng", "prior_mu", "prior_logvar", "weight", "free_bits_per_group"],
    "latent_draw": ["first", "second", "prior_mu", "prior_logvar", "weight", "free_bits_per_group"],
    "latent_backward": [
        "grad_z", "grad_kl", "grad_kl_per_group", "first", "second", "rng", "prior_mu", "prior_logvar",
        "gate", "weight",
    ],
}  # fmt: skip
SHAPES = {"rng": (2,), "weight": (8,), "free_bits_per_group": (8,), "gate": (8,), "open": (0,),
          "grad_kl": (), "grad_kl_per_group": (8,)}  # fmt: skip
DTYPES = {"rng": torch.int64, "open": torch.uint8}


def operator_call(operator: str, gpu: str = "cuda:0", wrong: str | None = None, place: str = "") -> object:
    """On a device, perhaps with one argument elsewhere."""
    given: dict[str, object] = {
        name: torch.empty(
            SHAPES.get(name, (8, 8)),
            dtype=DTYPES.get(name, torch.float32),
            device=place if name == wrong else gpu,
        )
        for name in [*TENSORS[operator], *(["open"] if operator == "latent_backward" else [])]
    }
    given |= {"dim": 1, "clamp": "batch"}
    if operator == "latent_draw":
        given["generator"] = None
    if operator == "latent_backward":
        given["prior_grads"] = True
    return getattr(torch.ops.vaekernels, operator)(**given)


@pytest.mark.parametrize("place", ["cuda:1", "cpu"])
@pytest.mark.parametrize("operator, name", [(o, n) for o, names in TENSORS.items() for n in names])
def test_operators_refuse_a_wrong_device(operator, name, place):
    found = null_cuda.records(lambda: operator_call(operator))
    assert len(null_cuda.ours(found)) == 1
    with null_cuda.recording() as found, pytest.raises((ValueError, RuntimeError), match=r"device"):
        operator_call(operator, "cuda:0", name, place)
    assert null_cuda.ours(found) == []


OPERATORS = {
    **{name: partial(operator_call, name) for name in TENSORS},
    "_rng_state": lambda gpu: torch.ops.vaekernels._rng_state(on(gpu, 8)),
    "_philox_words": lambda gpu: torch.ops.vaekernels._philox_words(STATE.to(gpu), 4097),
}


@pytest.mark.parametrize("gpu, current", [("cuda:1", 0), ("cuda:0", 1)])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_change_to_their_device_themselves(name, gpu, current):
    """Backward too, which autograd calls in a thread of the device."""
    stream = torch.cuda.default_stream(gpu)
    with torch.cuda.device(current):
        OPERATORS[name](gpu)
        with null_cuda.recording() as found:
            OPERATORS[name](gpu)
        assert torch.cuda.current_device() == current
    (launch,) = null_cuda.ours(found)
    assert (launch.device, launch.stream) == (stream.device_index, stream.cuda_stream)


def test_a_gradient_on_another_device():
    x = on("cuda:0", 8, 8).requires_grad_()
    z = vk.reparameterize(x, x)
    with pytest.raises(RuntimeError, match="cuda:1"):
        torch.autograd.grad(z, x, on("cuda:1", 8, 8))
