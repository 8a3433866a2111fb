"""The commands `diagnose` and `demo`, on data of a hundredth of the size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("typer", reason="the trainer needs vaekernels[train]")
pytest.importorskip("jinja2", reason="the pages need vaekernels[train]")

import torch
from tiny_runs import (
    settings,
    tiny_data,  # noqa: F401 (the fixture)
    trainer,
)
from typer.testing import CliRunner

from vaekernels.collapse import Estimate, Report
from vaekernels.training import checkpoint, diagnosis, gallery
from vaekernels.training.cli import app
from vaekernels.training.config import presets
from vaekernels.training.config import settings as texts
from vaekernels.training.data import Arrays
from vaekernels.training.data.base import digest
from vaekernels.training.demo import DEMOS, Outcome, tables
from vaekernels.training.errors import DataError
from vaekernels.training.run import open_run

pytestmark = [
    pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning"),
    pytest.mark.usefixtures("tiny_data"),
]


def call(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
    assert result.exit_code == status, result.output
    return result.output


def quiet(text: str) -> None:
    pass


# --- diagnose


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("docstrings", "objective.free_bits=0.5"),
        ("digits", "model.kind=ladder objective.pi_target=2"),
        ("digits", "model.kind=conv model.latent_channels=2"),
    ],
)
def test_diagnose_writes_the_report_with_all_that_the_run_knows(
    name: str, given: str, tmp_path: Path
) -> None:
    trainer(settings(name, given), tmp_path / "run").fit()
    output = call("diagnose", str(tmp_path / "run"), "-n", "100", "-k", "4")
    assert "rate (KL, unclamped)" in output and "Δ_shuffle" in output and "train [95%]" in output
    assert max(map(len, output.splitlines()[:-1])) <= 100
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["settings"]["data"] == name and report["settings"]["steps"] == 42
    assert report["settings"]["examples"] == {"heldout": 12, "train": 100}
    if "free_bits" in given:
        assert report["settings"]["free_bits"] == 0.5
        assert report["settings"]["effective_beta"] == 1.0
        assert report["settings"]["free_bits_mode"] == "batch, dim, floor"
    if "pi_target" in given:
        assert report["settings"]["effective_beta"] is None, "a controller moves it"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "weight of the KL" in page or "Training" in page
    titles = ["Reconstructions", "Samples of the prior", "Interpolations"]
    if name == "digits":
        titles = [
            "Held-out images above their reconstructions",
            "Samples of the prior",
            "What each dimension changes: dims",
        ]
    for title in titles:
        assert title in page, title


def test_vectors_have_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vaekernels.training import data as datasets

    x = torch.randn(120, 5)
    vectors = Arrays("digits", x[12:], x[:12], digest(x), levels=None)
    monkeypatch.setitem(datasets.DATASETS, "digits", lambda config, say: vectors)
    trainer(settings("digits"), tmp_path / "run").fit()
    call("diagnose", str(tmp_path / "run"), "-n", "50", "-k", "3", "--no-train")
    assert "Traversals" not in (tmp_path / "run" / "report.html").read_text()


def test_a_budget_leaves_out_and_says_so(tmp_path: Path) -> None:
    trainer(settings("digits"), tmp_path / "run").fit()
    assert "skipped:" in call("diagnose", str(tmp_path / "run"), "--budget", "1e-9")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere"], 1, "error: no run in nowhere (it has no config.toml)"),
        (["run", "-n", "3"], 2, "error: -n must be at least 4, got 3"),
        (["run", "-k", "1"], 2, "error: -k must be at least 2, got 1"),
        (["run", "--budget", "0"], 2, "error: --budget must be greater than 0, got 0"),
        (["unsaved"], 1, "error: no checkpoint at unsaved/checkpoint.pt; the run was stopped before"),
        (["torn"], 1, "error: torn/checkpoint.pt does not fit torn/config.toml"),
    ],
)
def test_what_cannot_be_diagnosed_is_one_clear_line(arguments: list[str], status: int, message: str) -> None:
    trainer(settings("digits"), Path("unsaved"))
    trainer(settings("digits"), Path("torn")).fit()
    state = torch.load("torn/checkpoint.pt", weights_only=True)
    state["model"].popitem()
    torch.save(state, "torn/checkpoint.pt")
    checkpoint.seal(Path("torn/checkpoint.pt"))
    output = call("diagnose", *arguments, status=status)
    assert output.startswith(message) and len(output.splitlines()) == 1


def test_a_report_that_cannot_be_written_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(settings("digits"), Path("run")).fit()
    monkeypatch.setattr(
        Report, "save", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    output = call("diagnose", "run", "-n", "50", "-k", "3", status=1)
    assert "error: cannot write the report into run: Read-only file system" in output


def test_a_run_of_other_data_is_opened_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(settings("digits"), Path("run")).fit()
    state = torch.load("run/checkpoint.pt", weights_only=True)
    torch.save(state | {"data": "f" * 64}, "run/checkpoint.pt")
    checkpoint.seal(Path("run/checkpoint.pt"))
    run = open_run(Path("run"), quiet)
    assert run.missing is not None and "was trained on other digits data" in run.missing
    assert len(run.data.heldout) == 0
    with pytest.raises(DataError, match="was trained on other digits data"):
        run.require_examples()


def test_curves_are_those_of_the_log() -> None:
    trainer(settings("digits", beta=2.0, anneal="linear", anneal_epochs=3.0), Path("run")).fit()
    found = diagnosis.curves(open_run(Path("run"), quiet))
    assert list(found["weight of the KL"]["weight"].steps) == [14, 28, 42]
    assert list(found["weight of the KL"]["weight"].values) == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert set(found["rate, nats"]) == {"train", "held out"}


# --- what a model shows


def test_sentences_to_look_at() -> None:
    trainer(settings("docstrings"), Path("run")).fit()
    run = open_run(Path("run"), quiet)
    state = torch.get_rng_state()
    seen = gallery.look(run.model, run.data, run.device)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(seen, gallery.Sentences)
    assert len(seen.originals) == len(seen.reconstructions) == 8 and len(seen.samples) == 200
    assert [len(line) for line in seen.interpolations] == [7, 7, 7]
    # the ends of a line are the sentences it lies between
    assert [line[0] for line in seen.interpolations] == seen.reconstructions[:3]
    assert [line[-1] for line in seen.interpolations] == seen.reconstructions[3:6]
    assert seen.distinct == len(set(seen.samples))


def test_images_to_look_at() -> None:
    trainer(settings("digits"), Path("run")).fit()
    run = open_run(Path("run"), quiet)
    seen = gallery.look(run.model, run.data, run.device)
    assert isinstance(seen, gallery.Images)
    assert seen.originals.shape == seen.reconstructions.shape == (8, 1, 4, 4)
    assert set(seen.originals.unique().tolist()) == {0.0, 1.0}
    assert seen.interpolations.shape == (3, 7, 1, 4, 4) and seen.traversals.shape == (3, 7, 1, 4, 4)
    torch.testing.assert_close(seen.interpolations[:, 0], seen.reconstructions[:3])
    torch.testing.assert_close(seen.interpolations[:, -1], seen.reconstructions[3:6])
    for row, dim in enumerate(seen.traversed):
        codes = run.model.encode(run.data.heldout[:1])[0].repeat(7, 1)
        codes[:, dim] = torch.linspace(-2.5, 2.5, 7)
        torch.testing.assert_close(seen.traversals[row], run.model.generate(codes))


def test_traversed_dims_are_those_of_the_highest_rates_near_collapse_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """exp(l) - 1 - l of these log-variances is rounding alone in float32; their rates, l²/4, are not."""
    trainer(settings("digits", "model.latent_dim=12"), Path("run")).fit()
    run = open_run(Path("run"), quiet)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))

    def near_the_prior(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(x), 12), (1e-5 * (order + 1)).expand(len(x), 12)

    monkeypatch.setattr(run.model, "encode", near_the_prior)
    seen = gallery.look(run.model, run.data, run.device)
    assert isinstance(seen, gallery.Images)
    assert seen.traversed == sorted(order.argsort(descending=True)[:8].tolist())


# --- demos


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """One run of the docstrings demo, for several tests."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        from tiny_runs import tiny_text

        from vaekernels.training import data as datasets

        patch.setitem(datasets.DATASETS, "docstrings", tiny_text)
        patch.chdir(folder)
        yield call("demo", "--epochs", "1", "--run-dir", "demo"), folder / "demo"


def test_the_demo_compares_models_side_by_side(shown: tuple[str, Path]) -> None:
    output, folder = shown
    titles = [variant.title for variant in DEMOS["docstrings"][0].variants]
    for part in ("beta 1", "PI controller", "Δ_shuffle", "distinct samples", "of 200", "greedy decoding"):
        assert part in output
    assert re.search(r"the likelihood \(IWAE\) is (worse|better) by|no difference in likelihood", output)
    assert max(len(line) for line in output.splitlines() if "demo.html" not in line) <= 100
    configs = {}
    for variant in DEMOS["docstrings"][0].variants:
        kept = folder / variant.folder
        assert (kept / "report.html").is_file() and (kept / "report.json").is_file()
        configs[variant.title] = texts.load(kept / "config.toml")
    first = configs["beta 1"]
    assert all(replace(config, objective=first.objective) == first for config in configs.values())
    assert [config.objective.free_bits for config in configs.values()] == [None, 0.25, 4.0, None]
    assert configs["PI controller"].objective.pi_target == 4.0 and list(configs) == titles


def test_the_page_of_the_demo_holds_everything(shown: tuple[str, Path]) -> None:
    page = (shown[1] / "demo.html").read_text()
    for part in ("Reconstructions", "Samples of the prior", "Lines between the codes", "shuffled"):
        assert part in page
    assert "prefers-color-scheme: dark" in page and "max-width: 500px" in page
    plain = page[page.index("In plain words") :]
    assert "Changing z" in plain and "I_dec: how much of x the decoder can find in z" in plain
    for variant in DEMOS["docstrings"][0].variants:
        assert f'<a href="{variant.folder}/report.html">{variant.title}</a>' in page
    assert page.count("data:image/svg+xml;base64,") == 6, "plane, curves, four histograms"
    outside = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all(link.startswith("data:") or link.endswith("/report.html") for link in outside)


def test_the_digits_demo_has_two_parts_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "save", lambda *_: None)  # the reports of single runs: seen above
    output = call("demo", "digits", "--epochs", "1", "--run-dir", "demo")
    assert "Too aggressive KL weighting" in output and "Better ELBO, dead latents" in output
    page = Path("demo/demo.html").read_text()
    assert "Samples of the prior" in page and page.count("data:image/png;base64,") == 3 * 5


def test_unknown_demo_names_the_nearest() -> None:
    assert "error: unknown demo 'digit'; did you mean digits?" in call("demo", "digit", status=2)


def test_the_settings_of_the_demos_are_what_their_titles_say() -> None:
    for parts in DEMOS.values():
        for part in parts:
            for variant in part.variants:
                assert variant.preset in presets.PRESETS
                variant.config({})
                assert re.fullmatch(r"[\w.-]+", variant.folder)
    first, annealed, _ = DEMOS["digits"][0].variants
    assert first.config({}).objective.beta == annealed.config({}).objective.beta == 6.0


# --- the words follow the figures


def outcome(title: str, verdict: str, figures: dict[str, Estimate], samples: list[str]) -> Outcome:
    class Fixed(Report):
        def iwae_difference(self, other: Report) -> Estimate:
            mine, theirs = self.metrics["iwae_nll"], other.metrics["iwae_nll"]
            assert mine is not None and theirs is not None
            change = mine.value - theirs.value
            return Estimate(change, change - 0.2, change + 0.2)

    empty: dict[str, Any] = {name: None for name in ("overfit", "excluded", "train")}
    subtype = "model collapse" if verdict == "collapsed" else None
    report = Fixed(
        verdict=verdict, subtype=subtype, reasons=[], findings={}, advice=[], metrics=dict(figures),
        gaps={}, classes={}, dims=[], rate_distortion={}, settings={"examples": {"heldout": 9}},
        checks={}, cost={}, skipped={}, samples=None, **empty,  # type: ignore[arg-type]
    )  # fmt: skip
    seen = gallery.Sentences([], [], samples, [], [], [])
    return Outcome(title, "report.html", report, seen, {})


def figures(rate: float, iwae: float) -> dict[str, Estimate]:
    return {
        "rate": Estimate(rate, rate, rate),
        "delta_shuffle": Estimate(rate, rate, rate),
        "iwae_nll": Estimate(iwae, iwae, iwae),
    }


def test_a_number_that_rounds_to_zero_has_no_sign() -> None:
    assert tables.interval(Estimate(-0.001, -0.02, 0.004)) == "0.00 [-0.02, 0.00]"


def test_conclusions() -> None:
    dead = outcome("beta 1", "collapsed", figures(0.0, 50.0), ["a"] * 3)
    worse = outcome("floor", "informative", figures(4.0, 51.5), ["a", "b", "c"])
    better = outcome("control", "partial", figures(4.0, 49.0), ["a", "b", "b"])
    same = outcome("nothing", "collapsed", figures(0.0, 50.1), ["a"] * 3)
    lines = tables.conclusions([dead, worse, better, same])
    assert lines[0].startswith(
        "beta 1 is collapsed (model collapse): its encoder sends 0.00 [0.00, 0.00] nats"
    )
    assert lines[1] == (
        "floor: alive (informative); the likelihood (IWAE) is worse by 1.50 nats an example [+1.30, +1.70]; "
        "3 distinct prior samples, not 1."
    )
    assert "the likelihood (IWAE) is better by 1.00 nats an example [-1.20, -0.80]" in lines[2]
    assert lines[3] == (
        "nothing: not alive either (collapsed (model collapse)); no difference in likelihood (IWAE) is seen: "
        "+0.10 [-0.10, +0.30]."
    )
