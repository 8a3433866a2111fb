"""The diagnosis: what is measured, in which order, and what is concluded from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vaekernels import _build
from vaekernels._checks import whole_number
from vaekernels.collapse import svi, units
from vaekernels.collapse.budget import Budget, OutOfTime, fitting, progress_bar
from vaekernels.collapse.decoder import importance_columns, importance_mean
from vaekernels.collapse.estimate import RESAMPLES, Estimate, difference, holm_low
from vaekernels.collapse.examples import (
    GAP,
    Encode,
    Examples,
    LogLikelihood,
    Prior,
    copies,
    count,
    digest,
    labels_of,
    near_copies,
    select,
    take,
    whiten_latents,
)
from vaekernels.collapse.measurements import (
    CONTRASTED,
    LEAST_REFINED,
    LEAST_WEIGHTED,
    NEVER,
    REFINED,
    USE_PAIRS,
    WEIGHTED,
    Measurements,
    stream,
)
from vaekernels.collapse.metrics import ACTIVE_THRESHOLD
from vaekernels.collapse.model import TRIED, Model
from vaekernels.collapse.redundancy import clusters, cost, find_redundant
from vaekernels.collapse.report import Report
from vaekernels.collapse.strata import LEAST, order
from vaekernels.collapse.verdict import (
    EPS_GLOBAL,
    EPS_INFO,
    EPS_USE,
    FINDINGS,
    SAME_SHARE,
    THRESHOLDS,
    USE_TAIL,
    Answer,
    Dim,
    Together,
    advice,
    answers,
    empty_shares,
    ends,
    excluded,
    findings,
    negligible,
    rule,
    state_of,
)

__all__ = ["diagnose"]

METRICS = (
    "rate",
    "active_units",
    "mi_lower",
    "mi_upper",
    "aggregate_kl",
    "total_correlation",
    "dimension_wise_kl",
    "information_share",
    "nll",
    "nelbo",
    "delta_shuffle",
    "delta_prior",
    "delta_mean",
    "z_free_gain",
    "i_dec",
    "svi_gain",
    "code_gap",
    "iwae_nll",
)
A_FEW = 5
"""Examples that bear half of Delta_shuffle, below which the report says that so few decide."""
COPIES = 0.05
"""Share of exact copies from which the report speaks of them."""
NEAR_COPIES = 0.1
"""Share of examples with near-copies from which the report asks about them. Of independent ones 0.02 at most
have such a gap between their neighbours."""
OF_TRAINING = ("beta", "effective_beta", "free_bits")
ON_TRAIN = ("rate", "mi_lower", "mi_upper", "nll", "nelbo", "delta_shuffle", "i_dec")


def diagnose(
    encode: Encode,
    log_likelihood: LogLikelihood,
    heldout: object,
    *,
    train: object = None,
    prior: Prior | None = None,
    condition: object = None,
    groups: object = None,
    n: int = 2048,
    k: int = 32,
    seed: int = 0,
    beta: float = 1.0,
    active_threshold: float = ACTIVE_THRESHOLD,
    classes: object = None,
    device: torch.device | str | None = None,
    budget_s: float | None = None,
    progress: bool = True,
) -> Report:
    """Has this VAE collapsed, and how? For any with q(z|x) = N(mu, diag exp(logvar)) and prior N(0, I), or
    another Gaussian ``prior``::

        encode(x) -> (mu, logvar)           # [B, D] each
        log_likelihood(x, z) -> Tensor[B]   # log p(x|z) in nats, summed over the data dimensions

        report = vaekernels.collapse.diagnose(model.encode, model.log_likelihood, heldout, train=train)
        print(report)
        report.save("diagnosis")            # report.json and report.html

    Put the model in eval mode first. Latents of another shape: :func:`flatten_latents`.

    Args:
        heldout: examples along the first axis: a tensor, a tuple of tensors (both functions get a tuple), or
            a torch Dataset of tensors or of tuples of tensors.
        train: examples of the training split, in the same form; without them, overfitting and memorised
            dimensions are not looked for.
        prior: None: N(0, I). (mu, logvar), [D] each, of a learned prior, or a function of x that gives them,
            [B, D] each, of a conditional one: measured is then the latent in which the prior is N(0, I), see
            :func:`whiten_latents`. A code that copies a learned prior has rate 0.
        condition: a label of each held-out example, numbers, of what the decoder is told beside z: its class,
            the length of its text. With ``train``, a pair of labels of both. Another example's code is then
            one of the same stratum, and I(x;z) is I(x;z|label), so that what z says of the label itself does
            not count. Strata of fewer than 8 examples are left out. The smallest stratum limits I_dec.
        groups: a number of each held-out example, the same for those that are not independent: copies and
            near-copies, crops of an image, sentences of a text. Intervals are then over groups.
        n: how many examples of each split are used, at random; at least 4. Intervals shrink as 1 / sqrt(n),
            and no more than log n nats of information can be seen.
        k: contrast codes of I_dec, which sees at most log k nats, and samples of the importance-weighted
            likelihood.
        seed: of everything random. The same seed gives the same report on the same machine.
        beta: the weight of the KL in training, with both terms as sums over their dimensions. Inference is
            refined at it: at beta 5, codes that pay at beta 1 do not pay for the encoder.
        active_threshold: the variance of mu from which a dimension counts as an active unit.
        classes: a label of each held-out example, numbers: rate, NLL, NELBO and Delta_shuffle are also told
            for each of them, in ``report.classes``.
        device: where batches of examples are moved (None: they stay where they are). Codes go where
            ``encode`` returns them.
        budget_s: seconds after which no more is measured. n and k are lowered until what decides the verdict
            takes at most 0.7 of them, by the time that both functions take on a few examples, and a batch
            takes a fiftieth at most, so the same seed may give another report. What was left out is named in
            ``report.skipped``, decisions last. Encoding and its information bounds are always measured, on
            32 examples at least.
        progress: a bar on standard error, where that is a terminal and rich is installed.

    ``log_likelihood`` is evaluated about 130,000 times at the defaults: n (5 + k), 16,384 times for single
    dimensions (on 16384 / D examples, 64 at least), 512 k for the importance weights, 21,504 for the
    refinement of 128 examples, where a gradient counts as 3; and 2 n + 512 k times for a train split. Without
    a budget, codes of at most 512 examples are shuffled 8 times, and single dimensions of at most 2048 / D.
    128 examples at a time on a CPU, 512 elsewhere. Memory: the examples chosen, four arrays [n, D] a split
    (of float64 up to 2^24 numbers, beyond of the encoder's dtype), about 1 GiB where n and D are large, and
    what a batch of the model takes. The codes of the first sqrt(2^33 / D) examples are compared with one
    another, 23,170 for D = 16, 5,792 for 256, 1,448 for 4,096.

    Raises:
        ValueError: fewer than 4 examples; wrong shapes; NaN or inf; functions that give two answers to the
            same question (dropout, batch norm or sampling left on).
        TypeError: inputs or outputs of another kind.
    """
    n, k, seed = _check("n", n, 4), _check("k", k, 2), _check("seed", seed, None)
    if not (isinstance(beta, int | float) and 0 <= beta < float("inf")):
        raise ValueError(f"beta must be a number of at least 0, got {beta!r}")
    if not (isinstance(active_threshold, int | float) and 0 <= active_threshold < float("inf")):
        raise ValueError(f"active_threshold must be a number of at least 0, got {active_threshold!r}")
    if budget_s is not None and not budget_s > 0:
        raise ValueError(f"budget_s must be positive, or None for no limit, got {budget_s!r}")
    told_prior = "N(0, I)"
    if prior is not None:
        told_prior = "a function of x" if callable(prior) else "given, the same for all examples"
        encode, log_likelihood = whiten_latents(encode, log_likelihood, prior)
    with torch.inference_mode(False):
        splits = 1 if train is None else 2
        counts = [_at_most(n, data) for data in (heldout, train) if data is not None]
        with progress_bar(progress, _evaluations(counts[0], k, splits, counts[-1])) as advance:
            budget = Budget(budget_s, advance)
            asked = n, k
            chosen = select("heldout", heldout, n, stream(seed, "select"))
            chosen_train = None if train is None else select("train", train, n, stream(seed, "select", 1))
            labels = (
                None if classes is None else labels_of("classes", classes, heldout, n, stream(seed, "select"))
            )
            grouped = (
                None if groups is None else labels_of("groups", groups, heldout, n, stream(seed, "select"))[0]
            )
            given = _conditions(condition, train)
            strata = [
                labels_of("condition", of, data, n, stream(seed, "select", number))[0]
                for number, (of, data) in enumerate(zip(given, (heldout, train), strict=False))
            ]
            model = Model(encode, log_likelihood, device=device, batch_size=None, counted=budget.count)
            with budget.part("check"):
                if budget_s is None:
                    model.check(chosen)
                else:
                    n, k = _fit(model, budget, chosen, n, k, splits, budget_s)
                    chosen = take(chosen, slice(0, n))
                    chosen_train = None if chosen_train is None else take(chosen_train, slice(0, n))
            if strata:
                chosen, strata[0], kept = _ordered(chosen, strata[0][:n])
                labels = None if labels is None else (labels[0][:n][kept], labels[1])
                grouped = None if grouped is None else grouped[:n][kept]
            if len(strata) > 1 and chosen_train is not None:
                chosen_train, strata[1], _ = _ordered(chosen_train, strata[1][:n])
            held = Measurements(
                "heldout",
                model,
                chosen,
                seed,
                0,
                beta,
                float(active_threshold),
                strata[0] if strata else None,
                grouped,
                budget_s is not None,
            )
            trained = (
                None
                if chosen_train is None
                else Measurements(
                    "train",
                    model,
                    chosen_train,
                    seed,
                    1,
                    strata=strata[1] if strata else None,
                    hurried=budget_s is not None,
                )
            )
            settings = {
                "n": n,
                "k": k,
                "seed": seed,
                "refined_at_beta": beta,
                "active_threshold": float(active_threshold),
                "prior": told_prior,
                "device": None if device is None else str(device),
                "budget_s": budget_s,
            }
            if grouped is not None:
                settings["groups"] = held.independent(held.n)
            if strata:
                settings["strata"] = len(torch.unique(strata[0]))
            if (n, k) != asked:
                settings |= {"n_asked": asked[0], "k_asked": asked[1]}
            return _Diagnosis(model, budget, held, trained, k, settings).run(labels)


def _check(name: str, value: Any, least: int | None) -> int:
    whole = whole_number(value)
    if whole is None or (least is not None and whole < least):
        takes = "an integer" if least is None else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {takes}, got {value!r}")
    return whole


def _conditions(condition: object, train: object) -> tuple[object, ...]:
    """The labels of each split. ValueError where those of one are missing."""
    if condition is None:
        return ()
    if train is None:
        return (condition,)
    if not isinstance(condition, tuple | list) or len(condition) != 2:
        raise ValueError(
            "condition must be a pair of labels, (of heldout, of train), where train is given, got "
            f"{type(condition).__name__}"
        )
    return tuple(condition)


def _ordered(x: Examples, strata: Tensor) -> tuple[Examples, Tensor, Tensor]:
    """The examples of strata that are large enough, their strata, and their places before."""
    kept = order(strata)
    if not len(kept):
        raise ValueError(
            f"condition must have strata of {LEAST} examples or more, got {len(strata)} examples in "
            f"{len(torch.unique(strata))} strata; pass more examples, or coarser labels"
        )
    return take(x, kept), strata[kept], kept


def _fit(
    model: Model, budget: Budget, chosen: Examples, n: int, k: int, splits: int, budget_s: float
) -> tuple[int, int]:
    """Check ``model`` in a tenth of the time, have it work in batches of a fiftieth, and choose n and k."""
    pace = model.check(chosen, 4)
    model.hurry(budget_s / 50, pace)
    tried = int(0.1 * budget_s / (2.5 * max(sum(pace), 1e-12)))  # 2.5 calls an example
    if tried > 4:
        pace = model.check(chosen, min(tried, TRIED))
        model.hurry(budget_s / 50, pace)
    budget.pace = pace
    n = min(n, count(chosen))
    left = budget.left
    assert left is not None
    everything = _evaluations(n, k, splits)
    return fitting(
        n,
        k,
        dims=model.dims,
        splits=splits,
        pace=pace,
        left=left,
        everything=everything,
        use_pairs=USE_PAIRS,
    )


def _at_most(n: int, data: Any) -> int:
    """How many of the examples are used; ``n`` where they do not tell how many they are."""
    try:
        return min(n, len(data[0] if isinstance(data, tuple) else data))
    except (TypeError, IndexError):  # a stream; an empty tuple, which is refused where examples are taken
        return n


def _evaluations(n: int, k: int, splits: int, n_train: int | None = None) -> int:
    """About as many as a diagnosis makes of ``n`` examples, and ``n_train`` of the train split, for the
    progress bar."""
    seen = n if n_train is None else n_train
    trained = (2 * seen + min(seen, CONTRASTED) * k) if splits > 1 else 0
    return trained + n * (5 + k) + USE_PAIRS + min(n, WEIGHTED) * k + svi.evaluations(min(n, REFINED))


class _Diagnosis:
    """The measurements so far. Every part adds to them, or to ``skipped`` why not."""

    def __init__(
        self,
        model: Model,
        budget: Budget,
        held: Measurements,
        trained: Measurements | None,
        k: int,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.budget, self.held, self.trained, self.k = model, budget, held, trained, k
        self.metrics: dict[str, Estimate | None] = dict.fromkeys(METRICS)
        self.train_metrics: dict[str, Estimate | None] = dict.fromkeys(ON_TRAIN)
        self.gaps: dict[str, Estimate] = {}
        self.skipped: dict[str, str] = {}
        self.points: dict[str, tuple[float, float]] = {}
        self.lost: Tensor | None = None
        self.use: list[Answer] | None = None
        self.used_again_n: int | None = None
        self.small: set[int] = set()
        self.small_together: Together | None = None
        self.redundant: dict[int, tuple[int, ...]] = {}
        self.use_train: dict[int, Answer] = {}
        self.train_only: set[int] = set()
        self.gradient: bool | None = None
        self.refined: tuple[str, float, float] | None = None
        self.settings = settings

    def run(self, labels: tuple[Tensor, list[str]] | None) -> Report:
        held = self.held
        self.copies, self.near_copies = copies(held.x), near_copies(held.x)
        with self.budget.part("encoder"):
            self._encoder()
        n, dims = held.n, held.dims
        # What decides the verdict, then what decides the rest, then what is only reported.
        self._part(
            "shuffled codes", ("nll", "nelbo", "delta_shuffle"), n * (1 + held.shuffles()), self._shuffle
        )
        self._part("contrast codes", ("i_dec",), n * self.held.contrast_codes(n, self.k), self._decoded)
        evaluations = held.use_n * dims * held.shuffles_of_dims(held.use_n)
        self._part("single dimensions", ("use",), evaluations, self._use)
        self._use_again()
        self._together()
        some = min(n, self.budget.affordable(svi.evaluations(1), REFINED, LEAST_REFINED))
        self._part("refined codes", ("svi_gain",), svi.evaluations(some), lambda: self._refine(some))
        weighted = min(n, self.budget.affordable(self.k, WEIGHTED, LEAST_WEIGHTED))
        self._part(
            "importance weights",
            ("code_gap", "iwae_nll"),
            weighted * self.k,
            lambda: self._importance(weighted),
        )
        self._part("other codes", ("delta_prior", "delta_mean", "z_free_gain"), 3 * n, self._other_codes)
        self._redundancy()
        self._train()
        return self._report({} if labels is None else held.by_class(*labels))

    def _part(
        self, title: str, names: tuple[str, ...], evaluations: int, measure: Callable[[], None]
    ) -> None:
        try:
            with self.budget.part(title):
                self.budget.foresee(evaluations)
                measure()
        except OutOfTime as spent:
            self.skipped |= dict.fromkeys(names, str(spent))

    def _encoder(self) -> None:
        held = self.held
        held.encode(self.budget.half_spent)
        self.metrics |= held.estimates(["rate"]) | held.estimates(["mi_lower", "mi_upper"])
        self.metrics["active_units"] = held.active_units()
        self.metrics["aggregate_kl"], self.metrics["information_share"] = held.aggregate_kl()
        self.metrics["total_correlation"], self.metrics["dimension_wise_kl"] = held.parts()
        self.per_dim = held.per_dim()
        independent = held.independent(held.dims_n)
        self.information = answers(self.per_dim.lower, self.per_dim.upper, independent, EPS_INFO)
        self.shares = empty_shares(self.per_dim.rate, held.shares, independent)

    def _shuffle(self) -> None:
        self.held.shuffle()
        self.metrics |= self.held.estimates(["nll", "nelbo", "delta_shuffle"])
        self.points["held out"] = self.held.point()

    def _decoded(self) -> None:
        self.held.decode_information(self.k, self.held.n)
        self.metrics |= self.held.estimates(["i_dec"])
        units.check(self.held, self.metrics["delta_shuffle"], self.metrics["i_dec"])

    def _use(self) -> None:
        held = self.held
        self.lost = held.lost([torch.tensor([d]) for d in range(held.dims)], held.use_n)
        self.used = held.use_estimates(self.lost)
        self._answer_use([held.use_n] * held.dims)

    def _use_again(self) -> None:
        """Where single dimensions were shuffled on a part of the examples: those with information, if they
        are few, on more."""
        informative = [d for d, answer in enumerate(self.information) if answer.yes]
        n = self.held.examples_for(len(informative))
        if self.use is None or not informative or n <= self.held.use_n:
            return

        def measure() -> None:
            lost = self.held.lost([torch.tensor([d]) for d in informative], n)
            numbers = [self.held.use_n] * self.held.dims
            for d, estimate in zip(informative, self.held.use_estimates(lost), strict=True):
                self.used[d], numbers[d] = estimate, n
            self.used_again_n = n
            self._answer_use(numbers)

        self._part("single dimensions", ("use_again",), n * len(informative), measure)

    def _answer_use(self, examples: list[int]) -> None:
        independent = {n: self.held.independent(n) for n in set(examples)}
        self.use = answers(self.used, self.used, [independent[n] for n in examples], EPS_USE, USE_TAIL)

    def _together(self) -> None:
        """The dimensions that are negligible alone."""
        if self.use is None:
            self.skipped["together"] = "use was not measured"
            return
        rates = (each.value for each in self.per_dim.rate)
        each = zip(rates, self.information, self.use, strict=True)
        small = [d for d, told in enumerate(each) if negligible(*told)]
        self.small = set(small)
        if not small:
            return
        n = self.held.n

        def measure() -> None:
            self.small_together = self.held.together(small, n)

        self._part("single dimensions", ("together",), n * self.held.shuffles_of_dims(n), measure)

    def _unexplained(self) -> list[int]:
        """Dimensions with information that nobody was seen to use."""
        both = zip(self.information, self.use or [], strict=True)
        return [
            d for d, (told, used) in enumerate(both) if told.yes and not used.yes and d not in self.redundant
        ]

    def _redundancy(self) -> None:
        if self.use is None:
            self.skipped["redundant"] = "use was not measured"
            return
        groups = clusters(self.held.mu, self._unexplained())

        def measure() -> None:
            self.redundant = find_redundant(self.held, groups)

        examples = self.held.examples_for(cost(groups, 1))
        evaluations = cost(groups, examples) * self.held.shuffles_of_dims(examples)
        if groups:
            self._part("redundant dimensions", ("redundant",), evaluations, measure)

    def _refine(self, examples: int) -> None:
        found = self.held.refine(examples)
        self.gradient = found.differentiable
        columns = torch.stack([found.at_posterior, found.at_prior, found.after], dim=1)
        self.metrics["svi_gain"] = self.held.of_means("svi_gain", columns, _gain)
        n = len(columns)
        before, nothing, after, paid = (
            values.mean().item()
            for values in (found.at_posterior, found.at_prior, found.after, found.rate_after)
        )
        # By the change from the better of q and the prior, as svi_gain has it: these few examples are nats
        # from the mean over all, refined or not.
        beta = self.held.beta
        if before <= nothing:
            paid -= self.held.columns["rate"][:n].mean().item()
            self.refined = "held out", paid, before - after + beta * paid
        else:
            self.refined = "z from the prior", paid, nothing - after + beta * paid

    def _train(self) -> None:
        trained = self.trained
        if trained is None:
            self.skipped |= dict.fromkeys(
                ("train", "gaps", "overfit", "use_train"), "no train split was given"
            )
            return
        n, title = trained.n, "train split"
        names = tuple(f"train.{name}" for name in ("nll", "nelbo", "delta_shuffle"))
        self._part(title, tuple(f"train.{name}" for name in ON_TRAIN[:3]), 0, self._train_encoder)
        self._part(title, names, n * (1 + trained.shuffles()), self._train_shuffle)
        some = min(n, CONTRASTED)
        self._part(title, ("train.i_dec",), some * trained.contrast_codes(some, self.k), self._train_decoded)
        self._compare(trained)
        if self.use is None or "nll" not in trained.columns:
            self.skipped["use_train"] = "use or the train split's NLL was not measured"
        elif unexplained := self._unexplained():

            def measure() -> None:
                self._train_use(trained, unexplained)

            evaluations = trained.use_n * len(unexplained) * trained.shuffles_of_dims(trained.use_n)
            self._part(title, ("use_train",), evaluations, measure)

    def _train_encoder(self) -> None:
        assert self.trained is not None
        self.trained.encode()
        self.train_metrics |= self.trained.estimates(["rate"])
        self.train_metrics |= self.trained.estimates(["mi_lower", "mi_upper"])

    def _train_shuffle(self) -> None:
        assert self.trained is not None
        self.trained.shuffle()
        self.train_metrics |= self.trained.estimates(["nll", "nelbo", "delta_shuffle"])
        self.points["train"] = self.trained.point()

    def _train_decoded(self) -> None:
        assert self.trained is not None
        self.trained.decode_information(self.k, min(self.trained.n, CONTRASTED))
        self.train_metrics |= self.trained.estimates(["i_dec"])

    def _compare(self, trained: Measurements) -> None:
        """How much better the train split is, by measure, with lower ends for all of them."""
        both = [
            name
            for name in ("nelbo", "delta_shuffle", "i_dec")
            if name in self.held.columns and name in trained.columns
        ]
        if not both:
            self.skipped |= dict.fromkeys(("gaps", "overfit"), "nothing was measured on both splits")
            return
        found: list[Estimate] = []
        for name in both:
            better = -1.0 if name == "nelbo" else 1.0
            here, there = trained.columns[name] * better, self.held.columns[name] * better
            found += difference(
                trained.subset(len(here)), here[:, None], self.held.subset(len(there)), there[:, None]
            )
        lows = holm_low(found, min(trained.n, self.held.n))
        self.gaps = {name: replace(gap, low=low) for name, gap, low in zip(both, found, lows, strict=True)}

    def _train_use(self, trained: Measurements, dims: list[int]) -> None:
        assert self.use is not None and self.lost is not None
        lost = trained.lost([torch.tensor([d]) for d in dims], trained.use_n)
        found = trained.use_estimates(lost)
        said = answers(found, found, trained.use_n, EPS_USE)
        self.use_train = dict(zip(dims, said, strict=True))
        gaps = difference(
            trained.subset(trained.use_n),
            trained.use_columns(lost),
            self.held.subset(self.held.use_n),
            self.held.use_columns(self.lost[:, dims]),
        )
        lows = holm_low(gaps, min(trained.use_n, self.held.use_n))
        self.train_only = {
            d
            for d, answer, low in zip(dims, said, lows, strict=True)
            if answer.yes and (self.use[d].no or low > 0)
        }

    def _other_codes(self) -> None:
        self.held.other_codes()
        self.metrics |= self.held.estimates(["delta_prior", "delta_mean"])
        self.metrics["z_free_gain"] = self.held.z_free_gain()
        self.points["z from the prior"] = (0.0, self.held.nll["prior"].mean().item())

    def _importance(self, examples: int) -> None:
        self.held.importance(self.k, examples)
        self.metrics |= self.held.estimates(["code_gap"])
        if "nelbo" not in self.held.columns:
            self.skipped["iwae_nll"] = "nelbo was not measured"
            return
        columns = importance_columns(self.held.columns["nelbo"], self.held.nll["importance"])
        self.metrics["iwae_nll"] = self.held.of_means("iwae_nll", columns, importance_mean)

    def _dims(self) -> list[Dim]:
        found: list[Dim] = []
        variances = self.held.mu.var(dim=0, correction=0).tolist()
        for d, (rate, mismatch) in enumerate(zip(self.per_dim.rate, self.per_dim.mismatch, strict=True)):
            use = None if self.use is None else self.use[d]
            on_train = self.use_train[d].estimate if d in self.use_train else None
            redundant = self.redundant.get(d, ())
            state, reason = state_of(
                rate.value,
                self.information[d],
                self.shares.get(d),
                use,
                d in self.train_only,
                redundant,
                on_train,
            )
            if d in self.small and self.small_together is not None:
                state, why = self.small_together.state()
                reason = f"{reason}; {why}"
            found.append(
                Dim(
                    index=d,
                    state=state,
                    reason=reason,
                    rate=rate,
                    information=self.information[d].estimate,
                    mismatch=mismatch,
                    use=None if use is None else use.estimate,
                    use_train=on_train,
                    mu_variance=variances[d],
                    redundant=redundant,
                )
            )
        return found

    def _report(self, classes: dict[str, dict[str, Estimate]]) -> Report:
        dims = self._dims()
        picked = self.held.picked()
        ruling = rule(self.metrics, dims, picked)
        better = [name for name, gap in self.gaps.items() if gap.low > 0 and gap.value >= EPS_GLOBAL]
        overfit = bool(better) if self.gaps else None
        on_train = [
            f"better on the train split: {name} by {ends(self.gaps[name])}, lower end above 0 and estimate "
            f"at least {EPS_GLOBAL:g}"
            for name in better
        ]
        found = findings(ruling.verdict, self.metrics)
        unmeasured = [name for name in FINDINGS if self.metrics[name] is None]
        return Report(
            verdict=ruling.verdict,
            subtype=ruling.subtype,
            overfit=overfit,
            excluded=excluded(ruling.verdict, self.held.independent(self.held.n)),
            reasons=[
                *ruling.reasons,
                *self._conditional(),
                *self._dependent(),
                *self._concentrated(),
                *self._impossible(),
                *on_train,
            ],
            findings={name: each.told for name, each in found.items()},
            advice=advice(
                ruling.verdict,
                ruling.subtype,
                overfit,
                dims,
                found,
                unmeasured,
                self._short(),
                self.held.apart(SAME_SHARE),
            ),
            metrics=self.metrics,
            train=None if self.trained is None else self.train_metrics,
            gaps=self.gaps,
            classes=classes,
            dims=dims,
            rate_distortion=self._points(),
            settings=self.settings | self._settings(),
            checks=self._checks(picked),
            cost=self._cost(),
            skipped=self.skipped | dict.fromkeys(OF_TRAINING, "not known here; save(extras=) may tell"),
            samples=self.held.samples(),
        )

    def _short(self) -> bool:
        """Whether more time would have shown more."""
        return "n_asked" in self.settings or any("budget_s" in why for why in self.skipped.values())

    def _points(self) -> dict[str, tuple[float, float]]:
        if self.refined is None or self.refined[0] not in self.points:
            return self.points
        start, paid, saved = self.refined
        rate, nll = self.points[start]
        return self.points | {"refined by gradient": (rate + paid, nll - saved)}

    def _conditional(self) -> list[str]:
        strata = self.settings.get("strata")
        if strata is None:
            return []
        return [
            f"all of it within the {strata} strata of condition, {self.held.n} examples: what z says of the "
            f"stratum itself does not count"
        ]

    def _dependent(self) -> list[str]:
        if "groups" in self.settings:
            return [f"intervals are over the {self.settings['groups']} groups of the {self.held.n} examples"]
        told = []
        if self.copies >= COPIES:
            told = [f"{100 * self.copies:.0f} % of the examples are exact copies of others"]
        if self.near_copies >= NEAR_COPIES:
            told.append(
                f"{100 * self.near_copies:.0f} % of the examples have others beside them, {GAP:g} times "
                f"nearer than the next, as near-copies have"
            )
        so = ", and the intervals take them for independent: if they are not, pass groups="
        return [each + so for each in told]

    def _concentrated(self) -> list[str]:
        share = self.held.concentration()
        number = 0 if share is None else round(share * self.held.n)
        if not 0 < number < A_FEW or self.metrics["delta_shuffle"].high < EPS_GLOBAL:  # type: ignore[union-attr]
            return []
        return [
            f"{number} of the {self.held.n} examples bear{'s' if number == 1 else ''} half of Δ_shuffle: so "
            f"few hardly tell how many use z, and the truth may lie above the interval; raise n"
        ]

    def _impossible(self) -> list[str]:
        share = self.held.impossible.get("delta_shuffle")
        if share is None:
            return []
        return [
            f"for {100 * share:.3g} % of the examples another example's z has likelihood 0, which counts as "
            f"{NEVER:g} nats more than their own"
        ]

    def _settings(self) -> dict[str, Any]:
        splits = [split for split in (self.held, self.trained) if split is not None]
        n = self.held.n
        return {
            "examples": {split.name: split.n for split in splits},
            "examples_of": {
                "mi_lower": len(self.held.bounds.lower),
                "dims": self.held.dims_n,
                "use": self.held.use_n,
                "use_of_informative": self.used_again_n or self.held.use_n,
                "svi_gain": self.held.refined_n,
                "iwae_nll": self.held.weighted_n,
            },
            "contrast_codes": self.held.contrast_codes(n, self.k),
            "latent_dims": self.held.dims,
            "thresholds": THRESHOLDS,
            "interval": 0.95,
            "resamples": RESAMPLES,
            "data_sha256": {split.name: digest(split.x) for split in splits},
            "vaekernels": _build.VERSION,
            "torch": str(torch.__version__),
        } | dict.fromkeys(OF_TRAINING)

    def _checks(self, picked: Estimate | None) -> dict[str, Any]:
        """What was checked, or came out on the way. ``likelihood_gradient``: whether log_likelihood has a
        gradient with respect to z; where it has none though it depends on z, svi_gain says nothing of the
        decoder. ``likelihood_zero``: measure -> the share of its likelihoods under other codes that are 0.
        ``picked_out``: the share of the examples whose own code the decoder picks out of the contrasts.
        ``half_of_delta_shuffle``: the smallest share of the examples that bears half of the nats which
        shuffling costs."""
        return {
            "deterministic": True,
            "copies": self.copies,
            "near_copies": self.near_copies,
            "finite": True,
            "likelihood_gradient": self.gradient,
            "information_cap": self.held.caps.get("mi_lower"),
            "information_cap_of_dims": self.held.bounds.cap_dims,
            "i_dec_cap": self.held.caps.get("i_dec"),
            "i_dec_tau": self.held.tau,
            "likelihood_zero": self.held.impossible,
            "picked_out": None if picked is None else [picked.value, picked.low, picked.high],
            "half_of_delta_shuffle": self.held.concentration(),
        }

    def _cost(self) -> dict[str, Any]:
        parts = {
            name: {"seconds": round(cost.seconds, 3), "evaluations": cost.evaluations}
            for name, cost in self.budget.costs.items()
        }
        return {
            "seconds": round(self.budget.elapsed, 3),
            "encoded": self.model.encoded,
            "evaluations": sum(cost.evaluations for cost in self.budget.costs.values()),
            "parts": parts,
        }


def _gain(means: Tensor) -> Tensor:
    """From NELBO at q, at the prior and after refinement."""
    before = torch.minimum(means[..., 0], means[..., 1])
    return (before - means[..., 2]).unsqueeze(-1)
