"""Schedules: the values by hand, the tensor's identity, the state."""

from __future__ import annotations

import math

import pytest
import torch

from vaekernels.schedules import Constant, Linear


def values(schedule: Linear | Constant, steps: int) -> list[float]:
    seen = [schedule.value.item()]
    for _ in range(steps):
        schedule.step()
        seen.append(schedule.value.item())
    return seen


def test_linear_rises_in_a_line_and_stays() -> None:
    assert values(Linear(2.0, steps=4), 6) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_from_a_start_downwards() -> None:
    assert values(Linear(1.0, steps=2, start=3.0), 3) == [3.0, 2.0, 1.0, 1.0]


def test_constant() -> None:
    assert values(Constant(0.5), 3) == [0.5] * 4


def test_value_is_one_tensor_for_life() -> None:
    schedule = Linear(1.0, steps=4)
    value = schedule.value
    assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad
    schedule.step()
    schedule.load_state_dict({"steps": 3})
    assert schedule.value is value
    assert value.item() == 0.75


def test_state_continues_where_it_stopped() -> None:
    whole, first, second = (Linear(1.0, steps=7) for _ in range(3))
    values(whole, 5)
    values(first, 2)
    second.load_state_dict(first.state_dict())
    values(second, 3)
    assert second.value.item() == whole.value.item()
    assert second.state_dict() == whole.state_dict() == {"steps": 5}


def test_a_step_before_backward_is_refused_by_autograd() -> None:
    schedule = Linear(1.0, steps=4)
    kl = torch.ones((), requires_grad=True)
    loss = schedule.value * kl
    schedule.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "state", [{}, {"steps": -1}, {"steps": 1.5}, {"steps": True}, {"steps": 1, "more": 2}]
)
def test_bad_state(state: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a schedule's state is"):
        Linear(1.0, steps=4).load_state_dict(state)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0; use Constant"):
        Linear(1.0, steps=0)
    with pytest.raises(ValueError, match="final must be finite, got nan"):
        Linear(math.nan, steps=3)
    with pytest.raises(ValueError, match="value must be finite, got inf"):
        Constant(math.inf)
