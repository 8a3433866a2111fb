"""Data sets: extraction, cache, hash, split, batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vaekernels.training import data as datasets
from vaekernels.training.config import DataConfig
from vaekernels.training.data import Arrays, Batches, Text
from vaekernels.training.data import text as docstrings
from vaekernels.training.data.base import BOS, EOS, PAD, UNK, Data, digest, encode_sentences, split
from vaekernels.training.data.images import binarized
from vaekernels.training.errors import DataError

SOURCE = '''"""The module says what it is for. And more."""

class Thing:
    """A thing that has
    its first sentence on two lines.

    A second paragraph.
    """

    def method(self):
        if self:
            def inner():
                r"""An inner function isn't overlooked by the reader!"""

    async def other(self):
        "Too short."

def twice():
    """The module says what it is for."""
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library, and a cache of its own."""
    root = tmp_path / "lib"
    (root / "site-packages").mkdir(parents=True)
    (root / "module.py").write_text(SOURCE, encoding="utf-8")
    (root / "site-packages" / "foreign.py").write_text('"""Not a part of the standard library."""\n')
    (root / "broken.py").write_text('"""This file does not parse at all."""\ndef (:\n')
    (root / "many.py").write_text(
        "".join(f'def f{i}():\n    """Return the value number {i} of all."""\n' for i in range(600))
    )
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.platform", "linux")
    return root


def quiet(text: str) -> None:
    pass


def test_first_sentences_are_read(library: Path) -> None:
    (library / "many.py").unlink()
    assert docstrings.read_sentences(library) == [
        "the module says what it is for .",
        "a thing that has its first sentence on two lines .",
        "an inner function isn't overlooked by the reader !",
    ]


def test_tokens() -> None:
    assert docstrings.tokenize("Don't call f(x2) -- ever.") == [
        "don't", "call", "f", "(", "x", "2", ")", "-", "-", "ever", "."
    ]  # fmt: skip
    assert docstrings.first_sentence("Use e.g.\n this. Then\n\nthat.") == "Use e.g."
    assert docstrings.first_sentence("no full stop\n\nnext") == "no full stop"


def test_docstrings_are_cached_and_the_hash_guards_the_cache(library: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = datasets.load(DataConfig("docstrings"), said.append)
    assert len(said) == 1 and "reading the docstrings under" in said[0]
    again = datasets.load(DataConfig("docstrings"), said.append)
    assert len(said) == 1, "the second load must come from the cache"
    assert again.sha256 == first.sha256 and torch.equal(again.train, first.train)

    (cached,) = (tmp_path / "cache" / "vaekernels").iterdir()
    content = json.loads(cached.read_text(encoding="utf-8"))
    content["sentences"][0] = "somebody changed this sentence here ."
    cached.write_text(json.dumps(content), encoding="utf-8")
    fixed = datasets.load(DataConfig("docstrings"), said.append)
    assert len(said) == 2, "a changed cache must be read anew"
    assert fixed.sha256 == first.sha256

    cached.write_text("{", encoding="utf-8")
    assert datasets.load(DataConfig("docstrings"), quiet).sha256 == first.sha256


def test_hash_depends_on_sentences_and_vocabulary(library: Path) -> None:
    first = datasets.load(DataConfig("docstrings"), quiet)
    assert datasets.load(DataConfig("docstrings", vocabulary=50), quiet).sha256 != first.sha256
    assert len(first.sha256) == 64
    assert digest(first.train, ("a", "b")) != digest(first.train, ("b", "a")) != digest(first.train)
    with open(library / "many.py", "a", encoding="utf-8") as file:
        file.write('def g():\n    """One more sentence for the language."""\n')
    for cached in docstrings.cache_dir().iterdir():
        cached.unlink()
    assert datasets.load(DataConfig("docstrings"), quiet).sha256 != first.sha256


def test_a_cache_that_cannot_be_written_is_said_and_harmless(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said: list[str] = []
    data = datasets.load(DataConfig("docstrings"), said.append)
    assert len(data.train) > 500
    assert "cannot keep them in" in said[-1]


def test_without_sources_synthetic_text_stands_in_and_is_announced(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (library / "many.py").unlink()
    monkeypatch.setattr("vaekernels.training.data.synthetic._SENTENCES", 300)
    said: list[str] = []
    data = datasets.load(DataConfig("docstrings"), said.append)
    assert data.name == "synthetic-text"
    assert "using synthetic-text instead" in said[-1]


def test_sentences_are_encoded_with_end_padding_and_unknown() -> None:
    vocabulary = ("<pad>", "<bos>", "<eos>", "<unk>", "a", "b")
    x = encode_sentences([["a", "b", "c"], ["b"]], vocabulary)
    assert x.tolist() == [[4, 5, UNK, EOS], [5, EOS, PAD, PAD]]
    text = Text("t", x, x, "", vocabulary)
    assert text.lengths(x).tolist() == [4, 2]
    assert text.sentence(x[0]) == "a b <unk>"


def test_split_is_fixed_and_disjoint() -> None:
    x = torch.arange(1005)
    train, heldout = split(x)
    assert len(heldout) == 100
    assert sorted([*train.tolist(), *heldout.tolist()]) == x.tolist()
    torch.manual_seed(123)
    assert torch.equal(split(x)[1], heldout)
    assert heldout.tolist() != list(range(100))


def test_digits_are_whole() -> None:
    pytest.importorskip("sklearn", reason="digits need vaekernels[train]")
    data = datasets.load(DataConfig("digits"), quiet)
    assert isinstance(data, Arrays) and data.levels == 17
    assert len(data.train) == 1618 and len(data.heldout) == 179
    assert data.shape == (1, 8, 8) and data.dims == 64
    assert data.train.dtype == torch.uint8 and data.train.max() == 16
    assert data.described == "8x8 images, 1 channel, 17 levels"
    assert data.sha256 == datasets.load(DataConfig("digits"), quiet).sha256


def test_binarized_data_are_the_same_in_every_run_and_keep_the_mean() -> None:
    grey = torch.arange(5, dtype=torch.uint8).repeat_interleave(4000).view(-1, 1)
    data = Arrays("grey", grey, grey[::2], "0" * 64, levels=5)
    sampled, cut = binarized(data, "sample"), binarized(data, "threshold")
    assert sampled.levels == cut.levels == 2 and sampled.described == "vectors of 1 numbers, 2 levels"
    assert cut.train.view(5, -1).float().mean(dim=1).tolist() == [0, 0, 1, 1, 1]
    means = sampled.train.view(5, -1).float().mean(dim=1)
    # 0 and 1 exactly at the ends; 5 standard errors of a share of 4000 between
    torch.testing.assert_close(means, torch.linspace(0, 1, 5), rtol=0, atol=5 * 0.5 / 4000**0.5)
    assert means[0] == 0 and means[4] == 1
    again = binarized(data, "sample")
    assert torch.equal(again.train, sampled.train) and again.sha256 == sampled.sha256
    assert len({data.sha256, sampled.sha256, cut.sha256}) == 3
    assert binarized(cut, "sample") is cut, "zeros and ones stay what they are"
    with pytest.raises(DataError, match=r"data.binarize is for images of grey levels, 'some' is sentences"):
        binarized(some_text(), "threshold")


def test_synthetic_text_is_reproducible_and_depends_on_its_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaekernels.training.data.synthetic._SENTENCES", 400)
    state = torch.get_rng_state()
    data = datasets.load(DataConfig("synthetic-text"), quiet)
    assert torch.equal(torch.get_rng_state(), state), "loading data must not touch the default generator"
    assert data.sha256 == datasets.load(DataConfig("synthetic-text"), quiet).sha256
    assert data.train.shape == (360, 11)
    assert (data.train[:, -1] == EOS).all() and data.train[:, :-1].min() > UNK
    # z shifts the logits by up to 5 * |z|, so few words dominate; without z nearly all 1000 occur
    assert data.train[:, :-1].unique().numel() < 700
    # and the sentence tells z: those that share most words have a z nearby
    assert isinstance(data, Text) and data.factors is not None
    z = torch.cat([data.factors.train, data.factors.heldout])
    assert data.factors.train.shape == (360, 2) and data.factors.heldout.shape == (40, 2)
    assert z.abs().mean().item() == pytest.approx(2.0, abs=0.2), "around (+-2, +-2)"
    words = torch.cat([data.train, data.heldout])[:, :-1]
    shared = (words[:, None] == words[None]).sum(dim=2).triu(diagonal=1)
    pairs = shared.flatten().topk(100).indices
    distance = (z[pairs // len(z)] - z[pairs % len(z)]).norm(dim=1).mean()
    assert distance < 0.5 * torch.pdist(z).mean()


def test_sprites_are_all_combinations_and_all_different() -> None:
    data = datasets.load(DataConfig("sprites"), quiet)
    assert isinstance(data, Arrays) and data.factors is not None and data.levels == 2
    x = torch.cat([data.train, data.heldout])
    factors = torch.cat([data.factors.train, data.factors.heldout])
    assert x.shape == (4608, 1, 32, 32)
    assert len(x.flatten(1).unique(dim=0)) == len(factors.unique(dim=0)) == 4608
    assert factors.max(dim=0).values.tolist() == [2, 2, 7, 7, 7]
    # a shape's centre of mass is where its factors say: x and y steps of 2 pixels from 9
    grid = torch.arange(32) + 0.5
    mass = x[:, 0].double()
    for axis, factor in ((2, 3), (1, 4)):
        centre = (mass.sum(dim=3 - axis) * grid).sum(dim=1) / mass.sum(dim=(1, 2))
        torch.testing.assert_close(centre, 9 + 2 * factors[:, factor].double(), rtol=0, atol=0.6)
    areas = [mass[factors[:, 1] == scale].sum(dim=(1, 2)).mean().item() for scale in range(3)]
    assert areas[1] / areas[0] == pytest.approx((1.0 / 0.7) ** 2, rel=0.05)
    assert areas[2] / areas[1] == pytest.approx(1.3**2, rel=0.05)


def test_batches_hold_every_example_once_and_are_of_equal_size() -> None:
    data = some_text()
    batches = Batches(data, batch_size=8, seed=3)
    order = batches.order(0)
    assert len(order) == len(batches) == 13
    assert {len(batch) for batch in order} == {7, 8}
    assert sorted(torch.cat(order).tolist()) == list(range(len(data.train)))
    mixed = 0
    for batch in order:
        x = batches.take(batch)
        assert BOS not in x and (x[:, -1] == EOS).any(), "a batch is cut to the longest of its sentences"
        mixed += len(data.lengths(x).unique()) > 1
    assert mixed <= 4, "five lengths: at most four batches hold two of them"


def test_batches_of_images_are_whole() -> None:
    x = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
    batches = Batches(Arrays("a", x, x, "", levels=256), batch_size=20, seed=0)
    assert [len(batch) for batch in batches.order(0)] in ([17, 17, 16], [17, 16, 17], [16, 17, 17])
    batch = batches.order(0)[0]
    assert torch.equal(batches.take(batch), x[batch])


def test_the_extra_stream_is_endless_and_not_that_of_the_epochs() -> None:
    data = some_text()
    batches = Batches(data, batch_size=8, seed=3)
    first = [batches.extra(i).tolist() for i in range(2 * len(batches))]
    assert sorted(row for batch in first[: len(batches)] for row in batch) == list(range(100))
    assert first[: len(batches)] != [batch.tolist() for batch in batches.order(0)]
    assert first[: len(batches)] != first[len(batches) :]
    again = Batches(data, batch_size=8, seed=3)
    assert again.extra(20).tolist() == first[20]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    data = some_text()

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in Batches(data, batch_size=8, seed=seed).order(epoch)]

    assert order(3, 2) == order(3, 2)
    assert order(3, 2) != order(3, 1)
    assert order(3, 2) != order(4, 2)
    assert order(3, 1) != order(4, 0)


def test_unknown_data_set_lists_the_known() -> None:
    with pytest.raises(DataError) as raised:
        datasets.load(DataConfig("mnist"), quiet)
    assert str(raised.value) == (
        "unknown data set 'mnist'; known: docstrings, synthetic-text, digits, sprites, idx:PATH, text:PATH, "
        "images:PATH, npz:PATH, npy:PATH, csv:PATH"
    )


def some_text() -> Data:
    words = ("<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh")
    sentences = [list("abcdefgh"[: 1 + i % 5]) for i in range(100)]
    x = encode_sentences(sentences, words)
    return Text("some", x, x[:10], "0" * 64, words)
