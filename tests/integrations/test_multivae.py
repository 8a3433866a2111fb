"""multivae: its divergence and its samples, and a model on them."""

from __future__ import annotations

import importlib

import pytest
import torch
from libraries import noise_of_seed, skip, within_rounding

try:
    import multivae.models  # noqa: F401
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
    skip("the integration of multivae", f"{error}; install it with a torchvision that fits this torch")

from multivae.models.base import base_utils

from vaekernels.integrations import multivae as fused

KL, SAMPLE = base_utils.kl_divergence, base_utils.rsample_from_gaussian


@pytest.mark.parametrize("prior_shape", [(5, 4), (1, 4), (4,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_divergence(dtype, prior_shape):
    q = [torch.randn(5, 4, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]
    p = [torch.randn(prior_shape, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]
    ours, theirs = fused.kl_divergence(*q, *p), KL(*q, *p)
    within_rounding(ours, theirs)
    if dtype is not torch.bfloat16:
        for a, b in zip(
            torch.autograd.grad(ours.sum(), (*q, *p)),
            torch.autograd.grad(theirs.sum(), (*q, *p)),
            strict=True,
        ):
            within_rounding(a, b)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("shape", [(5, 4), (4,)])
def test_samples(shape, n, flatten, monkeypatch):
    mu, log_var = torch.randn(shape), torch.randn(shape)
    eps = noise_of_seed(3, torch.zeros(shape if n == 1 else (n, *shape)))
    ours = fused.rsample_from_gaussian(mu, log_var, N=n, flatten=flatten)
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", lambda *a, **k: eps)
    within_rounding(ours, SAMPLE(mu, log_var, N=n, flatten=flatten))
    mean = fused.rsample_from_gaussian(mu, log_var, N=n, return_mean=True, flatten=flatten)
    assert torch.equal(mean, SAMPLE(mu, log_var, N=n, return_mean=True, flatten=flatten))


def test_patch_and_unpatch_rebind_every_module_of_multivae():
    module = importlib.import_module("multivae.models.mvae.mvae_model")
    for _ in range(2):
        fused.patch()
        assert module.rsample_from_gaussian is base_utils.rsample_from_gaussian is fused.rsample_from_gaussian
        assert base_utils.kl_divergence is fused.kl_divergence
    for _ in range(2):
        fused.unpatch()
        assert module.rsample_from_gaussian is base_utils.rsample_from_gaussian is SAMPLE
        assert base_utils.kl_divergence is KL
