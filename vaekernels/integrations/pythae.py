"""The VAEs of pythae on the fused ops: models to put in the place of pythae's, and their loss functions::

    from vaekernels.integrations.pythae import VAE  # in place of pythae.models
    model = VAE(config, encoder=encoder, decoder=decoder, free_bits=0.25)

Trainers, pipelines and checkpoints stay those of pythae.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pythae.models as theirs
import torch
import torch.nn.functional as F
from pythae.models.base.base_utils import ModelOutput
from torch import Tensor

from vaekernels import ops

__all__ = [
    "VAE",
    "BetaVAE",
    "DisentangledBetaVAE",
    "Loss",
    "disentangled_loss",
    "reconstruction_loss",
    "vae_loss",
]


class Loss(NamedTuple):
    """What pythae's `loss_function` returns: means over the batch, in nats."""

    loss: Tensor
    reconstruction: Tensor
    rate: Tensor


def reconstruction_loss(recon_x: Tensor, x: Tensor, kind: str) -> Tensor:
    """The reconstruction term of each example, [B]: "mse" is half the squared error, "bce" the binary cross
    entropy, both summed over the data."""
    pair = recon_x.reshape(x.shape[0], -1), x.reshape(x.shape[0], -1)
    if kind == "mse":
        return 0.5 * F.mse_loss(*pair, reduction="none").sum(-1)
    if kind == "bce":
        return F.binary_cross_entropy(*pair, reduction="none").sum(-1)
    raise ValueError(f"reconstruction_loss must be 'mse' or 'bce', got {kind!r}")


def vae_loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor,
    log_var: Tensor,
    *,
    kind: str = "mse",
    beta: float = 1.0,
    **options: Any,
) -> Loss:
    """The loss of VAE and BetaVAE: mean_b reconstruction_b + beta KL.

    `options` are those of `vaekernels.gaussian_kl`: free_bits, clamp, penalty, group_dims. `Loss.rate` is the
    KL without any of them.
    """
    kl, rate = ops.gaussian_kl(mu, log_var, return_per_group=True, **options)
    return _sum(reconstruction_loss(recon_x, x, kind), kl, rate, beta)


def _sum(reconstruction: Tensor, kl: Tensor, rate: Tensor, beta: float) -> Loss:
    mean = reconstruction.mean()
    return Loss(mean + beta * kl, mean, rate.sum())


def disentangled_loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor,
    log_var: Tensor,
    *,
    kind: str = "mse",
    beta: float = 1.0,
    capacity: float = 0.0,
) -> Loss:
    """The loss of DisentangledBetaVAE: mean_b reconstruction_b + beta |KL_b - capacity|, as pythae has it
    (Burgess et al. 2018 take the mean over the batch before the absolute value)."""
    rows = ops.gaussian_kl(mu, log_var, reduction="none", group_dims=())
    return _towards(reconstruction_loss(recon_x, x, kind), rows, beta, capacity)


def _towards(reconstruction: Tensor, rows: Tensor, beta: float, capacity: float) -> Loss:
    return Loss((reconstruction + beta * (rows - capacity).abs()).mean(), reconstruction.mean(), rows.mean())


class _Fused:
    """What the three models share: sample and KL in one op, unless someone's `loss_function` or
    `_sample_gauss` stands in the place of these. Then pythae's `forward` runs, which calls both."""

    encoder: torch.nn.Module
    decoder: torch.nn.Module
    model_config: Any

    def _sample_gauss(self, mu: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        # For `get_nll` and pythae's `forward`; the fused training step goes through `sample_kl`.
        eps = ops.reparameterize(torch.zeros_like(mu), torch.zeros_like(mu))
        return mu + eps * std, eps

    def _overrides(self, ours: type) -> bool:
        """Whether a subclass of `ours`, or this object, has one of the two methods of its own."""
        return any(
            getattr(getattr(self, name), "__func__", None) is not getattr(ours, name)
            for name in ("loss_function", "_sample_gauss")
        )

    def _run(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, ops.SampleKL]:
        encoded = self.encoder(x)
        latent = ops.sample_kl(encoded.embedding, encoded.log_covariance, **options)
        recon_x = self.decoder(latent.z)["reconstruction"]
        return recon_x, reconstruction_loss(recon_x, x, self.model_config.reconstruction_loss), latent

    @staticmethod
    def _output(loss: Loss, recon_x: Tensor, z: Tensor) -> ModelOutput:
        return ModelOutput(
            recon_loss=loss.reconstruction, reg_loss=loss.rate, loss=loss.loss, recon_x=recon_x, z=z
        )


class VAE(_Fused, theirs.VAE):
    """pythae.models.VAE: the same arguments, numbers, trainers and checkpoints.

    A subclass that overrides `loss_function` or `_sample_gauss` runs as it does there, with the fused KL in
    what it takes from `super()`.

    Args:
        free_bits, clamp, penalty, group_dims: as in `vaekernels.gaussian_kl`. `reg_loss` of the output is
            the KL without them. They are no part of pythae's configuration: `AutoModel` loads a saved model
            as pythae's own class.
    """

    def __init__(
        self,
        model_config: Any,
        encoder: Any = None,
        decoder: Any = None,
        *,
        free_bits: float | Tensor | None = None,
        clamp: str = "batch",
        penalty: str = "floor",
        group_dims: int | tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(model_config, encoder, decoder)
        self.kl_options = {
            "free_bits": free_bits, "clamp": clamp, "penalty": penalty, "group_dims": group_dims
        }  # fmt: skip

    def _weight(self) -> float:
        return 1.0

    def forward(self, inputs: Mapping[str, Tensor], **kwargs: Any) -> ModelOutput:
        if self._overrides(VAE):
            return super().forward(inputs, **kwargs)
        recon_x, reconstruction, (z, kl, rate) = self._run(inputs["data"], **self.kl_options)
        return self._output(_sum(reconstruction, kl, rate, self._weight()), recon_x, z)

    def loss_function(self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> Loss:
        kind = self.model_config.reconstruction_loss
        return vae_loss(recon_x, x, mu, log_var, kind=kind, beta=self._weight(), **self.kl_options)


class BetaVAE(VAE, theirs.BetaVAE):
    """pythae.models.BetaVAE; the arguments of `VAE` besides."""

    def _weight(self) -> float:
        return float(self.beta)


class DisentangledBetaVAE(_Fused, theirs.DisentangledBetaVAE):
    """pythae.models.DisentangledBetaVAE."""

    def _capacity(self, epoch: int) -> float:
        return float(self.C * min(epoch / (self.warmup_epoch + 1), 1))

    def forward(self, inputs: Mapping[str, Tensor], **kwargs: Any) -> ModelOutput:
        if self._overrides(DisentangledBetaVAE):
            return super().forward(inputs, **kwargs)
        capacity = self._capacity(kwargs.pop("epoch", self.warmup_epoch))
        recon_x, reconstruction, (z, rows, _) = self._run(inputs["data"], reduction="none", group_dims=())
        return self._output(_towards(reconstruction, rows, self.beta, capacity), recon_x, z)

    def loss_function(
        self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, epoch: int
    ) -> Loss:
        kind, capacity = self.model_config.reconstruction_loss, self._capacity(epoch)
        return disentangled_loss(recon_x, x, mu, log_var, kind=kind, beta=self.beta, capacity=capacity)
