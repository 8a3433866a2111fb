"""A whole VAE in plain PyTorch: scikit-learn's digits, a fused latent layer, the diagnosis at the end.

    python examples/minimal_vae.py
    python examples/minimal_vae.py --beta 8     # collapses, and the diagnosis says so

Takes seconds on a CPU.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vaekernels as vk
from vaekernels.schedules import Linear


class VAE(nn.Module):
    def __init__(self, pixels: int = 64, latent: int = 8, hidden: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) of each example, in nats."""
        return -F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the KL")
    parser.add_argument("--free-bits", type=float, help="floor of each dimension's KL, in nats")
    given = parser.parse_args()

    torch.manual_seed(0)
    pixels = torch.tensor(load_digits().data, dtype=torch.float32)  # [1797, 64], 0 to 16
    images = (pixels / 16).bernoulli()[torch.randperm(len(pixels))]
    train, heldout = images[300:], images[:300]

    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    beta = Linear(given.beta, steps=100)  # from 0 to beta in 100 steps, then constant
    for step in range(given.steps):
        x = train[torch.randint(len(train), (64,))]
        z, kl, rate = vk.sample_kl_packed(model.encoder(x), dim=1, free_bits=given.free_bits)
        nll = -model.log_likelihood(x, z).mean()
        optimizer.zero_grad()
        (nll + beta.value * kl).backward()
        optimizer.step()
        beta.step()
        if step % 50 == 0 or step == given.steps - 1:
            print(f"step {step:3d}  NLL {nll.item():5.2f} nats  rate {rate.sum().item():5.2f} nats")

    print(vk.collapse.diagnose(model.encode, model.log_likelihood, heldout, train=train, progress=False))


if __name__ == "__main__":
    main()
