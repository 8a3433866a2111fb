"""diffusers: the same loss and gradients given the same noise, and the right numbers where its class errs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from libraries import need, noise_of_seed, run_example, same_gradients, within_rounding

need("diffusers")

import diffusers
from diffusers.models.autoencoders import vae as diffusers_vae

from vaekernels.distributions import DiagonalGaussian
from vaekernels.integrations import diffusers as fused

Theirs = fused.Original


@pytest.fixture
def patched() -> Iterator[None]:
    fused.patch()
    yield
    fused.unpatch()


def image_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def video_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def loss(model: torch.nn.Module, x: torch.Tensor, kl_axes: tuple[int, ...]) -> torch.Tensor:
    posterior = model.encode(x).latent_dist
    z = posterior.sample()
    mean, logvar = posterior.mean, posterior.logvar
    # On video the sum by hand, as diffusers' own leaves an axis out.
    kl = posterior.kl() if len(kl_axes) == 3 else 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(kl_axes)
    return (model.decode(z).sample - x).square().mean() + 1e-4 * kl.mean()


@pytest.mark.parametrize("kind", ["image", "video"])
def test_loss_and_gradients_of_an_autoencoder(kind, monkeypatch):
    model = image_model() if kind == "image" else video_model()
    x = torch.randn((2, 3, 32, 32) if kind == "image" else (1, 3, 8, 16, 16)).clamp(-1, 1)
    latent = model.encode(x).latent_dist.mean
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    eps = noise_of_seed(7, latent)
    with monkeypatch.context() as given:
        given.setattr(diffusers_vae, "randn_tensor", lambda *args, **kwargs: eps)
        expected = loss(theirs, x, tuple(range(1, latent.ndim)))
    expected.backward()
    fused.patch()
    try:
        assert type(ours.encode(x).latent_dist) is fused.DiagonalGaussianDistribution
        torch.manual_seed(7)
        posterior = ours.encode(x).latent_dist
        z, kl = posterior.sample_kl()
        got = (ours.decode(z).sample - x).square().mean() + 1e-4 * kl.mean()
        got.backward()
    finally:
        fused.unpatch()
    within_rounding(got, expected)
    same_gradients(ours, theirs)


def test_forward_with_sampling_is_fused(patched, monkeypatch):
    model, x = image_model(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(3)
    out = model(x, sample_posterior=True).sample
    torch.manual_seed(3)
    assert torch.equal(out, model.decode(model.encode(x).latent_dist.sample()).sample)
    eps = noise_of_seed(3, model.encode(x).latent_dist.mean)
    fused.unpatch()
    monkeypatch.setattr(diffusers_vae, "randn_tensor", lambda *args, **kwargs: eps)
    within_rounding(out, model(x, sample_posterior=True).sample)


def test_patch_and_unpatch_rebind_every_module_of_diffusers():
    from diffusers.models.autoencoders import autoencoder_kl, autoencoder_kl_wan

    modules = (diffusers_vae, autoencoder_kl, autoencoder_kl_wan)
    for _ in range(2):
        fused.patch()
        assert {m.DiagonalGaussianDistribution for m in modules} == {fused.DiagonalGaussianDistribution}
    posterior = autoencoder_kl.DiagonalGaussianDistribution(torch.randn(2, 8, 3, 3))
    assert isinstance(posterior, Theirs) and isinstance(posterior, DiagonalGaussian)
    for _ in range(2):
        fused.unpatch()
        assert {m.DiagonalGaussianDistribution for m in modules} == {Theirs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_number_is_that_of_their_class(dtype, monkeypatch):
    t, other = (torch.randn(3, 8, 4, 5, dtype=dtype).requires_grad_() for _ in range(2))
    theirs, ours = Theirs(t), DiagonalGaussian(t)
    sample = torch.randn(3, 4, 4, 5, dtype=dtype)
    for name in ("mean", "logvar", "std", "var"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    eps = noise_of_seed(1, sample)
    monkeypatch.setattr(diffusers_vae, "randn_tensor", lambda *args, **kwargs: eps)
    for a, b in (
        (ours.sample(), theirs.sample()),
        (ours.mode(), theirs.mode()),
        (ours.kl(), theirs.kl()),
        (ours.kl(Theirs(other)), theirs.kl(Theirs(other))),
        (ours.kl(DiagonalGaussian(other)), theirs.kl(Theirs(other))),
        (ours.nll(sample), theirs.nll(sample)),
        (ours.nll(sample, [1]), theirs.nll(sample, [1])),
    ):
        within_rounding(a, b)
        for x, y in zip(
            torch.autograd.grad(a.sum(), (t, other), allow_unused=True, retain_graph=True),
            torch.autograd.grad(b.sum(), (t, other), allow_unused=True, retain_graph=True),
            strict=True,
        ):
            assert (x is None) == (y is None)
            if x is not None:
                within_rounding(x, y)


def test_shapes_on_which_their_class_errs():
    with pytest.raises(IndexError):
        Theirs(torch.zeros(5, 8)).kl()
    vector = torch.full((5, 8), 0.0)
    vector[:, :4] = 2.0  # 2 nats an element
    assert DiagonalGaussian(vector).kl().tolist() == [8.0] * 5
    video = torch.zeros(2, 4, 3, 5, 7)
    video[:, :2] = 2.0
    assert Theirs(video).kl().shape == (2, 7)  # a column of the picture each
    assert DiagonalGaussian(video).kl().tolist() == [2.0 * 2 * 3 * 5 * 7] * 2
    close = torch.tensor([0.0, 1e-4]).view(1, 2, 1, 1)
    assert Theirs(close).kl().item() != pytest.approx(0.25e-8, rel=0.1)
    assert DiagonalGaussian(close).kl().item() == pytest.approx(0.25e-8, rel=1e-4)
    half = torch.tensor([0.0, 0.1]).view(1, 2, 1, 1).bfloat16()
    assert DiagonalGaussian(half).kl().item() == pytest.approx(0.5 * 0.00517, rel=0.01)


def test_the_example():
    assert "KL" in run_example("diffusers_autoencoder.py")
