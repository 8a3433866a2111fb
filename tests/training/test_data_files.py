"""The user's own files: what is read from them, and what is said of bad ones, with the place."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="image folders need vaekernels[train]")

import torch
from PIL import EpsImagePlugin, Image, ImageOps

from vaekernels.training import data as datasets
from vaekernels.training.config import DataConfig
from vaekernels.training.data import Arrays, Data, Text
from vaekernels.training.data.base import UNK, split
from vaekernels.training.errors import DataError

DRAW = np.random.default_rng(0)
GREY = DRAW.integers(0, 256, (50, 6, 5), dtype=np.uint8)


def load(name: str, **options: object) -> tuple[Data, list[str]]:
    said: list[str] = []
    return datasets.load(DataConfig(name, **options), said.append), said  # type: ignore[arg-type]


def rows(data: Data) -> set[bytes]:
    """The examples whatever their order."""
    return {row.numpy().tobytes() for row in torch.cat([data.train, data.heldout])}


def refused(name: str, **options: object) -> str:
    with pytest.raises(DataError) as raised:
        load(name, **options)
    return str(raised.value)


# --- idx


def idx(array: np.ndarray, kind: int) -> bytes:
    big = array.astype(array.dtype.newbyteorder(">"))
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + big.tobytes()


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_images(compressed: bool, tmp_path: Path) -> None:
    content = idx(GREY, 0x08)
    path = tmp_path / "images.idx"
    path.write_bytes(gzip.compress(content) if compressed else content)
    data, _ = load(f"idx:{path}")
    assert isinstance(data, Arrays) and data.levels == 256 and data.shape == (1, 6, 5)
    assert (len(data.train), len(data.heldout)) == (45, 5)
    assert rows(data) == {image.tobytes() for image in GREY}
    assert data.name == f"idx:{path}"


@pytest.mark.parametrize(("kind", "dtype"), [(0x0D, np.float32), (0x0E, np.float64)])
def test_idx_of_real_numbers(kind: int, dtype: type, tmp_path: Path) -> None:
    array = DRAW.normal(size=(50, 4)).astype(dtype)
    (tmp_path / "x").write_bytes(idx(array, kind))
    data, _ = load(f"idx:{tmp_path / 'x'}")
    assert isinstance(data, Arrays) and data.levels is None and data.shape == (4,)
    assert rows(data) == {row.astype(np.float32).tobytes() for row in array}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, too short for the 4-byte magic number"),
        (b"\x00\x00\x08", "3 bytes, too short"),
        (b"\x89PNG\r\n\x1a\n", "byte 0: wrong magic number 0x89504e47; an idx file begins with 0x0000"),
        (b"\x00\x00\x08\x00", "byte 0: wrong magic number 0x00000800"),
        (b"\x00\x00\x07\x01abcd", "byte 0: wrong magic number 0x00000701"),
        (b"\x00\x00\x08\x03\x00\x00\x00\x32", "byte 8: ends within the 3 sizes of its dimensions"),
        (
            idx(GREY, 0x08)[:-7],
            "byte 1509: is truncated there; dimensions [50, 6, 5] of uint8 make 1516 bytes",
        ),
        (idx(GREY, 0x08) + b"??", "byte 1516: goes on behind its data"),
        (gzip.compress(idx(GREY, 0x08))[:-20], "damaged gzip file"),
        (idx(GREY[:, 0, 0], 0x08), "holds 50 single numbers (labels?); give the file of the images"),
        (idx(GREY[:7], 0x08), "7 examples; at least 40 are needed, one in ten is held out"),
        (idx(GREY[:, None, None, :, :], 0x08), "byte 3: 5 dimensions; takes 2, [N, D] vectors, 3"),
        (struct.pack(">HBB200I", 0, 8, 200, *[1] * 200) + b"?", "byte 3: 200 dimensions; takes 2"),
        (
            struct.pack(">HBB3I", 0, 8, 3, 0, 5, 5),
            "byte 4: dimensions [0, 5, 5] of uint8 make 16 bytes: there",
        ),
        (
            struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 0),
            "dimensions [4294967295, 4294967295, 0] of uint8 make 16 bytes: there are no numbers in it",
        ),
        (
            struct.pack(">HBB3I", 0, 8, 3, 2**31, 28, 28) + b"?",
            "dimensions [2147483648, 28, 28]: 1,568.0 GiB, more than data.max_gib 4; if that is right",
        ),
    ],
)
def test_bad_idx_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.idx"
    path.write_bytes(content)
    said = refused(f"idx:{path}")
    assert message in said and str(path) in said


# --- text


def test_text(tmp_path: Path) -> None:
    lines = [f"the number {i} is {'odd' if i % 2 else 'even'} ." for i in range(60)]
    path = tmp_path / "corpus.txt"
    path.write_bytes("\ufeff".encode() + "\r\n".join([*lines[:30], "", "  ", *lines[30:]]).encode())
    data, said = load(f"text:{path}", vocabulary=12)
    assert isinstance(data, Text) and data.unit == "word"
    assert said == [
        "16.1 % of the words are unknown to the vocabulary of 12 (--set data.vocabulary), which lowers the "
        "NLL: an unknown one is easily guessed"
    ]
    assert (len(data.train), len(data.heldout)) == (54, 6)
    # by frequency, then by the alphabet
    assert data.vocabulary[4:] == (".", "is", "number", "the", "even", "odd", "0", "1")
    assert {data.sentence(row) for row in data.train} | {data.sentence(row) for row in data.heldout} == {
        f"the number {i if i in (0, 1) else '<unk>'} is {'odd' if i % 2 else 'even'} ." for i in range(60)
    }


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_only_a_newline_ends_a_line(inside: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    for end in ("\n", "\r\n"):
        path.write_bytes("".join(f"cat {i} sat{inside} on it{end}" for i in range(100)).encode())
        data, _ = load(f"text:{path}")
        assert isinstance(data, Text) and len(data.train) + len(data.heldout) == 100
        assert data.lengths(data.train).tolist() == [6] * 90
        assert data.sentence(data.train[0]).split()[2:] == ["sat", "on", "it"]


def test_nothing_splits_text_by_str_splitlines() -> None:
    """Whoever reads a user's lines takes vaekernels._files.lines_of. Output of commands is no user's text."""
    package = Path(datasets.__file__).parents[2]
    commands = {package / "_build.py", package / "bench" / "__init__.py", package / "bench" / "gpu.py"}
    commands.add(package / "bench" / "report.py")  # /proc/cpuinfo
    paths = set(package.rglob("*.py")) - commands
    assert [path for path in paths if ".splitlines(" in path.read_text(encoding="utf-8")] == []


def test_unk_in_a_corpus_is_the_unknown_token(tmp_path: Path) -> None:
    path = tmp_path / "ptb.txt"
    path.write_text("\n".join(f"the <unk> number w{i % 30} sat on <unk>" for i in range(200)))
    data, _ = load(f"text:{path}", vocabulary=10)
    assert isinstance(data, Text)
    assert data.vocabulary == ("<pad>", "<bos>", "<eos>", "<unk>", "number", "on", "sat", "the", "w0", "w1")
    assert (data.train[:, [1, 6]] == UNK).all()


@pytest.mark.parametrize("word", ["<pad>", "<bos>", "<eos>"])
@pytest.mark.parametrize("frequent", [False, True])
def test_special_words_in_a_corpus_are_words(word: str, frequent: bool, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    lines = ["the cat sat on the mat"] * 100 + [f"we {word} here and {word}"] * (100 if frequent else 1)
    path.write_text("\n".join(lines))
    data, _ = load(f"text:{path}", vocabulary=14 if frequent else 9)
    assert isinstance(data, Text)
    both = torch.cat([data.train, data.heldout])
    lengths = sorted(data.lengths(both).tolist())
    assert lengths == sorted(len(line.split()) + 1 for line in lines)
    shown = {data.sentence(row) for row in both}
    expected = f"we {word} here and {word}" if frequent else "<unk> <unk> <unk> <unk> <unk>"
    assert shown == {"the cat sat on the mat", expected}


def test_lines_left_out_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(["a b c"] * 50 + ["w " * 9] * 3))
    data, said = load(f"text:{path}", max_tokens=8)
    assert len(data.train) + len(data.heldout) == 50
    assert said == ["left out 3 of 53 lines, longer than 8 words (--set data.max_tokens)"]


@pytest.mark.parametrize(
    ("line", "unit", "reason"),
    [
        ("未来を創る {} 技術の力", "char", "most of the text is in a script without spaces between words"),
        ("อนาคตเริ่มต้นที่นี่ {}", "char", "most of the text is in a script without spaces between words"),
        ("name{}", "char", "most lines are a single word"),
        ("Donaudampfschifffahrtsgesellschaftskapitän{} und", "char", "words have 23 characters in the mean"),
        ("technology {} for tomorrow", "word", None),
        ("기술이 {} 미래를 만든다", "word", None),
    ],
)
def test_a_token_is_a_word_or_a_character(line: str, unit: str, reason: str | None, tmp_path: Path) -> None:
    lines = [line.format(i % 10) for i in range(60)]
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    data, said = load(f"text:{path}")
    assert isinstance(data, Text) and data.unit == unit
    assert said == (
        [] if reason is None else [f"a token is a character, for {reason} (--set data.tokens=word)"]
    )
    assert {data.sentence(row) for row in data.train} <= set(lines)
    for given in ("word", "char"):
        chosen, said = load(f"text:{path}", tokens=given)
        assert isinstance(chosen, Text) and chosen.unit == given and not said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 of 0 lines hold a sentence of 1 to 100 words; at least 40 are needed"),
        (b"\n \n\n", "0 of 3 lines hold a sentence"),
        (b"one line only", "1 of 1 line hold a sentence"),
        (b"good\nline\n" + b"caf\xe9 au lait\n" + b"more\n" * 50, "line 3, byte 13: 0xe9 is not UTF-8"),
        (b"word " * 101 + b"\n", "0 of 1 line hold a sentence of 1 to 100 words"),
    ],
)
def test_bad_text(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    said = refused(f"text:{path}")
    assert message in said and said.startswith(str(path))


# --- folders of images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, image in enumerate(GREY):
        sub = tmp_path / "photos" / str(number % 3)
        sub.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(sub / f"{number:02}.png")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def test_folder_of_grey_images(folder: Path) -> None:
    data, said = load(f"images:{folder}")
    assert isinstance(data, Arrays) and data.levels == 256 and data.shape == (1, 6, 5)
    assert rows(data) == {image.tobytes() for image in GREY}
    assert said == [f"reading 50 images under {folder} ..."]


def test_one_colour_image_makes_all_of_them_colour(folder: Path) -> None:
    colour = DRAW.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(colour).save(folder / "colour.png")
    data, _ = load(f"images:{folder}")
    assert isinstance(data, Arrays) and data.shape == (3, 6, 5)
    expected = {np.stack([image] * 3).tobytes() for image in GREY} | {colour.transpose(2, 0, 1).tobytes()}
    assert rows(data) == expected


def write_large(folder: Path) -> None:
    Image.fromarray(np.zeros((6, 7), dtype=np.uint8)).save(folder / "z.png")


def write_broken(folder: Path) -> None:
    (folder / "z.png").write_bytes((folder / "0" / "00.png").read_bytes()[:40])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            write_large,
            "images of different size: {folder}/0/00.png is 5x6, {folder}/z.png is 7x6; --set data.size",
        ),
        (write_broken, "{folder}/z.png: damaged or no image"),
    ],
)
def test_bad_images(spoil: Callable[[Path], None], message: str, folder: Path) -> None:
    spoil(folder)
    assert message.format(folder=folder) in refused(f"images:{folder}", corrupt="abort")


def test_folders_without_images(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images under" in refused(f"images:{tmp_path / 'empty'}")
    assert "not a folder" in refused(f"images:{folder / 'notes.txt'}")
    assert "No such file or directory" in refused(f"images:{tmp_path / 'nowhere'}")
    assert "File name too long" in refused(f"images:{'x' * 300}")
    assert "null" in refused("images:x\0y")
    for path in sorted((folder / "1").iterdir()) + sorted((folder / "2").iterdir()):
        path.unlink()
    assert "17 examples; at least 40 are needed" in refused(f"images:{folder}")


def test_hidden_files_are_no_images(folder: Path) -> None:
    (folder / "._00.png").write_bytes(bytes.fromhex("00051607000200004d6163204f532058") + bytes(4000))
    for hidden in (".ipynb_checkpoints/00.png", "__MACOSX/._00.png", "0/.thumbs/x/00.png"):
        (folder / hidden).parent.mkdir(parents=True)
        shutil.copy(folder / "0" / "00.png", folder / hidden)
    data, said = load(f"images:{folder}")
    assert rows(data) == {image.tobytes() for image in GREY} and len(data.train) == 45
    assert said[0] == f"left out 4 hidden files, the first of them {folder}/._00.png"
    hidden_root = folder.rename(folder.parent / ".photos")
    assert len(load(f"images:{hidden_root}")[0].train) == 45


def test_files_that_are_no_images_abort_or_are_counted(folder: Path) -> None:
    (folder / "1" / "a.jpg").write_text("no image")
    (folder / "1" / "b.png").write_bytes((folder / "0" / "00.png").read_bytes()[:60])
    said = refused(f"images:{folder}", corrupt="abort")
    assert said.startswith(f"{folder}/1/a.jpg: damaged or no image (")
    assert said.endswith("; --set data.corrupt=skip leaves such files out")
    data, told = load(f"images:{folder}")
    assert rows(data) == {image.tobytes() for image in GREY} and len(data.train) == 45
    assert told[-1].startswith(
        f"left out 2 of 52 files: {folder}/1/a.jpg, {folder}/1/b.png. {folder}/1/a.jpg: damaged"
    )
    for path in folder.rglob("*.png"):
        path.write_text("no image")
    assert "none of 52 files is an image" in refused(f"images:{folder}", corrupt="skip")


def test_no_other_program_is_started_for_an_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes the format from the content, and has Ghostscript draw PostScript."""
    (folder / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\nshowpage\n")
    started: list[str] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append("gs"))
    assert f"{folder}/a.png: damaged or no image" in refused(f"images:{folder}", corrupt="abort")
    assert started == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    upright = DRAW.integers(0, 256, (50, 6, 5), dtype=np.uint8)
    undone = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    for number, image in enumerate(upright):
        stored, exif = Image.fromarray(image), Image.Exif()
        exif[0x0112] = undone
        stored.info["exif"] = exif.tobytes()
        stored = ImageOps.exif_transpose(stored)
        exif[0x0112] = orientation
        stored.save(tmp_path / f"{number:02}.png", exif=exif)
    data, _ = load(f"images:{tmp_path}")
    assert rows(data) == {image.tobytes() for image in upright}


def one_of(found: Data, shape: tuple[int, ...]) -> torch.Tensor:
    """The image that is all of the examples."""
    x = torch.cat([found.train, found.heldout])
    assert x.shape[1:] == shape and bool((x == x[0]).all())
    return x[0]


def test_transparent_images_lie_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((6, 5, 4), np.uint8)
    pixels[..., 0], pixels[2:, :, 3] = 200, 255
    for number in range(50):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    found, said = load(f"images:{tmp_path}")
    image = one_of(found, (3, 6, 5))
    assert image[:, :2].eq(255).all() and image[:, 2:].flatten(1).float().mean(dim=1).tolist() == [200, 0, 0]
    assert said[1:] == ["50 of 50 images are transparent in places, where white is put"]
    for number in range(50):
        Image.fromarray(pixels[..., [0, 3]], "LA").save(tmp_path / f"{number}.png")
    image = one_of(load(f"images:{tmp_path}")[0], (1, 6, 5))
    assert image[0, :2].eq(255).all() and image[0, 2:].eq(200).all()


def test_grey_of_16_bits_becomes_that_of_8(tmp_path: Path) -> None:
    for number in range(50):
        Image.fromarray(np.full((6, 5), 257 * number + 40, np.uint16)).save(tmp_path / f"{number:02}.png")
    found, said = load(f"images:{tmp_path}")
    assert rows(found) == {bytes([number]) * 30 for number in range(50)}
    assert said[1:] == ["50 of 50 images are grey of 16 bits, reduced to 8"]


def test_palettes_of_greys_are_grey(tmp_path: Path) -> None:
    for number in range(50):
        image = Image.fromarray((GREY[0] > 99).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 255, 255, 255])
        image.save(tmp_path / f"{number}.png")
    found, _ = load(f"images:{tmp_path}")
    assert (
        isinstance(found, Arrays)
        and found.levels == 2
        and one_of(found, (1, 6, 5)).sum() == (GREY[0] > 99).sum()
    )


def test_images_of_any_size_are_resized_and_cropped(tmp_path: Path) -> None:
    for number in range(50):
        shape = (20, 40 + number) if number % 2 else (30 + number, 10)
        pixels = np.zeros((*shape, 3), np.uint8)
        pixels[shape[0] // 2 - 5 : shape[0] // 2 + 5, shape[1] // 2 - 5 : shape[1] // 2 + 5] = 200
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    found, _ = load(f"images:{tmp_path}", size=4)
    assert isinstance(found, Arrays) and found.shape == (3, 4, 4)
    assert bool((torch.cat([found.train, found.heldout])[:, :, 1:3, 1:3] > 150).all())


def test_too_many_pixels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert f"{folder}/0/00.png: damaged or no image (Image size (30 pixels)" in refused(
        f"images:{folder}", corrupt="abort"
    )
    monkeypatch.undo()
    said = refused(f"images:{folder}", max_gib=1000 / 2**30)
    assert said.startswith(f"{folder}: 50 images: 0.0 GiB, more than data.max_gib 9.31323e-07")


# --- npz


@pytest.mark.parametrize(
    ("array", "shape", "levels"),
    [
        (GREY, (1, 6, 5), 256),
        (GREY[:, None], (1, 6, 5), 256),
        (GREY[..., None].repeat(3, axis=3), (3, 6, 5), 256),
        (GREY[..., None].repeat(2, axis=3), (2, 6, 5), 256),
        (GREY[..., None].repeat(4, axis=3), (4, 6, 5), 256),
        (DRAW.integers(0, 256, (50, 8, 4, 4), dtype=np.uint8), (8, 4, 4), 256),
        (GREY > 99, (1, 6, 5), 2),
        (DRAW.normal(size=(50, 9)), (9,), None),
        (DRAW.normal(size=(50, 9)).astype(">f4"), (9,), None),
        (DRAW.normal(size=(50, 3)).astype(np.float16), (3,), None),
        (np.asfortranarray(GREY), (1, 6, 5), 256),
    ],
)
def test_npz(array: np.ndarray, shape: tuple[int, ...], levels: int | None, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=array, other=np.zeros(3))
    data, _ = load(f"npz:{path}")
    assert isinstance(data, Arrays) and data.shape == shape and data.levels == levels
    last = array.ndim == 4 and array.shape[1:3] == (6, 5)
    channels_first = array.transpose(0, 3, 1, 2) if last else array
    flat = channels_first.reshape(50, -1).astype(np.float32 if levels is None else np.uint8)
    assert rows(data) == {np.ascontiguousarray(row).tobytes() for row in flat}


def test_npz_with_an_array_of_another_name(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, faces=GREY)
    message = f"{path} has no array 'x'; it has faces (choose with --set data.array=NAME)"
    assert refused(f"npz:{path}") == message
    data, _ = load(f"npz:{path}", array="faces")
    assert len(data.train) == 45


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (GREY.astype(str), "takes bool, integers or floats"),
        (GREY.astype(complex), "dtype complex128; takes bool, integers or floats"),
        (np.array([object()] * 50), "not an npz file of plain arrays"),
        (GREY[:, 0, 0], "shape [50]; takes [N, D] vectors"),
        (GREY[:, :0], "shape [50, 0, 5]"),
        (np.where(np.arange(50)[:, None] == 31, np.nan, np.zeros((50, 2))), "the first is in example 31"),
        (np.full((50, 2), 1e300), "example 0 holds NaN, inf or a value beyond float32"),
    ],
)
def test_bad_arrays(array: np.ndarray, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, x=array)
    said = refused(f"npz:{path}")
    assert message in said and said.startswith(str(path))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    whole = tmp_path / "whole.npz"
    np.savez(whole, x=GREY)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole.read_bytes()[:500])
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "single.npy", GREY)
    assert "damaged, or not an npz file" in refused(f"npz:{cut}")
    assert "damaged, or not an npz file" in refused(f"npz:{tmp_path / 'text.npz'}")
    assert "is a single array; name it npy:" in refused(f"npz:{tmp_path / 'single.npy'}")


def npz_of(path: Path, member: bytes, name: str = "x.npy") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, member)


def npy(header: str) -> bytes:
    """The head of an array file, of format 1."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


HEADER = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}\n"


@pytest.mark.parametrize(
    ("member", "message"),
    [
        # says more than there is
        (
            npy(HEADER.format("|u1", (10**9, 2))) + bytes(99),
            "its header says uint8 [1000000000, 2], 2000000000",
        ),
        (npy(HEADER.format("|u1", (10**9, 10**4))) + bytes(99), "9,313.2 GiB, more than data.max_gib 4"),
        (npy(HEADER.format("<f8", (10**40, 7))), "GiB, more than data.max_gib 4"),
        (npy(HEADER.format("|u1", (-50, -4))) + bytes(200), "damaged, or not an npz file"),
        # says less
        (npy(HEADER.format("|u1", (50, 2))) + bytes(10**7), "its header says uint8 [50, 2], 100 bytes, the"),
        # no arrays
        (b"hello", "damaged, or not an npz file of plain arrays"),
        (b"", "damaged, or not an npz file of plain arrays"),
        (npy("(" * 5000), "damaged, or not an npz file of plain arrays"),
        (npy("[" * 9999 + "]" * 9999), "damaged, or not an npz file of plain arrays"),
        (npy(HEADER.format("|O", (50,))), "damaged, or not an npz file of plain arrays"),
        (npy(HEADER.format("nothing", (50,))), "damaged, or not an npz file of plain arrays"),
    ],
)
def test_arrays_that_lie(member: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    npz_of(path, member)
    said = refused(f"npz:{path}")
    assert message in said and said.startswith(str(path))


def test_archives_that_lie(tmp_path: Path) -> None:
    """Both sizes of an archive say a hundred bytes, and a thousand times as many come out of it."""
    path = tmp_path / "bad.npz"
    member = npy(HEADER.format("|u1", (50, 2)))
    npz_of(path, member + bytes(10**5))
    content = path.read_bytes()
    true, said = struct.pack("<I", len(member) + 10**5), struct.pack("<I", len(member) + 100)
    assert content.count(true) == 2
    path.write_bytes(content.replace(true, said))
    assert "damaged, or not an npz file of plain arrays (Bad CRC-32" in refused(f"npz:{path}")


def peak_mib(name: str) -> int:
    """Of memory, of a process that is refused the data ``name``."""
    code = f"""
import resource
from vaekernels.training import data
from vaekernels.training.config import DataConfig
from vaekernels.training.errors import DataError
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    data.load(DataConfig({name!r}), print)
except DataError as error:
    print((peak() - before) // 1024)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(found.stdout)


def test_bombs_are_refused_before_they_unpack(tmp_path: Path) -> None:
    """A MB becomes a GB, and the cap of 4 GiB would let it."""
    zeros = gzip.compress(bytes(2**20)) * 1024  # members of a gzip file follow each other
    (tmp_path / "goes-on.idx").write_bytes(gzip.compress(idx(GREY, 0x08)) + zeros)
    assert peak_mib(f"idx:{tmp_path / 'goes-on.idx'}") < 100
    with zipfile.ZipFile(tmp_path / "bad.npz", "w", zipfile.ZIP_DEFLATED) as archive:  # noqa: SIM117
        with archive.open("x.npy", "w") as file:
            file.write(npy(HEADER.format("|u1", (50, 20))))
            for _ in range(1024):
                file.write(bytes(2**20))
    assert peak_mib(f"npz:{tmp_path / 'bad.npz'}") < 100


def test_the_cap_is_a_setting(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=GREY)
    (tmp_path / "x.idx").write_bytes(gzip.compress(idx(GREY, 0x08)))
    (tmp_path / "x.txt").write_text("a b c\n" * 300)
    for kind, name in (("npz", "x.npz"), ("idx", "x.idx"), ("text", "x.txt")):
        said = refused(f"{kind}:{tmp_path / name}", max_gib=1400 / 2**30)
        assert "more than data.max_gib" in said and "--set data.max_gib=GIB" in said
        load(f"{kind}:{tmp_path / name}", max_gib=1800 / 2**30)


# --- all of them


@pytest.mark.parametrize("kind", ["idx", "text", "npz"])
def test_devices_and_pipes_are_no_files(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        assert refused(f"{kind}:{path}") == f"cannot read {path}: not a regular file"


@pytest.mark.parametrize("kind", ["idx", "text", "npz"])
def test_paths_that_cannot_be(kind: str) -> None:
    assert "File name too long" in refused(f"{kind}:{'x' * 300}")
    assert "null" in refused(f"{kind}:x\0y")


@pytest.mark.parametrize("kind", ["idx", "text", "npz"])
def test_missing_files(kind: str, tmp_path: Path) -> None:
    assert refused(f"{kind}:{tmp_path / 'nowhere'}") == (
        f"cannot read {tmp_path / 'nowhere'}: No such file or directory"
    )
    assert "Is a directory" in refused(f"{kind}:{tmp_path}")
    assert refused(f"{kind}:") == f"'{kind}:' names no file; it takes {kind}:PATH"


def test_the_hash_is_of_the_data_and_not_of_its_place(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=GREY)
    (tmp_path / "b.idx").write_bytes(idx(GREY, 0x08))
    one, _ = load(f"npz:{tmp_path / 'a.npz'}")
    other, _ = load(f"idx:{tmp_path / 'b.idx'}")
    assert one.sha256 == other.sha256
    changed = GREY.copy()
    changed[3, 2, 1] ^= 1
    np.savez(tmp_path / "a.npz", x=changed)
    assert load(f"npz:{tmp_path / 'a.npz'}")[0].sha256 != one.sha256


# --- two values, and whole numbers


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int64", "uint64", "float16", "float32", ">f8", "bool"]
)
def test_zeros_and_ones_of_any_type_are_data_of_two_values(dtype: str, tmp_path: Path) -> None:
    binary = GREY > 127
    np.savez(tmp_path / "x.npz", x=binary.astype(dtype))
    found, said = load(f"npz:{tmp_path / 'x.npz'}")
    assert isinstance(found, Arrays) and found.levels == 2 and found.train.dtype == torch.uint8
    assert rows(found) == {row.tobytes() for row in binary.astype(np.uint8)}
    assert said == ([] if dtype == "bool" else ["all values are 0 or 1: data of two values"])
    for how in ("threshold", "sample"):
        assert rows(load(f"npz:{tmp_path / 'x.npz'}", binarize=how)[0]) == rows(found)


def test_black_and_white_bytes_are_data_of_two_values(tmp_path: Path) -> None:
    binary = (GREY > 127).astype(np.uint8)
    (tmp_path / "x.idx").write_bytes(idx(255 * binary, 0x08))
    found, said = load(f"idx:{tmp_path / 'x.idx'}")
    assert (
        isinstance(found, Arrays) and found.levels == 2 and rows(found) == {row.tobytes() for row in binary}
    )
    assert said == ["all values are 0 or 255: data of two values"]


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_whole_numbers(dtype: str, tmp_path: Path) -> None:
    """Images of 0 to 255 are levels; everything else is real numbers."""
    np.savez(
        tmp_path / "x.npz",
        images=GREY.astype(dtype),
        wide=4 * GREY.astype(dtype),
        table=GREY[:, 0].astype(dtype),
    )
    images, wide, table = (
        load(f"npz:{tmp_path / 'x.npz'}", array=each)[0] for each in ("images", "wide", "table")
    )
    assert isinstance(images, Arrays) and images.levels == 256
    assert rows(images) == {row.tobytes() for row in GREY}
    assert isinstance(wide, Arrays) and wide.levels is None and wide.train.max() == 4 * int(GREY.max())
    assert isinstance(table, Arrays) and table.levels is None


def test_one_value_alone_is_not_data_of_two(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((50, 6, 5), np.uint8))
    found, said = load(f"npz:{tmp_path / 'x.npz'}")
    assert isinstance(found, Arrays) and found.levels == 256 and said == []


# --- tables


def table(rows: int = 60) -> np.ndarray:
    draw = np.random.default_rng(1)
    return draw.normal(size=(rows, 3)) * [1e3, 1e-2, 1.0] + [5e4, 0.0, 0.0]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", [True, False])
def test_csv(delimiter: str, header: bool, tmp_path: Path) -> None:
    x = table()
    lines = [delimiter.join(f"{value:.9g}" for value in row) for row in x]
    if delimiter == ";":
        lines = [line.replace(".", ",") for line in lines]
    (tmp_path / "t.csv").write_text(
        "\n".join([*([delimiter.join(["pay", "tax", "a b"])] * header), *lines]) + "\n\n"
    )
    np.save(tmp_path / "t.npy", x)
    found, said = load(f"csv:{tmp_path / 't.csv'}")
    other, _ = load(f"npy:{tmp_path / 't.npy'}")
    assert isinstance(found, Arrays) and found.standardize and not said and found.shape == (3,)
    torch.testing.assert_close(found.train, other.train)
    plain, _ = load(f"csv:{tmp_path / 't.csv'}", standardize="no")
    assert isinstance(plain, Arrays) and not plain.standardize and torch.equal(plain.train, found.train)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n3,x\n", "line 3, column 'b': 'x' is no number; leave the column out"),
        ("1,2\n3\n", "line 2: 1 cells, the first line has 2"),
        ("", "holds no line"),
        (
            "a,b\n" + "1,2\n" * 49 + "3,\n",
            "1 of 100 values are missing (NaN), in column 'b'; the first is in example 49",
        ),
        ("1,2\n" * 49 + "3,NA\n", "in column 1; the first is in example 49. --set data.missing=mean puts"),
        ("a,b\n" + "1,\n" * 50, "50 of 100 values are missing"),
        ("1,2\n" * 49 + "3,inf\n", "example 49 holds NaN, inf"),
    ],
)
def test_bad_csv(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(content)
    said = refused(f"csv:{tmp_path / 't.csv'}")
    assert message in said and said.startswith(str(tmp_path / "t.csv"))


def test_missing_values_become_the_mean_of_the_training_data(tmp_path: Path) -> None:
    x = table()
    x[7, 1] = x[9, 2] = np.nan
    np.save(tmp_path / "t.npy", x)
    found, said = load(f"npy:{tmp_path / 't.npy'}", missing="mean")
    assert said == [
        "2 of 180 values are missing (NaN), in columns 1, 2: the mean of the column is put in their place"
    ]
    train, _ = split(torch.from_numpy(x))
    torch.testing.assert_close(found.train, torch.where(train.isnan(), train.nanmean(dim=0), train).float())
    x[:, 0] = np.nan
    np.save(tmp_path / "t.npy", x)
    assert "all values of the training data are missing in column 0" in refused(
        f"npy:{tmp_path / 't.npy'}", missing="mean"
    )


def test_constant_columns_are_named(tmp_path: Path) -> None:
    x = table()
    x[:, 1] = 0.1
    (tmp_path / "t.csv").write_text("\n".join(["pay,tax,age", *(",".join(map(str, row)) for row in x)]))
    _, said = load(f"csv:{tmp_path / 't.csv'}")
    assert said == ["constant over the training data: column 'tax'"]


def test_only_vectors_of_real_numbers_are_standardized(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", GREY)
    found, _ = load(f"npy:{tmp_path / 't.npy'}")
    assert isinstance(found, Arrays) and not found.standardize
    assert "data.standardize is for vectors of real numbers" in refused(
        f"npy:{tmp_path / 't.npy'}", standardize="yes"
    )
    np.savez(tmp_path / "t.npz", x=GREY)
    assert (
        refused(f"npz:{tmp_path / 't.npy'}")
        == f"{tmp_path}/t.npy is a single array; name it npy:{tmp_path}/t.npy"
    )
    assert "an archive of arrays is npz:" in refused(f"npy:{tmp_path / 't.npz'}")
