"""torchrl: Dreamer's loss of the world model, the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from libraries import need, within_rounding

need("torchrl.objectives")

from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.objectives import DreamerModelLoss

from vaekernels.integrations import torchrl as fused

MOMENTS = ("prior_mean", "prior_std", "posterior_mean", "posterior_std")


class Latent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moments = torch.nn.Linear(6, 4 * 5)

    def forward(self, x):
        a, b, c, d = self.moments(x).chunk(4, -1)
        return a, torch.nn.functional.softplus(b) + 0.1, c, torch.nn.functional.softplus(d) + 0.1


def world_model() -> TensorDictSequential:
    torch.manual_seed(0)
    latent = TensorDictModule(Latent(), [("next", "x")], [("next", name) for name in MOMENTS])
    decoder = TensorDictModule(
        lambda z: z[..., None, None].expand(*z.shape, 2, 2),
        [("next", "posterior_mean")],
        [("next", "reco_pixels")],
    )
    reward = TensorDictModule(lambda z: z[..., :1], [("next", "posterior_mean")], [("next", "reward")])
    return TensorDictSequential(TensorDictSequential(latent, decoder), reward)


@pytest.mark.parametrize("free_nats", [0, 1, 3, 50])
@pytest.mark.parametrize("global_average", [False, True])
@pytest.mark.parametrize("delayed_clamp", [False, True])
def test_the_loss_and_its_gradients(delayed_clamp, global_average, free_nats):
    options = {"delayed_clamp": delayed_clamp, "global_average": global_average, "free_nats": free_nats}
    data = TensorDict(
        {
            "next": {
                "x": torch.randn(4, 3, 6),
                "reward": torch.randn(4, 3, 1),
                "pixels": torch.rand(4, 3, 5, 2, 2),
            }
        },
        [4, 3],
    )
    found = []
    for cls in (DreamerModelLoss, fused.DreamerModelLoss):
        loss = cls(world_model(), **options)
        losses, _ = loss(data.clone())
        sum(losses.values()).sum().backward()
        found.append((losses["loss_model_kl"], [p.grad for p in loss.parameters()]))
    within_rounding(found[1][0], found[0][0])
    for a, b in zip(found[1][1], found[0][1], strict=True):
        within_rounding(a, b, 256.0)


def test_balance():
    """80 % of the gradient moves the prior, 20 % the posterior; the value stays."""
    moments = [torch.rand(4, 3, 5).add(0.5).requires_grad_() for _ in range(4)]
    plain = fused.DreamerModelLoss(world_model(), free_nats=0)
    balanced = fused.DreamerModelLoss(world_model(), free_nats=0, balance=0.8)
    a, b = plain.kl_loss(*moments), balanced.kl_loss(*moments)
    assert torch.equal(a, b)
    pairs = zip(torch.autograd.grad(a, moments), torch.autograd.grad(b, moments), strict=True)
    for share, (x, y) in zip((0.8, 0.8, 0.2, 0.2), pairs, strict=True):
        within_rounding(y, share * x)
