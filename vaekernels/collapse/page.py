"""report.html: one file with everything in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from vaekernels.collapse import pictures
from vaekernels.collapse.decide import Dim, Verdict, ends
from vaekernels.collapse.estimate import Estimate
from vaekernels.collapse.report import LABELS, Extras, Report

__all__ = ["render"]

_SAMPLES_SHOWN = 24
_TONES: dict[Verdict, str] = {
    "informative": "#0072B2",
    "partial": "#56B4E9",
    "near-collapsed": "#E69F00",
    "rate-only": "#E69F00",
    "encoder-only": "#D55E00",
    "collapsed": "#D55E00",
    "undetermined": "#999999",
}
_DIMS_SHOWN = 256


@dataclass(frozen=True)
class Picture:
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


def render(report: Report, extras: Extras) -> str:
    """The page. ValueError if an image grid has another shape than documented."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vaekernels.collapse", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["ends"] = _ends
    said = report.to_json(extras)
    return environment.get_template("report.html.j2").render(
        report=report,
        labels=LABELS,
        settings=said["settings"],
        skipped=_skipped(said["skipped"]),
        pictures=_pictures(report, extras),
        grids=[Picture(title, "", pictures.image_grid(title, grid)) for title, grid in extras.images.items()],
        texts=extras.texts,
        interpolations=[Interpolation(*each) for each in extras.interpolations.items()],
        prior_samples=list(extras.prior_samples),
        distinct=len(set(extras.prior_samples)),
        samples_shown=_SAMPLES_SHOWN,
        dims=_most_rate(report.dims),
        colours=pictures.COLOURS,
        tone=_TONES[report.verdict],
    )


def _pictures(report: Report, extras: Extras) -> list[Picture]:
    found = [
        Picture(
            "Dimensions",
            "What each dimension costs, what it tells of the example, and what shuffling it alone costs the "
            "decoder. Whiskers: 95% intervals, those of information and use for all dimensions together. "
            "Dotted: below this, nothing.",
            pictures.bars(report.dims),
        )
    ]
    if any(dim.use is not None for dim in report.dims):
        found.append(
            Picture(
                "Use against rate",
                "Paid for and unused: at the bottom right. Cheap and used: at the top left.",
                pictures.use_against_rate(report.dims),
            )
        )
    if report.rate_distortion:
        found.append(
            Picture(
                "Rate and distortion",
                "On each grey line the NELBO is the same, lower lines are better. A collapsed model sits on "
                "the left edge, whatever its NELBO.",
                pictures.plane(report.rate_distortion, extras.points),
            )
        )
    if report.samples.nll:
        found.append(
            Picture(
                "Likelihood with other codes",
                "If the histograms lie on each other, it makes no difference which z the decoder is given: "
                "it does not look, or all are alike.",
                pictures.likelihoods(report.samples),
            )
        )
    found.append(
        Picture(
            "Aggregate posterior",
            "The distribution of each z_d over the held-out examples. Off the prior, the decoder meets other "
            "codes when it samples than when it was trained.",
            pictures.aggregate_posterior(report.samples, report.dims),
        )
    )
    if extras.curves:
        found.append(Picture("Training", "", pictures.curves(extras.curves)))
    return found


def _most_rate(dims: Sequence[Dim]) -> list[Dim]:
    shown = sorted(dims, key=lambda dim: -dim.rate.value)[:_DIMS_SHOWN]
    return sorted(shown, key=lambda dim: dim.index)


def _skipped(skipped: dict[str, str]) -> dict[str, list[str]]:
    by_reason: dict[str, list[str]] = {}
    for name, why in skipped.items():
        by_reason.setdefault(why, []).append(name)
    return by_reason


def _ends(estimate: Estimate | None, name: str = "") -> str:
    if estimate is None:
        return "not measured"
    return estimate.show(0) if name == "active_units" else ends(estimate)
