"""The figures of a demo as a table, and what they say in sentences: these runs and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from vaekernels.collapse import Estimate
from vaekernels.training import gallery
from vaekernels.training.demo.outcome import Outcome

__all__ = ["change", "conclusions", "excerpt", "interval", "rows", "table"]

Cell = Callable[[Estimate, bool], str]

_EXCERPT = 3


def rows(outcomes: Sequence[Outcome], cell: Cell) -> list[tuple[str, list[str]]]:
    """Label, and one cell a model, in nats per held-out example. ``cell`` writes an estimate with its 95%
    interval; its second argument: whether with a sign."""

    def estimate(name: str) -> Callable[[Outcome], str]:
        return lambda outcome: _measured(outcome.report.metrics[name], cell)

    def difference(outcome: Outcome) -> str:
        if outcome is outcomes[0]:
            return ""
        found = change(outcome, outcomes[0])
        return "not comparable" if isinstance(found, str) else cell(found, True)

    shown: list[tuple[str, Callable[[Outcome], str]]] = [
        ("verdict", lambda outcome: outcome.verdict),
        ("rate (KL, unclamped)", estimate("rate")),
        ("I(x;z), lower bound", estimate("mi_lower")),
        ("total correlation", estimate("total_correlation")),
        ("dimension-wise KL", estimate("dimension_wise_kl")),
        ("I_dec", estimate("i_dec")),
        ("Δ_shuffle", estimate("delta_shuffle")),
        (
            "active units",
            lambda outcome: f"{_count(outcome.report.metrics['active_units'])} of {_dims(outcome)}",
        ),
        ("dims used", lambda outcome: f"{_used(outcome)} of {_dims(outcome)}"),
        ("NELBO", estimate("nelbo")),
        ("NLL (IWAE)", estimate("iwae_nll")),
        (f"  less {outcomes[0].title}'s", difference),
    ]
    if all(outcome.seen is not None for outcome in outcomes):
        shown.append(("distinct samples", _distinct))
    return [(label, [write(outcome) for outcome in outcomes]) for label, write in shown]


def table(title: str, outcomes: Sequence[Outcome]) -> Table:
    """The figures side by side, an interval as the larger of its halves."""
    examples = outcomes[0].report.settings["examples"]["heldout"]
    made = Table(
        title=f"{title}: nats on {examples} held-out examples, ± 95%",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    made.add_column("", no_wrap=True)
    for outcome in outcomes:
        made.add_column(outcome.title, justify="right", overflow="fold")
    for label, cells in rows(outcomes, _plus_minus):
        made.add_row(label, *cells)
    return made


def excerpt(outcomes: Sequence[Outcome]) -> Table | None:
    """Some sentences as each model gives them back, and some it makes up; None for images."""
    seen = [outcome.seen for outcome in outcomes if isinstance(outcome.seen, gallery.Sentences)]
    if not seen:
        return None
    made = Table(
        title="greedy decoding",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_lines=True,
        padding=(0, 1, 0, 0),
    )
    made.add_column("held-out sentence")
    for outcome in outcomes:
        made.add_column(outcome.title)
    for number in range(_EXCERPT):
        made.add_row(seen[0].originals[number], *(each.reconstructions[number] for each in seen))
    for number in range(_EXCERPT):
        made.add_row("(a sample of the prior)", *(each.samples[number] for each in seen))
    return made


def conclusions(outcomes: Sequence[Outcome]) -> list[str]:
    """One sentence on the first model, then one on what each of the others changes."""
    first, *others = outcomes
    rate, shuffle = first.report.metrics["rate"], first.report.metrics["delta_shuffle"]
    said = [
        f"{first.title} is {first.verdict}: its encoder sends {_measured(rate, interval)} nats, and with "
        f"another example's z an example is explained {_measured(shuffle, interval)} nats worse."
    ]
    for other in others:
        state = "alive" if other.alive else "not alive"
        if other.alive == first.alive:
            state = f"{state} either" if not other.alive else "alive as well"
        found = change(other, first)
        price = f"likelihoods not compared: {found}" if isinstance(found, str) else _likelihood(found)
        line = f"{other.title}: {state} ({other.verdict}); {price}"
        if other.seen is not None and first.seen is not None and other.seen.distinct != first.seen.distinct:
            line += f"; {other.seen.distinct} distinct prior samples, not {first.seen.distinct}"
        said.append(f"{line}.")
    return said


def change(outcome: Outcome, first: Outcome) -> Estimate | str:
    """The importance-weighted NLL less that of ``first``, paired by example; a sentence where that cannot be
    said."""
    try:
        return outcome.report.iwae_difference(first.report)
    except ValueError as error:
        return str(error)


def _dims(outcome: Outcome) -> int:
    return len(outcome.report.dims)


def _distinct(outcome: Outcome) -> str:
    assert outcome.seen is not None
    return f"{outcome.seen.distinct} of {len(outcome.seen.samples)}"


def _likelihood(change: Estimate) -> str:
    """The price, in nats of the importance-weighted NLL."""
    size = f"{abs(change.value):.2f} nats an example [{change.low:+.2f}, {change.high:+.2f}]"
    if change.low > 0:
        return f"the likelihood (IWAE) is worse by {size}"
    if change.high < 0:
        return f"the likelihood (IWAE) is better by {size}"
    seen = f"{change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"
    return f"no difference in likelihood (IWAE) is seen: {seen}"


def _used(outcome: Outcome) -> int:
    return sum(dim.state in ("active", "low-rate") for dim in outcome.report.dims)


def _count(estimate: Estimate | None) -> str:
    return "not measured" if estimate is None else f"{estimate.value:.0f}"


def _measured(estimate: Estimate | None, cell: Cell) -> str:
    return "not measured" if estimate is None else cell(estimate, False)


def interval(estimate: Estimate, signed: bool = False) -> str:
    """``1.23 [1.10, 1.36]``"""
    value, low, high = (_number(x, estimate, signed) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _plus_minus(estimate: Estimate, signed: bool) -> str:
    half = max(estimate.high - estimate.value, estimate.value - estimate.low)
    return f"{_number(estimate.value, estimate, signed)} ±{_number(half, estimate, False)}"


def _number(value: float, of: Estimate, signed: bool) -> str:
    digits = 1 if abs(of.value) >= 10 else 2
    return f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}"  # + 0.0: for -0.00
