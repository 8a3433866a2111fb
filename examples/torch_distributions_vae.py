"""A VAE of counts in the manner of scvi-tools: torch.distributions on the fused ops.

    python examples/torch_distributions_vae.py --steps 300

The counts are the pixels of scikit-learn's digits, 0 to 16. As for cells, a library size scales what the
decoder says, and has a posterior of its own.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import kl_divergence

from vaekernels.integrations.torch_distributions import Normal  # in place of torch.distributions


class CountsVAE(nn.Module):
    normal: type[torch.distributions.Normal] = Normal

    def __init__(self, genes: int = 64, latent: int = 10, hidden: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(genes, hidden), nn.ReLU())
        self.mean, self.var = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.library_mean, self.library_var = nn.Linear(hidden, 1), nn.Linear(hidden, 1)
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, genes), nn.Softmax(-1)
        )

    def posteriors(self, counts: Tensor) -> tuple[torch.distributions.Normal, torch.distributions.Normal]:
        h = self.hidden(torch.log1p(counts))
        z = self.normal(self.mean(h), (self.var(h).exp() + 1e-4).sqrt())
        library = self.normal(self.library_mean(h), (self.library_var(h).exp() + 1e-4).sqrt())
        return z, library

    def loss(self, counts: Tensor) -> Tensor:
        z, library = self.posteriors(counts)
        rate = torch.exp(library.rsample()) * self.decoder(z.rsample())
        sizes = counts.sum(1, keepdim=True).log()
        kl = kl_divergence(z, self.normal(torch.zeros_like(z.loc), torch.ones_like(z.scale))).sum(1)
        kl_library = kl_divergence(library, self.normal(sizes.mean(), sizes.std())).sum(1)
        nll = F.poisson_nll_loss(rate, counts, log_input=False, full=True, reduction="none").sum(1)
        return (nll + kl + kl_library).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    counts = torch.tensor(load_digits().data, dtype=torch.float32)  # [1797, 64]
    model = CountsVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        loss = model.loss(counts[torch.randint(len(counts), (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}  negative ELBO {loss.item():8.2f} nats")


if __name__ == "__main__":
    main()
