"""Numbers and arrays of NumPy are taken where torch's own functions take them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vaekernels as vk
from vaekernels import schedules
from vaekernels.collapse import CollapseMonitor
from vaekernels.distributions import DiagonalGaussian
from vaekernels.nn import GaussianLatent

M = torch.linspace(-1, 1, 32).view(8, 4)
RNG = torch.tensor([3, 4])
three, two, one = np.int64(3), np.int32(2), np.uint8(1)
FLOORS = np.linspace(0, 0.2, 4, dtype=np.float32)

# name: (the call with NumPy's numbers, the same with Python's)
SAME = {
    "num_samples": (
        lambda: vk.reparameterize(M, M, num_samples=two, rng=RNG),
        lambda: vk.reparameterize(M, M, num_samples=2, rng=RNG),
    ),
    "batch_dims": (
        lambda: vk.gaussian_kl(M, M, batch_dims=two, reduction="none"),
        lambda: vk.gaussian_kl(M, M, batch_dims=2, reduction="none"),
    ),
    "group_dims": (lambda: vk.gaussian_kl(M, M, group_dims=one), lambda: vk.gaussian_kl(M, M, group_dims=1)),
    "group_dims in a tuple": (
        lambda: vk.gaussian_kl(M, M, group_dims=(one,), free_bits=0.3),
        lambda: vk.gaussian_kl(M, M, group_dims=(1,), free_bits=0.3),
    ),
    "dim": (lambda: vk.gaussian_kl_packed(M, one), lambda: vk.gaussian_kl_packed(M, 1)),
    "free_bits": (
        lambda: vk.gaussian_kl(M, M, free_bits=np.float64(0.25)),
        lambda: vk.gaussian_kl(M, M, free_bits=0.25),
    ),
    "free_bits, float32": (
        lambda: vk.gaussian_kl(M, M, free_bits=np.float32(0.25)),
        lambda: vk.gaussian_kl(M, M, free_bits=0.25),
    ),
    "free_bits, an array": (
        lambda: vk.gaussian_kl(M, M, free_bits=FLOORS),
        lambda: vk.gaussian_kl(M, M, free_bits=torch.tensor(FLOORS)),
    ),
    "logvar_bounds": (
        lambda: vk.gaussian_kl(M, M, logvar_bounds=(np.float32(-0.5), np.float32(0.5))),
        lambda: vk.gaussian_kl(M, M, logvar_bounds=(-0.5, 0.5)),
    ),
    "balance": (
        lambda: vk.gaussian_kl(M, M, M, M, balance=np.float32(0.5)),
        lambda: vk.gaussian_kl(M, M, M, M, balance=0.5),
    ),
    "log_weight": (
        lambda: vk.log_aggregate_posterior(M, M, M, log_weight=np.int64(9))[0],
        lambda: vk.log_aggregate_posterior(M, M, M, log_weight=9)[0],
    ),
    "dims of a posterior": (
        lambda: DiagonalGaussian(M, dim=one).kl(dims=one),
        lambda: DiagonalGaussian(M, dim=1).kl(dims=1),
    ),
    "a module": (
        lambda: GaussianLatent(two, one, beta=np.float32(0.5), free_bits=FLOORS[:2])(M).kl,
        lambda: GaussianLatent(2, 1, beta=0.5, free_bits=torch.tensor(FLOORS[:2]))(M).kl,
    ),
    "schedules": (
        lambda: schedules.Cyclical(np.float32(1), np.int64(9), cycles=three).value,
        lambda: schedules.Cyclical(1.0, 9, cycles=3).value,
    ),
    "warm-up": (
        lambda: schedules.Warmup(1.0, hold=two, ramp=three).value,
        lambda: schedules.Warmup(1.0, hold=2, ramp=3).value,
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_numpys_numbers_are_numbers(name, backend):
    ours, plain = SAME[name]
    for _ in range(2):
        assert torch.equal(ours(), plain())


def test_the_state_of_schedules():
    linear, control = schedules.Linear(1.0, steps=10), schedules.GECO(1.0)
    linear.load_state_dict({"steps": three})
    assert linear.state_dict() == {"steps": 3} and type(linear.state_dict()["steps"]) is int
    state = {key: np.float32(value) for key, value in control.state_dict().items()} | {"ignored": two}
    control.load_state_dict(state)
    assert control.state_dict()["ignored"] == 2
    with pytest.raises(ValueError, match="a schedule's state is"):
        linear.load_state_dict({"steps": np.float32(3)})


@pytest.mark.parametrize("wrong", [np.float32(1), np.bool_(True), True, 1.0, torch.tensor(1)], ids=repr)
def test_what_is_no_int_stays_an_error(wrong):
    for call in (
        lambda: vk.reparameterize(M, M, num_samples=wrong),
        lambda: vk.gaussian_kl(M, M, batch_dims=wrong),
        lambda: vk.gaussian_kl(M, M, group_dims=(wrong,)),
        lambda: vk.gaussian_kl_packed(M, wrong),
        lambda: vk.log_aggregate_posterior(M, M, M, log_weight=wrong),
    ):
        with pytest.raises(TypeError, match="must be"):
            call()
    with pytest.raises(ValueError, match="steps must be a whole number"):
        schedules.Linear(1.0, steps=wrong)


def test_the_numbers_of_a_monitor():
    monitor = CollapseMonitor(
        lambda x: (x, x), torch.zeros(8, 2), every_n_steps=three, n=np.int64(8), patience=two, grace_steps=one
    )
    assert len(monitor.heldout) == 8 and type(monitor.every_n_steps) is int
    for wrong in (np.float32(8), np.bool_(True), True, 8.0, three):
        with pytest.raises(ValueError, match="n must be an int of at least 4, got"):
            CollapseMonitor(lambda x: (x, x), torch.zeros(8, 2), n=wrong)
