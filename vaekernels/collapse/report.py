"""What a diagnosis found: as an object, a table, report.json and a page with pictures."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaekernels._files import write_atomically
from vaekernels.collapse.decide import Dim, Verdict
from vaekernels.collapse.decoder import importance_columns, importance_mean
from vaekernels.collapse.estimate import Bootstrap, Estimate

__all__ = ["JSON", "PAGE", "SCHEMA", "Curve", "Extras", "Report", "Samples", "TextTable"]

SCHEMA = 1
JSON, PAGE = "report.json", "report.html"
WIDTH = 100
_TABLE_DIMS = 64


@dataclass(frozen=True)
class Samples:
    """What the pictures show beyond the estimates."""

    nll: dict[str, Tensor]
    """-log p(x|z) of every held-out example, [n], with its "own" z, a "shuffled" one, one of the "prior"; the
    "importance"-weighted -log p(x) of the first of them, [<= n]"""
    nelbo: Tensor | None
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


@dataclass(frozen=True)
class Report:
    """The outcome of :func:`vaekernels.collapse.diagnose`. All values in nats per example.

    ``metrics``: Estimate by name, None for what was not measured: ``rate``, ``active_units`` (a count),
    ``mi_lower`` and ``mi_upper`` (bounds on I(x;z); each interval is that of the bound, so the truth lies
    between the lower end of the first and the upper end of the second), ``aggregate_kl`` (rate - I), ``nll``
    and ``nelbo`` (one sample of z), ``delta_shuffle``, ``delta_prior``, ``delta_mean`` (NLL with another
    example's z, a z of the prior, or mu, less NLL with its own z), ``i_dec``, ``svi_gain``, ``iwae_nll``.
    ``train``: those measured on the train split. ``gaps``: by how much that split is better.
    ``rate_distortion``: (rate, NLL) of this model, and of it with other codes.
    ``skipped``: what was not measured -> why.
    """

    verdict: Verdict
    subtype: str | None
    """"model collapse" or "inference lag" of a collapsed one; None where refinement was not measured"""
    overfit: bool | None
    """None without a train split"""
    confidence: float | None
    """share of the bootstrap resamples whose means meet the verdict's conditions; None for undetermined"""
    reasons: list[str]
    advice: list[str]
    metrics: dict[str, Estimate | None]
    train: dict[str, Estimate | None] | None
    gaps: dict[str, Estimate]
    dims: list[Dim]
    rate_distortion: dict[str, tuple[float, float]]
    settings: dict[str, Any]
    checks: dict[str, Any]
    cost: dict[str, Any]
    skipped: dict[str, str]
    samples: Samples

    def to_json(self, extras: Extras | None = None) -> dict[str, Any]:
        """What report.json holds: dicts, lists, strings and numbers. An estimate is [value, low, high]; one
        that is near its cap is named in ``saturated``. null was not measured; ``skipped`` says why."""
        told = {} if extras is None else dict(extras.settings)
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "subtype": self.subtype,
            "overfit": self.overfit,
            "confidence": self.confidence,
            "reasons": self.reasons,
            "advice": self.advice,
            "settings": self.settings | told,
            "metrics": _triples(self.metrics),
            "saturated": [name for name, each in self.metrics.items() if each is not None and each.saturated],
            "train": None if self.train is None else _triples(self.train),
            "gaps": _triples(self.gaps) if self.gaps else None,
            "dims": [_dim(dim) for dim in self.dims],
            "rate_distortion": {name: list(point) for name, point in self.rate_distortion.items()},
            "checks": self.checks,
            "cost": self.cost,
            "skipped": {name: why for name, why in self.skipped.items() if told.get(name) is None},
        }

    def save(self, folder: str | os.PathLike[str], extras: Extras | None = None) -> Path:
        """Write report.json and the self-contained report.html into ``folder``, made where it is missing;
        returns the path of the page.

        Each file is at every moment the old one or the new one, whole. The page needs matplotlib and jinja2:
        without them ImportError names the extra, after report.json was written. OSError where the folder
        cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(extras), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / JSON, text + "\n")
        try:
            from vaekernels.collapse import page
        except ImportError as error:
            raise ImportError(
                f"{folder / JSON} is written, but the page needs {error.name}: "
                f"pip install 'vaekernels[train]'"
            ) from error
        write_atomically(folder / PAGE, page.render(self, extras or Extras()))
        return folder / PAGE

    def iwae_difference(self, other: Report) -> Estimate:
        """The importance-weighted NLL of this model less that of ``other``, paired by example: below 0 where
        this one is the better model of the data. (Compare models on this, not on the ELBO.)

        ValueError unless both were diagnosed on the same examples with the same seed and k, and both
        measured it.
        """
        for name in ("data_sha256", "seed", "k"):
            mine, theirs = self.settings[name], other.settings[name]
            if name == "data_sha256":
                mine, theirs = mine["heldout"], theirs["heldout"]
            if mine != theirs:
                raise ValueError(
                    f"the reports differ in {name}, {mine} and {theirs}; diagnose both on the same held-out "
                    f"data with the same arguments"
                )
        columns = [
            importance_columns(report.samples.nelbo, report.samples.nll["importance"])
            for report in (self, other)
            if report.samples.nelbo is not None and "importance" in report.samples.nll
        ]
        if len(columns) < 2:
            raise ValueError("iwae_nll was not measured in both reports; raise budget_s")
        first, second = columns
        # The same examples are known in both, so the gaps subtract as well.
        paired = torch.cat([first[:, :2] - second[:, :2], first[:, 2:]], dim=1)
        generator = torch.Generator().manual_seed(self.settings["seed"])
        return Bootstrap(len(paired), generator=generator).of_means(paired, importance_mean)[0]

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        parts = [self.verdict + (f" ({self.subtype})" if self.subtype else "")]
        if self.confidence is not None:
            parts.append(f"confidence {self.confidence:.2f}")
        if self.overfit is not None:
            parts.append("overfit" if self.overfit else "not overfit")
        return ", ".join(parts)

    def why_skipped(self) -> dict[str, list[str]]:
        """Reason -> what was skipped for it."""
        found: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            found.setdefault(why, []).append(name)
        return found

    def __str__(self) -> str:
        lines = [self.headline]
        for label, texts in (("", self.reasons), ("advice: ", self.advice)):
            for text in texts:
                lines += textwrap.wrap(label + text, WIDTH, initial_indent="  - ", subsequent_indent="    ")
        examples = self.settings["examples"]["heldout"]
        lines += ["", f"{f'nats, {examples} held-out examples':38}{'[95%]':>30}{'train [95%]':>30}"]
        for name, label in LABELS.items():
            on_train = "" if self.train is None or name not in self.train else _told(name, self.train[name])
            lines.append(f"{label:38}{_told(name, self.metrics[name]):>30}{on_train:>30}".rstrip())
        if any(each is not None and each.saturated for each in self.metrics.values()):
            lines.append("* saturated: within a nat of what so many examples, or contrast codes, can show")
        lines += [
            "",
            f"{'dim':>5}  {'state':13}{'rate':>7}  {'I_d [95%, all dims]':>24}  {'s_d [95%, all dims]':>24}",
        ]
        for dim in self.dims[:_TABLE_DIMS]:
            use = "not measured" if dim.use is None else dim.use.show(3)
            note = f"  with {_some(dim.redundant)}" if dim.redundant else ""
            row = f"{dim.index:>5}  {dim.state:13}{dim.rate.value:>7.3f}"
            row += f"  {dim.information.show(3):>24}  {use:>24}{note}"
            lines.append(row[:WIDTH])
        if len(self.dims) > _TABLE_DIMS:
            lines.append(f"  and {len(self.dims) - _TABLE_DIMS} more dimensions")
        for why, names in self.why_skipped().items():
            text = f"skipped: {', '.join(names)}: {why}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent="    ")
        return "\n".join(lines)


LABELS = {
    "rate": "rate (KL, unclamped)",
    "mi_lower": "I(x;z), lower bound",
    "mi_upper": "I(x;z), upper bound",
    "aggregate_kl": "KL(q(z) || p(z)) = rate - I",
    "active_units": "active units, Var(mu) > 0.01",
    "delta_shuffle": "Δ_shuffle: another example's z",
    "delta_prior": "Δ_prior: a z of the prior",
    "delta_mean": "Δ_mean: mu in place of z",
    "i_dec": "I_dec: what the decoder can read",
    "svi_gain": "gain of refining q by gradient",
    "nll": "NLL (reconstruction)",
    "nelbo": "NELBO (NLL + rate)",
    "iwae_nll": "NLL, importance-weighted (IWAE)",
}


def _told(name: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return "not measured"
    return estimate.show(0 if name == "active_units" else 2) + ("*" if estimate.saturated else " ")


def _triples(estimates: Mapping[str, Estimate | None]) -> dict[str, list[float] | None]:
    return {name: None if each is None else _triple(each) for name, each in estimates.items()}


def _triple(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def _dim(dim: Dim) -> dict[str, Any]:
    return {
        "index": dim.index,
        "state": dim.state,
        "reason": dim.reason,
        "rate": _triple(dim.rate),
        "information": _triple(dim.information),
        "mismatch": _triple(dim.mismatch),
        "use": None if dim.use is None else _triple(dim.use),
        "use_train": None if dim.use_train is None else _triple(dim.use_train),
        "mu_variance": dim.mu_variance,
        "redundant": list(dim.redundant),
    }


def _some(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:4])) + (", ..." if len(indices) > 4 else "")
