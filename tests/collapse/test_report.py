"""What a report looks like: a table, report.json, and a page with everything in it."""

from __future__ import annotations

import base64
import builtins
import dataclasses
import json
import math
import os
import re
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Linear, generator
from torch import Tensor

from vaekernels import _files, collapse
from vaekernels.collapse import Curve, Extras, TextTable, tables
from vaekernels.collapse.report import JSON, PAGE, SCHEMA

MODEL = Linear.worth([0.8, 0.3, 0.04, 0.0], generator(0))
X = MODEL.sample(600, generator(1))
SETTINGS = {"n": 300, "k": 8, "progress": False}


@pytest.fixture(scope="module")
def report() -> collapse.Report:
    train = MODEL.sample(300, generator(2))
    return collapse.diagnose(MODEL.encode, MODEL.log_likelihood, X, train=train, **SETTINGS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bare() -> collapse.Report:
    """As much as can be left out."""
    return collapse.diagnose(MODEL.encode, MODEL.log_likelihood, X, budget_s=1e-9, **SETTINGS)  # type: ignore[arg-type]


EXTRAS = Extras(
    settings={"beta": 0.5, "effective_beta": 0.5},
    curves={
        "rate, nats": {"train": Curve([0, 10, 20], [0.0, 1.0, 1.5]), "held out": Curve([0, 20], [0.0, 1.4])},
        "weight": {"": Curve([0, 20], [0.0, 1.0])},
        "NLL": {"train": Curve([0, 20], [50.0, 40.0])},
    },
    images={"Reconstructions": torch.rand(2, 5, 8, 8), "Traversals": torch.rand(3, 4, 3, 6, 9)},
    texts={"Sentences": TextTable(["original", "decoded"], [["a <b>", "a & b"]])},
    interpolations={"one to two": ["one", "one", "two"]},
    prior_samples=["a", "b", "a"],
    points={"another model": (3.0, 9.0)},
)


def test_json(report: collapse.Report, tmp_path: Path) -> None:
    report.save(tmp_path)
    said = json.loads((tmp_path / JSON).read_text(encoding="utf-8"))
    assert said == json.loads(json.dumps(report.to_json()))
    assert said["schema"] == SCHEMA and said["verdict"] == report.verdict
    assert said["metrics"]["rate"] == [
        getattr(report.metrics["rate"], end) for end in ("value", "low", "high")
    ]
    assert [dim["state"] for dim in said["dims"]] == [dim.state for dim in report.dims]
    assert re.fullmatch("[0-9a-f]{64}", said["settings"]["data_sha256"]["heldout"])
    assert said["settings"]["beta"] is None and "beta" in said["skipped"]
    assert {"deterministic", "likelihood_gradient"} <= said["checks"].keys()
    assert said["cost"]["evaluations"] > 0 and "contrast codes" in said["cost"]["parts"]
    assert said["train"]["nelbo"] is not None and said["gaps"]["nelbo"] is not None


def test_what_the_trainer_knows_joins_the_settings(report: collapse.Report) -> None:
    said = report.to_json(EXTRAS)
    assert said["settings"]["beta"] == 0.5
    assert "beta" not in said["skipped"] and "free_bits" in said["skipped"]


def test_not_measured_is_null_and_named(bare: collapse.Report, tmp_path: Path) -> None:
    bare.save(tmp_path)
    said = json.loads((tmp_path / JSON).read_text(encoding="utf-8"))
    missing = [name for name, value in said["metrics"].items() if value is None]
    assert (
        {"delta_shuffle", "i_dec", "svi_gain", "iwae_nll", "delta_prior"}
        <= set(missing)
        <= set(said["skipped"])
    )
    assert said["train"] is None and said["overfit"] is None and {"train", "overfit"} <= set(said["skipped"])
    assert all(dim["use"] is None for dim in said["dims"]) and "use" in said["skipped"]
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "not measured" in page and "Not measured: " in page
    assert "not measured" in str(bare)


@pytest.mark.parametrize("which", ["report", "bare"])
def test_the_table_fits_100_columns(which: str, request: pytest.FixtureRequest) -> None:
    text = str(request.getfixturevalue(which))
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[0].startswith(request.getfixturevalue(which).verdict)
    for label in ("rate (KL, unclamped)", "I(x;z), lower bound", "Δ_shuffle", "I_dec", "dim"):
        assert label in text


def test_a_long_table_fits_too() -> None:
    dims = 100
    x = 1e3 * torch.randn(64, dims, generator=generator(0))
    wide = collapse.diagnose(
        lambda x: (x, torch.full_like(x, -20.0)),
        lambda x, z: -((x - z) ** 2).sum(dim=1),
        x,
        train=x,
        **SETTINGS,
    )  # type: ignore[arg-type]
    lines = str(wide).splitlines()
    assert max(map(len, lines)) <= 100
    assert "  and 36 more dimensions" in lines
    assert "saturated" in str(wide)


def test_json_names_every_saturated_estimate() -> None:
    x = 1e3 * torch.randn(64, 3, generator=generator(0))
    wide = collapse.diagnose(
        lambda x: (x, torch.full_like(x, -20.0)),
        lambda x, z: -((x - z) ** 2).sum(dim=1),
        x,
        train=x,
        **SETTINGS,
    )  # type: ignore[arg-type]
    said = wide.to_json()
    for named, estimates in (("saturated", wide.metrics), ("train_saturated", wide.train)):
        assert estimates is not None and "mi_lower" in said[named]
        assert said[named] == [name for name, each in estimates.items() if each and each.saturated]
    assert [dim["saturated"] for dim in said["dims"]] == [["information", "mismatch"]] * 3
    assert [tables.dims_of(said), tables.metrics_of(said), tables.train_of(said)] == [
        wide.dims,
        wide.metrics,
        wide.train,
    ]


def test_the_page_holds_everything_itself(report: collapse.Report, tmp_path: Path) -> None:
    path = report.save(tmp_path / "made" / "here", EXTRAS)
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "made" / "here" / PAGE
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "http" not in re.sub(r'src="[^"]*"', "", page)
    images = re.findall(r'<img src="data:image/(svg\+xml|png);base64,([^"]*)" alt="([^"]+)"', page)
    assert [title for _, _, title in images] == [
        "Dimensions",
        "Use against rate",
        "Rate and distortion",
        "Likelihood with other codes",
        "Aggregate posterior",
        "Training",
        "Reconstructions",
        "Traversals",
    ]
    for kind, data, _ in images:
        start = base64.b64decode(data)[:200]
        assert start.startswith(b"\x89PNG") if kind == "png" else b"<svg" in start or b"<?xml" in start
    assert "a &lt;b&gt;" in page and "a &amp; b" in page  # what others wrote is text, never markup
    assert "changes at 1 of 2 steps" in page
    assert "2 of 3 are distinct" in page
    for reason in report.reasons:
        assert reason.split(":")[0].split(" [")[0].replace("&", "&amp;") in page
    assert sorted(file.name for file in path.parent.iterdir()) == [PAGE, JSON]


def test_the_page_says_in_plain_words_what_was_found(report: collapse.Report, tmp_path: Path) -> None:
    page_of = pytest.importorskip("vaekernels.collapse.html")
    settings = {
        "run": "runs/s8",
        "data": "text:s.txt",
        "date": "2026-01-02",
        "objective": ["one", {"a": True}],
    }
    report.save(tmp_path, collapse.Extras(settings=settings))
    page = (tmp_path / "report.html").read_text()
    assert "runs/s8 · text:s.txt · 2026-01-02" in page and page_of.PLAIN[report.verdict] in page
    assert "one\na: yes" in page and "[&#39;one" not in page
    assert all(f"<small>{escape(page_of.MEANINGS[name])}</small>" in page for name in report.metrics)
    assert page_of.MEANINGS.keys() == tables.LABELS.keys() and page_of.PLAIN.keys() == page_of._TONES.keys()
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("verdict", ["collapsed", "informative"])
def test_models_that_do_not_use_z_are_ringed(verdict: str) -> None:
    page_of = pytest.importorskip("vaekernels.collapse.html")
    said = {"verdict": verdict, "rate_distortion": {"held out": (0.0, 9.0)}}
    others = collapse.Extras(points={"other": (0.01, 9.0), "third": (3.0, 9.0)})
    assert page_of._unused(said, others) == {"other"} | ({"held out"} if verdict == "collapsed" else set())


def test_the_same_report_gives_the_same_page(report: collapse.Report, tmp_path: Path) -> None:
    first, second = (report.save(tmp_path / name, EXTRAS).read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 2, 5, 8, 8), (0, 2, 8, 8)])
def test_image_grids_of_another_shape_are_named(
    report: collapse.Report, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"images\['odd'\] must be \[rows, columns, H, W\]"):
        report.save(tmp_path, Extras(images={"odd": torch.zeros(shape)}))


def test_without_the_extra_the_json_is_written_and_the_extra_named(
    report: collapse.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **more: Any) -> Any:
        if name.split(".")[0] in ("matplotlib", "jinja2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    for module in ("html", "plots"):
        monkeypatch.delitem(__import__("sys").modules, f"vaekernels.collapse.{module}", raising=False)
        monkeypatch.delattr(collapse, module, raising=False)
    with pytest.raises(
        ImportError, match=r"is written, but the page needs jinja2: pip install 'vaekernels\[train\]'"
    ):
        report.save(tmp_path)
    assert json.loads((tmp_path / JSON).read_text(encoding="utf-8"))["verdict"] == report.verdict
    assert not (tmp_path / PAGE).exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    _files.write_atomically(path, "old")

    def fails(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        _files.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    _files.write_atomically(path, "new €")
    assert path.read_text(encoding="utf-8") == "new €" and list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_two_models_are_compared_by_example(report: collapse.Report) -> None:
    def worse(x: Tensor, z: Tensor) -> Tensor:
        return MODEL.log_likelihood(x, z) - 0.5 - 0.01 * x[:, 0]

    other = collapse.diagnose(MODEL.encode, worse, X, **SETTINGS)  # type: ignore[arg-type]
    gap = other.iwae_difference(report)
    # half a nat, known far better than either likelihood
    shift = 0.01 * X[:, 0].mean().item()
    assert gap.value == pytest.approx(0.5 + shift, abs=0.003) and gap.high - gap.low < 0.01
    mirrored = report.iwae_difference(other)
    assert mirrored.value == pytest.approx(-gap.value)
    own = report.metrics["iwae_nll"]
    assert own is not None and own.high - own.low > 0.1
    elsewhere = collapse.diagnose(MODEL.encode, worse, X[:300], **SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the reports differ in data_sha256"):
        elsewhere.iwae_difference(report)


def test_every_metric_is_paired(report: collapse.Report, tmp_path: Path) -> None:
    """A decoder that reads half of z: what the encoder alone decides is the same, and known to be."""

    def half(x: Tensor, z: Tensor) -> Tensor:
        return MODEL.log_likelihood(x, torch.cat([z[:, :1], torch.zeros_like(z[:, 1:])], dim=1))

    other = collapse.diagnose(MODEL.encode, half, X, **SETTINGS)  # type: ignore[arg-type]
    found = other.difference(report)
    assert set(found) == {name for name, each in other.metrics.items() if each is not None}
    for name in ("rate", "mi_lower", "mi_upper", "active_units", "aggregate_kl", "information_share"):
        assert (found[name].low, found[name].value, found[name].high) == (0, 0, 0), name
    assert found["delta_shuffle"].high < 0 and found["nelbo"].low > 0 and found["iwae_nll"].low > 0
    mine, theirs = other.metrics["nelbo"], report.metrics["nelbo"]
    assert mine is not None and theirs is not None
    # paired: each NELBO alone is known less well
    assert found["nelbo"].high - found["nelbo"].low < mine.high - mine.low
    other.save(tmp_path / "other")
    loaded = collapse.Report.load(tmp_path / "other").difference(report)
    for name, each in found.items():
        assert loaded[name].value == each.value
        assert (loaded[name].low, loaded[name].high) == pytest.approx((each.low, each.high), abs=1e-4)
    told = other.against(report, ("runs/half", "runs/whole"))
    assert max(map(len, told.splitlines())) <= 100
    assert told.startswith(
        "runs/half uses a part of its latent, runs/whole uses its latent; runs/half costs "
    )
    nothing = report.against(report)
    assert "no difference in likelihood (IWAE) is seen: 0.00 [0.00, 0.00]" in " ".join(nothing.split())


def test_who_uses_its_latent(report: collapse.Report) -> None:
    ignored = collapse.diagnose(
        MODEL.encode, lambda x, z: MODEL.log_likelihood(x, 0 * z), X, **SETTINGS  # type: ignore[arg-type]
    )  # fmt: skip
    told = " ".join(report.against(ignored, ("A", "B")).split())
    assert told.startswith("A uses its latent, B does not use its latent; A gains ")
    told = " ".join(ignored.against(report, ("B", "A")).split())
    assert told.startswith("B does not use its latent, A uses its latent; B costs ")


def test_not_measured_likelihoods_are_not_compared(report: collapse.Report) -> None:
    bare = dataclasses.replace(report, metrics=report.metrics | {"iwae_nll": None})
    with pytest.raises(ValueError, match="iwae_nll was not measured in both reports"):
        bare.iwae_difference(report)
    assert "the likelihoods (IWAE) were not both measured" in bare.against(report)


def test_nothing_is_nan(report: collapse.Report) -> None:
    for estimate in [*report.metrics.values(), *(dim.information for dim in report.dims)]:
        assert estimate is not None
        assert all(math.isfinite(end) for end in (estimate.value, estimate.low, estimate.high))
