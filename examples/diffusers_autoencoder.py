"""Trains diffusers' AutoencoderKL on scikit-learn's digits, its posterior on the fused ops.

python examples/diffusers_autoencoder.py --steps 200
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKL
from sklearn.datasets import load_digits

from vaekernels.integrations import diffusers as fused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8.0 - 1.0  # [1797, 1, 8, 8]
    fused.patch()  # the one line that differs
    model = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        x = images[torch.randint(len(images), (32,))]
        z, kl = model.encode(x).latent_dist.sample_kl()  # sample() and kl() in one pass
        error = (model.decode(z).sample - x).square().sum((1, 2, 3)).mean()
        loss = error + 1e-2 * kl.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}  squared error {error.item():7.2f}  KL {kl.mean().item():7.2f} nats")


if __name__ == "__main__":
    main()
