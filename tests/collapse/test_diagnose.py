"""`diagnose` as its users meet it: inputs, refusals, budgets, and that it keeps its word."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from planted import Linear, generator, normal
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from vaekernels import collapse
from vaekernels.collapse import diagnosis, tables, verdict
from vaekernels.collapse.estimate import Estimate
from vaekernels.collapse.examples import labels_of
from vaekernels.collapse.measurements import USE_PAIRS, Measurements, stream
from vaekernels.collapse.model import Model
from vaekernels.collapse.verdict import Dim, advice, rule

MODEL = Linear.worth([0.8, 0.3, 0.0], generator(0))
X = MODEL.sample(400, generator(1))


def diagnose(*arguments: Any, **settings: Any) -> collapse.Report:
    return collapse.diagnose(*arguments, **{"n": 200, "k": 8, "progress": False, **settings})


def numbers(report: collapse.Report) -> dict[str, Any]:
    said = report.to_json()
    return {name: said[name] for name in ("verdict", "metrics", "dims", "rate_distortion", "gaps", "train")}


@pytest.fixture(scope="module")
def report() -> collapse.Report:
    return diagnose(MODEL.encode, MODEL.log_likelihood, X, train=MODEL.sample(400, generator(2)))


def test_the_contract(report: collapse.Report) -> None:
    assert report.verdict == "informative" and report.subtype is None and report.overfit is False
    assert [dim.state for dim in report.dims] == ["active", "active", "pruned"]
    for name in [
        "mi_lower",
        "mi_upper",
        "rate",
        "i_dec",
        "delta_shuffle",
        "delta_prior",
        "delta_mean",
        "nelbo",
        "iwae_nll",
        "aggregate_kl",
        "svi_gain",
        "active_units",
    ]:
        estimate = report.metrics[name]
        assert isinstance(estimate, Estimate), name
        assert estimate.low <= estimate.value <= estimate.high, name
    assert report.train is not None and report.train["nelbo"] is not None
    assert set(report.gaps) == {"nelbo", "delta_shuffle", "i_dec"}
    assert set(report.skipped) == {"beta", "effective_beta", "free_bits"}


def test_refined_codes_lie_below_the_held_out_point_by_their_gain(report: collapse.Report) -> None:
    """On the plane, though they were measured on 128 examples, whose mean is another."""
    nelbo = {name: sum(point) for name, point in report.rate_distortion.items()}
    gain = report.metrics["svi_gain"].value
    assert nelbo["held out"] - nelbo["refined by gradient"] == pytest.approx(gain, abs=1e-9)


def test_the_same_seed_gives_the_same_report(report: collapse.Report) -> None:
    train = MODEL.sample(400, generator(2))
    state = torch.get_rng_state()
    again = diagnose(MODEL.encode, MODEL.log_likelihood, X, train=train)
    assert numbers(again) == numbers(report)
    assert torch.equal(torch.get_rng_state(), state)  # no one else's random numbers were touched
    other = diagnose(MODEL.encode, MODEL.log_likelihood, X, train=train, seed=1)
    assert numbers(other) != numbers(report)


class Pairs(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], index


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


def test_tensors_tuples_and_datasets(report: collapse.Report) -> None:
    seen: list[type] = []

    def encode(x: Any) -> tuple[Tensor, Tensor]:
        seen.append(type(x))
        return MODEL.encode(x[0])

    def log_likelihood(x: Any, z: Tensor) -> Tensor:
        seen.append(type(x))
        return MODEL.log_likelihood(x[0], z)

    expected = numbers(diagnose(MODEL.encode, MODEL.log_likelihood, X))
    for heldout in ((X, torch.arange(400)), [X, X], TensorDataset(X, torch.zeros(400)), Pairs()):
        assert numbers(diagnose(encode, log_likelihood, heldout)) == expected
    assert set(seen) == {tuple}
    one_tensor = TensorDataset(X)  # its items are tuples of one
    assert numbers(diagnose(encode, log_likelihood, one_tensor)) == expected
    streamed = diagnose(MODEL.encode, MODEL.log_likelihood, Stream())
    assert streamed.settings["examples"] == {"heldout": 200}
    assert streamed.verdict == "informative"


@pytest.mark.parametrize(
    "heldout, error, words",
    [
        (X[:3], ValueError, r"heldout must have at least 4 examples, got 3"),
        (X[:0], ValueError, r"at least 4 examples, got 0"),
        (TensorDataset(X[:2]), ValueError, r"at least 4 examples, got 2"),
        ((X, X[:7]), ValueError, r"equally many in every tensor, got shapes \[400, 5\], \[7, 5\]"),
        (torch.tensor(1.0), ValueError, r"examples along the first axis"),
        (
            "docstrings",
            TypeError,
            r"heldout must be a tensor, a tuple of tensors or a torch Dataset, got str",
        ),
        ((), TypeError, r"got tuple"),
        ([X, "label"], TypeError, r"got tuple"),
    ],
)
def test_wrong_examples_are_named(heldout: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        diagnose(MODEL.encode, MODEL.log_likelihood, heldout)


def test_items_that_are_no_tensors() -> None:
    class Records(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"x": X[index]}

    with pytest.raises(TypeError, match="items of a Dataset must be tensors or tuples of tensors, got dict"):
        diagnose(MODEL.encode, MODEL.log_likelihood, Records())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"n": 3}, "n must be an integer of at least 4, got 3"),
        ({"k": 1}, "k must be an integer of at least 2, got 1"),
        ({"k": 2.5}, "k must be an integer of at least 2, got 2.5"),
        ({"budget_s": 0}, "budget_s must be positive"),
        ({"beta": -1.0}, "beta must be a number of at least 0, got -1.0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        diagnose(MODEL.encode, MODEL.log_likelihood, X, **settings)


def test_the_train_split_is_named() -> None:
    with pytest.raises(ValueError, match="train must have at least 4 examples, got 1"):
        diagnose(MODEL.encode, MODEL.log_likelihood, X, train=X[:1])


@pytest.mark.parametrize(
    "encode, log_likelihood, error, words",
    [
        (lambda x: (x, x[:, :2]), MODEL.log_likelihood, ValueError, r"mu and logvar of shape \[B, D\]"),
        (lambda x: x, MODEL.log_likelihood, TypeError, r"must return the tensors \(mu, logvar\), got Tensor"),
        (MODEL.encode, lambda x, z: z, ValueError, r"shape \[64\], got \[64, 3\]"),
        (MODEL.encode, lambda x, z: 1.0, ValueError, r"shape \[64\], got float"),
        (
            lambda x: (x * math.nan, x),
            lambda x, z: x[:, 0],
            ValueError,
            "encode gave NaN or inf for 64 of 64",
        ),
        (
            MODEL.encode,
            lambda x, z: z[:, 0].log(),
            ValueError,
            r"log_likelihood gave NaN or inf for \d+ of 64",
        ),
    ],
)
def test_wrong_functions_are_named(
    encode: Any, log_likelihood: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        diagnose(encode, log_likelihood, X)


def test_infinities_of_other_codes_are_named() -> None:
    """Finite on what the model was tried with, mu; infinite on some of the codes that the measures need."""

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        return MODEL.log_likelihood(x, z) + torch.where(z[:, 2].abs() > 2.2, -math.inf, 0.0)

    with pytest.raises(ValueError, match=r"log_likelihood \(heldout\) gave NaN or inf for \d+ of 200"):
        diagnose(MODEL.encode, log_likelihood, X)


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(5)])
@pytest.mark.parametrize("where", ["encode", "log_likelihood"])
def test_a_model_in_train_mode_is_refused(layer: nn.Module, where: str) -> None:
    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return MODEL.encode(layer(x) if where == "encode" else x)

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        return MODEL.log_likelihood(layer(x) if where == "log_likelihood" else x, z)

    layer.train()
    with pytest.raises(ValueError, match=rf"{where} gave different values.*eval\(\)"):
        diagnose(encode, log_likelihood, X)
    layer.eval()
    assert diagnose(encode, log_likelihood, X).checks["deterministic"]


def test_a_floating_point_hair_is_no_randomness() -> None:
    calls = iter(range(10**9))

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = MODEL.encode(x)
        return mu * (1 + 1e-6 * (next(calls) % 2)), logvar

    diagnose(encode, MODEL.log_likelihood, X)


def test_latents_of_another_shape() -> None:
    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = MODEL.encode(x)
        return mu.view(-1, 3, 1), logvar.reshape(-1, 3, 1)

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        assert z.shape[1:] == (3, 1)
        return MODEL.log_likelihood(x, z[..., 0])

    with pytest.raises(ValueError, match="flatten_latents"):
        diagnose(encode, log_likelihood, X)
    flat = collapse.flatten_latents(encode, log_likelihood, (3, 1))
    assert numbers(diagnose(*flat, X)) == numbers(diagnose(MODEL.encode, MODEL.log_likelihood, X))
    with pytest.raises(ValueError, match=r"latent_shape is \[4\], but encode returned \[B, ...\] of"):
        diagnose(*collapse.flatten_latents(encode, log_likelihood, (4,)), X)
    with pytest.raises(ValueError, match="one or more positive sizes"):
        collapse.flatten_latents(encode, log_likelihood, ())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_codes_come_back_in_the_encoders_dtype(dtype: torch.dtype) -> None:
    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = MODEL.encode(x)
        return mu.to(dtype), logvar.to(dtype)

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        assert z.dtype == dtype
        return MODEL.log_likelihood(x, z.float())

    assert diagnose(encode, log_likelihood, X).verdict == "informative"


@pytest.mark.parametrize("n", [4, 5, 30])
def test_few_examples_are_not_enough_for_a_verdict_on_small_effects(n: int) -> None:
    report = diagnose(MODEL.encode, MODEL.log_likelihood, X[:n], train=X[n : 2 * n], k=32)
    assert report.settings["contrast_codes"] == min(32, n // 2)
    assert report.verdict in ("informative", "partial", "near-collapsed", "undetermined")
    if n <= 5:
        assert report.verdict == "undetermined"
    assert len(str(report).splitlines()) > 20


def test_works_inside_no_grad_and_inference_mode(report: collapse.Report) -> None:
    train = MODEL.sample(400, generator(2))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inside = X.clone()
            assert numbers(diagnose(MODEL.encode, MODEL.log_likelihood, inside, train=train)) == numbers(
                report
            )


# --- budget -------------------------------------------------------------------------------------------------


def test_a_spent_budget_names_what_it_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts evaluations, 1000 a second, in place of one that measures."""
    now = [0.0]
    monkeypatch.setattr("vaekernels.collapse.budget.time.perf_counter", lambda: now[0])

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        now[0] += len(z) / 1000
        return MODEL.log_likelihood(x, z)

    names = ("nelbo", "i_dec", "use", "svi_gain", "train.nelbo", "train.i_dec", "delta_prior", "iwae_nll")
    measured: list[int] = []
    for budget in (0.3, 1.0, 3.0, 10.0, 40.0, 100.0):
        report = diagnose(MODEL.encode, log_likelihood, X, train=X[200:], budget_s=budget)
        now[0] = 0.0
        skipped = [name for name in names if name in report.skipped]
        measured.append(len(names) - len(skipped))
        for name in report.skipped:
            if name in report.metrics:
                assert report.metrics[name] is None
            if name == "use":
                assert all(dim.use is None for dim in report.dims)
        for name, why in report.skipped.items():
            assert "budget_s" in why or "known here" in why or "measured" in why, name
        assert all(report.metrics[name] is not None for name in ("rate", "mi_lower", "mi_upper"))
        assert report.cost["seconds"] <= budget + 0.3
        if budget == 0.3:
            assert report.verdict == "undetermined" and "not measured" in " ".join(report.reasons)
        str(report)
    assert measured == sorted(measured) and measured[0] <= 3 and measured[-1] == len(names)


def test_what_is_decided_comes_before_what_is_only_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("vaekernels.collapse.budget.time.perf_counter", lambda: now[0])

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        now[0] += len(z) / 1000
        return MODEL.log_likelihood(x, z)

    # 170 for the check, 400 + 1600 + 600 for the verdict: the refinement takes 168 an example
    report = diagnose(MODEL.encode, log_likelihood, X, budget_s=5.0)
    assert report.verdict == "informative"
    assert "svi_gain" in report.skipped and "take about" in report.skipped["svi_gain"]
    assert "not measured, so it may be bad: svi_gain" in report.advice


def test_a_slow_decoder_is_measured_on_fewer_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 ms an example: n = 2048 takes 20 s for one pass. Codes, checks and batches are in the budget."""
    now, batches = [0.0], list[int]()
    monkeypatch.setattr("vaekernels.collapse.budget.time.perf_counter", lambda: now[0])

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        now[0] += len(x) / 1000
        return MODEL.encode(x)

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        now[0] += len(z) / 100
        batches.append(len(z))
        return MODEL.log_likelihood(x, z)

    x = MODEL.sample(2048, generator(1))
    for budget, n in ((5.0, 32), (20.0, 128), (60.0, 256)):
        now[0] = 0.0
        batches.clear()
        report = diagnose(encode, log_likelihood, x, n=2048, k=32, budget_s=budget)
        # 32 examples and 16 contrast codes: I_dec is 0.6 nats, its lower end about the threshold of 0.1
        possible = {"informative", "undetermined"} if n == 32 else {"informative"}
        assert report.verdict in possible, report.reasons
        assert report.settings["n"] == n and report.settings["n_asked"] == 2048
        assert report.settings["k"] in (4, 8, 16) and now[0] <= budget * 1.02
        # after the check; 10 ms each
        assert max(batches[7:]) / 100 <= max(budget / 50, 0.01)


def test_a_slow_encoder_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """It becomes slow after the check: half of the budget is for codes."""
    now, calls = [0.0], [0]
    monkeypatch.setattr("vaekernels.collapse.budget.time.perf_counter", lambda: now[0])

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        calls[0] += 1
        now[0] += len(x) / 1000 * (30 if calls[0] > 6 else 1)
        return MODEL.encode(x)

    report = diagnose(encode, MODEL.log_likelihood, X, n=400, k=8, budget_s=4.0)
    assert 32 <= report.settings["examples"]["heldout"] < 100
    assert report.verdict != "undetermined" or report.skipped


def test_advice_of_a_short_budget_names_the_budget() -> None:
    told = verdict.advice("undetermined", None, None, [], {}, short=True)
    assert "--budget" in told[0] and "raise n" not in told[0]


# --- decisions ----------------------------------------------------------------------------------------------


def dim(state: str, rate: float = 0.5) -> Dim:
    estimate = Estimate(rate, rate, rate)
    return Dim(0, state, "", estimate, estimate, estimate, estimate, None, 1.0)  # type: ignore[arg-type]


def test_a_constant_encoder_is_named_before_the_decoder() -> None:
    for apart, constant in ((1e-6, True), (1e-2, False)):
        found = advice("collapsed", "model collapse", None, [dim("pruned", 0.0)], {}, apart=apart)
        assert found[0].startswith("encoder constant: ") == constant
    assert not advice("informative", None, None, [dim("active")], {}, apart=0.0)[0].startswith("encoder")


@pytest.mark.parametrize(("varying", "constant"), [(0.0, True), (0.03, True), (0.2, False)])
def test_an_encoder_that_tells_a_few_examples_apart_is_constant_too(varying: float, constant: bool) -> None:
    """Saturated units: a variance of mu of 0.01 comes from 3 % of the examples, all others have one code."""
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0
    x[: int(400 * varying), 0] = torch.linspace(-1, 1, int(400 * varying))

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :1].expand(-1, 2) / 2, torch.zeros(len(x), 2)

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        return -x.square().sum(dim=1) + 0 * z.sum(dim=1)

    report = diagnose(encode, log_likelihood, x, k=4, progress=False)
    assert report.verdict == "collapsed"
    assert (
        any(line.startswith("encoder constant: 95 % of the examples") for line in report.advice) == constant
    )


def interval(middle: float, half: float = 0.01) -> Estimate:
    return Estimate(middle, middle - half, middle + half)


# rate, MI lower = upper, Delta_shuffle, I_dec, states -> verdict; the thresholds are 0.1 and 0.5
@pytest.mark.parametrize(
    "rate, information, shuffle, decoded, states, verdict",
    [
        (0.5, 0.0, 0.0, 0.0, ["rate-only"], "rate-only"),
        (0.05, 0.0, 0.0, 0.0, ["pruned"], "collapsed"),
        (0.09, 0.08, 0.05, 0.05, ["low-rate"], "near-collapsed"),  # as collapsed, but something is used
        (2.0, 2.0, 0.0, 0.0, ["encoder-only"], "encoder-only"),
        (2.0, 2.0, 3.0, 1.0, ["active", "pruned"], "informative"),
        (2.0, 2.0, 3.0, 1.0, ["active", "rate-only"], "informative"),  # half
        (2.0, 2.0, 3.0, 1.0, ["active", "rate-only", "rate-only"], "partial"),
        (0.4, 0.3, 0.1, 0.2, ["active"], "near-collapsed"),  # the lower end of Delta_shuffle is 0.09
        (0.4, 0.3, 0.12, 0.2, ["active"], "informative"),
        (2.0, 2.0, 3.0, 0.1, ["active"], "undetermined"),
        (2.0, 2.0, 0.1, 0.0, ["undetermined"], "undetermined"),
    ],
)
def test_verdicts(
    rate: float, information: float, shuffle: float, decoded: float, states: list[str], verdict: str
) -> None:
    metrics: dict[str, Estimate | None] = {
        "rate": interval(rate),
        "mi_lower": interval(information),
        "mi_upper": interval(information),
        "delta_shuffle": interval(shuffle),
        "i_dec": interval(decoded),
        "svi_gain": interval(0.0),
        "code_gap": interval(0.0),
    }
    dims = [dim(state, 0.0 if state == "pruned" else 0.5) for state in states]
    ruling = rule(metrics, dims, None)
    assert ruling.verdict == verdict
    assert (
        verdict in ("rate-only", "informative", "partial")
        or (information >= 0.2 and shuffle >= 0.2)  # used by more than a few
        or rule(metrics, dims, interval(0.02)).verdict == "rare-use"
    )
    if verdict == "collapsed":
        assert ruling.subtype == "model collapse"
        for gain, gap, subtype in (
            (interval(0.07), interval(0.0), "inference lag"),
            (interval(0.055), interval(0.0), "cause unknown"),  # the lower end is 0.045
            (interval(0.045), interval(0.0), "cause unknown"),
            (interval(0.0), interval(2.0), "cause unknown"),
            (interval(0.0), None, "cause unknown"),
        ):
            told = rule({**metrics, "svi_gain": gain, "code_gap": gap}, dims, None)
            assert told.subtype == subtype
        assert rule({**metrics, "svi_gain": None}, dims, None).subtype is None
    for missing in ("delta_shuffle", "i_dec"):
        found = rule({**metrics, missing: None}, dims, None)
        assert found.verdict == ("rate-only" if verdict == "rate-only" else "undetermined")


def test_wide_intervals_are_not_nearly_collapsed() -> None:
    """Delta_shuffle 0 +- 1.2 nats excludes nothing."""
    metrics: dict[str, Estimate | None] = dict.fromkeys(("rate", "mi_lower", "mi_upper"), interval(0.25))
    metrics |= {"delta_shuffle": interval(0.0, 1.2), "i_dec": interval(0.02), "svi_gain": interval(0.0)}
    assert rule(metrics, [dim("active")], None).verdict == "undetermined"
    metrics["delta_shuffle"] = interval(0.0, 0.4)
    assert rule(metrics, [dim("active")], None).verdict == "near-collapsed"


@pytest.mark.parametrize("n, share", [(30, 10), (2048, 0.15)])
def test_what_was_not_excluded(n: int, share: float) -> None:
    """Use by 3/n of the examples is in no one of n with probability (1 - 3/n)^n < 0.05."""
    for said in ("collapsed", "rate-only", "encoder-only", "near-collapsed"):
        told = verdict.excluded(said, n)  # type: ignore[arg-type]
        assert told is not None and f"3/n = {share:g} %" in told
    assert verdict.excluded("informative", n) is None
    assert (1 - 3 / n) ** n < 0.05


def rarely(share: float, n: int, seed: int, **settings: Any) -> collapse.Report:
    """A flag marks few examples; for those alone the code holds x, and the decoder reads it."""
    rng = generator(seed)
    x = torch.randn(n, 2, generator=rng)
    x[:, 1] = torch.rand(n, generator=rng) < share

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        rare = x[:, 1:] > 0
        return torch.where(rare, 0.999 * x[:, :1], 0.0), torch.where(rare, math.log(1 - 0.998), 0.0)

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        return torch.where(
            x[:, 1] > 0, normal(x[:, :1], z, 0.03), normal(x[:, :1], torch.zeros(()), 1.0)
        ).clamp_min(-8)

    return diagnose(encode, log_likelihood, x, **{"n": n, "k": 32, "seed": seed, **settings})


def test_rare_use_is_found() -> None:
    """Two of a hundred examples: I_dec cannot exceed 0.02 log 32 = 0.07 nats."""
    for seed in range(3):
        report = rarely(0.02, 2048, seed)
        assert report.verdict == "rare-use", report.reasons
        low, high = report.checks["picked_out"][1:]
        assert 0 < low < high < 0.03  # fewer than use it: some contrast codes lie as near
        assert report.checks["half_of_delta_shuffle"] < 0.02


def test_use_by_all_is_not_rare_use() -> None:
    """Where mi_lower and Δ_shuffle are high enough, an I_dec that is not known well is no rare use."""
    metrics = dict.fromkeys(
        ("rate", "mi_lower", "mi_upper", "delta_shuffle"), Estimate(2.0, 0.4, 3.0)
    ) | {"i_dec": Estimate(0.6, 0.09, 0.9)}  # fmt: skip
    picked = Estimate(0.1, 0.02, 0.3)
    assert rule(metrics, [], picked).verdict == "undetermined"
    assert rule(metrics | {"mi_lower": Estimate(0.1, 0.05, 0.2)}, [], picked).verdict == "rare-use"


def test_a_few_examples_that_bear_the_cost_are_told() -> None:
    told = rarely(0.02, 200, 1).reasons
    assert any("of the 200 examples bear half of Δ_shuffle: so few hardly tell" in each for each in told), (
        told
    )
    for share, n in ((0.0, 200), (0.5, 200)):
        assert not any("bear half" in each for each in rarely(share, n, 1).reasons)


def test_no_use_is_not_rare_use() -> None:
    for seed in range(3):
        assert rarely(0.0, 512, seed).verdict == "collapsed"


def test_every_state_has_its_row() -> None:
    """The table of states, one row after the other."""
    yes, no, unsure = (
        verdict.Answer(True, False, interval(1.0)),
        verdict.Answer(False, True, interval(0.0, 0.001)),
        verdict.Answer(False, False, interval(0.02, 0.05)),
    )
    empty, full = interval(0.1, 0.05), interval(0.9, 0.05)

    def state(
        rate: float, information: Any, share: Any, use: Any, train_only: bool = False, **more: Any
    ) -> str:
        redundant = more.get("redundant", ())
        return verdict.state_of(rate, information, share, use, train_only, redundant, more.get("train"))[0]

    assert state(0.5, yes, full, yes) == "active"
    assert state(0.05, yes, full, yes) == "low-rate"
    assert state(0.001, no, None, no) == "pruned"
    assert state(0.001, no, None, unsure) == "undetermined"
    assert state(0.5, no, empty, yes) == "rate-only"
    assert state(0.5, yes, empty, no) == "rate-only"  # most of the rate is empty
    assert state(0.5, yes, full, no, train_only=True, train=interval(1.0)) == "memorised"
    assert state(0.5, yes, full, no) == "encoder-only"
    assert state(0.5, yes, full, no, redundant=(1, 2)) == "active"
    assert state(0.5, yes, full, unsure) == "undetermined"
    assert state(0.5, unsure, full, yes) == "undetermined"
    assert state(0.5, yes, full, None) == "undetermined"


def test_use_of_a_blind_decoder_is_exactly_nothing() -> None:
    report = diagnose(MODEL.encode, lambda x, z: normal(x, torch.zeros(()), 1.0), X)
    assert report.verdict == "encoder-only"
    assert all(d.use is not None and (d.use.low, d.use.high) == (0, 0) for d in report.dims)
    assert report.metrics["i_dec"] == Estimate(0.0, 0.0, 0.0)
    assert report.checks["likelihood_gradient"] is False


def test_shedding_an_empty_rate_is_no_gain() -> None:
    """Refinement sheds 0.65 nats that tell nothing, but the prior, which has none, is as good."""

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(x), 3), 0.6), torch.full((len(x), 3), -0.2)

    report = diagnose(encode, lambda x, z: normal(x, torch.zeros(()), 1.0), X)
    assert report.verdict == "rate-only"
    rate, gain = report.metrics["rate"], report.metrics["svi_gain"]
    assert rate is not None and rate.value > 0.5
    assert gain is not None and -0.05 < gain.high < 0.01


# --- units and signs ----------------------------------------------------------------------------------------


def pixels(how: str) -> Any:
    """The diagnosis of four factors in 64 pixels, with their log-likelihoods summed, averaged or negated."""
    rng = generator(1)
    weights = 0.2 * torch.randn(4, 64, generator=rng)
    x = torch.randn(400, 4, generator=rng) @ weights + torch.randn(400, 64, generator=rng)
    precision = torch.linalg.inv(weights @ weights.T + torch.eye(4))
    logvar = torch.log(torch.diagonal(precision))

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ weights.T @ precision, logvar.expand(len(x), 4)

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        value = normal(x, z @ weights, 1.0)
        return {"sum": value, "mean": value / 64, "negative": -value, "negative mean": -value / 64}[how]

    return diagnose(encode, log_likelihood, x)


def test_a_mean_over_pixels_is_named() -> None:
    assert pixels("sum").verdict == "informative"
    with pytest.raises(ValueError, match=r"too flat to be a sum over the 64 values.*I_dec .*not their mean"):
        pixels("mean")


@pytest.mark.parametrize("how", ["negative", "negative mean"])
def test_a_negative_log_likelihood_is_named(how: str) -> None:
    with pytest.raises(ValueError, match=r"wrong sign.*not the loss"):
        pixels(how)


def test_a_likelihood_of_0_under_other_codes_is_the_strongest_use() -> None:
    x = torch.rand(400, 2, generator=generator(1)) * 2 - 1

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        return torch.where((x - z).abs() < 0.2, math.log(2.5), -math.inf).sum(dim=1)

    report = diagnose(lambda x: (x, torch.full_like(x, 2 * math.log(0.02))), log_likelihood, x, train=x)
    assert report.verdict == "informative" and [dim.state for dim in report.dims] == ["active", "active"]
    shuffled = report.metrics["delta_shuffle"]
    assert shuffled is not None and 60 < shuffled.low < shuffled.high < 100
    assert report.checks["likelihood_zero"]["delta_shuffle"] == pytest.approx(0.97, abs=0.03)
    assert any("likelihood 0" in reason for reason in report.reasons)
    assert all(math.isfinite(each.value) for each in report.metrics.values() if each is not None)


# --- the cause of a collapse --------------------------------------------------------------------------------


def bits(name: str, seed: int) -> collapse.Report:
    """q copies the prior; the decoder would read three signs from z, where no gradient leads to them."""
    x = torch.randint(0, 2, (400, 3), generator=generator(seed)) * 2.0 - 1

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(x), 3), torch.zeros(len(x), 3)

    read = {
        "sign": lambda x, z: torch.where((z > 0) == (x > 0), 0.95, 0.05).log().sum(dim=1),
        "cos": lambda x, z: (0.5 + 0.45 * x * (6 * z).cos()).log().sum(dim=1),
    }
    return diagnose(encode, read[name], x, k=32, seed=seed)


@pytest.mark.parametrize("name", ["sign", "cos"])
def test_better_codes_that_no_gradient_finds(name: str) -> None:
    for seed in range(2):
        report = bits(name, seed)
        assert (report.verdict, report.subtype) == ("collapsed", "cause unknown")
        gap = report.metrics["code_gap"]
        assert gap is not None and gap.low > 0.5


@pytest.mark.parametrize("beta, subtype", [(1.0, "inference lag"), (40.0, "model collapse")])
def test_inference_is_refined_at_the_beta_of_the_training(beta: float, subtype: str) -> None:
    """The best codes gain about 1 / beta: 0.1 nats at beta 8, 0.02 at 40."""
    model = Linear.worth([0.2, 0.2], generator(0))
    x = model.sample(600, generator(1))

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(x), 2), torch.zeros(len(x), 2)

    report = diagnose(encode, model.log_likelihood, x, n=600, k=32, beta=beta)
    assert (report.verdict, report.subtype) == ("collapsed", subtype), report.reasons


def test_the_refined_point_lies_the_gain_below_the_better_start() -> None:
    """An empty rate of 0.65 nats is shed on the way: no gain, and none in the picture."""

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(x), 3), 0.6), torch.full((len(x), 3), -0.2)

    found = diagnose(encode, lambda x, z: normal(x, torch.zeros(()), 1.0), X)
    nelbo = {name: sum(point) for name, point in found.rate_distortion.items()}
    gain = found.metrics["svi_gain"]
    assert gain is not None
    assert nelbo["z from the prior"] - nelbo["refined by gradient"] == pytest.approx(gain.value, abs=1e-9)


# --- what is wrong with a latent that is used ---------------------------------------------------------------


def ring() -> collapse.Report:
    """mu on a circle of radius 6, sd e^-2: I = log(12 pi / sqrt(2 pi e) e^-2) = 4.21, the rate 21.02 nats."""
    angle = 2 * math.pi * torch.rand(1024, 1, generator=generator(1))

    def circle(angle: Tensor) -> Tensor:
        return 6 * torch.cat([angle.cos(), angle.sin()], dim=1)

    return diagnose(
        lambda angle: (circle(angle), torch.full((len(angle), 2), -4.0)),
        lambda angle, z: normal(circle(angle), z, 0.05**0.5),
        angle,
        n=1024,
    )


def test_a_rate_without_information_qualifies_informative() -> None:
    report = ring()
    assert report.verdict == "informative" and set(report.findings) == {"information_share", "aggregate_kl"}
    share, distance = report.metrics["information_share"], report.metrics["aggregate_kl"]
    assert share is not None and share.low < 4.21 / 21.02 < share.high < 0.21
    assert distance is not None and distance.low < 21.02 - 4.21 < distance.high
    assert "samples from the prior will be off" in report.headline
    assert not any("nothing to fix" in each for each in report.advice)
    assert "but of the rate, a share of 0.2" in str(report)


def test_the_parts_of_the_rate_are_those_of_correlated_gaussian_codes() -> None:
    """mu = A x with x ~ N(0, I): q(z) is Gaussian, with the covariance C = A A^T + v I."""
    a, v = torch.tensor([[1.2, 0.0, 0.0], [1.0, 0.7, 0.0], [0.0, 0.0, 0.5]]), 0.3
    x = torch.randn(2048, 3, generator=generator(3))
    report = diagnose(
        lambda x: (x @ a.T, torch.full_like(x, math.log(v))), lambda x, z: normal(x, z, 1.0), x, n=2048
    )
    c = (a @ a.T + v * torch.eye(3)).double()
    single = c.diagonal()
    correlation = 0.5 * float(single.log().sum() - torch.logdet(c))
    by_dim = 0.5 * float((single - 1 - single.log()).sum())
    for name, truth in (("total_correlation", correlation), ("dimension_wise_kl", by_dim)):
        found = report.metrics[name]
        assert found is not None and found.low < truth < found.high
        assert found.high - found.low < 0.25
    rate, distance = report.metrics["rate"], report.metrics["aggregate_kl"]
    assert rate is not None and distance is not None
    assert distance.low < correlation + by_dim < distance.high


def autoencoder() -> collapse.Report:
    """Codes so far apart that the bounds of I(x;z) are saturated: the moments of q(z) tell how far off it is.
    The decoder's variance is large, which is no mean over data dimensions."""
    rng = generator(0)
    x, weights = torch.randn(512, 8, generator=rng), torch.randn(8, 32, generator=rng)
    back = torch.linalg.pinv(weights)
    return diagnose(
        lambda x: (4 * x @ weights / 8**0.5, torch.full((len(x), 32), -4.0)),
        lambda x, z: normal(x, z @ back * 8**0.5 / 4, 0.3**0.5),
        x,
        n=512,
    )


def test_an_autoencoder_is_off_the_prior() -> None:
    report = autoencoder()
    assert report.verdict == "informative"
    assert set(report.findings) == {"information_share", "aggregate_kl", "z_free_gain"}
    distance, rate = report.metrics["aggregate_kl"], report.metrics["rate"]
    assert rate is not None and distance is not None and distance.saturated
    # second moments of 16 a dimension: about 1/2 (16 - 1 - log 16) nats each, 6.1 * 32 in all
    assert 0.5 * 6.1 * 32 < distance.low < distance.high < rate.high


def test_a_good_model_has_no_findings(report: collapse.Report) -> None:
    assert report.findings == {}
    assert any("nothing to fix was found" in each for each in report.advice)
    gain, nelbo = report.metrics["z_free_gain"], report.metrics["nelbo"]
    assert gain is not None and nelbo is not None and gain.low > 0
    best = min(report.samples.nll[name].mean().item() for name in ("prior", "zero", "shuffled"))
    assert gain.value == pytest.approx(best - nelbo.value)


def test_what_is_not_measured_is_no_clean_bill() -> None:
    told = verdict.advice("informative", None, None, [], {}, ["svi_gain"])
    assert told[-1] == "not measured, so it may be bad: svi_gain"


def test_whole_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    settings = {"n": numpy.int64(50), "k": numpy.int32(4), "seed": numpy.int64(3)}
    assert numbers(diagnose(MODEL.encode, MODEL.log_likelihood, X, **settings)) == numbers(
        diagnose(MODEL.encode, MODEL.log_likelihood, X, n=50, k=4, seed=3)
    )


def test_what_small_dimensions_do_together() -> None:
    """The table of joint states, one row after the other."""

    def state(rate: Any, information: Any, use: Any) -> str:
        return verdict.Together(9, rate, information, information, use).state()[0]

    some, nothing, wide = interval(0.5), interval(0.0), interval(0.1, 0.2)
    assert state(interval(0.05), None, None) == "pruned"  # information is at most the rate
    assert state(some, None, None) == "undetermined"
    assert state(some, some, some) == "low-rate"
    assert state(some, some, nothing) == "encoder-only"
    assert state(some, nothing, some) == "rate-only"
    assert state(some, nothing, nothing) == "pruned"
    assert state(some, some, wide) == "undetermined"
    assert state(some, wide, nothing) == "undetermined"


def test_the_few_dimensions_with_information_are_measured_on_more_examples() -> None:
    model = Linear.worth([0.7] + [0.0] * 255, generator(0))
    x = model.sample(600, generator(1))
    report = diagnose(model.encode, model.log_likelihood, x, n=600)
    sizes = report.settings["examples_of"]
    assert (sizes["use"], sizes["use_of_informative"]) == (64, 600)
    use = report.dims[0].use
    assert report.dims[0].state == "active" and use is not None
    truth = math.exp(1.4) - 1
    assert use.low < truth < use.high and use.high - use.low < 2


def test_few_examples_are_shuffled_several_times() -> None:
    def split(n: int, **settings: Any) -> Measurements:
        found = Measurements("heldout", Model(MODEL.encode, MODEL.log_likelihood), X[:n], 0, 0, **settings)
        found.encode()
        found.shuffle()
        return found

    few = split(64)
    assert (few.shuffles(), few.shuffles_of_dims(64)) == (8, 8)
    assert few.shuffles_of_dims(USE_PAIRS // 8 // few.dims + 1) == 1
    for settings in ({"hurried": True}, {"groups": torch.arange(64)}):
        assert split(64, **settings).shuffles() == 1
    lost = few.lost([torch.tensor([0]), torch.tensor([0, 1])], 64)
    assert lost.shape == (64, 2, 8)
    ready = few.use_columns(lost)
    torch.testing.assert_close(ready.mean(dim=0), lost.mean(dim=(0, 2)))
    # by hand for one example: what it loses, and what those lose that got its code
    partners = torch.stack(few._use_pairs(64))
    caused = torch.stack([lost[partner.argsort()[5], 0, i] for i, partner in enumerate(partners)])
    assert ready[5, 0].item() == pytest.approx((lost[5, 0].mean() + caused.mean() - lost[:, 0].mean()).item())


@pytest.mark.slow
def test_false_activity_is_as_rare_as_said() -> None:
    """Two copies and a third dimension that a noisy decoder does not read: 2.5 % over both looks."""
    wrong = 0
    for seed in range(240):
        x = torch.randn(256, 4, generator=generator(seed))

        def encode(x: Tensor) -> tuple[Tensor, Tensor]:
            mu = torch.stack([x[:, 0], x[:, 0], x[:, 1], x[:, 2]], dim=1) * 0.8
            return mu, torch.full_like(mu, math.log(0.36))

        def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
            # reads the sum loudly, with no relation to x: noise of some nats for every code
            return normal(x, torch.zeros(()), 1.0) + 2 * torch.sin(9 * z.sum(dim=1) + 40 * x[:, 3])

        report = diagnose(encode, log_likelihood, x, n=256, seed=seed)
        wrong += any(dim.state in ("active", "low-rate") for dim in report.dims)
    assert wrong <= 0.025 * 240 + 2 * (0.025 * 240) ** 0.5, wrong


def test_classes_are_told_one_by_one() -> None:
    """Of class 1 the codes are another example's: it alone is explained worse."""
    classes = torch.arange(400) % 3

    def log_likelihood(x: Any, z: Tensor) -> Tensor:
        return MODEL.log_likelihood(x[0], z) - 2 * (x[1] == 1)

    report = diagnose(lambda x: MODEL.encode(x[0]), log_likelihood, (X, classes), classes=classes)
    assert list(report.classes) == ["0", "1", "2"]
    assert set(report.classes["0"]) == {"rate", "nll", "nelbo", "delta_shuffle"}
    for name, estimates in report.classes.items():
        nll = report.metrics["nll"]
        assert nll is not None and (estimates["nll"].low > nll.high) == (name == "1")
    chosen = labels_of("classes", classes, X, 200, stream(0, "select"))[0]
    for c in range(3):
        cost = (report.samples.nll["shuffled"] - report.samples.nll["own"])[chosen == c]
        assert report.classes[str(c)]["delta_shuffle"].value == pytest.approx(cost.mean().item())
    whole = sum(report.classes[str(c)]["rate"].value * int((classes == c).sum()) for c in range(3)) / 400
    assert whole == pytest.approx(report.metrics["rate"].value, rel=0.2)  # type: ignore[union-attr]
    assert tables.classes_of(report.to_json()) == report.classes
    assert "   class" in str(report)
    as_data = TensorDataset(X, classes)
    assert diagnose(lambda x: MODEL.encode(x[0]), log_likelihood, as_data, classes=classes).classes == (
        report.classes
    )


@pytest.mark.parametrize(
    "classes, error, words",
    [
        (torch.zeros(399), ValueError, r"one label for each of the 400 examples, got shape \[399\]"),
        (torch.zeros(400, 2), ValueError, r"got shape \[400, 2\]"),
        (["a"] * 400, TypeError, r"classes must be numbers, one for each example, got list"),
    ],
)
def test_wrong_labels_are_named(classes: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        diagnose(MODEL.encode, MODEL.log_likelihood, X, classes=classes)


def test_the_threshold_of_active_units() -> None:
    few = diagnose(MODEL.encode, MODEL.log_likelihood, X, active_threshold=0.5)
    units = few.metrics["active_units"]
    assert units is not None and units.value == 1 and "Var(mu) > 0.5" in str(few)
    with pytest.raises(ValueError, match="active_threshold must be a number of at least 0, got -1"):
        diagnose(MODEL.encode, MODEL.log_likelihood, X, active_threshold=-1)


# --- priors other than N(0, I) ------------------------------------------------------------------------------

PRIOR_MU, PRIOR_LOGVAR = torch.tensor([3.0, -2.0, 0.5]), torch.tensor([1.0, -1.5, 0.3])


def moved(model: Linear) -> tuple[Any, Any]:
    """The same model with its latent moved and stretched, so that its prior is another Gaussian."""

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = model.encode(x)
        return PRIOR_MU + torch.exp(0.5 * PRIOR_LOGVAR) * mu, logvar + PRIOR_LOGVAR

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        return model.log_likelihood(x, (z - PRIOR_MU) * torch.exp(-0.5 * PRIOR_LOGVAR))

    return encode, log_likelihood


def test_a_learned_prior_changes_no_measure() -> None:
    plain = diagnose(MODEL.encode, MODEL.log_likelihood, X)
    for prior in (
        (PRIOR_MU, PRIOR_LOGVAR),
        lambda x: (PRIOR_MU.expand(len(x), 3), PRIOR_LOGVAR.expand(len(x), 3)),
    ):
        found = diagnose(*moved(MODEL), X, prior=prior)
        assert found.verdict == plain.verdict == "informative"
        for name, estimate in plain.metrics.items():
            assert estimate is not None
            assert found.metrics[name].value == pytest.approx(estimate.value, abs=2e-4), name
        assert found.settings["prior"] != plain.settings["prior"] == "N(0, I)"
    # Taken for a model with the prior N(0, I), most of its rate is empty.
    assert "aggregate_kl" in diagnose(*moved(MODEL), X).findings


def test_a_learned_prior_that_is_copied_is_a_collapse() -> None:
    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return PRIOR_MU.expand(len(x), 3), PRIOR_LOGVAR.expand(len(x), 3)

    def log_likelihood(x: Tensor, z: Tensor) -> Tensor:
        return normal(x, torch.zeros(()), 1.0)

    assert diagnose(encode, log_likelihood, X).verdict == "rate-only"
    report = diagnose(encode, log_likelihood, X, prior=(PRIOR_MU, PRIOR_LOGVAR))
    assert report.verdict == "collapsed" and report.metrics["rate"].value == pytest.approx(0, abs=1e-6)


def test_a_conditional_prior() -> None:
    """q(z|x, c) = p(z|c): the code says nothing beyond the class, which the decoder has anyway."""
    c = torch.arange(400) % 4
    table = 3 * torch.randn(4, 3, generator=generator(5))

    def encode(x: Any) -> tuple[Tensor, Tensor]:
        return table[x[1]], torch.zeros(len(x[1]), 3)

    def log_likelihood(x: Any, z: Tensor) -> Tensor:
        off = ((z - table[x[1]]).square().sum(dim=1) - 3).clamp_min(0)
        return normal(x[0], torch.zeros(()), 1.0) - 0.3 * off

    assert diagnose(encode, log_likelihood, (X, c)).verdict == "informative"
    report = diagnose(
        encode, log_likelihood, (X, c), prior=lambda x: (table[x[1]], torch.zeros(len(x[1]), 3))
    )
    assert report.verdict == "collapsed", report.reasons


def test_a_prior_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"the mu of prior must be of shape \[3\], or \[64, 3\]"):
        diagnose(MODEL.encode, MODEL.log_likelihood, X, prior=(torch.zeros(2), torch.zeros(2)))


def test_the_bar_counts_the_examples_that_there_are() -> None:
    """It ended at 39 % where there were fewer than n."""
    few, many = torch.zeros(200, 3), torch.zeros(5000, 3)
    found = [diagnosis._at_most(2048, each) for each in (few, (many, many), TensorDataset(few))]
    assert found == [200, 2048, 200]
    assert diagnosis._evaluations(200, 32, 2, 2048) < diagnosis._evaluations(2048, 32, 2)
    assert diagnosis._evaluations(200, 32, 1) < diagnosis._evaluations(200, 32, 2, 300)
