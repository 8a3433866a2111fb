"""demo.html: the models of a demo side by side, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import torch
from torch import Tensor

from vaekernels.collapse import Curve, plots
from vaekernels.collapse.html import IDLE, MEANINGS, PLAIN
from vaekernels.collapse.verdict import FINDINGS
from vaekernels.training import gallery
from vaekernels.training.demo import tables
from vaekernels.training.demo.outcome import Outcome
from vaekernels.training.diagnosis import grid

__all__ = ["render"]

_SAMPLES = 12
_EXPLAINED = {
    "rate": "rate",
    "I(x;z)": "mi_lower",
    "I_dec": "i_dec",
    "Δ_shuffle": "delta_shuffle",
    "active units": "active_units",
    "NELBO": "nelbo",
    "NLL (IWAE)": "iwae_nll",
}
"""Row of the table -> the metric that it shows."""
_CURVES = ("rate, nats", "I(x;z), lower bound, nats")


@dataclass(frozen=True)
class Section:
    """One comparison: the first column's models are all the others' as well."""

    title: str
    outcomes: Sequence[Outcome]
    rows: list[tuple[str, list[str]]]
    conclusions: list[str]
    plain: list[tuple[str, str]]
    plane: str
    curves: str
    likelihoods: list[tuple[str, str]]
    sentences: list[gallery.Sentences]
    grids: list[dict[str, str]]


def render(heading: str, parts: Sequence[tuple[str, Sequence[Outcome]]]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vaekernels.training", "demo"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [_section(title, outcomes) for title, outcomes in parts]
    return environment.get_template("demo.html.j2").render(
        heading=heading,
        sections=sections,
        shown=_SAMPLES,
        meanings={row: MEANINGS[metric] for row, metric in _EXPLAINED.items()},
    )


def _section(title: str, outcomes: Sequence[Outcome]) -> Section:
    seen = [outcome.seen for outcome in outcomes]
    points = {outcome.title: outcome.report.rate_distortion["held out"] for outcome in outcomes}
    return Section(
        title,
        outcomes,
        tables.rows(outcomes, tables.interval),
        tables.conclusions(outcomes),
        [(outcome.title, _plain(outcome)) for outcome in outcomes],
        plots.plane(points, {}, unused={each.title for each in outcomes if each.report.verdict in IDLE}),
        plots.curves(_joined(outcomes)),
        [
            (outcome.title, plots.likelihoods(outcome.report.samples))
            for outcome in outcomes
            if "own" in outcome.report.samples.nll  # a saved report has them no more
        ],
        [each for each in seen if isinstance(each, gallery.Sentences)],
        [_grids(each) for each in seen if isinstance(each, gallery.Images)],
    )


def _plain(outcome: Outcome) -> str:
    """The verdict and the findings for a reader who knows none of the measures."""
    found = [FINDINGS[name] for name in outcome.report.findings]
    return PLAIN[outcome.report.verdict] + (f" But: {'; '.join(found)}." if found else "")


def _joined(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Curve]]:
    """Held-out curves of all models in one panel."""
    return {
        panel: {outcome.title: outcome.curves[panel]["held out"] for outcome in outcomes} for panel in _CURVES
    }


def _grids(seen: gallery.Images) -> dict[str, str]:
    def picture(title: str, images: Tensor) -> str:
        return plots.image_grid(title, images)

    return {
        "held-out images above their reconstructions": picture(
            "reconstructions", torch.stack([seen.originals, seen.reconstructions])
        ),
        "samples of the prior": picture("samples", grid(seen.samples[:24], 8)),
        "lines between the codes of two images": picture("interpolations", seen.interpolations),
    }
