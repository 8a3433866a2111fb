"""What the page of a report shows besides estimates: samples of the diagnosis, and what the caller adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Curve", "Extras", "Resampled", "Samples", "TextTable"]


@dataclass(frozen=True)
class Resampled:
    """A metric on resamples of ``examples`` examples. They are the same for every model that is measured on
    those with the same seed, so the differences of ``values`` are those of two models on the same
    resamples."""

    examples: int
    values: Tensor
    """float64 [1000]"""


@dataclass(frozen=True)
class Samples:
    """What the pictures show beyond the estimates."""

    nll: dict[str, Tensor]
    """-log p(x|z) of every held-out example, [n], with its "own" z, a "shuffled" one, one of the "prior"; the
    "importance"-weighted -log p(x) of the first of them, [<= n]"""
    nelbo: Tensor | None
    resampled: dict[str, Resampled]
    """metric -> what pairs it with that of another model"""
    shown: list[int]
    """the dimensions of ``z``, those with the highest rates"""
    z: Tensor
    """[n, len(shown)]"""


@dataclass(frozen=True)
class Curve:
    """One line: ``values`` at ``steps``."""

    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class TextTable:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Extras:
    """What a diagnosis cannot know, for the page: all of it optional, none of it about a kind of model.

    Args:
        settings: of the training, e.g. ``{"beta": 1.0, "effective_beta": 1.0, "free_bits": "0.25 per dim"}``;
            they join the settings in report.json.
        curves: title of a panel -> name of a line -> the line, e.g. ``{"rate": {"train": Curve(steps,
            rates)}}`` for rate, mutual information, active units, weight and reconstruction over the training
            steps.
        images: title -> a grid, [rows, columns, H, W] or [rows, columns, C, H, W] with C 1 or 3, values in
            [0, 1]: originals above reconstructions, traversals, samples of the prior.
        texts: title -> a table, e.g. sentences beside their reconstructions.
        interpolations: title -> the sentences decoded on a line between two codes, in order. The page says at
            how many of the steps the sentence changes.
        prior_samples: texts decoded from samples of the prior. The page says how many are distinct.
        points: name -> (rate, NLL) of other models, for the rate-distortion plane.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    images: Mapping[str, Tensor] = field(default_factory=dict)
    texts: Mapping[str, TextTable] = field(default_factory=dict)
    interpolations: Mapping[str, Sequence[str]] = field(default_factory=dict)
    prior_samples: Sequence[str] = ()
    points: Mapping[str, tuple[float, float]] = field(default_factory=dict)
