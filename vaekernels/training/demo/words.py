"""The figures of a demo as a table, and what they say in sentences: these runs and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from vaekernels.collapse import Estimate
from vaekernels.training import gallery
from vaekernels.training.demo.outcome import Outcome

__all__ = ["conclusions", "excerpt", "rows", "table"]

_EXCERPT = 3


def rows(outcomes: Sequence[Outcome]) -> list[tuple[str, list[str]]]:
    """Label, and one cell a model. Nats per held-out example, 95% intervals."""

    def estimate(name: str) -> Callable[[Outcome], str]:
        return lambda outcome: _short(outcome.report.metrics[name])

    def distinct(outcome: Outcome) -> str:
        return str(outcome.seen.distinct)

    dims, samples = len(outcomes[0].report.dims), len(outcomes[0].seen.samples)
    shown: list[tuple[str, Callable[[Outcome], str]]] = [
        ("verdict", lambda outcome: outcome.verdict),
        ("rate (KL, unclamped)", estimate("rate")),
        ("I(x;z), lower bound", estimate("mi_lower")),
        ("I_dec: what the decoder can read", estimate("i_dec")),
        ("Δ_shuffle: another example's z", estimate("delta_shuffle")),
        (f"active units, of {dims}", lambda outcome: _count(outcome.report.metrics["active_units"])),
        ("dims that are used", lambda outcome: str(_used(outcome))),
        ("NELBO", estimate("nelbo")),
        ("NLL, importance-weighted", estimate("iwae_nll")),
        ("  less that of the first, paired", lambda outcome: _difference(outcome, outcomes[0])),
        (f"distinct of {samples} prior samples", distinct),
        ("training, s", lambda outcome: f"{outcome.seconds:.0f}"),
    ]
    return [(label, [cell(outcome) for outcome in outcomes]) for label, cell in shown]


def table(title: str, outcomes: Sequence[Outcome]) -> Table:
    """The figures side by side."""
    made = Table(
        title=f"{title}: {outcomes[0].report.settings['examples']['heldout']} held-out examples, nats [95%]",
        title_justify="left",
    )
    made.add_column("")
    for outcome in outcomes:
        made.add_column(outcome.title, justify="right")
    for label, cells in rows(outcomes):
        made.add_row(label, *cells)
    return made


def excerpt(outcomes: Sequence[Outcome]) -> Table | None:
    """Some sentences as each model gives them back, and some it makes up; None for images."""
    seen = [outcome.seen for outcome in outcomes if isinstance(outcome.seen, gallery.Sentences)]
    if not seen:
        return None
    made = Table(title="greedy decoding", title_justify="left", show_lines=True)
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
        f"{first.title} is {first.verdict}: its encoder sends {_short(rate)} nats, and with another "
        f"example's z an example is explained {_short(shuffle)} nats worse."
    ]
    for other in others:
        change = other.report.iwae_difference(first.report)
        state = "alive" if other.alive else "not alive"
        if other.alive == first.alive:
            state = f"{state} either" if not other.alive else "alive as well"
        said.append(
            f"{other.title}: {state} ({other.verdict}); {_likelihood(change)}; "
            f"{other.seen.distinct} distinct prior samples, not {first.seen.distinct}."
        )
    return said


def _likelihood(change: Estimate) -> str:
    """The price, in nats of the importance-weighted NLL."""
    size = f"{abs(change.value):.2f} nats an example [{change.low:+.2f}, {change.high:+.2f}]"
    if change.low > 0:
        return f"the likelihood (IWAE) is worse by {size}"
    if change.high < 0:
        return f"the likelihood (IWAE) is better by {size}"
    seen = f"{change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"
    return f"no difference in likelihood (IWAE) is seen: {seen}"


def _difference(outcome: Outcome, first: Outcome) -> str:
    return "" if outcome is first else _short(outcome.report.iwae_difference(first.report), signed=True)


def _used(outcome: Outcome) -> int:
    return sum(dim.state in ("active", "low-rate") for dim in outcome.report.dims)


def _count(estimate: Estimate | None) -> str:
    return "not measured" if estimate is None else f"{estimate.value:.0f}"


def _short(estimate: Estimate | None, *, signed: bool = False) -> str:
    if estimate is None:
        return "not measured"
    digits = 1 if abs(estimate.value) >= 10 else 2
    value, low, high = (
        f"{number:{'+' if signed else ''}.{digits}f}"
        for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"
