"""Settings of a run: frozen, typed, checked when made.

A field's constraint stands next to its default, and its name is the key in a file and on the command line, so
that a message about a setting names what the user wrote. What two settings say to each other is checked in
``vaekernels.training.combinations``.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from vaekernels.training.errors import ConfigError

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


_HUGE = 2**63  # beyond the integers of torch
_UNITS = 2**20  # the most that a layer can have


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
        return float(value) if abs(value) < _HUGE else math.inf  # which _in_range refuses
    if type(value) is not kind:
        raise ConfigError(f"{name} must be of type {kind.__name__}, got {value!r}")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # bytes of a command line that are not UTF-8, which TOML has not
            raise ConfigError(f"{name} must be UTF-8, got {value!r}") from error
    return value


def _in_range(name: str, value: float, limits: typing.Mapping[str, float]) -> None:
    if isinstance(value, int) and abs(value) >= _HUGE:
        raise ConfigError(f"{name} must be at most {limits.get('most', _HUGE - 1)}, got {value}")
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
    """Which data.

    ``name``: one of the named data sets, or the user's own: ``idx:PATH``, ``text:PATH``, ``images:DIR``,
    ``npz:PATH``. ``array``: which array of an npz file. ``binarize``: grey levels become 0 and 1, at half of
    the largest ("threshold"), or each once and for all with its grey as the probability of a 1 ("sample",
    Salakhutdinov & Murray 2008). Text only: ``vocabulary``, the words known, the four
    special tokens included; ``max_tokens``, the longest line of a text file that is kept.

    The user's own: ``max_gib``, data of more GiB are refused, compressed ones before they are unpacked;
    ``corrupt``: an image file that cannot be read ends the run ("abort"), or is left out and counted
    ("skip").
    """

    name: str
    array: str = "x"
    binarize: Literal["no", "threshold", "sample"] = "no"
    vocabulary: int = _at_least(5, 2000)
    max_tokens: int = _at_least(1, 100)
    max_gib: float = _above(0, 4.0)
    corrupt: Literal["abort", "skip"] = "abort"


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """The model, and what it does against collapse by its construction.

    ``kind``: "auto" is "gru" for text, "mlp" else. ``likelihood`` (images and vectors): "auto" is "bernoulli"
    for data of two values, "discretized-logistic" for more, "gaussian" for real numbers. ``sigma``: the
    standard deviation of the Gaussian likelihood (None: learned). ``embedding``: text only. ``top_dim``: the
    upper layer of the ladder (None: half of ``latent_dim``). ``latent_channels``: of the convolutional model,
    a latent per position, [B, C, H/4, W/4], in place of a vector (None).

    ``delta``: the log-variance is bounded so that every dimension has at least this rate (delta-VAE, Razavi
    et al. 2019; usual 0.15). ``batch_norm``: mu is batch-normalised to this fixed scale (BN-VAE, Zhu et al.
    2020; usual 0.7). ``word_dropout``: this share of the decoder's input words is hidden in training (Bowman
    et al. 2016; usual 0.25 to 0.75).
    """

    kind: Literal["auto", "mlp", "conv", "ladder", "row-gru", "linear", "gru", "lstm"] = "auto"
    likelihood: Literal["auto", "bernoulli", "gaussian", "discretized-logistic", "categorical"] = "auto"
    sigma: float | None = _above(0, None)
    latent_dim: int = _between(1, _UNITS, 16)
    hidden: int = _between(1, _UNITS, 128)
    embedding: int = _between(1, _UNITS, 64)
    top_dim: int | None = _between(1, _UNITS, None)
    latent_channels: int | None = _between(1, _UNITS, None)
    delta: float | None = _above(0, None)
    batch_norm: float | None = _above(0, None)
    word_dropout: float = _between(0, 1, 0.0)


@dataclass(frozen=True)
class ObjectiveConfig(_Checked):
    """loss = NLL + weight * KL, the NLL summed over data dimensions, the KL over latent ones; or one of the
    three objectives that set the weight by themselves.

    ``beta``: the weight (Higgins et al. 2017). ``anneal``: how it gets there; ``anneal_epochs``: in how many
    epochs (None: linear and cosine 10, cyclical the whole run, warmup 1 at weight 0; logistic goes by
    ``logistic_rate`` and ``logistic_midpoint``, in steps). ``cycles``, ``cycle_ramp``: of cyclical.

    ``free_bits``: nats per group below which the KL is pushed no further; ``group``: "dim", every latent
    dimension, "channel", every channel of a latent with positions, "all", one group for each latent layer;
    ``clamp``: before ("sample") or after ("batch") the mean over the batch; ``penalty``: max(t, KL), max(0,
    KL - t) or KL where it is at least t; ``free_bits_decay_epochs``: the floor falls to 0 in a line.

    ``kl_balance``: share of the KL's gradient that goes to the learned prior of a ladder (Hafner et al.
    2020). ``layer_balance``: while the weight rises, every layer's KL counts in proportion to itself (Vahdat
    & Kautz 2020).

    ``capacity``: ``gamma * abs(rate - C)``, C from 0 to this in ``capacity_epochs`` (Burgess et al. 2018);
    ``capacity_gamma`` None: 1 for text, 1000 else; ``clamp`` "sample" takes abs() per example. ``pi_target``:
    the rate a PI controller holds (Shao et al. 2020). ``geco_target``: the NLL that GECO holds (Rezende &
    Viola 2018).

    ``reconstruction``, ``kl``: "mean" divides the term by its number of dimensions, which changes what beta
    means; the effective beta is printed.
    """

    beta: float = _at_least(0, 1.0)
    anneal: Literal["none", "linear", "logistic", "cosine", "cyclical", "warmup"] = "none"
    anneal_epochs: float | None = _above(0, None)
    cycles: int = _at_least(1, 4)
    cycle_ramp: float = field(default=0.5, metadata={"above": 0, "most": 1})
    logistic_rate: float = _above(0, 0.0025)
    logistic_midpoint: float = _at_least(0, 2500.0)
    free_bits: float | None = _at_least(0, None)
    clamp: Literal["batch", "sample"] = "batch"
    penalty: Literal["floor", "hinge", "mask"] = "floor"
    group: Literal["dim", "channel", "all"] = "dim"
    free_bits_decay_epochs: float | None = _above(0, None)
    kl_balance: float | None = _between(0, 1, None)
    layer_balance: bool = False
    capacity: float | None = _at_least(0, None)
    capacity_epochs: float = _above(0, 10.0)
    capacity_gamma: float | None = _above(0, None)
    pi_target: float | None = _at_least(0, None)
    pi_kp: float = _at_least(0, 0.01)
    pi_ki: float = _at_least(0, 0.001)
    pi_max: float = _above(0, 1.0)
    geco_target: float | None = None
    geco_speed: float = _above(0, 0.001)
    reconstruction: Literal["sum", "mean"] = "sum"
    kl: Literal["sum", "mean"] = "sum"


@dataclass(frozen=True)
class StrategyConfig(_Checked):
    """What is trained when. Unless told otherwise everything, in every step.

    ``aggressive``: until the mutual information on held-out data falls, every step of the decoder follows
    up to ``inner_steps`` steps of the encoder alone, which end when the loss, a mean over ``check_every`` of
    them, stops falling (He et al. 2019). ``pretrain_epochs``: so many epochs at weight 0, then the decoder
    starts anew and the schedules begin (Li et al. 2019; with an annealed weight and free bits).
    """

    aggressive: bool = False
    inner_steps: int = _at_least(1, 100)
    check_every: int = _at_least(1, 15)
    pretrain_epochs: int = _at_least(0, 0)


@dataclass(frozen=True)
class OptimConfig(_Checked):
    """Adam. ``batch_size``: of all processes together. ``clip_norm``: the largest norm of the gradient of all
    parameters together."""

    lr: float = _above(0, 1e-3)
    batch_size: int = _at_least(1, 64)
    epochs: int = _at_least(1, 8)
    clip_norm: float = _above(0, 5.0)


@dataclass(frozen=True)
class EngineConfig(_Checked):
    """Where and how it runs. ``devices``: processes, one per device. ``threads``: of torch on the CPU (None:
    torch's choice). ``checkpoint_steps``: also save every so many steps (None: after every epoch only).
    ``log_steps``: training figures are logged every so many steps."""

    seed: int = _between(0, 2**32 - 1, 0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = _at_least(1, 1)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    threads: int | None = _between(1, 1024, None)
    checkpoint_steps: int | None = _at_least(1, None)
    log_steps: int = _at_least(1, 10)
    tensorboard: bool = True


@dataclass(frozen=True)
class Config(_Checked):
    data: DataConfig
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    strategy: StrategyConfig = StrategyConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()


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
