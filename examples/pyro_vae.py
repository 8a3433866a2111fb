"""Trains a VAE in Pyro on scikit-learn's digits, its samples and its KL on the fused ops.

python examples/pyro_vae.py --steps 200
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from sklearn.datasets import load_digits
from torch import Tensor, nn

from vaekernels.integrations.pyro import Normal  # the line that differs

LATENT = 10


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 64))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(x.new_zeros(len(x), LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, logvar = self.encoder(x).chunk(2, -1)
            pyro.sample("z", Normal(loc, torch.exp(0.5 * logvar)).to_event(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps

    pyro.set_rng_seed(0)
    images = (torch.tensor(load_digits().data, dtype=torch.float32) > 8).float()  # [1797, 64]
    vae = VAE()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    for step in range(steps):
        x = images[torch.randint(len(images), (64,))]
        loss = svi.step(x) / len(x)
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}  ELBO {-loss:8.2f} nats per digit")


if __name__ == "__main__":
    main()
