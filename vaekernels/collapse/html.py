"""The page, report.html: what `Report.to_json` gives, with plots, in one file that needs no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from vaekernels.collapse import plots, tables
from vaekernels.collapse.estimate import Estimate
from vaekernels.collapse.extras import Extras, Samples
from vaekernels.collapse.verdict import Dim, Verdict, ends

__all__ = ["render"]

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
                "the left edge, whatever its NELBO.",
                plots.plane(said["rate_distortion"], extras.points),
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


def _most_rate(dims: Sequence[Dim]) -> list[Dim]:
    shown = sorted(dims, key=lambda dim: -dim.rate.value)[:_DIMS_SHOWN]
    return sorted(shown, key=lambda dim: dim.index)


def _ends(estimate: Estimate | None, name: str = "") -> str:
    if estimate is None:
        return "not measured"
    return estimate.show(0) if name == "active_units" else ends(estimate)
