"""The models: likelihoods are probabilities, posteriors keep their bounds, the ladder is one Gaussian."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vaekernels as vk
from vaekernels.training.config import Config, DataConfig, ModelConfig, combinations
from vaekernels.training.data import Arrays, Data, Text
from vaekernels.training.data.base import EOS, PAD, SPECIALS, UNK, digest
from vaekernels.training.latents import ELBO, LatentOptions
from vaekernels.training.models import (
    VAE,
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    Gaussian,
    LadderVAE,
    Likelihood,
    Posterior,
    RowGRUVAE,
    TextVAE,
    build,
    committed,
    largest_logvar,
    reset,
)

pytestmark = pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning")


def images(
    shape: tuple[int, ...] = (1, 8, 8), levels: int | None = 5, count: int = 40, seed: int = 0
) -> Arrays:
    draw = torch.Generator().manual_seed(seed)
    if levels is None:
        x = torch.randn(count, *shape, generator=draw)
    else:
        x = torch.randint(levels, (count, *shape), generator=draw).to(torch.uint8)
    return Arrays("images", x[8:], x[:8], digest(x), levels=levels)


def sentences(count: int = 40, words: int = 9, seed: int = 0) -> Text:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(UNK, len(SPECIALS) + words, (count, 7), generator=draw)
    for row, length in enumerate(torch.randint(2, 7, (count,), generator=draw).tolist()):
        x[row, length] = EOS
        x[row, length + 1 :] = PAD
    x = x[(x == EOS).any(dim=1)]
    vocabulary = (*SPECIALS, *(f"w{i}" for i in range(words)))
    return Text("sentences", x[8:], x[:8], digest(x, vocabulary), vocabulary)


def made(data: Data, **model: Any) -> VAE:
    config = Config(DataConfig("any"), ModelConfig(**{"latent_dim": 3, "hidden": 8, "embedding": 4} | model))
    torch.manual_seed(0)
    return build(combinations.resolve(config, data).model, data)


IMAGE_MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp"},
    "conv": {"kind": "conv"},
    "conv with positions": {"kind": "conv", "latent_channels": 2},
    "ladder": {"kind": "ladder"},
    "row-gru": {"kind": "row-gru"},
    "linear": {"kind": "linear"},
}
TEXT_MODELS: dict[str, dict[str, Any]] = {"gru": {"kind": "gru"}, "lstm": {"kind": "lstm"}}
MODELS = [(name, images(), options) for name, options in IMAGE_MODELS.items()]
MODELS += [(name, sentences(), options) for name, options in TEXT_MODELS.items()]


# --- what every model offers


@pytest.mark.parametrize(("name", "data", "options"), MODELS, ids=[m[0] for m in MODELS])
def test_the_contract_of_a_model(name: str, data: Data, options: dict[str, Any]) -> None:
    model = made(data, **options).eval()
    x = data.heldout
    mu, logvar = model.encode(x)
    assert mu.shape == logvar.shape == (len(x), model.latent_dim)
    z = torch.randn(len(x), model.latent_dim)
    assert model.log_likelihood(x, z).shape == (len(x),)
    assert torch.equal(model.log_likelihood(x, z), model.log_likelihood(x, z)), "the same twice"
    generated = model.generate(z)
    assert len(generated) == len(x)
    if isinstance(data, Arrays):
        assert generated.shape == x.shape
    # the whole of the model is in its encoder and decoder
    parts = {id(p) for part in (model.encoder, model.decoder) for p in part.parameters()}
    assert parts == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("name", "data", "options"), MODELS, ids=[m[0] for m in MODELS])
def test_a_step_reaches_every_parameter(name: str, data: Data, options: dict[str, Any]) -> None:
    model = made(data, **options)
    elbo = ELBO(model, LatentOptions())
    terms = elbo(data.train, len(data.train), torch.Generator().manual_seed(1))
    (terms.nll + terms.kl.sum()).backward()
    for parameter_name, parameter in model.named_parameters():
        if "prior.0" in parameter_name:
            continue  # behind the last layer of the ladder's prior, which starts at 0
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), parameter_name


@pytest.mark.parametrize(("name", "data", "options"), MODELS, ids=[m[0] for m in MODELS])
def test_outside_the_ladder_the_terms_are_those_of_encode_and_log_likelihood(
    name: str, data: Data, options: dict[str, Any]
) -> None:
    if name == "ladder":
        pytest.skip("has two layers; see below")
    model = made(data, **options)
    x = data.train
    terms = ELBO(model, LatentOptions())(x, len(x), torch.Generator().manual_seed(1))
    mu, logvar = (m.double() for m in model.encode(x))
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(dim=1).mean()
    torch.testing.assert_close(terms.rate.sum().double(), kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(terms.kl.sum().double(), kl, rtol=1e-5, atol=1e-7)
    moments = model.moments(x)
    z = vk.reparameterize_packed(moments.float(), generator=torch.Generator().manual_seed(1)).flatten(1)
    expected = -model.log_likelihood(x, z)
    torch.testing.assert_close(terms.nll, expected.mean())
    torch.testing.assert_close(terms.nll_per_example, expected.detach())


def test_reset_is_a_function_of_the_seed_alone() -> None:
    for data, options in ((images(), {"kind": "ladder"}), (sentences(), {"kind": "lstm"})):
        first, second = made(data, **options), made(data, **options)
        before = {k: v.clone() for k, v in first.state_dict().items()}
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.add_(1.0)
        state = torch.get_rng_state()
        reset(first.decoder, 5)
        reset(second.decoder, 5)
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in first.decoder.state_dict().items():
            assert torch.equal(value, second.decoder.state_dict()[name]), name
        assert not torch.equal(
            first.decoder.net[0].weight if data.name == "images" else first.decoder.to_logits.weight,  # type: ignore[index,union-attr]
            before["decoder.net.0.weight" if data.name == "images" else "decoder.to_logits.weight"],
        )
        for name, value in first.encoder.state_dict().items():
            assert torch.equal(value, before[f"encoder.{name}"]), "the encoder stays"
    assert isinstance(first, TextVAE)
    ladder = made(images(), kind="ladder")
    reset(ladder.decoder, 5)
    assert not ladder.decoder.prior[-1].weight.any(), "the prior starts as N(0, I)"  # type: ignore[index,union-attr]


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 6), (9, 13)])
@pytest.mark.parametrize("channels", [None, 2])
def test_the_convolutional_model_takes_any_size(size: tuple[int, int], channels: int | None) -> None:
    data = images((3, *size), levels=2)
    model = made(data, kind="conv", latent_channels=channels)
    z = torch.randn(8, model.latent_dim)
    assert model.generate(z).shape == data.heldout.shape
    if channels:
        assert model.latent_dim == 2 * ((size[0] + 3) // 4) * ((size[1] + 3) // 4)


# --- likelihoods


def pixel_values(levels: int, pixels: int) -> Tensor:
    """All images of ``pixels`` pixels."""
    return torch.tensor(list(product(range(levels), repeat=pixels)), dtype=torch.uint8)


@pytest.mark.parametrize(
    "likelihood", [Bernoulli(2), Categorical(4), DiscretizedLogistic(4), DiscretizedLogistic(2)]
)
def test_probabilities_of_all_images_sum_to_one(likelihood: Likelihood) -> None:
    assert likelihood.levels is not None
    x = pixel_values(likelihood.levels, 3)
    said = 3 * torch.randn(1, likelihood.width, 3, generator=torch.Generator().manual_seed(0))
    total = likelihood.log_prob(x, said.expand(len(x), -1, -1)).double().exp().sum()
    assert total.item() == pytest.approx(1.0, rel=1e-5)


def test_the_discretized_logistic_is_a_difference_of_logistic_distributions() -> None:
    likelihood = DiscretizedLogistic(256)
    level = torch.arange(256, dtype=torch.uint8)[:, None]
    for mean, log_scale in ((0.3, -1.0), (0.0, -3.0), (0.5, -6.9), (1.4, 0.5)):
        said = torch.tensor([[[mean - 0.5], [log_scale + 1.5]]]).expand(256, -1, -1)

        def cdf(x: Tensor, mean: float = mean, log_scale: float = log_scale) -> Tensor:
            return torch.sigmoid((x - mean) / math.exp(log_scale))

        edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 255
        edges[0], edges[-1] = -torch.inf, torch.inf
        mass = cdf(edges[1:]) - cdf(edges[:-1])
        got = likelihood.log_prob(level, said).double().exp()
        torch.testing.assert_close(got, mass, rtol=2e-3, atol=1e-9)
        assert got.sum().item() == pytest.approx(1.0, rel=1e-4)


def test_a_logistic_far_from_the_data_has_a_finite_gradient() -> None:
    likelihood = DiscretizedLogistic(256)
    said = torch.tensor([[[30.0], [-50.0]]], requires_grad=True)
    likelihood.log_prob(torch.tensor([[0]], dtype=torch.uint8), said).backward()
    assert said.grad is not None and bool(said.grad.isfinite().all()) and said.grad[0, 0, 0] < 0


@pytest.mark.parametrize("sigma", [0.3, None])
def test_the_gaussian_likelihood(sigma: float | None) -> None:
    likelihood = Gaussian(None, sigma)
    x, mean = torch.randn(5, 4), torch.randn(5, 4)
    expected = torch.distributions.Normal(mean, sigma or 1.0).log_prob(x).sum(dim=1)
    torch.testing.assert_close(likelihood.log_prob(x, mean.unsqueeze(1)), expected)
    assert likelihood.log_sigma.requires_grad == (sigma is None)


def test_a_learned_sigma_finds_the_residual() -> None:
    likelihood = Gaussian(None, None)
    x = 0.2 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (-likelihood.log_prob(x, torch.zeros(1000, 1, 4)).mean()).backward()
        optimizer.step()
    assert likelihood.log_sigma.exp().item() == pytest.approx(0.2, rel=0.03)


def test_what_encoders_see_and_decoders_expect() -> None:
    x = torch.tensor([[0, 1, 2, 3, 4]], dtype=torch.uint8)
    assert Categorical(5).features(x).tolist() == [[0.0, 0.25, 0.5, 0.75, 1.0]]
    assert Bernoulli(2).features(x[:, :2]).tolist() == [[0.0, 1.0]]
    said = torch.tensor([[[2.0], [0.0], [0.0]]])
    weight = math.exp(2) / (math.exp(2) + 2)
    assert Categorical(3).mean(said).item() == pytest.approx((1 - weight) / 2 * (0.5 + 1.0))
    assert Categorical(3).mode(said).item() == 0.0
    assert DiscretizedLogistic(5).mode(torch.tensor([[[0.12], [0.0]]])).item() == 0.5
    assert Bernoulli(2).mode(torch.tensor([[[-1.0, 1.0]]])).tolist() == [[0.0, 1.0]]


# --- autoregressive decoders


def test_row_gru_gives_a_probability_and_sees_only_rows_above() -> None:
    data = images((1, 3, 2), levels=2)
    model = made(data, kind="row-gru")
    z = torch.randn(1, 3)
    everything = pixel_values(2, 6).view(-1, 1, 3, 2)
    total = model.log_likelihood(everything, z.expand(len(everything), 3)).double().exp().sum()
    assert total.item() == pytest.approx(1.0, rel=1e-5)
    assert isinstance(model, RowGRUVAE)
    drawn = model.generate(z)[0]
    # the likeliest row given those above: no single row can be changed for the better with those below free
    for row in range(3):
        above = everything[(everything[:, 0, :row] == drawn[:, :row]).flatten(1).all(dim=1)]
        likelihood = model.log_likelihood(above, z.expand(len(above), 3)).double().exp()
        marginals = {
            pair: likelihood[(above[:, 0, row] == torch.tensor(pair)).all(dim=1)].sum().item()
            for pair in product((0, 1), repeat=2)
        }
        assert max(marginals, key=lambda pair: marginals[pair]) == tuple(drawn[0, row].int().tolist())


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_sentences_have_a_probability(cell: str) -> None:
    model = TextVAE(cell, 6, Posterior(2), latent_dim=2, hidden=4, embedding=3)
    # Over first tokens: every one but the last is followed by EOS, which the second factor sums over.
    x = torch.tensor([[token, end] for token in range(1, 6) for end in range(1, 6)])
    with torch.no_grad():
        model.decoder.to_logits.bias[0] = -1e9  # PAD is no target
    z = torch.randn(1, 2).expand(len(x), 2)
    assert model.log_likelihood(x, z).exp().sum().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_padding_changes_neither_posterior_nor_likelihood(cell: str) -> None:
    data = sentences()
    model = made(data, kind=cell)
    row = data.train[int(data.lengths(data.train).argmin())]
    cut = row[: int((row != PAD).sum())]
    assert len(cut) < len(row)
    z = torch.randn(1, 3)
    torch.testing.assert_close(model.encode(row[None]), model.encode(cut[None]))
    torch.testing.assert_close(model.log_likelihood(row[None], z), model.log_likelihood(cut[None], z))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_greedy_decoding_takes_the_likeliest_and_ends(cell: str) -> None:
    model = TextVAE(cell, 9, Posterior(2), latent_dim=2, hidden=8, embedding=4)
    z = 5 * torch.randn(50, 2)
    tokens = model.generate(z, length=12)
    assert tokens.shape[0] == 50 and tokens.shape[1] <= 12
    alternatives = torch.arange(2, 9)[:, None]  # PAD and BOS are never said
    likelihood = model.log_likelihood(alternatives, z[:1].expand(len(alternatives), 2))
    assert alternatives[likelihood.argmax()].item() == tokens[0, 0].item()
    ended = (tokens == EOS).cumsum(dim=1) - (tokens == EOS).long() > 0
    assert ((tokens == PAD) == ended).all(), "PAD after EOS and nowhere else"
    with torch.no_grad():
        model.decoder.to_logits.bias[EOS] = 1e3  # EOS at once
    assert model.generate(z).tolist() == [[EOS]] * 50


def test_word_dropout_hides_words_from_the_decoder_in_training_only() -> None:
    data = sentences()
    model = made(data, kind="gru", word_dropout=1.0)
    assert isinstance(model, TextVAE)
    x, z = data.train, torch.randn(len(data.train), 3)
    blind = model.log_likelihood(x, z)
    other = x.clone()
    # Another first word: with every input hidden, it cannot change what is said of the rest.
    inner = (torch.arange(x.shape[1]) == 0) & (x[:, 1:2] > UNK)
    other[inner] = UNK + 1
    change = model.log_likelihood(other, z) - blind
    first_only = model.log_likelihood(other[:, :1], z) - model.log_likelihood(x[:, :1], z)
    torch.testing.assert_close(change, first_only, rtol=1e-4, atol=1e-5)
    model.eval()
    assert not torch.allclose(
        model.log_likelihood(other, z) - model.log_likelihood(x, z), first_only, atol=1e-3
    )
    half = made(data, kind="gru", word_dropout=0.5)
    torch.manual_seed(3)
    once = half.log_likelihood(x, z)
    assert not torch.equal(once, half.log_likelihood(x, z)), "the words hidden are drawn anew"
    torch.manual_seed(3)
    assert torch.equal(once, half.log_likelihood(x, z)), "from torch's default generator"


# --- posteriors


@given(st.floats(1e-6, 20))
def test_the_largest_logvar_solves_the_equation_of_the_rate(delta: float) -> None:
    logvar = largest_logvar(delta)
    rate = 0.5 * (math.expm1(logvar) - logvar)
    assert logvar < 0 and delta <= rate <= delta * (1 + 4e-6)


def test_largest_logvar_by_hand() -> None:
    # 1/2 (e^-1 - 1 + 1) = 1/(2e); and near 0 the rate is logvar^2 / 4
    assert largest_logvar(0.5 / math.e) == pytest.approx(-1.0, rel=2e-6)
    assert largest_logvar(1e-6) == pytest.approx(-2e-3, rel=1e-3)


@given(
    st.floats(1e-3, 5),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=2),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_rate_of_a_delta_vae_never_falls_below_delta(
    delta: float, moments: list[float], dtype: torch.dtype
) -> None:
    head = Posterior(1, delta=delta)
    bounded = head(torch.tensor([moments], dtype=dtype))
    assert bounded.dtype == torch.float32
    rate = vk.gaussian_kl_packed(bounded)
    # the KL's own rounding: 2 ulp of logvar - 1
    assert rate.item() >= delta - 4e-7
    double = bounded.double()
    assert 0.5 * (torch.expm1(double[0, 1]) - double[0, 1] + double[0, 0] ** 2).item() >= delta


def test_the_bound_is_smooth_and_leaves_small_variances_alone() -> None:
    logvar = torch.tensor([-20.0, -1.0, 0.0, 5.0], requires_grad=True)
    bounded = committed(logvar, 0.15)
    bounded.sum().backward()
    assert bounded[0].item() == pytest.approx(-20.0, rel=1e-6)
    assert logvar.grad is not None and bool((logvar.grad > 0).all()), (
        "no value is out of the gradient's reach"
    )


def test_batch_normalised_means_commit_a_rate() -> None:
    head = Posterior(3, batch_norm=0.7)
    moments = torch.cat([0.1 * torch.randn(64, 3), torch.zeros(64, 3)], dim=1)
    with torch.no_grad():
        head.offset.copy_(torch.tensor([0.0, 0.5, -1.0]))
    mu, logvar = head(moments).chunk(2, dim=1)
    # up to the 1e-5 that BatchNorm adds to a variance of about 1e-2
    torch.testing.assert_close(mu.std(dim=0, correction=0), torch.full((3,), 0.7), rtol=1e-3, atol=0)
    torch.testing.assert_close(mu.mean(dim=0), head.offset.detach())
    _, rate = vk.gaussian_kl(mu, logvar, return_per_group=True)
    floor = (0.699**2 + head.offset.detach() ** 2) / 2
    assert bool((rate >= floor).all())
    torch.testing.assert_close(logvar, moments[:, 3:])
    assert head.gamma == 0.7 and [name for name, _ in head.named_parameters()] == ["offset"]


def test_batch_norm_per_channel_of_a_latent_with_positions() -> None:
    model = made(images(), kind="conv", latent_channels=2, batch_norm=0.7)
    mu, _ = model.moments(images().train).chunk(2, dim=1)
    assert mu.shape[1:] == (2, 2, 2)
    torch.testing.assert_close(mu.mean(dim=(0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-6)


# --- the ladder


def ladder(**options: Any) -> tuple[LadderVAE, Tensor]:
    data = images()
    model = made(data, kind="ladder", latent_dim=4, top_dim=2, **options).double()
    assert isinstance(model, LadderVAE)
    features = model.decoder.likelihood.features
    model.decoder.likelihood.features = lambda x: features(x).double()  # type: ignore[method-assign]
    with torch.no_grad():  # a prior that depends on z2, as after training
        model.decoder.prior[-1].weight.normal_()
        model.decoder.prior[-1].bias.normal_()
    return model, data.train


def normal_kl(mu: Tensor, logvar: Tensor, mp: Tensor, lp: Tensor) -> Tensor:
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    return torch.distributions.kl_divergence(q, torch.distributions.Normal(mp, (0.5 * lp).exp())).sum(dim=1)


class Recorded:
    """Takes mu + sd * eps with given eps, and keeps posterior and prior."""

    def __init__(self, eps: list[Tensor]) -> None:
        self.eps = eps
        self.layers: list[tuple[Tensor, tuple[Tensor, Tensor] | None]] = []

    def __call__(self, moments: Tensor, prior: Tensor | None = None) -> Tensor:
        mu, logvar = moments.chunk(2, dim=1)
        z = mu + (0.5 * logvar).exp() * self.eps[len(self.layers)]
        self.layers.append((moments, None if prior is None else prior.chunk(2, dim=1)))  # type: ignore[arg-type]
        return z


def test_the_posterior_of_the_lower_layer_joins_data_and_prior_by_precision() -> None:
    model, x = ladder()
    eps = [torch.randn(len(x), 2).double(), torch.randn(len(x), 4).double()]
    sample = Recorded(eps)
    model(x, sample)
    (top, none), (lower, prior) = sample.layers
    assert none is None and prior is not None
    z2 = top[:, :2] + (0.5 * top[:, 2:]).exp() * eps[0]
    m, logvar = model._up(x)[1].chunk(2, dim=1)
    mp, lp = model._prior(z2)
    torch.testing.assert_close(prior, (mp, lp))
    precision = (-logvar).exp() + (-lp).exp()
    mean = (m * (-logvar).exp() + mp * (-lp).exp()) / precision
    torch.testing.assert_close(lower, torch.cat([mean, -precision.log()], dim=1))


def test_u_is_the_lower_layer_relative_to_its_prior() -> None:
    """Fixed z2: the sample, the KL and the likelihood are the same in z1 and in u."""
    model, x = ladder()
    mu, logvar = model.encode(x)
    at_mean = Recorded([torch.zeros(len(x), 2).double(), torch.randn(len(x), 4).double()])  # z2 = mu2
    log_likelihood = model(x, at_mean)
    lower, prior = at_mean.layers[1]
    assert prior is not None
    kl_z1 = normal_kl(*lower.chunk(2, dim=1), *prior)
    zero = torch.zeros_like(mu[:, 2:])
    kl_u = normal_kl(mu[:, 2:], logvar[:, 2:], zero, zero)
    torch.testing.assert_close(kl_u, kl_z1)
    u = mu[:, 2:] + (0.5 * logvar[:, 2:]).exp() * at_mean.eps[1]
    z = torch.cat([mu[:, :2], u], dim=1)
    torch.testing.assert_close(model.log_likelihood(x, z), log_likelihood)


def test_under_the_prior_u_is_standard_normal_whatever_z2_is() -> None:
    model, _ = ladder()
    draw = torch.Generator().manual_seed(0)
    z2 = 2 * torch.randn(4000, 2, generator=draw, dtype=torch.float64)
    mp, lp = model._prior(z2)
    z1 = mp + (0.5 * lp).exp() * torch.randn(4000, 4, generator=draw, dtype=torch.float64)
    u = (z1 - mp) / (0.5 * lp).exp()
    joint = torch.cat([z2 / 2, u], dim=1)
    covariance = torch.cov(joint.T)
    torch.testing.assert_close(covariance, torch.eye(6).double(), rtol=0, atol=5 * math.sqrt(2 / 4000))
    torch.testing.assert_close(model._lower(torch.cat([z2, u], dim=1)), z1)


def test_the_flattened_posterior_gives_a_lower_bound_too() -> None:
    """Importance weights of both posteriors have the same mean, the marginal likelihood; so -NELBO of either
    is below it. Checked on one image with 50,000 samples."""
    model, x = ladder()
    x, draws = x[:1], 50_000
    many = x.expand(draws, *x.shape[1:])
    generator = torch.Generator().manual_seed(0)

    def eps(dims: int) -> Tensor:
        return torch.randn(draws, dims, generator=generator, dtype=torch.float64)

    def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return -0.5 * ((z - mu) ** 2 * (-logvar).exp() + logvar + math.log(2 * math.pi)).sum(dim=1)

    with torch.no_grad():
        # posteriors about as wide as the true one, which a weak decoder leaves near the prior: finite weights
        model.decoder.net[-1].weight.mul_(0.1)  # type: ignore[operator,union-attr]
        model.encoder.to_lower.bias[4:] += 4
        own = Recorded([eps(2), eps(4)])
        likelihood = model(many, own)
        weights = [likelihood]
        z = [
            m.chunk(2, dim=1)[0] + (0.5 * m.chunk(2, dim=1)[1]).exp() * e
            for (m, _), e in zip(own.layers, own.eps, strict=True)
        ]
        for (moments, prior), sample in zip(own.layers, z, strict=True):
            zero = torch.zeros_like(sample)
            mp, lp = prior or (zero, zero)
            weights.append(log_normal(sample, mp, lp) - log_normal(sample, *moments.chunk(2, dim=1)))
        ours = torch.stack(weights).sum(dim=0)

        mu, logvar = model.encode(many)
        flat = mu + (0.5 * logvar).exp() * eps(6)
        zero = torch.zeros_like(flat)
        flattened = (
            model.log_likelihood(many, flat) + log_normal(flat, zero, zero) - log_normal(flat, mu, logvar)
        )

    def marginal(w: Tensor) -> tuple[float, float]:
        """log of the mean weight, and its standard error."""
        weights = (w - w.max()).exp()
        error = weights.std() / weights.mean() / math.sqrt(draws)
        return (weights.mean().log() + w.max()).item(), error.item()

    (first, error), (second, other_error) = marginal(ours), marginal(flattened)
    assert error + other_error < 0.03
    assert first == pytest.approx(second, abs=4 * (error + other_error))
    assert ours.mean().item() < first and flattened.mean().item() < second


def test_the_ladder_commits_its_rate_relative_to_the_learned_prior() -> None:
    model, x = ladder(delta=0.3)
    _, logvar = model.encode(x)
    assert bool((logvar <= largest_logvar(0.3)).all())
    sample = Recorded([torch.randn(len(x), 2).double(), torch.zeros(len(x), 4).double()])
    model(x, sample)
    lower, prior = sample.layers[1]
    assert prior is not None
    per_dim = 0.5 * ((lower[:, 4:] - prior[1]).exp() - 1 - (lower[:, 4:] - prior[1]))
    assert per_dim.min().item() >= 0.3 - 1e-6


# --- the linear VAE


def test_the_optimum_of_probabilistic_pca_is_one_of_the_linear_vae() -> None:
    """W = U (L - sigma²)^½ over the eigenvalues above sigma², V = M^-1 W', D = sigma² M^-1, M = W'W + sigma²
    (Lucas et al. 2019): there the gradient of the ELBO is 0, dimensions of eigenvalues below sigma² have rate
    0, and the others have 1/2 log(eigenvalue / sigma²)."""
    draw = torch.Generator().manual_seed(0)
    eigenvalues, variance = torch.tensor([4.0, 2.0, 0.05], dtype=torch.float64), 0.25
    basis = torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=torch.float64)).Q
    white = torch.randn(400, 3, generator=draw, dtype=torch.float64)
    white = white - white.mean(dim=0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / 400)).T
    x = (white * eigenvalues.sqrt()) @ basis.T + 1.0
    data = Arrays("gaussian", x.float(), x[:8].float(), digest(x), levels=None)
    model = made(data, kind="linear", sigma=0.5, latent_dim=3).double()
    model.decoder.likelihood.features = lambda x: x  # type: ignore[union-attr,method-assign]
    model.inputs = torch.nn.Identity()  # V is of x itself
    scale = (eigenvalues - variance).clamp(min=0).sqrt()
    precision = scale**2 + variance
    with torch.no_grad():
        model.decoder.net.weight.copy_(basis * scale)  # type: ignore[union-attr]
        model.decoder.net.bias.fill_(1.0)  # type: ignore[union-attr]
        model.encoder.to_mu.weight.copy_((basis * (scale / precision)).T)  # type: ignore[union-attr]
        model.encoder.to_mu.bias.copy_(-model.encoder.to_mu.weight.sum(dim=1))  # type: ignore[union-attr]
        model.encoder.logvar.copy_(torch.log(variance / precision))  # type: ignore[union-attr]
    mu, logvar = model.encode(x)
    # the loss is quadratic in z: six points with the right first and second moments give its exact mean
    points = torch.cat([torch.eye(3), -torch.eye(3)]).double() * math.sqrt(3)
    nll = -torch.stack([model.log_likelihood(x, mu + (0.5 * logvar).exp() * e) for e in points]).mean()
    kl, rate = vk.gaussian_kl(mu, logvar, return_per_group=True)
    (nll + kl).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # 1e-7: log sigma was rounded to float32
            assert parameter.grad is not None and parameter.grad.abs().max().item() < 1e-7, name
    expected = 0.5 * torch.log(eigenvalues / variance).clamp(min=0)
    torch.testing.assert_close(rate, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["mlp", "conv", "row-gru", "ladder", "linear"])
@pytest.mark.parametrize("levels", [256, None])
def test_encoders_see_centred_and_scaled_inputs(kind: str, levels: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    x = 0.1 * torch.randn(2100, 3, 8, 8, generator=generator) + torch.rand(8, 8, generator=generator)
    x = (x.clamp(0, 1) * 255).to(torch.uint8) if levels else 1e4 * x
    likelihood = "auto" if kind == "linear" or levels is None else "discretized-logistic"
    model = build(
        combinations.resolve(
            Config(DataConfig("x"), ModelConfig(kind=kind, likelihood=likelihood, hidden=8, latent_dim=2)),  # type: ignore[arg-type]
            Arrays("x", x, x[:10], "", levels=levels),
        ).model,
        Arrays("x", x, x[:10], "", levels=levels),
    )
    seen = []
    first = next(part for part in model.encoder.modules() if not list(part.children()))
    first.register_forward_hook(lambda module, given, said: seen.append(given[0]))
    model.eval().encode(x)
    given = seen[0].reshape(len(x), -1).double()
    torch.testing.assert_close(given.mean(dim=0), torch.zeros(192).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(given.var(dim=0).mean(), torch.tensor(1.0).double(), atol=2e-3, rtol=0)


def test_columns_are_scaled_each_by_itself_and_constant_ones_are_left() -> None:
    x = torch.randn(500, 3) * torch.tensor([1e3, 1e-2, 0.0]) + torch.tensor([5.0, 0.0, 7.0])
    data = Arrays("x", x, x[:50], "", levels=None)
    model = build(combinations.resolve(Config(DataConfig("x")), data).model, data)
    given = model.inputs(x)  # type: ignore[operator]
    torch.testing.assert_close(given.std(dim=0, correction=0), torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize(("side", "kind"), [(15, "mlp"), (16, "conv")])
def test_images_of_16x16_take_the_convolutional_model(side: int, kind: str) -> None:
    x = torch.zeros(50, 1, side, 16, dtype=torch.uint8)
    data = Arrays("x", x, x, "", levels=2)
    assert combinations.resolve(Config(DataConfig("x")), data).model.kind == kind
