"""pythae: its three Gaussian VAEs, the same loss and gradients given the same noise."""

from __future__ import annotations

import copy

import pytest
import torch
from libraries import need, noise_of_seed, run_example, same_gradients, within_rounding

theirs = need("pythae.models")

import vaekernels as vk
from vaekernels.integrations import pythae as fused

CASES = {
    "VAE": (theirs.VAE, theirs.VAEConfig, fused.VAE, {}),
    "BetaVAE": (theirs.BetaVAE, theirs.BetaVAEConfig, fused.BetaVAE, {"beta": 3.5}),
    "DisentangledBetaVAE": (
        theirs.DisentangledBetaVAE,
        theirs.DisentangledBetaVAEConfig,
        fused.DisentangledBetaVAE,
        {"beta": 3.5, "C": 2.0, "warmup_epoch": 5},
    ),
}


def pair(name: str, kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    cls, config_cls, ours_cls, options = CASES[name]
    config = config_cls(input_dim=(1, 8, 8), latent_dim=6, reconstruction_loss=kind, **options)
    torch.manual_seed(0)
    model, ours = cls(config), ours_cls(copy.deepcopy(config))
    ours.load_state_dict(model.state_dict())
    return model, ours


@pytest.mark.parametrize("kind", ["mse", "bce"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name, kind):
    model, ours = pair(name, kind)
    inputs = {"data": torch.rand(16, 1, 8, 8)}
    eps = noise_of_seed(5, torch.zeros(16, 6))
    model._sample_gauss = lambda mu, std: (mu + eps * std, eps)
    options = {"epoch": 2} if name.startswith("Dis") else {}
    expected, got = model(inputs, **options), ours(inputs, **options)
    assert set(got) == set(expected)
    for key in expected:
        within_rounding(got[key], expected[key])
    expected.loss.backward()
    got.loss.backward()
    same_gradients(ours, model)


def with_loss_function(base: type) -> type:
    class Weighted(base):
        def loss_function(self, *arguments):
            _, reconstruction, rate = super().loss_function(*arguments)
            return reconstruction + 100.0 * rate, reconstruction, rate

    return Weighted


def with_sample_gauss(base: type) -> type:
    class Fixed(base):
        def _sample_gauss(self, mu, std):
            return mu, torch.zeros_like(std)

    return Fixed


def with_both_on_the_object(base: type) -> type:
    class Replaced(base):
        def __init__(self, config):
            super().__init__(config)
            self._sample_gauss = lambda mu, std: (mu + std, torch.ones_like(std))

    return Replaced


@pytest.mark.parametrize("override", [with_loss_function, with_sample_gauss, with_both_on_the_object])
@pytest.mark.parametrize("name", CASES)
def test_a_subclass_that_overrides_a_method_is_asked(name, override):
    cls, config_cls, ours_cls, options = CASES[name]
    config = config_cls(input_dim=(1, 8, 8), latent_dim=6, **options)
    model, ours = override(cls)(config), override(ours_cls)(config)
    ours.load_state_dict(model.state_dict())
    inputs = {"data": torch.rand(16, 1, 8, 8)}
    if override is with_loss_function:
        eps = noise_of_seed(5, torch.zeros(16, 6))
        torch.nn.Module.__setattr__(model, "_sample_gauss", lambda mu, std: (mu + eps * std, eps))
    expected, got = model(inputs), ours(inputs)
    for key in expected:
        within_rounding(got[key], expected[key])
    expected.loss.backward()
    got.loss.backward()
    same_gradients(ours, model)


def test_free_bits_reach_a_subclass_through_super():
    Weighted = with_loss_function(fused.VAE)
    config = theirs.VAEConfig(input_dim=(1, 8, 8), latent_dim=6)
    model, inputs = Weighted(config, free_bits=5.0), {"data": torch.rand(16, 1, 8, 8)}
    loss, reconstruction, _ = fused.VAE.loss_function(
        model, *(torch.rand(16, 64),) * 2, *(torch.zeros(16, 6),) * 2, None
    )
    assert loss.item() == pytest.approx(reconstruction.item() + 5.0 * 6)
    assert model(inputs).loss.isfinite()


@pytest.mark.parametrize("name", CASES)
def test_the_loss_functions_alone(name):
    model, ours = pair(name, "mse")
    arguments = [torch.rand(16, 64), torch.rand(16, 64), torch.randn(16, 6), torch.randn(16, 6), None]
    arguments += [2] if name.startswith("Dis") else []
    for a, b in zip(ours.loss_function(*arguments), model.loss_function(*arguments), strict=True):
        within_rounding(a, b)


def test_free_bits_are_in_the_loss_and_not_in_the_rate():
    _, ours = pair("VAE", "mse")
    floored = fused.VAE(ours.model_config, free_bits=5.0)
    floored.load_state_dict(ours.state_dict())
    inputs = {"data": torch.rand(16, 1, 8, 8)}
    torch.manual_seed(1)
    plain = ours(inputs)
    torch.manual_seed(1)
    out = floored(inputs)
    assert torch.equal(out.reg_loss, plain.reg_loss)
    assert out.loss.item() == pytest.approx(plain.recon_loss.item() + 5.0 * 6)


@pytest.mark.parametrize("examples", [16, 1000])
def test_the_loss_of_their_beta_tcvae(examples):
    """With minibatch weights. Their stratified ones give the own posterior's weight to the batch's first."""
    config = theirs.BetaTCVAEConfig(
        input_dim=(1, 8, 8), latent_dim=6, alpha=1.5, beta=6.0, gamma=0.5, use_mss=False
    )
    model = theirs.BetaTCVAE(config)
    torch.manual_seed(0)
    x = torch.rand(16, 64)
    mu, log_var, eps = (torch.randn(16, 6) for _ in range(3))
    found = []
    for ours in (False, True):
        leaves = [t.clone().requires_grad_() for t in (mu + torch.exp(log_var / 2) * eps, mu, log_var)]
        if ours:
            parts = vk.kl_decomposition(*leaves, log_weight=examples)
            weighed = zip((1.5, 6.0, 0.5), parts, strict=True)
            rate = torch.stack([weight * part for weight, part in weighed]).sum()
        else:
            _, _, rate = model.loss_function(x, x, *leaves[1:], leaves[0], examples)
        found.append([rate.detach(), *torch.autograd.grad(rate, leaves)])
    for theirs_, ours_ in zip(*found, strict=True):
        within_rounding(ours_, theirs_)


def test_their_trainer_their_checkpoint_their_likelihood(tmp_path):
    from pythae.pipelines import TrainingPipeline
    from pythae.trainers import BaseTrainerConfig

    _, ours = pair("BetaVAE", "mse")
    config = BaseTrainerConfig(
        output_dir=str(tmp_path),
        num_epochs=2,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        no_cuda=True,
    )
    data = torch.rand(64, 1, 8, 8)
    before = ours.encoder.embedding.weight.clone()
    TrainingPipeline(model=ours, training_config=config)(train_data=data, eval_data=data)
    assert not torch.equal(before, ours.encoder.embedding.weight)
    (folder,) = tmp_path.glob("*/final_model")
    loaded = theirs.AutoModel.load_from_folder(str(folder))
    assert type(loaded) is theirs.BetaVAE and loaded.beta == 3.5
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    assert torch.isfinite(torch.tensor(ours.get_nll(data[:2], n_samples=10, batch_size=10)))


def test_an_unknown_reconstruction_loss_is_an_error():
    with pytest.raises(ValueError, match="must be 'mse' or 'bce', got 'l1'"):
        fused.reconstruction_loss(torch.zeros(2, 3), torch.zeros(2, 3), "l1")


def test_the_example():
    assert "reg_loss" in run_example("pythae_vae.py")
