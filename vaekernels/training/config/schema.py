"""Settings of a run: frozen, typed, checked when made.

A setting's type says its range, and its name is the key in a file and on the command line, so that a message
about a setting names what the user wrote. What two settings say to each other is checked in
``vaekernels.training.config.combinations``.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Annotated, Any, Literal, TypeVar

import pydantic.dataclasses
from pydantic import ConfigDict, Field, ValidationError
from typing_extensions import dataclass_transform

from vaekernels.training.errors import ConfigError, nearest

if typing.TYPE_CHECKING:
    from pydantic_core import ErrorDetails

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

T = TypeVar("T")


_MOST = 2**63 - 1  # the largest integer of torch
_UNITS = 2**20  # the most that a layer can have

# Strict: what is no number, text or truth value already is refused, never converted (an int becomes a float).
Text = Annotated[str, Field(strict=True, min_length=0)]  # a limit of length makes pydantic read it as UTF-8
Flag = Annotated[bool, Field(strict=True)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
NonNegative = Annotated[Real, Field(ge=0)]
Share = Annotated[Real, Field(ge=0, le=1)]
PositiveShare = Annotated[Real, Field(gt=0, le=1)]
Count = Annotated[int, Field(strict=True, ge=1, le=_MOST)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
Vocabulary = Annotated[int, Field(strict=True, ge=5, le=_MOST)]  # the special tokens and a word
Units = Annotated[int, Field(strict=True, ge=1, le=_UNITS)]
Threads = Annotated[int, Field(strict=True, ge=1, le=1024)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)]

# By pydantic's name of the error; its own words are for programmers.
_MUST = {
    "dataclass_type": "be a table of settings, got {input!r}",
    "string_type": "be of type str, got {input!r}",
    "bool_type": "be of type bool, got {input!r}",
    "int_type": "be of type int, got {input!r}",
    "float_type": "be of type float, got {input!r}",
    "literal_error": "be one of {expected}; got {input!r}",
    "string_unicode": "be UTF-8, got {input!r}",  # bytes of a command line, which TOML does not allow
    "finite_number": "be finite, got {input}",
    "greater_than": "be greater than {gt}, got {input}",
    "greater_than_equal": "be at least {ge}, got {input}",
    "less_than_equal": "be at most {le}, got {input}",
}


@dataclass_transform(frozen_default=True)
def _checked(cls: type[T]) -> type[T]:
    """A frozen dataclass that pydantic checks when it is made. It refuses with a ConfigError of one line."""
    made: Any = pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    check = made.__init__

    def init(self: object, /, *args: object, **kwargs: object) -> None:
        try:
            check(self, *args, **kwargs)
        except ValidationError as error:
            refused = [_message(made, found) for found in error.errors(include_url=False)]
            raise ConfigError("; ".join(refused)) from error

    made.__init__ = init
    checked: type[T] = made
    return checked


def _message(kind: type[Any], error: ErrorDetails) -> str:
    """What is wrong with one setting of ``kind``, and what it takes."""
    positions: dict[int | str, str] = dict(enumerate(f.name for f in dataclasses.fields(kind)))
    *tables, name = (positions.get(part, str(part)) for part in error["loc"])
    what, context = error["type"], {"input": error["input"], **error.get("ctx", {})}
    if what == "unexpected_keyword_argument":
        for table in tables:
            kind = typing.get_type_hints(kind)[table]
        known, where = [f.name for f in dataclasses.fields(kind)], "".join(f"{table}." for table in tables)
        return f"unknown setting {where}{name}; {nearest(name, known, where)}"
    if what == "missing":
        return f"{'.'.join(tables) or 'the config'} lacks a setting: {name!r} must be given"
    if what == "float_type" and type(error["input"]) is int:  # too large for a float
        what, context["input"] = "finite_number", math.inf
    if "expected" in context:
        context["expected"] = context["expected"].replace("'", "").replace(" or ", ", ")
    for limit in {"gt", "ge", "le"} & context.keys():
        if isinstance(context[limit], float):
            context[limit] = f"{context[limit]:g}"  # 0.0 as 0
    return f"{name} must {_MUST[what].format_map(context)}" if what in _MUST else f"{name}: {error['msg']}"


@_checked
class DataConfig:
    """Which data.

    ``name``: one of the named data sets, or the user's own: ``idx:PATH``, ``text:PATH``, ``images:PATH``,
    ``npz:PATH``, ``npy:PATH``, ``csv:PATH``. ``array``: which array of an npz file. ``binarize``: grey levels
    become 0 and 1, at half of the largest ("threshold"), or each once and for all with its grey as the
    probability of a 1 ("sample", Salakhutdinov & Murray 2008). Text only: ``vocabulary``, the words known,
    the four special tokens included; ``max_tokens``, the longest line of a text file that is kept;
    ``tokens``, of a text file: "word", separated by white space, "char", or "auto": characters where the
    script has no spaces, words are longer than 20 characters in the mean, or most lines are one word.

    The user's own: ``max_gib``, data of more GiB are refused, compressed ones before they are unpacked;
    ``standardize``: every column of a table less its mean and divided by its standard deviation, in the
    model, which takes and gives the units of the data ("auto": of vectors of real numbers); the NLL is then
    that of the standardized data. ``missing``: a NaN in a table ends the run ("abort"), or becomes the mean
    of its column ("mean"). ``corrupt``: an image file that cannot be read ends the run ("abort"), or is left
    out, counted and named ("skip"). ``size``: images are resized until the shorter side has so many pixels,
    and the middle of the longer one is kept (None: all images must be of one size).
    """

    name: Text
    array: Text = "x"
    binarize: Literal["no", "threshold", "sample"] = "no"
    vocabulary: Vocabulary = 2000
    max_tokens: Count = 100
    tokens: Literal["auto", "word", "char"] = "auto"
    max_gib: Positive = 4.0
    corrupt: Literal["abort", "skip"] = "skip"
    size: Units | None = None
    standardize: Literal["auto", "no", "yes"] = "auto"
    missing: Literal["abort", "mean"] = "abort"


@_checked
class ModelConfig:
    """The model, and what it does against collapse by its construction.

    ``kind``: "auto" is "gru" for text, "conv" for images of 16x16 and more, "mlp" else. ``likelihood``
    (images and vectors): "auto" is "bernoulli" for data of two values, "discretized-logistic" for more,
    "gaussian" for real numbers. ``sigma``: the standard deviation of the Gaussian likelihood (None: learned).
    ``embedding``: text only. ``top_dim``: the upper layer of the ladder (None: half of ``latent_dim``).
    ``latent_channels``: of the convolutional model, a latent per position, [B, C, H/4, W/4], in place of a
    vector (None).

    ``delta``: the log-variance is bounded so that every dimension has at least this rate (delta-VAE, Razavi
    et al. 2019; usual 0.15). ``batch_norm``: mu is batch-normalised to this fixed scale (BN-VAE, Zhu et al.
    2020; usual 0.7). ``word_dropout``: this share of the decoder's input words is hidden in training (Bowman
    et al. 2016; usual 0.25 to 0.75).
    """

    kind: Literal["auto", "mlp", "conv", "ladder", "row-gru", "linear", "gru", "lstm"] = "auto"
    likelihood: Literal["auto", "bernoulli", "gaussian", "discretized-logistic", "categorical"] = "auto"
    sigma: Positive | None = None
    latent_dim: Units = 16
    hidden: Units = 128
    embedding: Units = 64
    top_dim: Units | None = None
    latent_channels: Units | None = None
    delta: Positive | None = None
    batch_norm: Positive | None = None
    word_dropout: Share = 0.0


@_checked
class ObjectiveConfig:
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

    ``tc_beta``: the total correlation of the latent counts this many times (beta-TCVAE, Chen et al. 2018;
    usual 2 to 10); ``mi_weight``: so does the information I(x; z) (0: the aggregate posterior alone is held
    to the prior, as in the InfoVAE, Zhao et al. 2019). Both are parts of the KL, estimated from each batch.

    ``capacity``: ``gamma * abs(rate - C)``, C from 0 to this in ``capacity_epochs`` (Burgess et al. 2018);
    ``capacity_gamma`` None: 1 for text, 1000 else; ``clamp`` "sample" takes abs() per example. ``pi_target``:
    the rate a PI controller holds (Shao et al. 2020). ``geco_target``: the NLL that GECO holds (Rezende &
    Viola 2018).

    ``reconstruction``, ``kl``: "mean" divides the term by its number of dimensions, which changes what beta
    means; the effective beta is printed.
    """

    beta: NonNegative = 1.0
    anneal: Literal["none", "linear", "logistic", "cosine", "cyclical", "warmup"] = "none"
    anneal_epochs: Positive | None = None
    cycles: Count = 4
    cycle_ramp: PositiveShare = 0.5
    logistic_rate: Positive = 0.0025
    logistic_midpoint: NonNegative = 2500.0
    free_bits: NonNegative | None = None
    clamp: Literal["batch", "sample"] = "batch"
    penalty: Literal["floor", "hinge", "mask"] = "floor"
    group: Literal["dim", "channel", "all"] = "dim"
    free_bits_decay_epochs: Positive | None = None
    kl_balance: Share | None = None
    layer_balance: Flag = False
    tc_beta: NonNegative | None = None
    mi_weight: NonNegative | None = None
    capacity: NonNegative | None = None
    capacity_epochs: Positive = 10.0
    capacity_gamma: Positive | None = None
    pi_target: NonNegative | None = None
    pi_kp: NonNegative = 0.01
    pi_ki: NonNegative = 0.001
    pi_max: Positive = 1.0
    geco_target: Real | None = None
    geco_speed: Positive = 0.001
    reconstruction: Literal["sum", "mean"] = "sum"
    kl: Literal["sum", "mean"] = "sum"


@_checked
class StrategyConfig:
    """What is trained when. Unless told otherwise everything, in every step.

    ``aggressive``: until the mutual information on held-out data falls, every step of the decoder follows
    up to ``inner_steps`` steps of the encoder alone, which end when the loss, a mean over ``check_every`` of
    them, stops falling (He et al. 2019). ``pretrain_epochs``: so many epochs at weight 0, then the decoder
    starts anew and the schedules begin (Li et al. 2019; with an annealed weight and free bits).
    """

    aggressive: Flag = False
    inner_steps: Count = 100
    check_every: Count = 15
    pretrain_epochs: CountOrZero = 0


@_checked
class OptimConfig:
    """Adam. ``batch_size``: of all processes together. ``clip_norm``: the largest norm of the gradient of all
    parameters together."""

    lr: Positive = 1e-3
    batch_size: Count = 64
    epochs: Count = 8
    clip_norm: Positive = 5.0


@_checked
class EngineConfig:
    """Where and how it runs. ``devices``: processes, one per device. ``threads``: of torch on the CPU (None:
    torch's choice). ``checkpoint_steps``: also save every so many steps (None: after every epoch only).
    ``log_steps``: training figures are logged every so many steps."""

    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: Count = 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    threads: Threads | None = None
    checkpoint_steps: Count | None = None
    log_steps: Count = 10
    tensorboard: Flag = True


@_checked
class Config:
    """All settings of a run, one table each: what ``config.toml`` holds."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    strategy: StrategyConfig = StrategyConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Settings in which two configs differ: dotted name -> (old, new)."""
    after = dataclasses.asdict(new)
    return {
        f"{table}.{name}": (value, after[table][name])
        for table, values in dataclasses.asdict(old).items()
        for name, value in values.items()
        if value != after[table][name]
    }
