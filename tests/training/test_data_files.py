"""The user's own files: what is read from them, and what is said of bad ones, with the place."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="image folders need vaekernels[train]")

import torch
from PIL import Image

from vaekernels.training import data as datasets
from vaekernels.training.config import DataConfig
from vaekernels.training.data import Arrays, Data, Text
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
        (idx(GREY.astype(np.int32), 0x0C), "dtype int32; takes uint8, bool or floats"),
        (idx(GREY[:7], 0x08), "7 examples; at least 40 are needed, one in ten is held out"),
        (idx(GREY[:, None, None, :, :], 0x08), "shape [50, 1, 1, 6, 5]; takes [N, D] vectors"),
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
    assert isinstance(data, Text) and not said
    assert (len(data.train), len(data.heldout)) == (54, 6)
    # by frequency, then by the alphabet
    assert data.vocabulary[4:] == (".", "is", "number", "the", "even", "odd", "0", "1")
    assert {data.sentence(row) for row in data.train} | {data.sentence(row) for row in data.heldout} == {
        f"the number {i if i in (0, 1) else '<unk>'} is {'odd' if i % 2 else 'even'} ." for i in range(60)
    }


def test_lines_left_out_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(["a b c"] * 50 + ["w " * 9] * 3))
    data, said = load(f"text:{path}", max_tokens=8)
    assert len(data.train) + len(data.heldout) == 50
    assert said == ["left out 3 of 53 lines, longer than 8 words (--set data.max_tokens)"]


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


def write_deep(folder: Path) -> None:
    Image.fromarray(np.zeros((6, 5), dtype=np.uint16)).save(folder / "z.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write_large, "images of different size: {folder}/0/00.png is 5x6, {folder}/z.png is 7x6; resize"),
        (write_broken, "{folder}/z.png: damaged or no image"),
        (write_deep, "{folder}/z.png: pixels of mode 'I;16'; takes 8-bit grey or colour images"),
    ],
)
def test_bad_images(spoil: Callable[[Path], None], message: str, folder: Path) -> None:
    spoil(folder)
    assert message.format(folder=folder) in refused(f"images:{folder}")


def test_folders_without_images(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images under" in refused(f"images:{tmp_path / 'empty'}")
    assert "not a folder" in refused(f"images:{folder / 'notes.txt'}")
    assert "No such folder" in refused(f"images:{tmp_path / 'nowhere'}")
    for path in sorted((folder / "1").iterdir()) + sorted((folder / "2").iterdir()):
        path.unlink()
    assert "17 examples; at least 40 are needed" in refused(f"images:{folder}")


# --- npz


@pytest.mark.parametrize(
    ("array", "shape", "levels"),
    [
        (GREY, (1, 6, 5), 256),
        (GREY[:, None], (1, 6, 5), 256),
        (GREY[..., None].repeat(3, axis=3), (3, 6, 5), 256),
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
    channels_first = array.transpose(0, 3, 1, 2) if array.shape[-1] == 3 and array.ndim == 4 else array
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
        (GREY.astype(np.int64), "dtype int64; takes uint8, bool or floats"),
        (GREY.astype(str), "takes uint8, bool or floats"),
        (GREY.astype(complex), "dtype complex128; takes uint8"),
        (np.array([object()] * 50), "not an npz file of plain arrays"),
        (GREY[:, 0, 0], "shape [50]; takes [N, D] vectors"),
        (GREY[:, :0], "shape [50, 0, 5]"),
        (np.where(np.arange(50)[:, None] == 31, np.nan, np.zeros((50, 2))), "example 31 holds NaN, inf"),
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
    assert "is a single array; save it with numpy.savez(PATH, x=array)" in refused(
        f"npz:{tmp_path / 'single.npy'}"
    )


# --- all of them


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
