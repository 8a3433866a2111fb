"""The commands that put a trained run to use."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("typer", reason="the trainer needs vaekernels[train]")
pytest.importorskip("jinja2", reason="the pages need vaekernels[train]")

import numpy as np
import torch
from PIL import Image
from tiny_runs import (
    settings,
    tiny_data,  # noqa: F401 (the fixture)
    trained,
)
from typer.testing import CliRunner

import _vaekernels_command
import vaekernels as vk
from vaekernels.training import commands
from vaekernels.training import data as datasets
from vaekernels.training.cli import app
from vaekernels.training.config import Config
from vaekernels.training.data import Arrays
from vaekernels.training.data.base import digest

pytestmark = [
    pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning"),
    pytest.mark.usefixtures("tiny_data"),
]


def call(*arguments: str, status: int = 0) -> tuple[str, str]:
    """What was printed, and said on standard error."""
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
    assert result.exit_code == status, result.output
    return result.stdout, result.stderr


def test_every_command_is_listed_without_torch_too() -> None:
    names = {command.__name__ for command in commands.COMMANDS} | {"train", "diagnose", "demo"}
    assert names == set(_vaekernels_command.TRAIN_COMMANDS)


def test_sentences() -> None:
    run = trained("docstrings")
    lines, said = call("sample", "run", "-n", "4", "--temperature", "0.7")
    assert lines.splitlines() == run.sample(4, temperature=0.7) and "of 4 sentences are distinct" in said
    assert json.loads(call("sample", "run", "-n", "3", "--json")[0]) == run.sample(3)
    call("sample", "run", "--out", "s.txt")
    assert Path("s.txt").read_text().splitlines() == run.sample(20)
    lines, said = call("interpolate", "run", "w1 w2", "w3 zebra", "--steps", "5")
    assert lines.splitlines() == run.interpolate("w1 w2", "w3 zebra", steps=5)
    assert "not in the vocabulary: zebra" in said and "of 4 steps" in said
    shown = call("traverse", "run", "--dim", "1")[0].splitlines()
    assert shown[0].startswith("dim 1, rate ") and len(shown) == 7
    assert json.loads(call("traverse", "run", "--json")[0])["dims"]["2"] == run.traverse(2)
    Path("mine.txt").write_text("w1 w2\n\nw3\n")
    found = json.loads(call("encode", "run", "--data", "text:mine.txt", "--json")[0])
    torch.testing.assert_close(torch.tensor(found["mu"]), run.encode(["w1 w2", "w3"]).mu)


@pytest.mark.parametrize("suffix", ["npy", "csv"])
def test_what_is_encoded_is_decoded_and_encoded_again(suffix: str) -> None:
    run = trained("digits")
    out = f"codes.{suffix}"
    assert f"codes: {out}" in call("encode", "run", "--out", out)[0]
    codes = run.encode(run.data.heldout)
    if suffix == "npy":
        stored = np.load(out)
        for name in ("mu", "logvar", "rate"):
            np.testing.assert_allclose(stored[name], getattr(codes, name).numpy(), rtol=1e-6)
    else:
        with open(out) as file:
            header, first, *_ = csv.reader(file)
        assert header == [f"{name}_{d}" for name in ("mu", "logvar", "rate") for d in range(3)]
        assert float(first[0]) == pytest.approx(codes.mu[0, 0].item(), rel=1e-6)
    call("decode", "run", out, "--out", "x.npy")
    np.testing.assert_allclose(np.load("x.npy"), run.decode(codes).numpy(), rtol=1e-4, atol=1e-6)
    call("encode", "run", "--data", "x.npy", "--out", "again.npy")
    np.testing.assert_allclose(np.load("again.npy")["mu"], run.encode(run.decode(codes)).mu, atol=1e-5)


def test_pictures() -> None:
    run = trained("digits")
    assert call("sample", "run")[0] == "run/samples.png\n"
    Image.fromarray((255 * run.data.heldout[1, 0]).numpy()).save("b.png")
    call("interpolate", "run", "heldout:0", "b.png", "--out", "line.png")
    line = json.loads(call("interpolate", "run", "heldout:0", "b.png", "--json")[0])
    torch.testing.assert_close(torch.tensor(line), run.interpolate(*run.data.heldout[:2].unsqueeze(1)))
    call("traverse", "run", "--of", "b.png", "--out", "t.png")
    call("encode", "run", "--out", "codes.npy")
    call("decode", "run", "codes.npy", "--out", "d.png")
    for name in ("run/samples.png", "line.png", "t.png", "d.png"):
        with Image.open(name) as picture:
            assert picture.width > 100, name


def test_vectors_are_lines_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(120, 5)
    vectors = Arrays("digits", x[12:], x[:12], digest(x), levels=None)
    monkeypatch.setitem(datasets.DATASETS, "digits", lambda config, say: vectors)
    run = trained("digits")
    rows = [[float(cell) for cell in row] for row in csv.reader(call("sample", "run")[0].splitlines())]
    torch.testing.assert_close(torch.tensor(rows), run.sample(20))
    call("traverse", "run", "--out", "t.png")
    call("interpolate", "run", "heldout:0", "heldout:1", "--out", "line.png")
    assert "takes held-out examples here" in call("interpolate", "run", "a", "b", status=1)[1]


def test_the_newest_run_is_the_default() -> None:
    assert "no run below runs/ in this folder" in call("sample", status=1)[1]
    trained("docstrings", folder="runs/old")
    run = trained("docstrings", folder="runs/new")
    os.utime("runs/old/checkpoint.pt", ns=(1, 1))
    lines, said = call("sample", "-n", "2")
    assert lines.splitlines() == run.sample(2) and "the newest run: runs/new" in said
    assert "the newest run: runs/new" in call("diagnose", "-n", "50", "-k", "3", "--no-train")[1]
    assert Path("runs/new/report.json").is_file()


def test_runs_are_compared_from_their_reports() -> None:
    trained("docstrings", folder="a")
    trained("docstrings", "objective.free_bits=0.5", folder="b")
    told, said = call("compare", "a", "b", "--out", "both.html")
    assert "a has no report of step 42: diagnosing" in said
    for part in ("rate (KL, unclamped)", "less a's", "distinct samples", "greedy decoding", "- b: "):
        assert part in told
    page = Path("both.html").read_text()
    assert '<a href="b/report.html">b</a>' in page and "Rate and distortion" in page
    again, said = call("compare", "a", "b", "--json")
    assert "diagnosing" not in said
    first, second = json.loads(again)["runs"]
    reports = [vk.collapse.Report.load(name) for name in "ab"]
    gap = reports[1].iwae_difference(reports[0])
    assert second["iwae_nll_less_first"] == [gap.value, gap.low, gap.high]
    assert first["verdict"] == reports[0].verdict and first["less_first"] is None
    assert second["less_first"]["iwae_nll"] == second["iwae_nll_less_first"]
    assert set(second["less_first"]) == set(reports[1].difference(reports[0]))
    told, _ = call("diagnose", "b", "-n", "50", "-k", "3", "--no-train", "--against", "a")
    assert "likelihood (IWAE)" in told and "difference [95%, paired]" in told
    Path("a/report.json").write_text("{}")
    assert "`vaekernels diagnose a` makes it anew" in call("compare", "a", "b", status=1)[1]


def test_reports_on_other_examples_are_shown_side_by_side_but_not_subtracted() -> None:
    trained("docstrings", folder="a")
    trained("digits", folder="b")
    assert "not comparable" in call("compare", "a", "b")[0]
    told = call("diagnose", "a", "-n", "50", "-k", "3", "--no-train", "--against", "b", status=1)[1]
    assert "a and b cannot be compared: the reports differ in data_sha256" in told
    told = json.loads(call("compare", "a", "b", "--json")[0])["runs"][1]
    assert told["iwae_nll_less_first"] is None and "differ in data_sha256" in told["not_comparable"]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("docstrings", ""),
        ("docstrings", "model.kind=lstm"),
        ("digits", ""),
        ("digits", "model.kind=conv model.latent_channels=2"),
        ("digits", "model.kind=ladder"),
        ("digits", "model.kind=row-gru"),
    ],
)
def test_an_exported_model_is_the_runs_in_a_fresh_process_without_this_package(name: str, given: str) -> None:
    run = trained(name, given)
    assert call("export", "run", "--out", "m.pt2")[0] == "m-encoder.pt2\nm-decoder.pt2\n"
    x = run.data.heldout
    codes = run.encode(x)
    torch.save(x, "x.pt")
    script = (
        "import sys, json, torch\n"
        "about = {'vaekernels.json': ''}\n"
        "encode = torch.export.load('m-encoder.pt2', extra_files=about).module()\n"
        "decode = torch.export.load('m-decoder.pt2').module()\n"
        "x = torch.load('x.pt')\n"
        "mu, logvar = encode(x)\n"
        "one = encode(x[:2])[0]\n"
        "assert 'vaekernels' not in sys.modules and json.loads(about['vaekernels.json'])['kind']\n"
        "torch.save([mu, logvar, decode(mu), one], 'out.pt')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, env=environment)
    mu, logvar, decoded, one = torch.load("out.pt")
    torch.testing.assert_close(mu, codes.mu, atol=1e-5, rtol=0)
    torch.testing.assert_close(one, codes.mu[:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(logvar, codes.logvar, atol=1e-5, rtol=0)
    expected = run.decode(codes)
    if isinstance(expected, list):
        assert [run.data.sentence(row) for row in decoded] == expected  # type: ignore[attr-defined]
    else:
        torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=0)


def test_settings_lists_every_setting() -> None:
    told = call("settings")[0]
    for table in dataclasses.fields(Config):
        for each in dataclasses.fields(
            table.type
            if isinstance(table.type, type)
            else type(getattr(Config(data=settings("digits").data), table.name))
        ):
            assert f"  {table.name}.{each.name} " in told
    assert "objective.anneal " in told and "none | linear" in told and "at least 0" in told
    assert "free_bits: nats per group" in told
    few = call("settings", "anneal")[0]
    assert " None " not in few and few.rstrip().endswith("none         a number, above 0, or none")
    assert "anneal: how it gets there" in few and "free_bits: nats per group" not in few
    assert "objective.anneal_epochs" in few and "optim" not in few.replace("optimizer", "")
    assert "no setting has 'nothing'" in call("settings", "nothing", status=2)[1]
    assert json.loads(call("settings", "beta", "--json")[0])["objective"]["settings"]["beta"][0] == "1.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nowhere"], "error: no run in nowhere"),
        (["sample", "run", "-n", "0"], "error: n must be an integer of at least 1, got 0"),
        (["sample", "run", "--out", "x.doc"], "error: --out must end in .npy, .csv, .json or"),
        (["sample", "run", "--out", "no/x.npy"], "error: cannot write no/x.npy: No such file"),
        (["decode", "run", "no.npy"], "error: cannot read no.npy: No such file"),
        (["decode", "run", "bad.npy"], "error: bad.npy: no .npy, .npz or .csv file"),
        (["decode", "run", "wide.csv"], "error: z must be [N, 3] or [3], got [1, 2]"),
        (
            ["interpolate", "run", "heldout:99", "heldout:0"],
            "error: 'heldout:99': takes heldout:0 to",
        ),
        (["interpolate", "run", "no.png", "heldout:0"], "error: no.png: damaged or no image"),
        (["interpolate", "run", "big.png", "heldout:0"], "error: big.png is 9x5, the run takes 4x4"),
        (["traverse", "run", "--dim", "3"], "error: dim must be one of 0 to 2, got 3"),
        (["compare", "run"], "error: compare takes two runs or more, got 1"),
        (["compare", "run", "run", "--out", "x.png"], "error: --out must end in .html, got x.png"),
        (["export", "run", "--out", "x.onnx"], "error: --out must end in .pt2, got x.onnx"),
        (["encode", "run", "--out", "x.txt"], "error: --out must end in .npy or .csv, got x.txt"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], message: str) -> None:
    trained("digits")
    Path("bad.npy").write_bytes(b"\x93NUMPYbad")
    Path("wide.csv").write_text("1,2\n")
    Image.new("L", (9, 5)).save("big.png")
    told, said = call(*arguments, status=1)
    assert told == "" and said.startswith(message) and len(said.splitlines()) == 1
