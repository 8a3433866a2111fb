"""The report as text: a table of at most 100 columns, from what `Report.to_json` gives."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vaekernels.collapse.estimate import Estimate
from vaekernels.collapse.metrics import ACTIVE_THRESHOLD
from vaekernels.collapse.verdict import FINDINGS, Dim

__all__ = [
    "DIM_ESTIMATES",
    "LABELS",
    "against",
    "by_reason",
    "classes_of",
    "dims_of",
    "gaps_of",
    "headline",
    "labels",
    "metrics_of",
    "text",
    "train_of",
]

WIDTH = 100
_TABLE_DIMS = 64
DIM_ESTIMATES = ("rate", "information", "mismatch", "use", "use_train")
"""The fields of `Dim` that are estimates."""

LABELS = {
    "rate": "rate (KL, unclamped)",
    "mi_lower": "I(x;z), lower bound",
    "mi_upper": "I(x;z), upper bound",
    "aggregate_kl": "KL(q(z) || p(z)) = rate - I",
    "total_correlation": "  of it the total correlation",
    "dimension_wise_kl": "  and the dimension-wise KL",
    "information_share": "I / rate, a share",
    "active_units": "active units, Var(mu) > 0.01",
    "delta_shuffle": "Δ_shuffle: another example's z",
    "delta_prior": "Δ_prior: a z of the prior",
    "delta_mean": "Δ_mean: mu in place of z",
    "z_free_gain": "NLL without an encoder - NELBO",
    "i_dec": "I_dec: what the decoder can read",
    "svi_gain": "gain of refining q by gradient",
    "code_gap": "gain of the best codes found",
    "nll": "NLL (reconstruction)",
    "nelbo": "NELBO (NLL + rate)",
    "iwae_nll": "NLL, importance-weighted (IWAE)",
}
"""Metric -> what the tables call it, in their order."""


def text(said: Mapping[str, Any]) -> str:
    """The whole report. ``said``: what `Report.to_json` gives."""
    lines = [headline(said)]
    excluded = [said["excluded"]] if said["excluded"] is not None else []
    wrong = list(said["findings"].values())
    for label, texts in (
        ("", [*said["reasons"], *excluded]),
        ("but ", wrong),
        ("advice: ", said["advice"]),
    ):
        for each in texts:
            lines += textwrap.wrap(label + each, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    metrics, train = metrics_of(said), train_of(said)
    examples = said["settings"]["examples"]["heldout"]
    lines += ["", f"{f'nats, {examples} held-out examples':38}{'[95%]':>30}{'train [95%]':>30}"]
    for name, label in labels(said).items():
        on_train = _cell(name, train[name]) if name in train else ""
        lines.append(f"{label:38}{_cell(name, metrics[name]):>30}{on_train:>30}".rstrip())
    if any(each is not None and each.saturated for each in metrics.values()):
        lines.append("* saturated: within a nat of what so many examples, or contrast codes, can show")
    classes = classes_of(said)
    if classes:
        measured = list(next(iter(classes.values())))
        lines += ["", f"{'class':>8}" + "".join(f"{name:>22}" for name in measured)]
    for label, found in list(classes.items())[:_TABLE_DIMS]:
        lines.append(f"{label:>8}" + "".join(f"{each.show(2):>22}" for each in found.values()))
    lines += [
        "",
        f"{'dim':>5}  {'state':13}{'rate':>7}  {'I_d [95%, all dims]':>24}  {'s_d [95%, all dims]':>24}",
    ]
    dims = dims_of(said)
    for dim in dims[:_TABLE_DIMS]:
        use = "not measured" if dim.use is None else dim.use.show(3)
        note = f"  with {_some(dim.redundant)}" if dim.redundant else ""
        row = f"{dim.index:>5}  {dim.state:13}{dim.rate.value:>7.3f}"
        row += f"  {dim.information.show(3):>24}  {use:>24}{note}"
        lines.append(row[:WIDTH])
    if len(dims) > _TABLE_DIMS:
        lines.append(f"  and {len(dims) - _TABLE_DIMS} more dimensions")
    for why, names in by_reason(said["skipped"]).items():
        lines += textwrap.wrap(f"skipped: {', '.join(names)}: {why}", WIDTH, subsequent_indent="    ")
    return "\n".join(lines)


def against(
    said: Mapping[str, Any],
    other: Mapping[str, Any],
    differences: Mapping[str, Estimate],
    names: tuple[str, str],
) -> str:
    """Two reports side by side, and their paired differences."""
    first, second = names
    lines = textwrap.wrap(_said_of_both(said, other, differences, names), WIDTH)
    lines += ["", *(f"{name}: {headline(each)}" for name, each in zip(names, (said, other), strict=True))]
    lines += ["", f"{'nats':36}{_cut(first):>10}{_cut(second):>12}{'difference [95%, paired]':>40}"]
    mine, theirs = metrics_of(said), metrics_of(other)
    for name, label in labels(said).items():
        digits = 0 if name == "active_units" else 2
        shown = [
            "-" if each is None else f"{each.value:.{digits}f}" + ("*" if each.saturated else " ")
            for each in (mine[name], theirs[name])
        ]
        change = differences.get(name)
        told = "not measured" if change is None else change.show(digits)
        if change is not None and (change.low > 0 or change.high < 0):
            told += " <>"
        lines.append(f"{label:36}{shown[0]:>10}{shown[1]:>12}{told:>40}")
    lines.append("<> the interval of the difference leaves out 0; * saturated")
    return "\n".join(lines)


def _said_of_both(
    said: Mapping[str, Any],
    other: Mapping[str, Any],
    differences: Mapping[str, Estimate],
    names: tuple[str, str],
) -> str:
    """Who uses its latent, and at what price."""
    first, second = names
    uses = [_USES.get(each["verdict"], "does not use its latent") for each in (said, other)]
    both = f"{first} {uses[0]}, {second} {uses[1]}"
    if uses[0] == uses[1]:
        both = f"{first} and {second}: each {uses[0]}"
    change = differences.get("iwae_nll")
    if change is None:
        return f"{both}; the likelihoods (IWAE) were not both measured."
    shown = change.show(2)
    if change.low > 0:
        return f"{both}; {first} costs {shown} nats of likelihood (IWAE)."
    if change.high < 0:
        return f"{both}; {first} gains {_turned(change).show(2)} nats of likelihood (IWAE)."
    return f"{both}; no difference in likelihood (IWAE) is seen: {shown} nats."


_USES = {
    "informative": "uses its latent",
    "partial": "uses a part of its latent",
    "rare-use": "uses its latent for few examples",
    "undetermined": "may use its latent or not (undetermined)",
}


def _turned(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, -estimate.high, -estimate.low, estimate.saturated)


def _cut(name: str) -> str:
    return name if len(name) <= 10 else f"{name[:4]}..{name[-4:]}"


def headline(said: Mapping[str, Any]) -> str:
    """The verdict in one line."""
    parts = [said["verdict"] + (f" ({said['subtype']})" if said["subtype"] else "")]
    parts += [FINDINGS[name] for name in said["findings"]]
    if said["overfit"] is not None:
        parts.append("overfit" if said["overfit"] else "not overfit")
    return ", ".join(parts)


def by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> what was skipped for it."""
    found: dict[str, list[str]] = {}
    for name, why in skipped.items():
        found.setdefault(why, []).append(name)
    return found


# ---- the estimates of report.json as objects again --------------------------------------------------------


def metrics_of(said: Mapping[str, Any]) -> dict[str, Estimate | None]:
    """By name, None for what was not measured."""
    return _estimates(said["metrics"], said["saturated"])


def train_of(said: Mapping[str, Any]) -> dict[str, Estimate | None]:
    """Those on the train split; empty without one."""
    return _estimates(said["train"] or {}, said["train_saturated"])


def gaps_of(said: Mapping[str, Any]) -> dict[str, Estimate | None]:
    """By how much the train split is better; empty without one."""
    return _estimates(said["gaps"] or {}, ())


def classes_of(said: Mapping[str, Any]) -> dict[str, dict[str, Estimate]]:
    """Label -> metric -> estimate; empty where no labels were given."""
    return {
        label: {name: Estimate(*triple) for name, triple in found.items()}
        for label, found in said["classes"].items()
    }


def labels(said: Mapping[str, Any]) -> dict[str, str]:
    """:data:`LABELS`, with the threshold of this report."""
    threshold = said["settings"].get("active_threshold", ACTIVE_THRESHOLD)
    return LABELS | {"active_units": f"active units, Var(mu) > {threshold:g}"}


def dims_of(said: Mapping[str, Any]) -> list[Dim]:
    found = []
    for dim in said["dims"]:
        rest = {name: dim[name] for name in ("index", "state", "reason", "mu_variance")}
        estimates: Any = _estimates({name: dim[name] for name in DIM_ESTIMATES}, dim["saturated"])
        found.append(Dim(**rest, **estimates, redundant=tuple(dim["redundant"])))
    return found


def _estimates(
    triples: Mapping[str, Sequence[float] | None], saturated: Collection[str]
) -> dict[str, Estimate | None]:
    return {
        name: None if triple is None else Estimate(triple[0], triple[1], triple[2], name in saturated)
        for name, triple in triples.items()
    }


def _cell(name: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return "not measured"
    return estimate.show(0 if name == "active_units" else 2) + ("*" if estimate.saturated else " ")


def _some(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:4])) + (", ..." if len(indices) > 4 else "")
