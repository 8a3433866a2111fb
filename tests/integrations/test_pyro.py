"""Pyro: a VAE as model and guide, the same loss and gradients given the same noise."""

from __future__ import annotations

import copy

import pytest
import torch
from libraries import need, noise_of_seed, run_example, same_gradients, within_rounding

pyro = need("pyro")

import pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from vaekernels.integrations.pyro import Normal


class PyroVAE(torch.nn.Module):
    def __init__(self, normal: type[dist.Normal]) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(20, 8), torch.nn.Linear(4, 20)
        self.normal = normal

    def model(self, x: torch.Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            prior = self.normal(x.new_zeros(len(x), 4), x.new_ones(len(x), 4)).to_event(1)
            z = pyro.sample("latent", prior)
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, logvar = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", self.normal(loc, torch.exp(0.5 * logvar)).to_event(1))


def loss(vae: PyroVAE, x: torch.Tensor, elbo: Trace_ELBO) -> torch.Tensor:
    value = elbo.differentiable_loss(vae.model, vae.guide, x)
    value.backward()
    return value.detach()


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])
@pytest.mark.parametrize("prior", [Normal, dist.Normal], ids=["our prior", "Pyro's prior"])
def test_loss_and_gradients(elbo, prior, monkeypatch):
    x = (torch.rand(16, 20) < 0.5).float()
    torch.manual_seed(0)
    pyro.clear_param_store()
    theirs = PyroVAE(dist.Normal)
    ours = copy.deepcopy(theirs)
    eps = noise_of_seed(6, torch.zeros(16, 4))
    with monkeypatch.context() as given:
        given.setattr(torch.distributions.normal, "_standard_normal", lambda *a, **k: eps)
        expected = loss(theirs, x, elbo())
    pyro.clear_param_store()
    torch.manual_seed(6)
    # The guide draws; the prior only gives densities or its parameters.
    ours.normal = lambda loc, scale: (Normal if loc.requires_grad else prior)(loc, scale)
    got = loss(ours, x, elbo())
    within_rounding(got, expected)
    same_gradients(ours, theirs)


def test_svi_trains():
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae, x = PyroVAE(Normal), (torch.rand(64, 20) < torch.linspace(0.02, 0.98, 20)).float()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]


def test_it_is_a_distribution_of_pyro():
    normal = Normal(torch.zeros(4), torch.ones(4))
    assert isinstance(normal, dist.Normal)
    assert normal.expand([3, 4]).to_event(1).event_shape == (4,)
    assert type(normal.expand([3, 4])) is Normal
    assert normal.mask(torch.tensor(True)).shape() == (4,)
    assert pyro.sample("z", normal.expand_by([2])).shape == (2, 4)


def test_the_example():
    assert "ELBO" in run_example("pyro_vae.py")


def test_a_forecaster_takes_it_as_noise():
    """pyro.contrib.forecast has a table of distributions by their exact classes."""
    from pyro.contrib.forecast import Forecaster, ForecastingModel

    class Model(ForecastingModel):
        def model(self, zero_data, covariates):
            scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0).expand([1]).to_event(1))
            self.predict(Normal(0.0, scale), zero_data)

    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    data = torch.randn(20, 1)
    forecaster = Forecaster(Model(), data, torch.zeros(20, 0), num_steps=2, log_every=0)
    assert forecaster(data, torch.zeros(25, 0), num_samples=3).shape == (3, 5, 1)
