"""Diagnoses of runs by class and within classes, and where the labels come from."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("typer", reason="the trainer needs vaekernels[train]")
pytest.importorskip("jinja2", reason="the pages need vaekernels[train]")

import numpy as np
import torch
from test_commands import call
from tiny_runs import (
    settings,
    tiny_data,  # noqa: F401 (the fixture)
    trained,
)
from torch import Tensor, nn

from vaekernels import collapse
from vaekernels.training import compare, diagnosis, labels
from vaekernels.training import data as datasets
from vaekernels.training.config import DataConfig
from vaekernels.training.data import Text
from vaekernels.training.data.base import EOS, PAD
from vaekernels.training.errors import InputError
from vaekernels.training.run import Run, RunFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning"),
    pytest.mark.usefixtures("tiny_data"),
]


def sentences(n: int) -> Tensor:
    """int64 [n, 5]: 1 to 4 equally likely tokens of two."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(4, 6, (n, 5), generator=generator)
    length = torch.randint(1, 5, (n, 1), generator=generator)
    place = torch.arange(5)
    return torch.where(place < length, x, torch.where(place == length, EOS, PAD))


class _Reader(nn.Module):
    """z is what ``feature`` says of a sentence, and all that the decoder reads."""

    latent_dim = 1

    def __init__(self, feature: str) -> None:
        super().__init__()
        self.feature = feature
        self.latent_layers: tuple[nn.Module, ...] = (nn.Identity(),)

    def _of(self, x: Tensor) -> Tensor:
        return ((x != PAD).sum(dim=1) if self.feature == "length" else (x == 5).sum(dim=1)) - 2.0

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu = self._of(x).unsqueeze(1)
        return mu, torch.full_like(mu, -4.0)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        return -4 * (self._of(x) - z[:, 0]).square()


def run_of(feature: str) -> Run:
    x = sentences(400)
    data = Text("docstrings", x[100:], x[:100], "0", ("<pad>", "<bos>", "<eos>", "<unk>", "a", "b"))
    model = _Reader(feature)
    return Run(RunFolder(Path("run")), settings(), data, model, torch.device("cpu"), 1)  # type: ignore[arg-type]


def test_where_z_is_the_length_of_the_sentence_the_report_says_so() -> None:
    report = diagnosis.diagnose(run_of("length"), k=4, train=False, progress=False)
    assert report.verdict == "informative"
    told = [reason for reason in report.reasons if "same length" in reason]
    assert len(told) == 1 and "more than half of what z says is the length" in told[0]
    assert "--condition length" in report.advice[-1]
    within = diagnosis.diagnose(run_of("length"), k=4, condition="length", train=False, progress=False)
    assert within.verdict not in ("informative", "partial"), "of the rest of the sentence z says nothing"
    assert within.settings["condition"] == "length" and within.settings["strata"] == 4
    other = diagnosis.diagnose(run_of("words"), k=4, train=False, progress=False)
    assert other.verdict == "informative" and "same length" not in "".join(other.reasons)


def test_the_classes_and_the_threshold_of_a_diagnosis() -> None:
    run = trained("docstrings")
    text, _ = call("diagnose", "run", "-k", "4", "--classes", "length", "--active-threshold", "0")
    assert "skipped" not in text and "   class" in text and "active units, Var(mu) > 0" in text
    report = run.report(k=4, classes="length", active_threshold=0.0, train=False)
    lengths = run.data.lengths(run.data.heldout)
    repeated = [str(length) for length in lengths.unique().tolist() if (lengths == length).sum() > 1]
    assert list(report.classes) == repeated and report.settings["classes"] == "length"
    assert report.metrics["active_units"].value == 3  # type: ignore[union-attr]
    np.save("labels.npy", np.arange(120) % 2)
    said = call("diagnose", "run", "-k", "4", "--condition", "labels.npy", "--no-train", status=1)[1]
    assert "--condition labels.npy: condition must have strata of 8 examples or more" in said
    assert "at least 0, got -1" in call("diagnose", "run", "--active-threshold", "-1", status=2)[1]
    said = call("diagnose", "run", "--classes", "lenght", status=1)[1]
    assert "no labels 'lenght' in docstrings; did you mean length?" in said


def test_a_comparison_is_not_of_a_report_within_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained("digits")
    np.save("labels.npy", np.zeros(120))
    report = run.report(k=4, condition="labels.npy")
    assert report.settings["strata"] == 1
    report.save("run")
    said: list[str] = []
    asked: dict[str, Any] = {}
    measure = collapse.diagnose

    def seen(*arguments: Any, **options: Any) -> collapse.Report:
        asked.update(options)
        return measure(*arguments, **options)

    monkeypatch.setattr(collapse, "diagnose", seen)
    found = compare.outcome(Path("run"), said.append)
    assert asked["progress"], "it takes minutes: a bar, where there is a terminal"
    assert any("the one there is is within classes of labels.npy: diagnosing" in line for line in said)
    assert "condition" not in found.report.settings


def test_labels_lie_with_their_examples() -> None:
    """Each example of the split has the label that it has in the whole."""
    x = np.random.default_rng(0).random((50, 3)).astype(np.float32)
    np.save("x.npy", x)
    np.save("y.npy", np.arange(50))
    Path("y.csv").write_text("class\n" + "".join(f"{i}\n" for i in range(50)))
    Path("y-idx1").write_bytes(struct.pack(">HBBI", 0, 8, 1, 50) + bytes(range(50)))
    config = DataConfig("npy:x.npy")
    data = datasets.load(config, lambda text: None)
    for name in ("y.npy", "y.csv", "y-idx1"):
        train, heldout = labels.find(data, name, config)
        torch.testing.assert_close(data.train, torch.from_numpy(x)[train])
        torch.testing.assert_close(data.heldout, torch.from_numpy(x)[heldout])


def test_labels_of_the_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    monkeypatch.undo()  # the real digits
    config = DataConfig("digits")
    data = datasets.load(config, lambda text: None)
    assert labels.names(data) == ["digit"]
    train, heldout = labels.find(data, "digit", config)
    of = {tuple(image.ravel().astype(int)): int(y) for image, y in zip(*digits_of(sklearn), strict=True)}
    for x, y in ((data.train, train), (data.heldout, heldout)):
        assert [of[tuple(image.flatten().tolist())] for image in x] == y.tolist()


def digits_of(sklearn: object) -> tuple[np.ndarray, np.ndarray]:
    bunch = sklearn.load_digits()  # type: ignore[attr-defined]
    return bunch.images, bunch.target


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("half.npy", "not whole numbers: number the classes 0, 1, 2"),
        ("short.npy", r"holds \[7\] labels, docstrings has 120 examples"),
        ("y.txt", r"takes labels in a .npy, .npz, .csv or idx file"),
        ("z", "no labels 'z' in docstrings; known: length; or the path of a file"),
    ],
)
def test_what_is_no_label(given: str, message: str) -> None:
    np.save("half.npy", np.arange(120) / 2)
    np.save("short.npy", np.arange(7))
    Path("y.txt").write_text("a\n" * 120)
    config = DataConfig("docstrings")
    with pytest.raises(InputError, match=message):
        labels.find(datasets.load(config, lambda text: None), given, config)
