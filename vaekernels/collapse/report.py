"""The report: what a diagnosis found, as an object, as report.json, and written to a folder with report.html.

The text (`tables`) and the page (`html`, with `plots`) are made of what `Report.to_json` gives."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vaekernels._files import open_regular, write_atomically
from vaekernels.collapse import tables
from vaekernels.collapse.estimate import Bootstrap, Estimate
from vaekernels.collapse.extras import Extras, Resampled, Samples
from vaekernels.collapse.verdict import Dim, Verdict

__all__ = ["JSON", "PAGE", "SCHEMA", "Report"]

SCHEMA = 3
JSON, PAGE = "report.json", "report.html"


@dataclass(frozen=True)
class Report:
    """The outcome of :func:`vaekernels.collapse.diagnose`. All values in nats per example.

    ``metrics``: Estimate by name, None for what was not measured: ``rate``, ``active_units`` (a count),
    ``mi_lower`` and ``mi_upper`` (bounds on I(x;z); each interval is that of the bound, so the truth lies
    between the lower end of the first and the upper end of the second), ``aggregate_kl`` (rate - I),
    ``total_correlation`` and ``dimension_wise_kl`` (its parts, see `vaekernels.kl_decomposition`),
    ``information_share`` (I / rate, a share), ``nll`` and ``nelbo`` (one sample of z), ``delta_shuffle``,
    ``delta_prior``, ``delta_mean`` (NLL with another example's z, a z of the prior, or mu, less NLL with its
    own z), ``i_dec``, ``svi_gain`` (by how much NLL + beta rate falls below the lower of its values at q and
    at the prior when every q(z|x) is refined by gradient), ``code_gap`` (by how much it is above the least
    that importance weighting finds), ``iwae_nll``, ``z_free_gain`` (the NLL of the same decoder without an
    encoder, with a z of the prior, z = 0 or another example's z, whichever is best, less the NELBO: below 0,
    the model is worse than one that ignores z).
    ``train``: those measured on the train split. ``gaps``: by how much that split is better.
    ``rate_distortion``: (rate, NLL) of this model, and of it with other codes.
    ``skipped``: what was not measured -> why.
    """

    verdict: Verdict
    subtype: str | None
    """"model collapse", "inference lag" or "cause unknown" of a collapsed one; None where refinement was not
    measured"""
    overfit: bool | None
    """None without a train split"""
    excluded: str | None
    """how rare a use of the latent the verdict does not rule out; None where it says that there is use"""
    reasons: list[str]
    findings: dict[str, str]
    """metric -> what is wrong with a latent that is used"""
    advice: list[str]
    metrics: dict[str, Estimate | None]
    train: dict[str, Estimate | None] | None
    gaps: dict[str, Estimate]
    classes: dict[str, dict[str, Estimate]]
    """label -> metric -> estimate, where labels were given"""
    dims: list[Dim]
    rate_distortion: dict[str, tuple[float, float]]
    settings: dict[str, Any]
    checks: dict[str, Any]
    cost: dict[str, Any]
    skipped: dict[str, str]
    samples: Samples

    def to_json(self, extras: Extras | None = None) -> dict[str, Any]:
        """What report.json holds: dicts, lists, strings and numbers. An estimate is [value, low, high]; one
        that is near its cap is named in ``saturated`` (of the train split ``train_saturated``, of a dimension
        its own ``saturated``). null was not measured; ``skipped`` says why. ``resampled``: every metric on
        1000 resamples of the examples, for comparisons."""
        told = {} if extras is None else dict(extras.settings)
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "subtype": self.subtype,
            "overfit": self.overfit,
            "excluded": self.excluded,
            "reasons": self.reasons,
            "findings": self.findings,
            "advice": self.advice,
            "settings": self.settings | told,
            "metrics": _triples(self.metrics),
            "saturated": _saturated(self.metrics),
            "train": None if self.train is None else _triples(self.train),
            "train_saturated": _saturated(self.train or {}),
            "gaps": _triples(self.gaps) if self.gaps else None,
            "classes": {label: _triples(found) for label, found in self.classes.items()},
            "dims": [_dim(dim) for dim in self.dims],
            "rate_distortion": {name: list(point) for name, point in self.rate_distortion.items()},
            "checks": self.checks,
            "cost": self.cost,
            "skipped": {name: why for name, why in self.skipped.items() if told.get(name) is None},
            "resampled": {
                name: {"examples": each.examples, "values": [_rounded(v) for v in each.values.tolist()]}
                for name, each in self.samples.resampled.items()
            },
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
            from vaekernels.collapse import html
        except ImportError as error:
            raise ImportError(
                f"{folder / JSON} is written, but the page needs {error.name}: "
                f"pip install 'vaekernels[train]'"
            ) from error
        write_atomically(folder / PAGE, html.render(self.to_json(extras), self.samples, extras or Extras()))
        return folder / PAGE

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """The report in a report.json, or in the one of the folder ``path``. ``samples`` has
        of it what :meth:`difference` needs, and is empty of what only pictures show.

        OSError if it cannot be read, ValueError if it is no report or one of another schema.
        """
        file = Path(path)
        file = file / JSON if file.is_dir() else file
        with open_regular(file) as opened:
            content = opened.read()
        try:
            said = json.loads(content)
            schema = said["schema"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} is no report.json of vaekernels: it has no schema") from error
        if schema != SCHEMA:
            raise ValueError(f"{file} has schema {schema!r}, this version reads {SCHEMA}: diagnose again")
        try:
            return cls._of(said)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from error

    @classmethod
    def _of(cls, said: Mapping[str, Any]) -> Report:
        """What :meth:`to_json` gave, as a report."""
        as_they_are = ["verdict", "subtype", "overfit", "excluded", "reasons", "findings", "advice"]
        as_they_are += ["settings", "checks", "cost", "skipped"]
        resampled = {
            name: Resampled(each["examples"], torch.tensor(each["values"], dtype=torch.float64))
            for name, each in said["resampled"].items()
        }
        gaps = {name: gap for name, gap in tables.gaps_of(said).items() if gap is not None}
        return cls(
            **{name: said[name] for name in as_they_are},
            metrics=tables.metrics_of(said),
            train=None if said["train"] is None else tables.train_of(said),
            gaps=gaps,
            classes=tables.classes_of(said),
            dims=tables.dims_of(said),
            rate_distortion={name: (rate, nll) for name, (rate, nll) in said["rate_distortion"].items()},
            samples=Samples({}, None, resampled, [], torch.empty(0, 0, dtype=torch.float64)),
        )

    def difference(self, other: Report) -> dict[str, Estimate]:
        """Every metric that both measured: that of this model less that of ``other``, paired by example. Each
        interval by itself is one of 95 %.

        ValueError unless both were diagnosed on the same examples with the same seed and k.
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
        found: dict[str, Estimate] = {}
        for name, mine in self.metrics.items():
            theirs = other.metrics.get(name)
            if mine is None or theirs is None:
                continue
            a, b = self.samples.resampled[name], other.samples.resampled[name]
            bootstrap = Bootstrap(min(a.examples, b.examples))
            change = torch.tensor([mine.value - theirs.value], dtype=torch.float64)
            estimate = bootstrap.interval(change, (a.values - b.values)[:, None])[0]
            found[name] = replace(estimate, saturated=mine.saturated or theirs.saturated)
        return found

    def iwae_difference(self, other: Report) -> Estimate:
        """The importance-weighted NLL of this model less that of ``other``: below 0 where this one is the
        better model of the data. (Compare models on this, not on the ELBO.) ValueError as :meth:`difference`,
        and if it was not measured in both."""
        found = self.difference(other)
        if "iwae_nll" not in found:
            raise ValueError("iwae_nll was not measured in both reports; raise budget_s")
        return found["iwae_nll"]

    def against(self, other: Report, names: tuple[str, str] = ("this", "the other")) -> str:
        """Both models in a sentence and a table of 100 columns at most, with what :meth:`difference`
        gives."""
        return tables.against(self.to_json(), other.to_json(), self.difference(other), names)

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        return tables.headline(self.to_json())

    def why_skipped(self) -> dict[str, list[str]]:
        """Reason -> what was skipped for it."""
        return tables.by_reason(self.skipped)

    def __str__(self) -> str:
        return tables.text(self.to_json())


def _rounded(value: float) -> float:
    """To seven digits, a quarter of the length in the file."""
    return float(f"{value:.7g}")


def _triples(
    estimates: Mapping[str, Estimate] | Mapping[str, Estimate | None],
) -> dict[str, list[float] | None]:
    return {
        name: None if each is None else [each.value, each.low, each.high] for name, each in estimates.items()
    }


def _saturated(estimates: Mapping[str, Estimate | None]) -> list[str]:
    return [name for name, each in estimates.items() if each is not None and each.saturated]


def _dim(dim: Dim) -> dict[str, Any]:
    estimates: dict[str, Estimate | None] = {name: getattr(dim, name) for name in tables.DIM_ESTIMATES}
    return {
        "index": dim.index,
        "state": dim.state,
        "reason": dim.reason,
        **_triples(estimates),
        "saturated": _saturated(estimates),
        "mu_variance": dim.mu_variance,
        "redundant": list(dim.redundant),
    }
