"""A trained model put to use from Python: opened, encoded and decoded with, diagnosed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("jinja2", reason="the pages need vaekernels[train]")

import numpy as np
import torch
from tiny_runs import (
    settings,
    tiny_data,  # noqa: F401 (the fixture)
    trained,
    trainer,
)

import vaekernels as vk
from vaekernels.collapse import Report
from vaekernels.collapse.report import SCHEMA
from vaekernels.training import data as datasets
from vaekernels.training.data import Arrays, Text
from vaekernels.training.data.base import digest
from vaekernels.training.errors import CheckpointError, ConfigError, DataError, InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning"),
    pytest.mark.usefixtures("tiny_data"),
]


def test_sentences_go_in_and_come_out() -> None:
    run = trained("docstrings")
    mu, logvar = run.encode(["w1 w2 w3", "w4"])
    assert mu.shape == logvar.shape == (2, 3) and mu.dtype == torch.float32
    again = run.encode("w1 w2 w3")
    torch.testing.assert_close(again.mu, mu[:1])
    x = run.data.heldout
    torch.testing.assert_close(run.encode(x).mu, run.model.encode(x)[0].detach())
    torch.testing.assert_close(run.encode([run.data.sentence(row) for row in x]).mu, run.encode(x).mu)
    assert run.decode(mu) == run.decode(run.encode(["w1 w2 w3", "w4"])) and len(run.decode(mu[0])) == 1
    assert all(isinstance(sentence, str) for sentence in run.sample(5)) and len(run.sample(5)) == 5
    assert run.sample(5) == run.sample(5)
    assert len(set(run.sample(5, temperature=0.0))) == 1
    assert run.unknown("w1 nothing, w2") == ["nothing", ","]
    line = run.interpolate("w1 w2", "w3", steps=5)
    assert [line[0], line[-1]] == run.decode(run.encode(["w1 w2", "w3"])) and len(line) == 5


def test_rates_are_those_of_the_closed_form() -> None:
    run = trained("digits")
    codes = run.encode(run.data.heldout)
    mu, logvar = (part.double() for part in codes)
    torch.testing.assert_close(
        codes.rate.double(), 0.5 * (mu**2 + logvar.exp() - 1 - logvar), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("given", ["", "model.kind=conv", "model.kind=ladder", "model.kind=row-gru"])
def test_images_in_every_layout_have_the_same_code(given: str) -> None:
    run = trained("digits", given)
    x = run.data.heldout
    codes = run.encode(x)
    torch.testing.assert_close(codes.mu, run.model.encode(x)[0].detach())
    for same in (x.squeeze(1), x.movedim(1, -1), x.float(), x.numpy(), x.bool(), x.squeeze(1).double()):
        torch.testing.assert_close(run.encode(same).mu, codes.mu)
    torch.testing.assert_close(run.encode(x[0, 0]).mu, codes.mu[:1])
    decoded = run.decode(codes)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32
    assert decoded.min() >= 0 and decoded.max() <= 1
    assert run.encode(decoded).mu.shape == codes.mu.shape, "what is decoded can be encoded again"
    assert run.sample(300).shape == (300, 1, 4, 4)


def test_colour_images_may_have_their_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(256, (60, 3, 4, 5), dtype=torch.uint8)
    photos = Arrays("digits", x[6:], x[:6], digest(x), levels=256)
    monkeypatch.setitem(datasets.DATASETS, "digits", lambda config, say: photos)
    run = trained("digits")
    torch.testing.assert_close(run.encode(x.movedim(1, -1)).mu, run.encode(x).mu)
    torch.testing.assert_close(run.encode(x[0].movedim(0, -1)).mu, run.encode(x[:1]).mu)
    torch.testing.assert_close(run.encode(x / 255).mu, run.encode(x).mu)
    with pytest.raises(InputError, match=r"x must be images \[N, 3, 4, 5\] or one of them"):
        run.encode(x.movedim(1, 2))


def test_vectors_go_in_and_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(120, 5)
    vectors = Arrays("digits", x[12:], x[:12], digest(x), levels=None)
    monkeypatch.setitem(datasets.DATASETS, "digits", lambda config, say: vectors)
    run = trained("digits")
    torch.testing.assert_close(run.encode(x[0]).mu, run.encode(x.double().numpy()).mu[:1])
    assert run.decode(run.encode(x)).shape == x.shape
    whole = run.encode([1, 2, 3, 4, 5]).mu
    torch.testing.assert_close(whole, run.encode([1.0, 2.0, 3.0, 4.0, 5.0]).mu)


def test_a_traversal_changes_one_dimension() -> None:
    run = trained("digits")
    z = torch.tensor([0.3, -0.2, 1.0])
    codes = z.repeat(2, 1)
    codes[:, 1] = torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(run.traverse(1, [-1, 1], z=z), run.decode(codes))
    assert run.traverse(0).shape == (6, 1, 4, 4)


def test_a_table_goes_in_and_comes_out_in_its_own_units() -> None:
    x = np.random.default_rng(0).normal(size=(200, 1)) @ np.array([[1e3, 1e-2]]) + np.array([5e4, 3.0])
    Path("t.csv").write_text("\n".join(["pay,tax", *(f"{a:.9g},{b:.9g}" for a, b in x)]))
    run = trained("digits", "data.name=csv:t.csv model.sigma=0.3 optim.epochs=30")
    decoded = run.decode(run.encode(x))
    assert isinstance(decoded, torch.Tensor)
    spread = (decoded - torch.from_numpy(x)).abs().mean(dim=0) / torch.from_numpy(x).std(dim=0)
    assert (spread < 0.3).all(), "in units of the columns' own spread"
    assert json.loads(Path("run/metrics.json").read_text())["heldout"]["nll"] < 10
    Path("t.csv").unlink()
    torch.testing.assert_close(
        vk.training.open_run("run", say=lambda text: None).decode(run.encode(x)), decoded
    )


@pytest.mark.parametrize("tokens", ["word", "char"])
def test_a_text_run_works_without_its_corpus(tokens: str) -> None:
    lines = [f"the cat {i % 7} sees {'a dog' if i % 2 else 'it'}" for i in range(80)]
    Path("corpus.txt").write_text("\n".join(lines))
    given = f"data.name=text:corpus.txt data.tokens={tokens}"
    run = trained("docstrings", given)
    codes, samples = run.encode(lines[:3]).mu, run.sample(5)
    for change in ("removed", "changed"):
        if change == "changed":
            Path("corpus.txt").write_text("\n".join(reversed(lines)))
        else:
            Path("corpus.txt").unlink()
        said: list[str] = []
        moved = vk.training.open_run("run", say=said.append)
        assert len(said) == 1 and "without the data of the run" in said[0]
        what = "are no longer at" if change == "removed" else f"{Path('corpus.txt').absolute()} has changed"
        assert what in said[0]
        assert isinstance(moved.data, Text) and moved.data.unit == tokens
        assert torch.equal(moved.encode(lines[:3]).mu, codes) and moved.sample(5) == samples
        assert moved.length == run.length and moved.unknown("the cat") == []
        with pytest.raises(DataError, match="takes the data that run was trained on"):
            moved.report()


def test_a_run_of_images_works_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained("digits")

    def gone(config: object, say: object) -> None:
        raise DataError("cannot read x: No such file or directory")

    monkeypatch.setitem(datasets.DATASETS, "digits", gone)  # type: ignore[arg-type]
    moved = vk.training.open_run("run", say=lambda text: None)
    torch.testing.assert_close(moved.sample(3), run.sample(3))
    assert torch.equal(moved.encode(run.data.heldout).mu, run.encode(run.data.heldout).mu)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda run: run.encode(torch.zeros(2, 5)), r"x must be images \[N, 1, 4, 4\] or one of them"),
        (lambda run: run.encode(np.zeros((0, 4, 4))), "x must be at least one example"),
        (lambda run: run.encode(np.full((4, 4), np.nan)), "x must be finite"),
        (lambda run: run.encode(np.full((4, 4), 2)), "x must be whole numbers in 0 to 1, got some from 2 to"),
        (lambda run: run.encode(np.full((4, 4), 7.5)), "real numbers in .0, 1. or whole ones in 0 to 1"),
        (lambda run: run.encode("a sentence"), "takes an array of numbers"),
        (lambda run: run.decode(torch.zeros(4)), r"z must be \[N, 3\] or \[3\], got \[1, 4\]"),
        (lambda run: run.decode([[0.0, float("inf"), 0.0]]), "z must be finite"),
        (lambda run: run.sample(0), "n must be an integer of at least 1, got 0"),
        (lambda run: run.sample(1, temperature=-1), "temperature must be finite and at least 0"),
        (lambda run: run.traverse(3), "dim must be one of 0 to 2, got 3"),
        (lambda run: run.interpolate(np.zeros((2, 4, 4)), np.zeros((4, 4))), "a must be one example, got 2"),
        (lambda run: run.interpolate(np.zeros((4, 4)), np.zeros((4, 4)), steps=1), "steps must be"),
    ],
)
def test_what_the_model_does_not_take_is_named(use: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        use(trained("digits"))


@pytest.mark.parametrize("x", [[], [1, 2], "  ", torch.zeros(2, 3)])
def test_what_is_no_sentence_is_named(x: Any) -> None:
    with pytest.raises(InputError, match="x must be"):
        trained("docstrings").encode(x)


def test_training_from_python_is_that_of_the_command_line(tmp_path: Path) -> None:
    run = vk.training.train(settings("digits"), out="a", quiet=True)
    trainer(settings("digits"), Path("b")).fit()
    other = vk.training.open_run(Path("b"), device="cpu")
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert isinstance(run, vk.training.Run) and not run.model.training and run.step == 42
    with pytest.raises(CheckpointError, match="already holds a run"):
        vk.training.train(settings("digits"), out="a", quiet=True)
    with pytest.raises(ConfigError, match="is for text"):
        vk.training.train(settings("digits", "model.kind=gru"), quiet=True)
    with pytest.raises(ConfigError, match="did you mean digits"):
        vk.training.train("digit")
    assert not Path("runs").exists()


def test_a_run_is_diagnosed_from_python() -> None:
    run = trained("digits")
    report = run.report(n=100, k=4, train=False)
    assert isinstance(report, Report) and report.train is None
    assert not Path("run", "report.json").exists()


def test_a_saved_report_is_loaded(tmp_path: Path) -> None:
    report = trained("digits").report(n=100, k=4)
    report.save(tmp_path / "saved")
    for path in (tmp_path / "saved", str(tmp_path / "saved" / "report.json")):
        loaded = Report.load(path)
        assert loaded.to_json() == json.loads(json.dumps(report.to_json()))
        assert str(loaded) == str(report) and loaded.headline == report.headline
        assert loaded.dims == report.dims and loaded.metrics == report.metrics
    for text, message in (
        ("{}", "it has no schema"),
        ("[1]", "it has no schema"),
        ("no", "it has no schema"),
        ('{"schema": 99}', "has schema 99, this version reads"),
        (f'{{"schema": {SCHEMA}}}', "is damaged"),
    ):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Report.load(tmp_path)
