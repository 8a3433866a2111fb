"""CollapseMonitor in a plain loop: what it measures, when it warns, what it leaves alone."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits need vaekernels[train]")

from digits_vae import DigitsVAE, digits

from vaekernels.collapse import CollapseMonitor, CollapseWarning, delta_shuffle, moments, rate_per_dim
from vaekernels.collapse import monitor as monitors

EPOCH = 88  # batches of 16 from 1397 digits


def train(beta: float, seed: int, epochs: int = 3, **options) -> CollapseMonitor:
    data, heldout = digits()
    torch.manual_seed(seed)
    model = DigitsVAE(beta)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    monitor = CollapseMonitor(
        model.encode, heldout, model.log_likelihood, modules=[model], n=256, every_n_steps=10, **options
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(data)).split(16):
            optimizer.zero_grad()
            model.loss(data[rows]).backward()
            optimizer.step()
            monitor.step()
    return monitor


@pytest.mark.parametrize("seed", range(3))
def test_a_collapsing_run_is_flagged_before_epoch_three_once(seed):
    with pytest.warns(CollapseWarning, match=r"no information since step \d+: I\(x; z\) <=") as caught:
        monitor = train(8.0, seed, grace_steps=100)
    assert len([w for w in caught if w.category is CollapseWarning]) == 1
    assert caught[0].filename == __file__
    assert 100 < monitor.collapsed_at <= 2 * EPOCH
    assert sum(monitor.history[-1].rate_per_dim) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_is_not(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        monitor = train(1.0, seed, grace_steps=100)
    last = monitor.history[-1]
    assert last.mi_lower.low > 0.5 and last.shuffle_gap.low > 1.0 and last.active_units > 0


def identity(x):
    return x[:, :2], x[:, 2:]


def test_the_measures_are_those_of_the_diagnosis():
    _, heldout = digits()
    torch.manual_seed(0)
    model = DigitsVAE()
    monitor = CollapseMonitor(model.encode, heldout, model.log_likelihood)
    reading = monitor.read(0)
    exact = rate_per_dim(*moments(model.encode, monitor.heldout))
    assert reading.rate_per_dim == pytest.approx(exact.tolist())
    gap = delta_shuffle(model.encode, model.log_likelihood, monitor.heldout)
    assert abs(reading.shuffle_gap.value - gap.value) < gap.high - gap.low
    names = set(reading.metrics())
    assert names == {"rate", "active_units", "mi_lower", "mi_upper", "shuffle_gap"} | {
        f"rate/{d}" for d in range(8)
    }
    assert reading.metrics()["rate"] == pytest.approx(exact.sum().item())


def test_the_likelihood_and_the_spread_of_mu_are_those_of_the_examples():
    _, heldout = digits()
    torch.manual_seed(0)
    model = DigitsVAE()
    monitor = CollapseMonitor(model.encode, heldout, model.log_likelihood)
    reading = monitor.measure(7)
    assert reading.step == 7 and monitor.history == [], "measured, not recorded"
    mu, logvar = moments(model.encode, monitor.heldout)
    draws = torch.Generator().manual_seed(1)
    z = [mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape, generator=draws) for _ in range(20)]
    nll = torch.stack([-model.log_likelihood(monitor.heldout, each).detach().mean() for each in z])
    assert abs(reading.nll - nll.mean().item()) < 4 * nll.std().item()
    spread = mu.double().var(dim=0, correction=0)
    assert reading.mu_variance_per_dim == pytest.approx(spread.tolist(), rel=1e-6)
    monitor.record(reading)
    again = CollapseMonitor(model.encode, heldout, model.log_likelihood)
    again.load_state_dict(monitor.state_dict())
    assert again.history == [reading] and 0 < again.mi_seconds == monitor.mi_seconds


def test_information_is_that_of_2048_of_more_examples(monkeypatch):
    """All pairs of n examples are n² densities; the gap and the rates are those of all."""
    compared = []
    bounds = monitors.mi_bounds

    def counted(mu, logvar, z, **options):
        compared.append((len(mu), len(z)))
        return bounds(mu, logvar, z, **options)

    monkeypatch.setattr(monitors, "mi_bounds", counted)
    x = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    scored = []

    def log_likelihood(x, z):
        scored.append(len(x))
        return -(x[:, :2] - z).square().sum(dim=1).float()

    reading = CollapseMonitor(lambda x: (x[:, :2], -x[:, 2:].abs()), x, log_likelihood, n=3000).read(1)
    assert compared == [(2048, 2048)] and sum(scored) == 2 * 3000
    assert reading.mi_lower.low > 0.3 and reading.shuffle_gap.low > 1.0


def test_a_rate_without_information_is_flagged():
    """Every example at (3, 3): a rate of 9 nats, as free bits leave it, and nothing in it."""
    x = torch.zeros(64, 4)
    x[:, :2] = 3.0
    monitor = CollapseMonitor(identity, x, grace_steps=0)
    with pytest.warns(CollapseWarning, match="rate 9 nats, 0 active units of 2"):
        for step in (1, 2, 3):
            monitor.read(step)


def readings(spread: list[float], **options) -> CollapseMonitor:
    """Means at +-spread: I(x; z) grows with it, from 0 to log 2."""
    scale = iter(spread)

    def encode(x):
        return x * now[0], torch.zeros_like(x)

    now = [0.0]
    x = torch.tensor([[-1.0], [1.0]]).repeat(128, 1)
    monitor = CollapseMonitor(encode, x, grace_steps=0, **options)
    for step, value in enumerate(scale, 1):
        now[0] = value
        monitor.read(step)
    return monitor


@pytest.mark.parametrize(
    "spread, at",
    [
        ([0.0] * 3, 3),
        ([0.1] * 2, None),  # patience
        ([0.0, 0.0, 2.0, 0.0, 0.0], None),  # not in a row
        ([2.0, 1.0, 0.1, 0.1, 0.1], 5),  # it was alive before
        ([0.0, 0.1, 0.35, 0.8, 1.5], None),  # it wakes up
    ],
)
def test_when_it_warns(spread, at):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        assert readings(spread).collapsed_at == at


def test_the_state_continues_and_does_not_warn_again():
    with pytest.warns(CollapseWarning):
        first = readings([0.0] * 3)
    second = CollapseMonitor(first.encode, first.heldout, grace_steps=0)
    second.load_state_dict(first.state_dict())
    assert second.history == first.history and second.collapsed_at == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        second.read(4)


def test_training_is_left_as_it_is():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout())
    model[1].eval()  # frozen
    monitor = CollapseMonitor(lambda x: model(x).chunk(2, 1), torch.randn(32, 4), modules=[model])
    before, mean = torch.get_rng_state(), model[1].running_mean.clone()
    monitor.read(1)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(mean, model[1].running_mean)
    assert [each.training for each in model] == [True, False, True] and model.training


def test_errors():
    with pytest.raises(ValueError, match="patience must be an int of at least 2, got 1"):
        CollapseMonitor(identity, torch.zeros(8, 4), patience=1)
    with pytest.raises(ValueError, match="heldout must"):
        CollapseMonitor(identity, torch.zeros(2, 4))
    with pytest.raises(TypeError, match="encode"):
        CollapseMonitor(lambda x: x, torch.zeros(8, 4)).read(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["encode", "log_likelihood"])
def test_a_reading_that_is_not_finite_is_ignored_and_counted(where, bad):
    spoilt = {"encode": 0.0, "log_likelihood": 0.0}
    monitor = CollapseMonitor(
        lambda x: (x[:, :2] + spoilt["encode"], x[:, 2:]),
        torch.randn(32, 4),
        lambda x, z: -((x[:, :2] - z) ** 2).sum(1) + spoilt["log_likelihood"],
        every_n_steps=1,
    )
    first = monitor.step()
    spoilt[where] = bad
    with pytest.warns(RuntimeWarning, match="not measured at step 2: .* ignored and counted") as caught:
        assert monitor.step() is None and monitor.step() is None
    assert len(caught) == 1 and caught[0].filename == __file__
    spoilt[where] = 0.0
    last = monitor.step()
    assert monitor.history == [first, last] and monitor.ignored == 2 and last.step == 4
    again = CollapseMonitor(identity, torch.zeros(8, 4))
    again.load_state_dict(monitor.state_dict())
    assert again.ignored == 2
