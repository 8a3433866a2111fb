"""On a linear VAE the number of active dimensions and their rates are known, and the diagnosis must agree."""

from __future__ import annotations

import pytest
import torch
from linear_vae import LinearVAE
from planted import generator, rotation
from sklearn import datasets
from torch import Tensor

from vaekernels import collapse


def spectrum(values: list[float], seed: int, n: int = 3000) -> Tensor:
    """Gaussian data with these eigenvalues, exactly."""
    rng = generator(seed)
    white = torch.linalg.qr(torch.randn(n, len(values), generator=rng)).Q * n**0.5
    return (white * torch.tensor(values).sqrt()) @ rotation(len(values), rng).T


def standardised(values: object, n: int | None = None) -> Tensor:
    x = torch.as_tensor(values, dtype=torch.float32)
    x = x[torch.randperm(len(x), generator=generator(0))][:n]
    x = x[:, x.std(dim=0) > 0]
    return (x - x.mean(dim=0)) / x.std(dim=0)


# name -> (data, latent dimensions, sigma^2, beta): none has an eigenvalue within 5% of beta sigma^2
DATA = {
    "geometric": (lambda: spectrum([8 * 0.6**i for i in range(12)], 1), 8, 0.5, 1.0),
    "power law": (lambda: spectrum([4 / i**1.5 for i in range(1, 17)], 2), 8, 0.3, 1.0),
    "spiked": (lambda: spectrum([5.0, 4.0, 3.0] + [0.4] * 12, 3), 6, 0.5, 2.0),
    "digits": (lambda: standardised(datasets.load_digits().data) / 3, 10, 0.36, 1.0),
    "breast cancer": (lambda: standardised(datasets.load_breast_cancer().data), 8, 0.5, 2.0),
    "wine": (lambda: standardised(datasets.load_wine().data), 8, 0.9, 2.0),
}


@pytest.mark.parametrize("name", DATA)
def test_the_optimum_in_closed_form(name: str) -> None:
    """The trained model in the limit: the data's own moments, so that rates are exact but for rounding."""
    make, latent, sigma2, beta = DATA[name]
    x = make()
    model = LinearVAE(x.shape[1], latent, sigma2)
    truth = model.set_to_optimum(x, beta)
    ratio = truth.eigenvalues / truth.noise
    assert 0 < truth.active < latent and not bool(((ratio > 0.95) & (ratio < 1.05)).any()), ratio

    report = collapse.diagnose(model.encode, model.log_likelihood, x, n=len(x), k=16, progress=False)
    used = [dim.state in ("active", "low-rate") for dim in report.dims]
    assert used == (truth.rates > 0).tolist(), [dim.reason for dim in report.dims]
    for dim, rate in zip(report.dims, truth.rates.tolist(), strict=True):
        assert dim.rate.value == pytest.approx(rate, rel=0.02, abs=1e-5)
    total = report.metrics["rate"]
    assert total is not None and total.value == pytest.approx(truth.rates.sum().item(), rel=0.02)
    assert all(dim.state == "pruned" for dim, active in zip(report.dims, used, strict=True) if not active)
    units = report.metrics["active_units"]
    assert units is not None and units.value == truth.active


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_a_trained_one(name: str) -> None:
    """Adam on `vk.sample_kl` finds that optimum, up to the order of the dimensions."""
    torch.set_num_threads(1)
    make, latent, sigma2, beta = DATA[name]
    x = make()
    model = LinearVAE(x.shape[1], latent, sigma2)
    truth = LinearVAE(x.shape[1], latent, sigma2).set_to_optimum(x, beta)
    model.fit(x, beta, steps=8000)
    report = collapse.diagnose(model.encode, model.log_likelihood, x, n=len(x), k=16, progress=False)
    rates = sorted((dim.rate.value for dim in report.dims), reverse=True)
    assert sum(dim.state in ("active", "low-rate") for dim in report.dims) == truth.active
    # 0.002 nats: where a dimension is nearly not worth its rate, the loss is flat and z's noise moves it
    expected = truth.rates[: truth.active].tolist()
    assert rates[: truth.active] == pytest.approx(expected, rel=0.02, abs=0.002)
    assert sum(rates) == pytest.approx(sum(expected), rel=0.02)
    assert max(rates[truth.active :]) < 0.01
