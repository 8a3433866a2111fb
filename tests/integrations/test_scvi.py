"""scvi-tools: its models, the same loss and gradients given the same noise."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from libraries import need, run_example, same_gradients, within_rounding

scvi = need("scvi")

from torch.distributions import kl_divergence

import vaekernels as vk
from vaekernels.integrations import scvi as fused

MODELS = {
    "SCVI": (scvi.model.SCVI, {}, {}),
    "SCVI, library size latent": (scvi.model.SCVI, {}, {"use_observed_lib_size": False}),
    "SCVI, logistic normal": (scvi.model.SCVI, {}, {"latent_distribution": "ln"}),
    "LinearSCVI": (scvi.model.LinearSCVI, {}, {}),
    "SCANVI": (scvi.model.SCANVI, {"labels_key": "labels", "unlabeled_category": "label_0"}, {}),
    "TOTALVI": (scvi.model.TOTALVI, {"protein_expression_obsm_key": "protein_expression"}, {}),
    "PEAKVI": (scvi.model.PEAKVI, {}, {}),
}


@pytest.fixture
def patched() -> Iterator[None]:
    fused.patch()
    yield
    fused.unpatch()


def model(name: str) -> Any:
    cls, keys, options = MODELS[name]
    torch.manual_seed(0)
    scvi.settings.seed = 0
    adata = scvi.data.synthetic_iid(batch_size=32, n_genes=20, n_proteins=5)
    cls.setup_anndata(adata, batch_key="batch", **keys)
    return cls(adata, **options)


def batch(owner: Any) -> dict[str, torch.Tensor]:
    return next(iter(scvi.dataloaders.AnnDataLoader(owner.adata_manager, batch_size=64)))


def forward(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    """Outputs of inference, of the generative model, and the loss; dropout and noise from one seed."""
    torch.manual_seed(7)
    return module(tensors)


def noise_of_philox(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What torch's Normal asks for, from where ours takes it."""
    zero = torch.zeros(shape, dtype=dtype, device=device)
    return vk.reparameterize(zero, zero)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name, monkeypatch):
    owner = model(name)
    theirs, ours, tensors = owner.module.train(), copy.deepcopy(owner.module), batch(owner)
    with monkeypatch.context() as given:
        given.setattr(torch.distributions.normal, "_standard_normal", noise_of_philox)
        inference, _, expected = forward(theirs, tensors)
    fused.patch()
    try:
        mine, _, got = forward(ours, tensors)
    finally:
        fused.unpatch()
    drawn = [v for v in mine.values() if isinstance(v, torch.distributions.Normal)]
    assert drawn and all(type(v) is fused.Normal for v in drawn)
    within_rounding(mine["z"], inference["z"])
    within_rounding(got.loss, expected.loss)
    assert set(got.kl_local) == set(expected.kl_local)
    for key, value in expected.kl_local.items():  # a number for each cell
        within_rounding(got.kl_local[key], value)
    expected.loss.backward()
    got.loss.backward()
    same_gradients(ours, theirs)


def test_the_kl_of_each_cell(patched):
    owner = model("SCVI")
    inference, generative, losses = forward(owner.module, batch(owner))
    posterior = inference["qz"]
    assert type(posterior) is fused.Normal and type(generative["pz"]) is scvi.distributions.Normal
    mean, sd = posterior.loc.double(), posterior.scale.double()
    exact = 0.5 * (mean.square() + sd.square() - 1 - 2 * sd.log()).sum(1)
    torch.testing.assert_close(losses.kl_local["kl_divergence_z"], exact.float(), rtol=1e-6, atol=0)
    assert torch.equal(losses.kl_local["kl_divergence_z"], kl_divergence(posterior, generative["pz"]).sum(1))


def test_patch_and_unpatch_rebind_every_module_of_scvi():
    from scvi.external.contrastivevi import _module as contrastive
    from scvi.module import _totalvae
    from scvi.nn import _base_components

    modules = (_base_components, _totalvae, contrastive)
    for _ in range(2):
        fused.patch()
        assert {m.Normal for m in modules} == {fused.Normal}
        assert torch.distributions.Normal is not fused.Normal
    owner = model("SCVI")
    for _ in range(2):
        fused.unpatch()
        assert {m.Normal for m in modules} == {torch.distributions.Normal}
    inference, _, _ = forward(owner.module, batch(owner))
    assert type(inference["qz"]) is torch.distributions.Normal


def test_a_module_that_says_dist_normal():
    pytest.importorskip("scvi.external.cytovi", reason="scvi-tools below 1.4 has no such module")
    from scvi.external.cytovi import _model
    from scvi.external.mrvi_torch import _module

    for module in (_model, _module):
        assert module.dist is torch.distributions
        for _ in range(2):
            fused.patch()
            assert module.dist.Normal is fused.Normal
            assert module.dist.Categorical is torch.distributions.Categorical
        for _ in range(2):
            fused.unpatch()
            assert module.dist is torch.distributions


def test_their_trainer_and_their_readouts(patched):
    owner = model("SCVI")
    owner.train(max_epochs=15, accelerator="cpu", batch_size=32, enable_progress_bar=False)
    elbo = owner.history["elbo_train"].to_numpy().ravel()  # negative, nats per cell
    assert elbo[-1] < elbo[0]
    assert owner.get_latent_representation().shape == (64, 10)
    assert owner.get_normalized_expression(n_samples=2, return_mean=True).shape == (64, 20)
    assert torch.isfinite(torch.as_tensor(owner.get_marginal_ll(n_mc_samples=4))).all()


def test_the_example():
    assert "elbo" in run_example("scvi_vae.py")
