"""Schedules and controllers: the values by hand, bounds, the tensor's identity, the state, compiled use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vaekernels as vk
from vaekernels.schedules import (
    GECO,
    Capacity,
    Constant,
    Controller,
    Cosine,
    Cyclical,
    FreeBits,
    Linear,
    Logistic,
    PIController,
    Schedule,
    Warmup,
)


def values(schedule: Schedule, steps: int) -> list[float]:
    seen = [schedule.value.item()]
    for _ in range(steps):
        schedule.step()
        seen.append(schedule.value.item())
    return seen


# --- tables


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(0.5), [0.5, 0.5, 0.5]),
        (Linear(2.0, steps=4), [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]),
        (Linear(1.0, steps=2, start=3.0), [3.0, 2.0, 1.0, 1.0]),
        # (1 - cos(60 degrees)) / 2 = 1/4, and so on
        (Cosine(1.0, steps=3), [0.0, 0.25, 0.75, 1.0, 1.0]),
        # odds of e^-ln3, 1, e^ln3: 1/4, 1/2, 3/4
        (Logistic(1.0, rate=math.log(3), midpoint=1), [0.25, 0.5, 0.75, 0.9]),
        (Cyclical(1.0, steps=8, cycles=2), [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]),
        (Cyclical(2.0, steps=4, cycles=1, ramp=1.0), [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]),
        (Warmup(1.0, hold=2), [0.0, 0.0, 1.0, 1.0]),
        (Warmup(1.0, hold=1, ramp=2, start=0.5), [0.5, 0.5, 0.75, 1.0, 1.0]),
        (Warmup(1.0, hold=0), [1.0, 1.0]),
        (Capacity(10.0, steps=4), [0.0, 2.5, 5.0, 7.5, 10.0, 10.0]),
        (FreeBits(0.5, hold=2, ramp=2), [0.5, 0.5, 0.5, 0.25, 0.0, 0.0]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Schedule) else "",
)
def test_values_by_hand(schedule: Schedule, expected: list[float]) -> None:
    assert values(schedule, len(expected) - 1) == pytest.approx(expected, abs=1e-7)


def test_defaults_are_those_of_the_papers() -> None:
    bowman, fu, burgess = Logistic(1.0), Cyclical(1.0, steps=400), Capacity()
    assert (bowman.rate, bowman.midpoint) == (0.0025, 2500)
    assert bowman.at(0) == pytest.approx(1 / (1 + math.exp(6.25)))
    assert (fu.cycles, fu.ramp) == (4, 0.5)
    assert [fu.at(t) for t in (0, 25, 50, 99, 100)] == [0.0, 0.5, 1.0, 1.0, 0.0]
    assert (burgess.final, burgess.steps, burgess.gamma) == (25.0, 100_000, 1000.0)
    shao = PIController(3.0)
    assert (shao.kp, shao.ki, shao.low, shao.high) == (0.01, 0.001, 0.0, 1.0)
    assert GECO(0.0).decay == 0.99
    assert FreeBits().start == 0.25


def test_capacity_penalises_both_sides() -> None:
    capacity = Capacity(4.0, steps=1, gamma=10.0)
    capacity.step()
    assert capacity.penalty(torch.tensor(3.0)).item() == capacity.penalty(torch.tensor(5.0)).item() == 10.0
    assert capacity.penalty(torch.tensor([3.0, 6.0])).item() == 15.0  # per example: (1 + 2) / 2 * 10


# --- properties

RAMPS = {
    "linear": lambda steps: Linear(1.0, steps),
    "cosine": lambda steps: Cosine(1.0, steps),
    "logistic": lambda steps: Logistic(1.0, rate=4.0 / steps, midpoint=steps / 2),
    "warmup": lambda steps: Warmup(1.0, hold=steps // 3, ramp=steps // 2),
    "falling floor": lambda steps: FreeBits(1.0, hold=steps // 3, ramp=steps // 2),
    "cyclical": lambda steps: Cyclical(1.0, steps, cycles=3),
}


@given(st.sampled_from(sorted(RAMPS)), st.integers(3, 10**6), st.integers(0, 2 * 10**6))
def test_schedules_stay_between_their_ends_and_ramps_never_turn_back(name: str, steps: int, t: int) -> None:
    schedule = RAMPS[name](steps)
    now, later = schedule.at(t), schedule.at(t + 1)
    assert 0.0 <= now <= 1.0
    if name == "falling floor":
        assert later <= now
    elif name != "cyclical":
        assert later >= now


@given(st.integers(1, 50), st.integers(1, 6))
def test_cycles_repeat(length: int, cycles: int) -> None:
    schedule = Cyclical(1.0, steps=length * cycles, cycles=cycles)
    for t in range(length * (cycles - 1)):
        assert schedule.at(t) == schedule.at(t + length)


def test_logistic_is_finite_far_from_its_midpoint() -> None:
    steep = Logistic(1.0, rate=10.0, midpoint=1000)
    assert steep.at(0) == 0.0 and steep.at(10**6) == 1.0


# --- the tensor and the state


def test_value_is_one_tensor_for_life() -> None:
    schedule = Linear(1.0, steps=4)
    value = schedule.value
    assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad
    schedule.step()
    schedule.load_state_dict({"steps": 3})
    assert schedule.value is value
    assert value.item() == 0.75
    for control in (PIController(1.0), GECO(1.0)):
        value = control.value
        control.step(3.0)
        control.load_state_dict(control.state_dict())
        assert control.value is value and not value.requires_grad


def test_state_continues_where_it_stopped() -> None:
    whole, first, second = (Linear(1.0, steps=7) for _ in range(3))
    values(whole, 5)
    values(first, 2)
    second.load_state_dict(first.state_dict())
    values(second, 3)
    assert second.value.item() == whole.value.item()
    assert second.state_dict() == whole.state_dict() == {"steps": 5}


CONTROLLERS: dict[str, Callable[[], Controller]] = {
    "pi": lambda: PIController(2.0, kp=0.05, ki=0.01),
    "geco": lambda: GECO(2.0, speed=0.1),
}


@pytest.mark.parametrize("make", CONTROLLERS.values(), ids=CONTROLLERS)
@given(st.lists(st.floats(0, 50, width=32), min_size=2, max_size=30), st.data())
def test_a_controller_resumed_mid_way_equals_the_uninterrupted_bit_for_bit(
    make: Callable[[], Controller], measured: list[float], data: st.DataObject
) -> None:
    whole, first, second = make(), make(), make()
    cut = data.draw(st.integers(0, len(measured)))
    for m in measured:
        whole.step(m)
    for m in measured[:cut]:
        first.step(m)
    second.load_state_dict(first.state_dict())
    for m in measured[cut:]:
        second.step(torch.tensor(m))
    assert second.state_dict() == whole.state_dict()


def test_a_step_before_backward_is_refused_by_autograd() -> None:
    schedule = Linear(1.0, steps=4)
    kl = torch.ones((), requires_grad=True)
    loss = schedule.value * kl
    schedule.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- controllers


def test_pi_by_hand() -> None:
    # target 2, rate 3: e = -1; P = 0.01 / (1 + e^-1) = 0.0073106, I grows by 0.001 a step
    control = PIController(2.0)
    proportional = 0.01 / (1 + math.exp(-1))
    for n in range(1, 6):
        control.step(3.0)
        assert control.value.item() == pytest.approx(proportional + 0.001 * n, rel=1e-5)
    # at the target the error is 0: P = 0.005, I stays
    control.step(2.0)
    assert control.value.item() == pytest.approx(0.005 + 0.005, rel=1e-5)


def without_anti_windup(control: PIController, rates: list[float]) -> list[float]:
    integral, weights = 0.0, []
    for rate in rates:
        error = control.target - rate
        integral -= control.ki * error
        wanted = control.kp / (1 + math.exp(error)) + integral
        weights.append(min(max(wanted, control.low), control.high))
    return weights


def test_anti_windup_frees_the_weight_at_once_after_a_long_saturation() -> None:
    control = PIController(4.0)
    rates = [30.0] * 2000 + [3.0] * 10
    weights = []
    for rate in rates:
        control.step(rate)
        weights.append(control.value.item())
    assert weights[1999] == 1.0
    # e = 1: the first step below the target takes P down to 0.0027 and I down by 0.001
    assert weights[2000] < 1.0 - 0.001
    assert all(later < now for now, later in itertools.pairwise(weights[2000:]))
    plain = without_anti_windup(control, rates)
    assert plain[1999] == plain[-1] == 1.0, "the plain sum would have to be worked off for 50,000 steps"


def test_one_step_far_beyond_the_limit_goes_to_the_limit() -> None:
    control = PIController(4.0)
    control.step(5000.0)  # ki * |e| = 5: a sum that stood still instead would leave the weight near 0
    assert control.value.item() == 1.0
    control.step(3.0)
    assert control.value.item() < 1.0


def test_anti_windup_at_the_lower_limit() -> None:
    control = PIController(4.0)
    for _ in range(2000):
        control.step(0.0)  # collapsed: less weight is wanted than there is
    assert control.value.item() == 0.0
    control.step(6.0)
    assert control.value.item() > 0.005


def test_saturated_weight_still_answers_to_the_error() -> None:
    """ControlVAE's own test freezes the sum whenever the weight was at a limit, which never lets it go."""
    control = PIController(4.0)
    for _ in range(2000):
        control.step(30.0)
    before = control.state_dict()["integral"]
    control.step(3.0)
    assert control.state_dict()["integral"] == pytest.approx(before - 0.001, rel=1e-5)


@given(st.lists(st.floats(0, 1000, width=32), max_size=60))
def test_pi_stays_within_its_limits(rates: list[float]) -> None:
    control = PIController(5.0, kp=0.5, ki=0.1, low=0.1, high=0.9)
    for rate in rates:
        control.step(rate)
        assert 0.1 - 1e-7 <= control.value.item() <= 0.9 + 1e-7
        # never further outside than the proportional part alone can make up for
        assert 0.1 - 0.5 - 1e-6 <= control.state_dict()["integral"] <= 0.9 + 1e-6


def test_pi_holds_the_rate_of_a_plant() -> None:
    """rate = 2 / (0.05 + w): the more weight the less rate, as a VAE's; the target asks for w = 0.45."""
    control = PIController(4.0, ki=0.01)
    for _ in range(3000):
        control.step(2 / (0.05 + control.value.item()))
    assert control.value.item() == pytest.approx(0.45, abs=1e-3)


def test_pi_follows_a_scheduled_target() -> None:
    target = Linear(10.0, steps=10)
    control = PIController(target.value)
    control.step(5.0)  # target 0: more weight
    rising = control.state_dict()["integral"]
    for _ in range(10):
        target.step()
    control.step(5.0)  # target 10: less
    assert rising == pytest.approx(0.005) and control.state_dict()["integral"] == pytest.approx(0.0, abs=1e-9)


def test_geco_by_hand() -> None:
    # constraints 10, then 0: the average is 10, then 9.9; lambda = exp(0.01 * 10), times exp(0.01 * 9.9)
    control = GECO(90.0, speed=0.01)
    control.step(100.0)
    assert control.value.item() == pytest.approx(math.exp(0.1), rel=1e-6)
    control.step(90.0)
    assert control.value.item() == pytest.approx(math.exp(0.199), rel=1e-6)


def test_geco_falls_when_the_constraint_is_met_and_stays_positive() -> None:
    control = GECO(90.0, speed=1.0)
    for _ in range(100):
        control.step(50.0)
    assert control.value.item() == pytest.approx(1e-3)
    for _ in range(1000):
        control.step(500.0)
    assert control.value.item() == pytest.approx(1e3)


NOT_FINITE = [math.nan, math.inf, -math.inf, 1e300, -1e300]


def given_as(measured: float, form: str) -> torch.Tensor | float:
    return measured if form == "number" else torch.tensor(measured, dtype=getattr(torch, form))


@pytest.mark.parametrize("form", ["number", "float32", "float64", "float16"])
@pytest.mark.parametrize("make", CONTROLLERS.values(), ids=CONTROLLERS)
@given(st.lists(st.floats(0, 50, width=16), min_size=1, max_size=20), st.data())
def test_measurements_that_are_not_finite_move_nothing_and_are_counted(
    make: Callable[[], Controller], form: str, measured: list[float], data: st.DataObject
) -> None:
    clean, met = make(), make()
    bad = data.draw(
        st.lists(st.tuples(st.integers(0, len(measured)), st.sampled_from(NOT_FINITE)), max_size=5)
    )
    for n in range(len(measured) + 1):
        for _, number in (each for each in bad if each[0] == n):
            met.step(given_as(number, form))
        for control in (clean, met) if n < len(measured) else ():
            control.step(given_as(measured[n], form))
    assert met.state_dict() == clean.state_dict() | {"ignored": len(bad)}
    assert met.ignored.item() == len(bad)


@pytest.mark.parametrize("make", CONTROLLERS.values(), ids=CONTROLLERS)
def test_the_count_of_ignored_measurements_is_seen_and_kept(make: Callable[[], Controller]) -> None:
    control, again = make(), make()
    assert "ignored" not in repr(control)
    for number in (math.nan, 1.0, math.inf):
        control.step(number)
    assert "ignored 2 measurements that were not finite" in repr(control)
    again.load_state_dict(control.state_dict())
    assert again.state_dict() == control.state_dict() and again.ignored.item() == 2


def test_a_target_that_is_not_finite_for_a_step_is_ignored_too() -> None:
    target = torch.tensor(4.0)
    control = PIController(target)
    control.step(5.0)
    before = control.state_dict()
    target.fill_(math.nan)
    control.step(5.0)
    assert control.state_dict() == before | {"ignored": 1}


@pytest.mark.parametrize("control", [PIController(0.0, kp=3e38, ki=3e38), GECO(-3e38, speed=3e38)])
def test_finite_measurements_of_any_size_leave_a_finite_state(control: Controller) -> None:
    for number in (3e38, -3e38, 1e-45, 0.0, 3e38):
        control.step(number)
        assert all(map(math.isfinite, control.state_dict().values())), control.state_dict()


# --- inside somebody's loop


@pytest.mark.parametrize("how", ["schedule", "controller", "floor"])
def test_compiled_code_sees_the_new_value_without_recompiling(how: str) -> None:
    made = {"schedule": Linear(1.0, steps=8), "controller": PIController(1.0), "floor": FreeBits(2.0, ramp=8)}
    changing = made[how]
    traced: list[int] = []

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        traced.append(1)
        return graph.forward

    @torch.compile(fullgraph=True, backend=counted)
    def loss(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        if how == "floor":
            return vk.gaussian_kl(mu, logvar, free_bits=changing.value)
        return changing.value * vk.gaussian_kl(mu, logvar)

    mu, logvar = torch.full((4, 2), 0.5), torch.zeros(4, 2)
    kl = vk.gaussian_kl(mu, logvar).item()
    seen = []
    for _ in range(6):
        expected = 2 * max(kl / 2, changing.value.item()) if how == "floor" else kl * changing.value.item()
        assert loss(mu, logvar).item() == pytest.approx(expected, rel=1e-6)
        seen.append(changing.value.item())
        if isinstance(changing, Controller):
            changing.step(9.0)
        else:
            changing.step()
    assert len(set(seen)) == 6 and len(traced) == 1


# --- errors


@pytest.mark.parametrize(
    "state", [{}, {"steps": -1}, {"steps": 1.5}, {"steps": True}, {"steps": 1, "more": 2}]
)
def test_bad_state(state: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a schedule's state is"):
        Linear(1.0, steps=4).load_state_dict(state)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"value": 1.0, "integral": 0.0},
        {"value": math.nan, "integral": 0.0, "ignored": 0},
        {"value": 1.0, "integral": "0", "ignored": 0},
        {"value": 1.0, "integral": 0.0, "ignored": -1},
        {"value": 1.0, "integral": 0.0, "ignored": 0.5},
    ],
)
def test_bad_controller_state(state: dict[str, float]) -> None:
    control = PIController(1.0)
    with pytest.raises(ValueError, match="state of a PIController is finite numbers for value, integral"):
        control.load_state_dict(state)
    assert control.state_dict() == {"value": 0.0, "integral": 0.0, "ignored": 0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(1.0, steps=0), "steps must be a whole number, at least 1, got 0; use Constant"),
        (lambda: Linear(1.0, steps=2.5), "steps must be a whole number, at least 1, got 2.5"),
        (lambda: Linear(math.nan, steps=3), "final must be finite, got nan"),
        (lambda: Constant(math.inf), "final must be finite, got inf"),
        (lambda: Cyclical(1.0, steps=3, cycles=0), "cycles must be a whole number, at least 1"),
        (lambda: Cyclical(1.0, steps=3, ramp=0.0), r"ramp is the share .* in \(0, 1\]; got 0.0"),
        (lambda: Warmup(1.0, hold=-1), "hold must be a whole number, at least 0, got -1"),
        (lambda: Logistic(1.0, rate=-1.0), "rate must be at least 0, got -1.0"),
        (lambda: Capacity(-1.0), "final must be at least 0, got -1.0"),
        (lambda: FreeBits(-0.5), "start must be at least 0, got -0.5"),
        (lambda: PIController(-1.0), "target must be at least 0, got -1.0"),
        (lambda: PIController(1.0, low=1.0, high=1.0), "low must be below high, got 1.0 and 1.0"),
        (lambda: PIController(1.0).step(torch.ones(3)), r"rate must be one number, .* got shape \[3\]"),
        (lambda: GECO(1.0, decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: GECO(1.0, low=0.0), "0 < low <= 1 <= high; got 0.0"),
        (lambda: GECO(1.0).step(torch.ones(2)), r"nll must be one number, .* got shape \[2\]"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
