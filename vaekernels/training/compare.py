"""Trained runs side by side: the table, the sentences and the page of a demo, for one's own runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vaekernels.collapse import Report
from vaekernels.collapse.report import JSON, PAGE
from vaekernels.training import diagnosis, gallery
from vaekernels.training.demo import tables
from vaekernels.training.demo.outcome import Outcome
from vaekernels.training.errors import CheckpointError
from vaekernels.training.run import open_run

__all__ = ["outcome", "page", "show", "to_json"]

_TITLE = "Runs side by side"


def outcome(path: Path, say: Callable[[str], None]) -> Outcome:
    """The run in ``path`` with its saved report, which is made and saved now where there is none, one of
    fewer training steps, or one within classes. CheckpointError if the report cannot be read."""
    run = open_run(path, say)
    run.require_examples()
    report = _saved(path)
    settings = {} if report is None else report.settings
    if report is None or settings.get("steps") != run.step or "condition" in settings:
        classes = settings.get("condition")
        found = "" if classes is None else f", the one there is is within classes of {classes}"
        say(f"{path} has no report of step {run.step}{found}: diagnosing")
        report = diagnosis.diagnose(run)
        diagnosis.save(report, path, diagnosis.extras(run))
    seen = gallery.look(run.model, run.data, run.device)
    return Outcome(str(path), str(path / PAGE), report, seen, diagnosis.curves(run))


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Table, sentences of text models, and what the figures say."""
    console.print(tables.table(_TITLE, outcomes))
    if excerpt := tables.excerpt(outcomes):
        console.print(excerpt)
    for line in tables.conclusions(outcomes):
        console.print(f"- {line}")
    first, *others = outcomes
    for other in others:
        if not isinstance(tables.change(other, first), str):
            console.print(
                "\n" + other.report.against(first.report, (other.title, first.title)),
                highlight=False,
                markup=False,
            )


def page(outcomes: Sequence[Outcome], folder: Path) -> str:
    """A page that lies in ``folder``, with links to the reports of the runs."""
    from vaekernels.training.demo import html  # matplotlib takes seconds to import

    linked = [each.linked(os.path.relpath(each.page, folder)) for each in outcomes]
    return html.render(_TITLE, [(", ".join(each.title for each in outcomes), linked)])


def to_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Verdict, metrics and, in ``less_first``, every metric less the first run's: [value, low, high]."""
    told = []
    for each in outcomes:
        change = None if each is outcomes[0] else tables.change(each, outcomes[0])
        told_of = each.report
        said = told_of.to_json()
        told.append(
            {
                "run": each.title,
                **{name: said[name] for name in ("verdict", "subtype", "metrics")},
                "iwae_nll_less_first": None
                if change is None or isinstance(change, str)
                else [change.value, change.low, change.high],
                "not_comparable": change if isinstance(change, str) else None,
                "less_first": None
                if change is None or isinstance(change, str)
                else {
                    name: [each.value, each.low, each.high]
                    for name, each in told_of.difference(outcomes[0].report).items()
                },
            }
        )
    return {"runs": told}


def _saved(path: Path) -> Report | None:
    if not (path / JSON).is_file():
        return None
    try:
        return Report.load(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{error}; `vaekernels diagnose {path}` makes it anew") from error
