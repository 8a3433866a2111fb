"""The page, report.html: what `Report.to_json` gives, with plots, in one file that needs no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from vaekernels.collapse import plots, tables
from vaekernels.collapse.estimate import Estimate
from vaekernels.collapse.extras import Extras, Samples
from vaekernels.collapse.verdict import EPS_GLOBAL, Dim, Verdict, ends

__all__ = ["IDLE", "render"]

_SAMPLES_SHOWN = 24
_TONES: dict[Verdict, str] = {
    "informative": "#0072B2",
    "partial": "#56B4E9",
    "rare-use": "#E69F00",
    "near-collapsed": "#E69F00",
    "rate-only": "#E69F00",
    "encoder-only": "#D55E00",
    "collapsed": "#D55E00",
    "undetermined": "#999999",
}
_DIMS_SHOWN = 256


PLAIN = {
    "informative": "Changing z changes what the decoder makes: the latent is used.",
    "partial": "Changing z changes what the decoder makes, but only few of the dimensions do that.",
    "rare-use": "Changing z changes what the decoder makes for a few of the examples, and nothing for "
    "the others.",
    "near-collapsed": "Changing z changes next to nothing: the decoder hardly looks at it.",
    "rate-only": "Changing z changes nothing, although it costs: z has a rate, and tells nothing of the "
    "example.",
    "encoder-only": "Changing z changes nothing: z tells the examples apart, but the decoder does not look "
    "at it.",
    "collapsed": "Changing z changes nothing: the decoder makes the same of every z, and z tells nothing of "
    "the example.",
    "undetermined": "Whether changing z changes anything could not be decided from these examples.",
}
"""Verdict -> the same in plain words; z is the code of an example."""

MEANINGS = {
    "rate": "what the code z of an example x costs: KL(q(z|x) || p(z)), q what the encoder says, p the prior",
    "mi_lower": "how much z tells of x, at least",
    "mi_upper": "how much z tells of x, at most",
    "aggregate_kl": "how far the codes of all examples together, q(z), are from the prior p(z)",
    "total_correlation": "how much the dimensions of z tell of each other",
    "dimension_wise_kl": "how far each dimension by itself is from the prior",
    "information_share": "the part of the cost that tells something of x",
    "active_units": "dimensions whose mean mu differs between examples",
    "delta_shuffle": "how much worse x is explained with the z of another example",
    "delta_prior": "how much worse x is explained with a z drawn from the prior",
    "delta_mean": "how much worse x is explained with the mean mu than with a z drawn around it",
    "z_free_gain": "below 0 the code costs more than it is worth",
    "i_dec": "how much of x the decoder can find in z",
    "svi_gain": "how much better the codes get when they are improved by gradient",
    "code_gap": "how much better the best codes are that were found",
    "nll": "how badly x is explained given its z: -log p(x|z)",
    "nelbo": "the two costs together, the loss at beta 1",
    "iwae_nll": "a close upper bound on -log p(x): compare models on it",
}
"""Metric -> what it is, in a line."""

IDLE = frozenset({"collapsed", "near-collapsed", "rate-only", "encoder-only"})
"""Verdicts that z is not used."""


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    source: str


@dataclass(frozen=True)
class Interpolation:
    title: str
    sentences: Sequence[str]

    @property
    def changes(self) -> str:
        """At how many of the steps the sentence changes."""
        steps = list(zip(self.sentences, self.sentences[1:], strict=False))
        return f"{sum(a != b for a, b in steps)} of {len(steps)}"


def render(said: Mapping[str, Any], samples: Samples, extras: Extras) -> str:
    """The page. ``said``: what `Report.to_json` gives. ValueError if an image grid has another shape than
    documented."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vaekernels.collapse", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["ends"] = _ends
    environment.filters["told"] = _told
    dims = tables.dims_of(said)
    return environment.get_template("report.html.j2").render(
        said=said,
        headline=tables.headline(said),
        labels=tables.labels(said),
        classes=tables.classes_of(said),
        metrics=tables.metrics_of(said),
        train=tables.train_of(said),
        gaps=tables.gaps_of(said),
        skipped=tables.by_reason(said["skipped"]),
        plots=_plots(said, dims, samples, extras),
        grids=[Plot(title, "", plots.image_grid(title, grid)) for title, grid in extras.images.items()],
        texts=extras.texts,
        interpolations=[Interpolation(*each) for each in extras.interpolations.items()],
        prior_samples=list(extras.prior_samples),
        distinct=len(set(extras.prior_samples)),
        samples_shown=_SAMPLES_SHOWN,
        dims=_most_rate(dims),
        colours=plots.COLOURS,
        tone=_TONES[said["verdict"]],
        plain=PLAIN[said["verdict"]],
        meanings=MEANINGS,
        about=_about(said["settings"]),
    )


def _plots(said: Mapping[str, Any], dims: Sequence[Dim], samples: Samples, extras: Extras) -> list[Plot]:
    found = [
        Plot(
            "Dimensions",
            "What each dimension costs, what it tells of the example, and what shuffling it alone costs the "
            "decoder. Whiskers: 95% intervals, those of information and use for all dimensions together. "
            "Dotted: below this, nothing.",
            plots.bars(dims),
        )
    ]
    if any(dim.use is not None for dim in dims):
        found.append(
            Plot(
                "Use against rate",
                "Paid for and unused: at the bottom right. Cheap and used: at the top left.",
                plots.use_against_rate(dims),
            )
        )
    if said["rate_distortion"]:
        found.append(
            Plot(
                "Rate and distortion",
                "On each grey line the NELBO is the same, lower lines are better. A collapsed model sits on "
                "the left edge, whatever its NELBO. Ringed: z is not used.",
                plots.plane(said["rate_distortion"], extras.points, unused=_unused(said, extras)),
            )
        )
    if samples.nll:
        found.append(
            Plot(
                "Likelihood with other codes",
                "If the histograms lie on each other, it makes no difference which z the decoder is given: "
                "it does not look, or all are alike.",
                plots.likelihoods(samples),
            )
        )
    found.append(
        Plot(
            "Aggregate posterior",
            "The distribution of each z_d over the held-out examples. Off the prior, the decoder meets other "
            "codes when it samples than when it was trained.",
            plots.aggregate_posterior(samples, dims),
        )
    )
    if extras.curves:
        found.append(Plot("Training", "", plots.curves(extras.curves)))
    return found


def _unused(said: Mapping[str, Any], extras: Extras) -> set[str]:
    """The models in the plane that do not use z: this one by its verdict, others by their rate."""
    others = {name for name, (rate, _) in extras.points.items() if rate < EPS_GLOBAL}
    return others | ({"held out"} if said["verdict"] in IDLE else set())


def _about(settings: Mapping[str, Any]) -> str:
    """Run, data and date, those that are known."""
    return " · ".join(str(settings[name]) for name in ("run", "data", "date") if settings.get(name))


def _told(value: object) -> str:
    """A setting as one would say it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {_told(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return "\n".join(_told(each) for each in value)
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
    )


def _most_rate(dims: Sequence[Dim]) -> list[Dim]:
    shown = sorted(dims, key=lambda dim: -dim.rate.value)[:_DIMS_SHOWN]
    return sorted(shown, key=lambda dim: dim.index)


def _ends(estimate: Estimate | None, name: str = "") -> str:
    if estimate is None:
        return "not measured"
    return estimate.show(0) if name == "active_units" else ends(estimate)
