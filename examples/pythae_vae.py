"""Trains pythae's BetaVAE with free bits on scikit-learn's digits, its latent layer on the fused ops.

python examples/pythae_vae.py --steps 200
"""

from __future__ import annotations

import argparse

import torch
from pythae.models import BetaVAEConfig
from sklearn.datasets import load_digits

from vaekernels.integrations.pythae import BetaVAE  # the line that differs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16.0  # [1797, 1, 8, 8]
    config = BetaVAEConfig(input_dim=(1, 8, 8), latent_dim=10, beta=2.0, reconstruction_loss="bce")
    model = BetaVAE(config, free_bits=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        out = model({"data": images[torch.randint(len(images), (64,))]})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {out.loss.item():7.2f}  reg_loss {out.reg_loss.item():6.2f} nats")


if __name__ == "__main__":
    main()
