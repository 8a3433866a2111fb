"""The settings of a run. ``schema``: each setting, its type, range and default; ``settings``: from TOML and
``--set``, and back; ``combinations``: which settings do not go together; ``presets``: settings by name."""

from __future__ import annotations

from vaekernels.training.config.schema import (
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    StrategyConfig,
    differences,
)

__all__ = [
    "Config",
    "DataConfig",
    "EngineConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "StrategyConfig",
    "differences",
]
