"""The verdict: thresholds and rules that turn estimates into the state of every dimension, the verdict on the
model, its reasons and advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from vaekernels.collapse.estimate import TAIL, Estimate, holm_high, holm_low

__all__ = [
    "Answer",
    "Dim",
    "Ruling",
    "State",
    "Verdict",
    "advice",
    "answers",
    "empty_shares",
    "ends",
    "excluded",
    "findings",
    "rule",
    "state_of",
]

State: TypeAlias = Literal[
    "active", "low-rate", "pruned", "rate-only", "encoder-only", "memorised", "undetermined"
]
Verdict: TypeAlias = Literal[
    "collapsed",
    "rate-only",
    "encoder-only",
    "rare-use",
    "informative",
    "partial",
    "near-collapsed",
    "undetermined",
]

EPS_INFO = 0.01
"""Nats below which I(x; z_d) and a dimension's rate count as nothing."""
EPS_USE = 0.02
"""Nats below which the cost of shuffling one dimension counts as nothing."""
EPS_GLOBAL = 0.1
"""Nats below which a measure of the whole latent counts as nothing."""
LOW_RATE = 0.1
EMPTY_SHARE = 0.3
"""Share of information in a rate below which the rate is called empty."""
NEAR = 0.5
CONSTANT = 1e-4
"""Distance below which two codes are the same: a ten-thousandth of the prior's standard deviation."""
SAME_SHARE = 0.95
"""Share of the examples from which on with the same code the encoder is called constant. A variance would be
that of the few others: saturated units still tell an odd example apart."""
LAG = 0.05
"""Gain of refined inference, in nats, from which a collapse is the encoder's."""
HALF = 0.5
"""Share of information in the whole rate below which a used latent is said to pay for little."""
OFF_PRIOR = 1.0
"""Nats between aggregate posterior and prior from which samples of the prior are said to be off: codes of the
prior lie e times less densely there than codes of the data, or more."""
GAP = 0.1
"""Share of the rate that refined inference gains from which the encoder is said to lag."""

THRESHOLDS = {
    "information": EPS_INFO,
    "use": EPS_USE,
    "global": EPS_GLOBAL,
    "low_rate": LOW_RATE,
    "empty_share": EMPTY_SHARE,
    "near_collapsed": NEAR,
    "inference_lag": LAG,
    "information_share": HALF,
    "aggregate_kl": OFF_PRIOR,
    "svi_gain_of_rate": GAP,
}


class Answer(NamedTuple):
    """Is there as much as a threshold? ``yes``: significantly more than nothing, and estimated at the
    threshold or more. ``no``: significantly less than the threshold. Neither: undetermined."""

    yes: bool
    no: bool
    estimate: Estimate
    """with the ends that decided: those of all dimensions together (Holm)"""


USE_TAIL, REDUNDANCY_TAIL = 0.02, 0.005
"""Chance of a wrong answer about the use of any dimension alone, and in the second look at groups: together
0.025, as for the information."""


def answers(
    lower: Sequence[Estimate],
    upper: Sequence[Estimate],
    n: int | Sequence[int],
    threshold: float,
    tail: float = TAIL,
) -> list[Answer]:
    """One question for many dimensions, from bounds (or twice the same estimates) on ``n`` examples, or those
    of each. ``tail``: the chance that any of them is answered wrongly with yes, or with no."""
    lows, highs = holm_low(lower, n, tail=tail), holm_high(upper, n, threshold, tail)
    found: list[Answer] = []
    for low, high, below, above in zip(lows, highs, lower, upper, strict=True):
        value = (below.value + above.value) / 2
        found.append(
            Answer(
                low > 0 and value >= threshold,
                high < threshold,
                Estimate(value, low, high, below.saturated),
            )
        )
    return found


def empty_shares(
    rates: Sequence[Estimate], shares: Callable[[list[int]], list[Estimate]], n: int
) -> dict[int, Estimate]:
    """Information / rate of the dimensions whose rate is no mere rounding, with upper ends for all of them.
    ``shares`` estimates it for the dimensions it is given."""
    paying = [d for d, rate in enumerate(rates) if rate.value >= EPS_INFO]
    if not paying:
        return {}
    found = shares(paying)
    highs = holm_high(found, n, EMPTY_SHARE)
    return {d: replace(share, high=high) for d, share, high in zip(paying, found, highs, strict=True)}


@dataclass(frozen=True)
class Dim:
    """What is known of one latent dimension. The ends of ``information`` and ``use`` hold for all dimensions
    together; None was not measured."""

    index: int
    state: State
    reason: str
    rate: Estimate
    information: Estimate
    mismatch: Estimate
    """rate - information, how far the aggregate posterior of this dimension is from the prior"""
    use: Estimate | None
    """nats lost when this dimension alone is shuffled"""
    use_train: Estimate | None
    mu_variance: float
    redundant: tuple[int, ...] = ()
    """dimensions that say the same; shuffled together they matter, this one alone does not"""


def negligible(rate: float, information: Answer, use: Answer | None) -> bool:
    """Whether a dimension has neither rate nor information nor use, alone."""
    return rate < EPS_INFO and information.no and use is not None and use.no


class Together(NamedTuple):
    """All dimensions that are negligible alone, as one code: many small ones may hold a lot."""

    number: int
    rate: Estimate
    lower: Estimate | None
    """bounds of I(x; z) of these dimensions; None where their rate is no more than the threshold, which the
    information cannot exceed, or where it was not measured"""
    upper: Estimate | None
    use: Estimate | None
    """nats lost when all of them are shuffled"""

    def state(self) -> tuple[State, str]:
        """What the state of each of them is, and why."""
        if self.rate.high < EPS_GLOBAL:
            return "pruned", f"all {self.number} such dimensions together: rate {ends(self.rate)}"
        if self.lower is None or self.upper is None or self.use is None:
            return "undetermined", (
                f"all {self.number} such dimensions together have a rate of {ends(self.rate)}, and what they "
                f"do together was not measured"
            )
        both = Estimate((self.lower.value + self.upper.value) / 2, self.lower.low, self.upper.high)
        told = (
            f"all {self.number} such dimensions together: rate {ends(self.rate)}, information {ends(both)}, "
            f"use {ends(self.use)}"
        )
        if both.high < EPS_GLOBAL and self.use.high < EPS_GLOBAL:
            return "pruned", told
        if both.low >= EPS_GLOBAL and self.use.low > 0 and self.use.value >= EPS_GLOBAL:
            return "low-rate", told
        if both.low >= EPS_GLOBAL and self.use.high < EPS_GLOBAL:
            return "encoder-only", told
        if both.high < EPS_GLOBAL:
            return "rate-only", told
        return "undetermined", told


def state_of(
    rate: float,
    information: Answer,
    share: Estimate | None,
    use: Answer | None,
    train_only: bool,
    redundant: Sequence[int],
    use_train: Estimate | None,
) -> tuple[State, str]:
    """The state of one dimension and why. ``share``: information / rate with its upper end for all
    dimensions; ``train_only``: shuffling costs on the train split and, on held-out data, nothing or
    significantly less; ``redundant``: the group in which it is used."""
    told = f"rate {rate:.3f}, information {ends(information.estimate)}"
    if use is not None:
        told += f", use {ends(use.estimate)}"
    used = (use is not None and use.yes) or bool(redundant)
    if redundant:
        told += f"; shuffled together with {_listed(redundant)} it is used"
    if information.yes and used:
        return ("low-rate" if rate < LOW_RATE else "active"), told
    if negligible(rate, information, use):
        return "pruned", told
    if rate >= EPS_INFO and (information.no or (share is not None and share.high < EMPTY_SHARE)):
        if share is not None:
            told += f", information / rate at most {share.high:.2f}"
        return "rate-only", told
    if information.yes and train_only and use_train is not None:
        return "memorised", f"{told}, use on the train split {ends(use_train)}"
    if rate >= EPS_INFO and information.yes and use is not None and use.no:
        return "encoder-only", told
    return "undetermined", told + ("" if use is not None else ", use not measured")


class Condition(NamedTuple):
    """That one end of a measure's interval lies on one side of a threshold."""

    metric: str
    end: Literal["low", "high"]
    side: Literal["below", "at least"]
    threshold: float

    def holds(self, metrics: Mapping[str, Estimate | None]) -> bool:
        estimate = metrics[self.metric]
        if estimate is None:
            return False
        number: float = getattr(estimate, self.end)
        return number < self.threshold if self.side == "below" else number >= self.threshold

    def reason(self, metrics: Mapping[str, Estimate | None]) -> str:
        estimate = metrics[self.metric]
        if estimate is None:
            return f"{_LABELS[self.metric]} was not measured"
        part = {"low": "lower end", "high": "upper end"}[self.end]
        return f"{_LABELS[self.metric]} {ends(estimate)}: {part} {self.side} {self.threshold:g}"


def _all(
    metrics: Sequence[str], end: Literal["low", "high"], side: Literal["below", "at least"], t: float
) -> list[Condition]:
    return [Condition(metric, end, side, t) for metric in metrics]


_LABELS = {
    "rate": "rate",
    "mi_lower": "lower bound of I(x;z)",
    "mi_upper": "upper bound of I(x;z)",
    "delta_shuffle": "Δ_shuffle",
    "i_dec": "I_dec",
}
_DECODER = ["delta_shuffle", "i_dec"]
_COMMON = ["mi_lower", "delta_shuffle"]
RULES: list[tuple[Verdict, list[Condition]]] = [
    (
        "rate-only",
        [
            Condition("rate", "low", "at least", EPS_GLOBAL),
            Condition("mi_upper", "high", "below", EPS_GLOBAL),
        ],
    ),
    ("collapsed", _all(["mi_upper", *_DECODER], "high", "below", EPS_GLOBAL)),
    (
        "encoder-only",
        [
            Condition("mi_lower", "low", "at least", EPS_GLOBAL),
            *_all(_DECODER, "high", "below", EPS_GLOBAL),
        ],
    ),
    ("informative", _all(["mi_lower", *_DECODER], "low", "at least", EPS_GLOBAL)),
    (
        "near-collapsed",
        [
            *_all(["mi_upper", *_DECODER], "high", "below", NEAR),
            # No true cost is below 0: an interval that reaches below -0.5 is too wide to tell.
            Condition("delta_shuffle", "low", "at least", -NEAR),
        ],
    ),
]
"""The first whose conditions all hold. "collapsed" also asks that no dimension is used; "informative" is
"partial" where fewer than half of the dimensions that cost rate are."""


class Ruling(NamedTuple):
    verdict: Verdict
    subtype: str | None
    reasons: list[str]


RARE = frozenset({"collapsed", "encoder-only", "near-collapsed", "undetermined"})
"""Verdicts that give way to "rare-use" where some examples were found whose codes the decoder picks out."""


def rule(metrics: Mapping[str, Estimate | None], dims: Sequence[Dim], picked: Estimate | None) -> Ruling:
    """The verdict. ``picked``: the share of the examples whose own code the decoder picks out."""
    ruling = _by_rules(metrics, dims)
    # Where both hold, z is used by more than a few, and it is I_dec that is not known well enough.
    common = all(Condition(name, "low", "at least", EPS_GLOBAL).holds(metrics) for name in _COMMON)
    if ruling.verdict in RARE and picked is not None and picked.low > 0 and not common:
        told = (
            f"the decoder picks the own code out of the contrasts, with 95 % of the posterior, for a share "
            f"of {ends(picked)} of the examples: lower end above 0"
        )
        return Ruling("rare-use", None, [told, *ruling.reasons])
    return ruling


def _by_rules(metrics: Mapping[str, Estimate | None], dims: Sequence[Dim]) -> Ruling:
    used = [dim.index for dim in dims if dim.state in ("active", "low-rate")]
    notes: list[str] = []
    for verdict, conditions in RULES:
        if not all(condition.holds(metrics) for condition in conditions):
            continue
        reasons = [condition.reason(metrics) for condition in conditions]
        subtype: str | None = None
        if verdict == "collapsed":
            if used:
                notes = [f"not collapsed: {_listed(used)} active or low-rate"]
                continue
            subtype, why = _subtype(metrics["svi_gain"], metrics["code_gap"])
            reasons.append(why)
        if verdict == "informative":
            share = _share_of_work(dims, used)
            if share is None:
                notes = [*reasons, "by which dimensions z is used was not measured"]
                break
            reasons.append(share[1])
            verdict = "informative" if share[0] else "partial"
        return Ruling(verdict, subtype, reasons + notes)
    return Ruling("undetermined", None, notes or _undecided(metrics))


def _share_of_work(dims: Sequence[Dim], used: Sequence[int]) -> tuple[bool, str] | None:
    """Whether half of the dimensions that cost rate are used, and that in words."""
    if any(dim.use is None for dim in dims):
        return None
    paying = [dim.index for dim in dims if dim.rate.value >= EPS_INFO]
    working = set(paying).intersection(used)
    return 2 * len(working) >= len(paying), (
        f"{len(working)} of the {len(paying)} dimensions with a rate of {EPS_INFO:g} or more are active or "
        f"low-rate"
    )


def _undecided(metrics: Mapping[str, Estimate | None]) -> list[str]:
    told = []
    for metric, label in _LABELS.items():
        estimate = metrics[metric]
        told.append(f"{label} {'was not measured' if estimate is None else ends(estimate)}")
    return [
        *told,
        f"no rule holds: each asks on which side of {EPS_GLOBAL:g} an end of these intervals lies, or for "
        f"upper ends below {NEAR:g}",
    ]


def excluded(verdict: Verdict, n: int) -> str | None:
    """What a verdict that the latent is not used rules out, on ``n`` independent examples; None of others.

    Use by a share s of the examples is missed by all n with probability (1 - s)^n, which is 0.05 for s = 3/n
    (the rule of three)."""
    if verdict not in ("collapsed", "rate-only", "encoder-only", "near-collapsed"):
        return None
    return f"use by fewer than 3/n = {300 / n:.2g} % of the examples is not excluded"


def _subtype(gain: Estimate | None, gap: Estimate | None) -> tuple[str | None, str]:
    """By the intervals: which of the two is at fault, or that this cannot be told."""
    if gain is None:
        return None, "whether better inference would help was not measured"
    refined = f"refining every q(z|x) by gradient gains {ends(gain)}"
    if gain.low >= LAG:
        return (
            "inference lag",
            f"better inference finds what the encoder does not: {refined}, lower end at least {LAG:g}",
        )
    if gap is None:
        return "cause unknown", f"{refined}; whether better codes exist was not measured"
    better = f"importance weighting finds codes that are better by {ends(gap)}"
    if gain.high < LAG and gap.high < LAG:
        return (
            "model collapse",
            f"better inference finds nothing either: {refined}, and {better}, upper ends below {LAG:g}",
        )
    return "cause unknown", f"{refined}; {better}; the intervals do not lie on one side of {LAG:g}"


class Finding(NamedTuple):
    """Of a latent that is used: what is wrong with it all the same."""

    told: str
    advice: str


FOUND_IN = frozenset({"informative", "partial", "rare-use"})
"""Verdicts that the latent is used, which :func:`findings` qualify."""
FINDINGS = {
    "information_share": "most of the rate is no information",
    "aggregate_kl": "samples from the prior will be off",
    "svi_gain": "the encoder lags",
    "z_free_gain": "worse than without its encoder",
}
"""Metric -> what a finding about it says, in short."""


def findings(verdict: Verdict, metrics: Mapping[str, Estimate | None]) -> dict[str, Finding]:
    """By metric, those whose interval lies beyond its threshold; none where z is not used, since then the
    verdict says what is wrong."""
    if verdict not in FOUND_IN:
        return {}
    share, aggregate, gain, free = (metrics[name] for name in FINDINGS)
    rate = metrics["rate"]
    found: dict[str, Finding] = {}
    if share is not None and share.high < HALF:
        found["information_share"] = Finding(
            f"of the rate, a share of {ends(share)} is information: upper end below {HALF:g}",
            "most of the rate is paid for nothing: raise beta or anneal it to 1, and clamp free bits after "
            "the batch mean",
        )
    if aggregate is not None and aggregate.low >= OFF_PRIOR:
        found["aggregate_kl"] = Finding(
            f"the aggregate posterior is {ends(aggregate)} nats from the prior: lower end at least "
            f"{OFF_PRIOR:g}",
            "samples from the prior will be off, as the decoder has not seen such codes: sample codes of "
            "training examples, fit a prior to them, or raise beta",
        )
    if gain is not None and rate is not None and gain.low >= max(EPS_GLOBAL, GAP * rate.value):
        found["svi_gain"] = Finding(
            f"refining every q(z|x) gains {ends(gain)}: lower end at least {GAP:g} of the rate",
            "the encoder lags behind the decoder: train it longer or make it larger",
        )
    if free is not None and free.high < 0:
        found["z_free_gain"] = Finding(
            f"the NELBO is worse by {ends(_negative(free))} than the same decoder without an encoder, with a "
            f"z of the prior, z = 0 or another example's z: lower end above 0",
            "as a model of the data it is worse than one that ignores z: raise beta or anneal it to 1, and "
            "compare with a collapsed run on the IWAE NLL",
        )
    return found


def _negative(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, -estimate.high, -estimate.low, estimate.saturated)


def advice(
    verdict: Verdict,
    subtype: str | None,
    overfit: bool | None,
    dims: Sequence[Dim],
    found_wrong: Mapping[str, Finding],
    unmeasured: Sequence[str] = (),
    short: bool = False,
    apart: float = math.inf,
) -> list[str]:
    """What to do about it. ``unmeasured``: metrics of :data:`FINDINGS`; ``short``: more time would have shown
    more; ``apart``: how far the codes of :data:`SAME_SHARE` of the examples lie from one code at most."""
    found = [each.advice for each in found_wrong.values()]
    if not (found and verdict == "informative"):
        undecided = short and verdict == "undetermined"
        found.insert(0, _MORE_TIME if undecided else _ADVICE[subtype if subtype is not None else verdict])
    if verdict in ("collapsed", "rate-only", "near-collapsed") and apart < CONSTANT:
        # A weaker decoder does not cure an encoder that cannot tell the examples apart.
        found.insert(
            0,
            f"encoder constant: {100 * SAME_SHARE:g} % of the examples have the same mu and logvar, within "
            f"{apart:.1g}, so no decoder could use z. Look at the encoder first: are its inputs centred and "
            f"scaled, are its units saturated, does its gradient vanish?",
        )
    if unmeasured and verdict in FOUND_IN:
        found.append(f"not measured, so it may be bad: {', '.join(unmeasured)}")
    by_state: dict[State, list[int]] = {}
    for dim in dims:
        by_state.setdefault(dim.state, []).append(dim.index)
    for state, text in _DIM_ADVICE.items():
        if state in by_state and state != verdict:
            found.append(f"{_listed(by_state[state])}: {text}")
    if overfit:
        found.append(
            "the model is better on the train split: more data, a smaller model, a higher beta or an earlier "
            "stop"
        )
    return found


_MORE_TIME = "the budget was too short to tell: raise budget_s (--budget SECONDS), or leave it out"
_ADVICE: dict[str, str] = {
    "collapsed": "the decoder ignores z: keep the rate up (free bits, a delta-VAE) or weaken the decoder",
    "model collapse": "the decoder ignores z, and a better encoder would not help: keep the rate up from the "
    "start (free bits, a controller, a delta-VAE), weaken the decoder (word dropout, a smaller context), or "
    "lower beta if it is above 1: the gain was measured at the beta given; annealing alone often falls back",
    "cause unknown": "the decoder gets nothing from z, and whether the encoder or the decoder is at fault is "
    "open. Where better codes exist that gradients do not find (codes quantised, or read periodically), "
    "train the encoder with samples, or smooth the decoder; otherwise raise n",
    "inference lag": "the decoder can use codes that the encoder does not find: train the encoder more "
    "(several encoder steps for one of the decoder, He et al. 2019), or start from a pretrained encoder",
    "rate-only": "there is a rate, but z says nothing about x: the aggregate posterior is not the prior. "
    "Clamp free bits after the batch mean rather than per sample, check for a constant offset of mu, and "
    "weaken the decoder so that it needs z",
    "encoder-only": "z tells the examples apart, but the decoder does not use it: check that z reaches the "
    "decoder, and weaken the decoder",
    "rare-use": "z is used for few of the examples and idle for the others: look at which they are; for the "
    "others the advice for a collapsed latent holds (free bits, a weaker decoder)",
    "informative": "nothing to fix was found; compare models on the IWAE NLL, not on the ELBO",
    "partial": "z is used, by fewer than half of the dimensions that cost rate: fewer latent dimensions, or "
    "a floor for each dimension",
    "near-collapsed": "z is nearly unused: treat it as collapsed, and measure again on more examples if the "
    "difference matters",
    "undetermined": "raise n, or k where I_dec is saturated, until the intervals clear the thresholds",
}

_DIM_ADVICE: dict[State, str] = {
    "low-rate": "well regularised; leave alone",
    "pruned": "unused at no cost, alone and together; benign unless all are",
    "rate-only": "a rate without information: aggregate mismatch or an empty floor",
    "memorised": "used on the train split only: more data, a higher beta",
    "encoder-only": "encoded, not decoded: check redundancy, weaken the decoder",
}


def ends(estimate: Estimate) -> str:
    """With the digits that a threshold of 0.01 needs."""
    digits = 3 if max(abs(estimate.value), abs(estimate.low), abs(estimate.high)) < 10 else 1
    return estimate.show(digits) + (" (saturated)" if estimate.saturated else "")


def _listed(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:12]))
    more = f" and {len(indices) - 12} more" if len(indices) > 12 else ""
    return f"dim{'s' if len(indices) > 1 else ''} {shown}{more}"
