"""Trains a VAE on scikit-learn's digits with PyTorch Lightning. At beta 8 its latent collapses, and
CollapseMonitor says so within the first epochs.

    python examples/lightning_monitor.py --beta 8
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vaekernels.integrations.lightning import CollapseMonitor
from vaekernels.nn import GaussianLatent


class VAE(LightningModule):
    def __init__(self, beta: float) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
        self.latent = GaussianLatent(8, beta=beta)
        self.decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:  # CollapseMonitor finds it by name
        mu, logvar = self.encoder(x).chunk(2, 1)
        return mu, logvar

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:  # and this one
        return -F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(1)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        z, kl, _ = self.latent(self.encoder(x))
        return kl - self.log_likelihood(x, z).mean()

    def validation_step(self, x: Tensor, index: int) -> None:
        z, kl, _ = self.latent(self.encoder(x))
        self.log("validation_loss", kl - self.log_likelihood(x, z).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beta", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16.0  # [1797, 64]
    train, heldout = images[:1397], images[1397:]
    monitor = CollapseMonitor(every_n_steps=10, grace_steps=100)
    trainer = Trainer(
        max_steps=arguments.steps,
        callbacks=[monitor],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(VAE(arguments.beta), DataLoader(train, 16, shuffle=True), DataLoader(heldout, 64))
    for reading in monitor.monitor.history[::5]:
        print(f"step {reading.step:4d}  I(x; z) <= {reading.mi_upper}  shuffle gap {reading.shuffle_gap}")
    print(f"collapsed at step {monitor.monitor.collapsed_at}")


if __name__ == "__main__":
    main()
