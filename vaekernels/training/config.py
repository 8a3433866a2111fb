"""Settings of a run: frozen, typed, checked when made, saved as ``config.json`` in the run directory.

A field's constraint stands next to its default, and its name is the key in the file, so that a message about
a setting names what the user wrote.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from vaekernels.training.errors import ConfigError

__all__ = [
    "Config",
    "DataConfig",
    "EngineConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "differences",
    "from_mapping",
    "load",
    "preset",
    "to_json",
]

T = TypeVar("T")


def _at_least(least: float, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"least": least})


def _above(bound: float, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"above": bound})


def _between(least: float, most: float, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"least": least, "most": most})


def _typed(kind: Any, value: Any, name: str) -> Any:
    """``value``, as the annotation ``kind`` has it (an int where a float belongs becomes one)."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (option for option in typing.get_args(kind) if option is not type(None))
    if typing.get_origin(kind) is Literal:
        known = typing.get_args(kind)
        if value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value


def _in_range(name: str, value: float, limits: typing.Mapping[str, float]) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value}")
    if "least" in limits and value < limits["least"]:
        raise ConfigError(f"{name} must be at least {limits['least']}, got {value}")
    if "most" in limits and value > limits["most"]:
        raise ConfigError(f"{name} must be at most {limits['most']}, got {value}")
    if "above" in limits and value <= limits["above"]:
        raise ConfigError(f"{name} must be greater than {limits['above']}, got {value}")


class _Checked:
    """Checks every field's type and range when a frozen dataclass is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(typing.cast(Any, self)):
            value = _typed(hints[f.name], getattr(self, f.name), f.name)
            object.__setattr__(self, f.name, value)
            if isinstance(value, int | float):
                _in_range(f.name, value, f.metadata)


@dataclass(frozen=True)
class DataConfig(_Checked):
    """Which data. ``vocabulary`` counts the four special tokens and concerns text only."""

    name: str
    vocabulary: int = _at_least(5, 2000)


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """Sizes. ``embedding`` concerns text only."""

    latent_dim: int = _at_least(1, 16)
    hidden: int = _at_least(1, 128)
    embedding: int = _at_least(1, 64)


@dataclass(frozen=True)
class ObjectiveConfig(_Checked):
    """loss = NLL + weight * KL, the NLL summed over data dimensions, the KL over latent ones.

    ``anneal_epochs``: the weight rises linearly from 0 to ``beta`` over this many epochs, then stays (0:
    ``beta`` from the start). ``free_bits``: nats per group (None: off); ``group``: "dim" a group per latent
    dimension, "all" one group; ``clamp``: before ("sample") or after ("batch") the mean over the batch.
    """

    beta: float = _at_least(0, 1.0)
    anneal_epochs: float = _at_least(0, 0.0)
    free_bits: float | None = _at_least(0, None)
    clamp: Literal["batch", "sample"] = "batch"
    group: Literal["dim", "all"] = "dim"


@dataclass(frozen=True)
class OptimConfig(_Checked):
    """Adam. ``clip_norm``: the largest norm of the gradient of all parameters together."""

    lr: float = _above(0, 1e-3)
    batch_size: int = _at_least(1, 64)
    epochs: int = _at_least(1, 8)
    clip_norm: float = _above(0, 5.0)


@dataclass(frozen=True)
class EngineConfig(_Checked):
    """Where and how it runs. ``threads``: of torch on the CPU (None: torch's choice)."""

    seed: int = _between(0, 2**32 - 1, 0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    threads: int | None = _at_least(1, None)


@dataclass(frozen=True)
class Config(_Checked):
    data: DataConfig
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()


_PRESETS = {
    "digits": Config(DataConfig("digits"), ModelConfig(latent_dim=8), optim=OptimConfig(epochs=60)),
}


def preset(name: str) -> Config:
    """The settings a data set is trained with unless told otherwise."""
    return _PRESETS.get(name) or Config(DataConfig(name))


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def load(path: Path) -> Config:
    """The config saved at ``path``. ConfigError names the file and the key at fault."""
    try:
        return from_mapping(Config, json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def from_mapping(kind: type[T], values: object, where: str = "") -> T:
    """A dataclass from nested mappings. ConfigError for an unknown key or a value of the wrong type or
    range."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'the config'} must be a table of settings, got {values!r}")
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"unknown setting {where}{key}; known here: {', '.join(hints)}")
        nested = dataclasses.is_dataclass(hints[key])
        arguments[key] = from_mapping(hints[key], value, f"{where}{key}.") if nested else value
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where or 'the config'} lacks a setting: {error}") from error


def differences(old: object, new: object, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings in which two configs of one type differ: dotted name -> (old, new)."""
    found: dict[str, tuple[Any, Any]] = {}
    for f in dataclasses.fields(typing.cast(Any, old)):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(a):
            found.update(differences(a, b, f"{where}{f.name}."))
        elif a != b:
            found[where + f.name] = (a, b)
    return found
