"""vaekernels: the latent layer of a variational autoencoder as one operation.

>>> import torch
>>> import vaekernels as vk
>>> mu, logvar = torch.randn(128, 32), torch.randn(128, 32)
>>> z, kl, kl_per_group = vk.sample_kl(mu, logvar, free_bits=0.25)
>>> z.shape, kl.shape, kl_per_group.shape
(torch.Size([128, 32]), torch.Size([]), torch.Size([32]))

`reparameterize` draws the sample, `gaussian_kl` computes the KL divergence with free bits, `sample_kl` does
both from one reading of the posterior; each has a `_packed` form for one tensor that holds mu and logvar.
`log_aggregate_posterior` is the log-density under the mixture of all posteriors of a batch; from it,
`mutual_information` and `kl_decomposition`.
Everything is in nats.

Imported when first used, as attributes: `distributions` (the interface of diffusers), `nn` (modules),
`schedules`, `collapse` (diagnosis), `integrations` (diffusers, torch.distributions, Lightning, pythae),
`training` (the reference trainer, and its trained models to use).
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from vaekernels import _build, _native, ops
from vaekernels._native import FallbackWarning
from vaekernels.ops import (
    Clamp,
    KLDecomposition,
    KLOptions,
    LogWeight,
    Parameterization,
    Penalty,
    Reduction,
    SampleKL,
    gaussian_kl,
    gaussian_kl_packed,
    kl_decomposition,
    log_aggregate_posterior,
    mutual_information,
    reparameterize,
    reparameterize_packed,
    rng_state,
    sample_kl,
    sample_kl_packed,
)

if TYPE_CHECKING:
    from vaekernels import collapse as collapse
    from vaekernels import distributions as distributions
    from vaekernels import integrations as integrations
    from vaekernels import nn as nn
    from vaekernels import schedules as schedules
    from vaekernels import training as training

if _native.C is not None:
    from vaekernels import _double_backward

    _double_backward.register()
else:
    setattr(torch.ops, "vaekernels", _native.AbsentOperators("vaekernels"))  # noqa: B010

__version__ = _build.VERSION

# As in vaekernels.ops: torch.fx wraps a name of one module.
for _name in ops._TRACED:
    torch.fx.wrap(_name)

__all__ = [
    "Clamp",
    "FallbackWarning",
    "KLDecomposition",
    "KLOptions",
    "LogWeight",
    "Parameterization",
    "Penalty",
    "Reduction",
    "SampleKL",
    "__version__",
    "gaussian_kl",
    "gaussian_kl_packed",
    "kl_decomposition",
    "log_aggregate_posterior",
    "mutual_information",
    "reparameterize",
    "reparameterize_packed",
    "rng_state",
    "sample_kl",
    "sample_kl_packed",
]

_SUBMODULES = ("collapse", "distributions", "integrations", "nn", "schedules", "training")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES])
