"""The settings a model is trained with unless told otherwise."""

from __future__ import annotations

from vaekernels.training.config import settings
from vaekernels.training.config.schema import Config, DataConfig, ModelConfig, OptimConfig
from vaekernels.training.data import DATASETS, OWN, is_own
from vaekernels.training.errors import ConfigError, nearest

__all__ = ["PRESETS", "find"]

_DIGITS = Config(
    DataConfig("digits", binarize="sample"), ModelConfig(latent_dim=8), optim=OptimConfig(epochs=60)
)


def _digits(**model: object) -> Config:
    return settings.changed(_DIGITS, {"model": model})


# Every data set is a preset by its own name, at the default settings unless they stand here.
PRESETS: dict[str, Config] = {name: Config(DataConfig(name)) for name in DATASETS} | {
    "docstrings-lstm": Config(DataConfig("docstrings"), ModelConfig(kind="lstm")),
    "synthetic-text": Config(DataConfig("synthetic-text"), ModelConfig(kind="lstm", latent_dim=2)),
    "digits": _DIGITS,
    "digits-ladder": _digits(kind="ladder"),
    "digits-row-gru": _digits(kind="row-gru"),
    "sprites": Config(DataConfig("sprites"), ModelConfig(kind="conv", latent_dim=10, hidden=32)),
}


def find(name: str) -> Config:
    """The config that ``name`` stands for: a preset, or the user's own data (``idx:PATH`` and so on, all
    settings at their defaults). ConfigError with the nearest preset if it is neither."""
    if name in PRESETS:
        return PRESETS[name]
    if is_own(name):
        return Config(DataConfig(name))
    own = ", ".join(f"{kind}:PATH" for kind in OWN)
    raise ConfigError(f"unknown preset {name!r}; {nearest(name, PRESETS)} (your own data: {own})")
