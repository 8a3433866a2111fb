"""Losses: every convention against its formula in float64, and what moves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")

import torch
from torch import Tensor, nn

from vaekernels.training import objectives
from vaekernels.training.config import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    StrategyConfig,
)
from vaekernels.training.latents import ELBO, Terms
from vaekernels.training.models import VAE, LatentLayer
from vaekernels.training.objectives import Objective, Task
from vaekernels.training.strategies import describe

pytestmark = pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning")

B, D, N = 6, 4, 30


def build(text: bool = False, **config: Any) -> Objective:
    return objectives.build(
        ObjectiveConfig(**config),
        Task(text=text, data_dims=50.0, latent_dim=D, examples=N, epochs=4, steps_per_epoch=5),
    )


def layer(seed: int, shape: tuple[int, ...] = (D,)) -> Tensor:
    """Moments [B, 2 * shape[0], ...], some dims near the prior and some far from it."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 1.5, shape[0]).repeat(2).view(-1, *[1] * (len(shape) - 1))
    return torch.randn(B, 2 * shape[0], *shape[1:], generator=draw) * scale


def terms_of(objective: Objective, *layers: Tensor, nll: Tensor | None = None) -> Terms:
    shapes = [(moments.shape[1] // 2, *moments.shape[2:]) for moments in layers]
    modules = [objective.options.layer(LatentLayer(shape)) for shape in shapes]
    drawn = [module(moments) for module, moments in zip(modules, layers, strict=True)]
    kl = torch.stack([each.kl for each in drawn])
    rate = torch.stack([each.kl_per_group.sum() for each in drawn])
    rate = kl.mean(dim=1) if objective.options.per_example else rate
    nll = torch.full((B,), 20.0) if nll is None else nll
    return Terms(nll.mean(), kl, rate, B, nll, ())


def elements(moments: Tensor) -> Tensor:
    """KL of every latent element, float64 [B, ...]."""
    mu, logvar = moments.double().chunk(2, dim=1)
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar)


FORMULAS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    # FIELD's table: the settings, and the KL term from the elements [B, D]
    "none": ({}, lambda kl: kl.sum(dim=1).mean()),
    "per dimension (Kingma 2016)": (
        {"free_bits": 0.3},
        lambda kl: kl.mean(dim=0).clamp(min=0.3).sum(),
    ),
    "on the whole (Dreamer)": (
        {"free_bits": 2.0, "group": "all"},
        lambda kl: kl.sum(dim=1).mean().clamp(min=2.0),
    ),
    "per row (ladder-vae)": (
        {"free_bits": 2.0, "group": "all", "clamp": "sample"},
        lambda kl: kl.sum(dim=1).clamp(min=2.0).mean(),
    ),
    "per row and dimension (Li 2019, fb=2)": (
        {"free_bits": 0.3, "clamp": "sample"},
        lambda kl: kl.clamp(min=0.3).sum(dim=1).mean(),
    ),
    "mask per row and dimension": (
        {"free_bits": 0.3, "clamp": "sample", "penalty": "mask"},
        lambda kl: (kl * (kl >= 0.3)).sum(dim=1).mean(),
    ),
    "mask per row (Li 2019, fb=1)": (
        {"free_bits": 2.0, "clamp": "sample", "penalty": "mask", "group": "all"},
        lambda kl: (kl.sum(dim=1) * (kl.sum(dim=1) > 2.0)).mean(),
    ),
    "hinge per row (MusicVAE)": (
        {"free_bits": 2.0, "clamp": "sample", "penalty": "hinge", "group": "all"},
        lambda kl: (kl.sum(dim=1) - 2.0).clamp(min=0).mean(),
    ),
    "beta": ({"beta": 4.0}, lambda kl: 4.0 * kl.sum(dim=1).mean()),
    "a floor under beta": (
        {"beta": 4.0, "free_bits": 0.3},
        lambda kl: 4.0 * kl.mean(dim=0).clamp(min=0.3).sum(),
    ),
    "mean over dims": ({"kl": "mean"}, lambda kl: kl.mean()),
    "capacity below (Burgess 2018)": (
        {"capacity": 100.0, "capacity_gamma": 3.0},
        lambda kl: 3.0 * kl.sum(dim=1).mean(),  # C = 0 at the start
    ),
    "capacity per example (pythae)": (
        {"capacity": 100.0, "capacity_gamma": 3.0, "clamp": "sample"},
        lambda kl: 3.0 * kl.sum(dim=1).mean(),
    ),
}


@pytest.mark.parametrize(("config", "formula"), FORMULAS.values(), ids=FORMULAS)
def test_losses_are_their_formulas(config: dict[str, Any], formula: Callable[[Tensor], Tensor]) -> None:
    objective, moments = build(**config), layer(0)
    loss = objective.loss(terms_of(objective, moments))
    torch.testing.assert_close(loss.double(), 20.0 + formula(elements(moments)), rtol=1e-5, atol=1e-5)


def test_per_channel_of_a_latent_with_positions() -> None:
    objective, moments = build(free_bits=2.0, group="channel"), layer(0, (D, 2, 3))
    expected = elements(moments).sum(dim=(2, 3)).mean(dim=0).clamp(min=2.0).sum()
    assert 2 * D < expected < elements(moments).sum() / B + 2 * D, "some channels below, some above"
    loss = objective.loss(terms_of(objective, moments))
    torch.testing.assert_close(loss.double(), 20.0 + expected, rtol=1e-5, atol=1e-5)


def test_one_group_is_one_for_each_layer() -> None:
    objective = build(free_bits=3.0, group="all", clamp="sample")
    first, second = layer(1), 0.1 * layer(2)
    expected = sum(elements(m).sum(dim=1).clamp(min=3.0).mean() for m in (first, second))
    loss = objective.loss(terms_of(objective, first, second))
    torch.testing.assert_close(loss.double(), 20.0 + expected, rtol=1e-5, atol=1e-5)


class OneLayer(VAE):
    """Its moments are its parameters, its NLL is 20, and it remembers its z."""

    latent_dim = D

    def __init__(self, moments: Tensor) -> None:
        super().__init__()
        self.given = nn.Parameter(moments)

    def moments(self, x: Tensor) -> Tensor:
        return self.given

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        self.z = z
        return torch.full((len(x),), -20.0)

    def generate(self, z: Tensor) -> Tensor:
        raise NotImplementedError


def stratified(z: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """(information, total correlation) by the definition (Chen et al. 2018, appendix C.2), float64: the own
    posterior weighs 1 / N, the next one (N - M + 1) / (N (M - 1)), every other one 1 / (M - 1)."""
    z, (mu, logvar) = z.double(), moments.double().chunk(2, dim=1)
    density = torch.distributions.Normal(mu, (logvar / 2).exp()).log_prob(z.unsqueeze(1))
    weights = torch.full((B, B), 1 / (B - 1), dtype=torch.float64)
    for i in range(B):
        weights[i, i] = 1 / N
        weights[i, (i + 1) % B] = (N - B + 1) / (N * (B - 1))
    log_qz = torch.logsumexp(density.sum(2) + weights.log(), dim=1)
    product = torch.logsumexp(density + weights.log().unsqueeze(2), dim=1).sum(1)
    own = density.diagonal().T.sum(1)
    return (own - log_qz).mean(), (log_qz - product).mean()


@pytest.mark.parametrize(
    "config", [{"tc_beta": 6.0}, {"mi_weight": 0.0}, {"tc_beta": 2.0, "mi_weight": 0.5, "beta": 3.0}], ids=str
)
def test_the_parts_of_the_kl_are_weighed(config: dict[str, Any]) -> None:
    objective, model = build(**config), OneLayer(layer(0))
    terms = ELBO(model, objective.options)(torch.zeros(B, 1), B)
    loss = objective.loss(terms)
    (gradient,) = torch.autograd.grad(loss, model.given)
    moments = model.given.detach().double().requires_grad_()
    mu, logvar = moments.chunk(2, dim=1)
    eps = (model.z.detach().double() - mu.detach()) * (-0.5 * logvar.detach()).exp()
    information, correlation = stratified(mu + (0.5 * logvar).exp() * eps, moments)
    kl = elements(moments).sum(dim=1).mean()
    kl = (
        kl
        + (config.get("tc_beta", 1.0) - 1.0) * correlation
        + (config.get("mi_weight", 1.0) - 1.0) * information
    )
    exact = 20.0 + config.get("beta", 1.0) * kl
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(exact, moments)[0], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(objective.kl(terms).double(), kl, rtol=1e-5, atol=1e-5)


def test_a_batch_of_one_example_has_no_parts() -> None:
    objective = build(tc_beta=6.0)
    terms = ELBO(OneLayer(layer(0)[:1]), objective.options)(torch.zeros(1, 1), 1)
    assert terms.parts is None
    assert objective.loss(terms).isfinite()


def test_balancing_splits_the_gradient_between_posterior_and_learned_prior() -> None:
    def gradients(**config: Any) -> tuple[float, Tensor, Tensor]:
        objective = build(**config)
        q = layer(0).requires_grad_()
        p = layer(3).requires_grad_()
        _, kl, _ = objective.options.layer(LatentLayer((D,), learned_prior=True))(q, p)
        kl = kl.unsqueeze(0)
        loss = objective.loss(Terms(torch.zeros(()), kl, kl, B, torch.zeros(B), ()))
        loss.backward()
        assert q.grad is not None and p.grad is not None
        return loss.item(), q.grad, p.grad

    value, dq, dp = gradients()
    balanced, dq_b, dp_b = gradients(kl_balance=0.8)
    assert balanced == pytest.approx(value)
    torch.testing.assert_close(dq_b, 0.2 * dq)
    torch.testing.assert_close(dp_b, 0.8 * dp)


def test_layers_count_in_proportion_to_their_kl_while_the_weight_rises() -> None:
    objective = build(anneal="linear", anneal_epochs=1.0, layer_balance=True)
    layers = layer(1), 0.1 * layer(2)
    rates = torch.stack([elements(m).sum(dim=1).mean() for m in layers])
    for step in range(7):
        weight = min(1.0, step / 5)
        share = rates / rates.mean() if weight < 1 else torch.ones(2)
        expected = 20.0 + weight * (share * rates).sum()
        loss = objective.loss(terms_of(objective, *layers)).double()
        torch.testing.assert_close(loss, expected.double(), rtol=1e-5, atol=1e-5)
        objective.step(torch.tensor(20.0), rates.sum())


def test_capacity_rises_and_pulls_from_both_sides() -> None:
    moments = layer(0)
    rate = elements(moments).sum(dim=1).mean().item()
    for clamp in ("batch", "sample"):
        objective = build(capacity=2 * rate, capacity_epochs=2.0, clamp=clamp)
        for _ in range(10):
            objective.step(torch.tensor(20.0), torch.tensor(rate))
        loss = objective.loss(terms_of(objective, moments)).item()
        if clamp == "batch":
            assert loss == pytest.approx(20 + 1000 * rate, rel=1e-5)
        else:
            rows = elements(moments).sum(dim=1)
            assert loss == pytest.approx(20 + 1000 * (rows - 2 * rate).abs().mean().item(), rel=1e-5)
    assert build(text=True, capacity=1.0).weight.item() == 1.0
    assert build(text=False, capacity=1.0).weight.item() == 1000.0


def test_the_pi_controller_moves_the_weight_by_the_rate() -> None:
    objective, moments = build(pi_target=1.0, pi_kp=0.0, pi_ki=0.01), layer(0)
    assert objective.loss(terms_of(objective, moments)).item() == 20.0, "the weight starts at 0"
    for _ in range(3):
        objective.step(torch.tensor(20.0), torch.tensor(6.0))
    assert objective.weight.item() == pytest.approx(0.15)
    kl = elements(moments).sum(dim=1).mean()
    loss = objective.loss(terms_of(objective, moments)).double()
    torch.testing.assert_close(loss, 20 + 0.15 * kl, rtol=1e-5, atol=1e-5)
    assert build(pi_target=1.0, pi_max=2.0)._control.high == 2.0  # type: ignore[attr-defined]


def test_geco_moves_its_multiplier_by_the_nll() -> None:
    objective, moments = build(geco_target=15.0, geco_speed=0.1), layer(0)
    objective.step(torch.tensor(20.0), torch.tensor(6.0))
    multiplier = torch.tensor(0.5).double().exp()
    kl = elements(moments).sum(dim=1).mean()
    loss = objective.loss(terms_of(objective, moments)).double()
    torch.testing.assert_close(loss, kl + multiplier * (20 - 15), rtol=1e-5, atol=1e-5)
    assert objective.weight.item() == pytest.approx(1 / multiplier.item())


def test_a_floor_that_falls() -> None:
    objective, moments = build(free_bits=1.0, free_bits_decay_epochs=1.0), 0.01 * layer(0)
    seen = []
    for _ in range(7):
        seen.append(objective.loss(terms_of(objective, moments)).item() - 20.0)
        objective.step(torch.tensor(20.0), torch.tensor(0.0))
    assert seen[:5] == pytest.approx([4.0, 3.2, 2.4, 1.6, 0.8], abs=1e-4)
    assert seen[6] == pytest.approx(elements(moments).sum(dim=1).mean().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [1.0] * 21),
        ({"anneal": "linear", "beta": 2.0}, [2.0 * t / 50 for t in range(21)]),
        ({"anneal": "linear", "anneal_epochs": 1.5}, [min(1.0, t / 8) for t in range(21)]),
        ({"anneal": "warmup"}, [0.0] * 5 + [1.0] * 16),
        ({"anneal": "cyclical", "cycles": 2}, [min(1.0, (t % 10) / 5) for t in range(20)] + [1.0]),
    ],
)
def test_weights_go_by_epochs(config: dict[str, Any], expected: list[float]) -> None:
    task = Task(text=False, data_dims=50.0, latent_dim=D, examples=N, epochs=4, steps_per_epoch=5)
    schedule = objectives.weight_schedule(ObjectiveConfig(**config), task)
    assert [schedule.at(t) for t in range(21)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "config",
    [
        {"anneal": "linear", "free_bits": 1.0, "free_bits_decay_epochs": 2.0},
        {"pi_target": 2.0},
        {"geco_target": 2.0},
        {"capacity": 2.0},
    ],
)
def test_the_state_continues(config: dict[str, Any]) -> None:
    whole, first, second = (build(**config) for _ in range(3))
    figures = [(torch.tensor(20.0 - t), torch.tensor(1.0 * t)) for t in range(6)]
    for nll, rate in figures:
        whole.step(nll, rate)
    for nll, rate in figures[:3]:
        first.step(nll, rate)
    second.load_state_dict(first.state_dict())
    for nll, rate in figures[3:]:
        second.step(nll, rate)
    assert second.state_dict() == whole.state_dict()
    assert torch.equal(second.weight, whole.weight)
    with pytest.raises(ValueError, match="schedules other where"):
        second.load_state_dict({"other": {}})


# --- in words


IN_WORDS = Task(text=False, data_dims=64, latent_dim=8, examples=N, epochs=20, steps_per_epoch=26)


def said(**objective: Any) -> str:
    config = Config(
        DataConfig("digits"), objective=ObjectiveConfig(**objective), optim=OptimConfig(epochs=20)
    )
    return "\n".join(describe(config, IN_WORDS))


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({}, "weight: 1 throughout, so effective beta = 1"),
        (
            {"beta": 4.0, "anneal": "linear", "anneal_epochs": 2.0},
            "weight: 0 to 4 linearly over 52 steps, so effective beta = 4",
        ),
        (
            {"anneal": "logistic"},
            "half of it at step 2500, so effective beta = 1 (only 0.007 of it when the run ends)",
        ),
        ({"anneal": "cosine"}, "0 to 1 as a cosine over 260 steps"),
        ({"anneal": "cyclical"}, "4 times 0 to 1 in 520 steps"),
        ({"anneal": "warmup"}, "0 for 26 steps, then 1"),
        ({"reconstruction": "mean"}, "so effective beta = 64"),
        ({"kl": "mean"}, "so effective beta = 0.125"),
        ({"free_bits": 0.25}, "free bits: 0.25 nats per dimension (2 in all), floor, after the batch mean"),
        (
            {"free_bits": 4.0, "group": "all", "clamp": "sample", "penalty": "hinge"},
            "free bits: 4 nats for all dimensions of a layer, hinge, before the batch mean",
        ),
        ({"capacity": 25.0}, "C: 0 to 25 nats over 10 epochs"),
        ({"pi_target": 4.0}, "holds the rate at 4 nats; effective beta = the weight, 0 to 1"),
        ({"geco_target": 20.0}, "effective beta = 1 / lambda"),
        (
            {"tc_beta": 6.0, "mi_weight": 0.0},
            "of the KL counts its total correlation 6 times, its information I(x; z) 0 times",
        ),
    ],
)
def test_the_objective_in_words(objective: dict[str, Any], words: str) -> None:
    assert words in said(**objective)


def test_countermeasures_in_words() -> None:
    config = Config(
        DataConfig("docstrings"),
        ModelConfig(delta=0.15, batch_norm=0.7, word_dropout=0.5),
        strategy=StrategyConfig(pretrain_epochs=2),
    )
    text = "\n".join(describe(config, IN_WORDS))
    for part in (
        "at least 0.15 nats in every dimension",
        "to scale 0.7",
        "0.5 of the decoder's",
        "first 2 epochs",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("reduction", "factor"),
    [
        ({"reconstruction": "mean"}, 64.0),
        ({"kl": "mean"}, 1 / 8),
        ({"reconstruction": "mean", "kl": "mean"}, 8.0),
    ],
)
def test_a_reduction_mismatch_is_warned_about_and_the_same_loss_named(
    reduction: dict[str, Any], factor: float
) -> None:
    config = ObjectiveConfig(beta=2.0, **reduction)
    text = objectives.build(config, IN_WORDS).warning
    assert text is not None and text.startswith("warning: the reconstruction is a")
    assert f"objective.beta={2 * factor:g}" in text
    mixed, summed = build(beta=2.0, **reduction), build(beta=2.0 * factor * 50 / 64 * 8 / D)
    # the same loss up to the scale of the NLL (here 50 data and 4 latent dims)
    factor_here = (50.0 if config.reconstruction == "mean" else 1.0) / (D if config.kl == "mean" else 1.0)
    summed = build(beta=2.0 * factor_here)
    scale = 1 / 50 if config.reconstruction == "mean" else 1.0
    moments = layer(0)
    loss, same = (objective.loss(terms_of(objective, moments)) for objective in (mixed, summed))
    torch.testing.assert_close(loss, scale * same)
    assert mixed.weight.item() == pytest.approx(summed.weight.item())
    assert objectives.build(ObjectiveConfig(), IN_WORDS).warning is None
