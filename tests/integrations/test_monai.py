"""MONAI: its autoencoder, the same loss and gradients given the same noise."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from libraries import need, noise_of_seed, same_gradients, within_rounding

need("monai")

from monai.data import MetaTensor
from monai.networks.nets import AutoencoderKL, SPADEAutoencoderKL

from vaekernels.integrations import monai as fused


@pytest.fixture
def patched() -> Iterator[None]:
    fused.patch()
    yield
    fused.unpatch()


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoencoderKL(
        spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 8), latent_channels=2,
        num_res_blocks=1, norm_num_groups=4, attention_levels=(False, False),
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    )  # fmt: skip


def test_loss_and_gradients(monkeypatch):
    theirs, x = model(), torch.randn(3, 1, 16, 16)
    ours = copy.deepcopy(theirs)
    eps = noise_of_seed(5, theirs.encode(x)[0])
    with monkeypatch.context() as given:
        given.setattr(torch, "randn_like", lambda *a, **k: eps)
        out, mu, sigma = theirs(x)
    by_hand = 0.5 * (mu.square() + sigma.square() - torch.log(sigma.square()) - 1).sum((1, 2, 3))
    expected = (out - x).square().mean() + 1e-3 * by_hand.mean()
    fused.patch()
    try:
        torch.manual_seed(5)
        out, mu, sigma = ours(x)
    finally:
        fused.unpatch()
    got = (out - x).square().mean() + 1e-3 * fused.kl_loss(mu, sigma)
    within_rounding(got, expected)
    expected.backward()
    got.backward()
    same_gradients(ours, theirs)


def test_patch_and_unpatch():
    theirs = {each: each.sampling for each in (AutoencoderKL, SPADEAutoencoderKL)}
    for _ in range(2):
        fused.patch()
        assert all(each.sampling is not theirs[each] for each in theirs)
    for _ in range(2):
        fused.unpatch()
        assert all(each.sampling is theirs[each] for each in theirs)


def test_a_meta_tensor_stays_one(patched):
    x = MetaTensor(torch.randn(2, 1, 16, 16), meta={"filename": "a"})
    out, mu, sigma = model()(x)
    assert isinstance(out, MetaTensor) and out.meta["filename"] == "a"
    assert out.requires_grad and not isinstance(fused.kl_loss(mu, sigma), MetaTensor)
