"""Images: handwritten digits, folders of image files, and grey images as zeros and ones."""

from __future__ import annotations

import math
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vaekernels.training.config import DataConfig
from vaekernels.training.data.arrays import as_arrays
from vaekernels.training.data.base import Arrays, Data, Factors, Most, digest, split
from vaekernels.training.errors import DataError
from vaekernels.training.waiting import tracked

__all__ = ["SUFFIXES", "binarized", "image_paths", "load_digits", "load_images", "read_image"]


def load_digits(config: DataConfig, say: Callable[[str], None]) -> Data:
    """The data set ``digits``: the 1797 handwritten 8x8 digits bundled with scikit-learn, pixels 0..16."""
    try:
        from sklearn import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(
            "digits come with scikit-learn, which is missing; pip install 'vaekernels[train]'"
        ) from error
    bunch = datasets.load_digits()
    x = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    train, heldout = split(x)
    factors = Factors(("digit",), *split(torch.from_numpy(bunch.target).float().unsqueeze(1)))
    return Arrays("digits", train, heldout, digest(x), levels=17, factors=factors)


# --- folders of image files

# By suffix; Pillow tries these formats and no other. Left to itself it goes by the content, and starts
# Ghostscript for PostScript.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_GREY = ("1", "L", "LA")
_COLOUR = ("RGB", "P", "RGBA", "CMYK", "YCbCr", "PA")  # become RGB
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # grey of 16 bits, which Pillow may widen
_ALPHA = ("RGBA", "LA", "PA")
_WHITE = (255, 255, 255, 255)
_NAMED = 5  # files, in a message


def load_images(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``images:PATH``: the images in a folder and the folders below it, in the order of their paths.

    They are turned as their EXIF orientation says; all are of one size, or, with ``config.size``, resized and
    cropped to it. Grey if all are, else RGB; transparent ones lie on white, 16-bit grey becomes 8-bit, which
    ``say`` is told. Hidden files are left out and counted; with ``config.corrupt`` "skip", so are those that
    cannot be read."""
    root = Path(config.name.partition(":")[2])
    paths = image_paths(root, say)
    say(f"reading {len(paths)} images under {root} ...")
    most = Most(config)
    read: list[tuple[Path, np.ndarray]] = []
    bad: list[tuple[Path, DataError]] = []
    notes: Counter[str] = Counter()
    colour = False
    for path in tracked(paths, "reading images"):
        try:
            image, noted = _read(path, config.size)
        except DataError as error:
            if config.corrupt == "abort":
                raise DataError(f"{error}; --set data.corrupt=skip leaves such files out") from error
            bad.append((path, error))
            continue
        notes.update(noted)
        if read and image.shape[:2] != read[0][1].shape[:2]:
            raise DataError(
                f"images of different size: {read[0][0]} is {_size(read[0][1])}, {path} is {_size(image)}; "
                f"--set data.size=64 resizes all of them and crops them to squares"
            )
        colour |= image.ndim == 3
        most.check(
            f"{root}: {len(paths)} images", len(paths) * math.prod(image.shape[:2]) * (3 if colour else 1)
        )
        read.append((path, image))
    if bad:
        named = ", ".join(str(path) for path, _ in bad[:_NAMED])
        more = f" and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
        say(f"left out {len(bad):,} of {len(paths):,} files: {named}{more}. {bad[0][1]}")
    for note, count in sorted(notes.items()):
        say(f"{count:,} of {len(read):,} images {note}")
    if not read:
        raise DataError(f"{root}: none of {len(paths)} files is an image that can be read")
    images = [image for _, image in read]
    if colour:
        images = [image if image.ndim == 3 else np.stack([image] * 3, axis=2) for image in images]
    return as_arrays(config, torch.from_numpy(np.stack(images)), str(root), say)


def image_paths(root: Path, say: Callable[[str], None]) -> list[Path]:
    try:
        if not stat.S_ISDIR(os.stat(root).st_mode):
            raise DataError(f"cannot read {root}: not a folder")
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read {root}: {reason}") from error
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    hidden = [path for path in found if _is_hidden(path.relative_to(root))]
    paths = [path for path in found if not _is_hidden(path.relative_to(root))]
    if hidden:
        say(f"left out {len(hidden)} hidden files, the first of them {hidden[0]}")
    if not paths:
        raise DataError(f"no images under {root}; known are {', '.join(SUFFIXES)}")
    return paths


def _is_hidden(path: Path) -> bool:
    """As ``._x.jpg``, where macOS keeps what other file systems cannot, and ``.ipynb_checkpoints/x.jpg``."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def read_image(path: Path, size: int | None = None) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3]; with ``size`` the shorter side is resized to it, and the middle of the
    longer one kept. DataError for what is no image."""
    return _read(path, size)[0]


def _read(path: Path, size: int | None) -> tuple[np.ndarray, list[str]]:
    """The image, and what was changed in it."""
    from PIL import Image, ImageOps

    notes: list[str] = []
    try:
        with Image.open(path, formats=_FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            grey = image.mode in _GREY
            if image.mode in _DEEP:
                deep = np.asarray(image).astype(np.int64)
                if deep.min() >= 0 and deep.max() < 2**16:
                    notes.append("are grey of 16 bits, reduced to 8")
                    image, grey = Image.fromarray((deep / 257).round().astype(np.uint8)), True
            if image.mode in _ALPHA or "transparency" in image.info:
                layer = image.convert("RGBA")
                if np.asarray(layer)[..., 3].min() < 255:
                    notes.append("are transparent in places, where white is put")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, _WHITE), layer)
            if grey or image.mode in _COLOUR:
                image = image.convert("L" if grey else "RGB")
                if size is not None:
                    image = ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)
                pixels = np.asarray(image)
                if opened.mode in ("P", "PA") and bool((pixels == pixels[..., :1]).all()):
                    pixels = pixels[..., 0]  # a palette of greys
                return pixels, notes
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises a dozen types for damaged files, and one for too many pixels
        raise DataError(f"{path}: damaged or no image ({error})") from error
    raise DataError(f"{path}: pixels of mode {image.mode!r}; takes grey of 8 or 16 bits and colour of 8")


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


# --- zeros and ones, so that a Bernoulli likelihood is a probability of the data

_BINARIZE_SEED = 0  # of the one draw: the data are the same in every run


def binarized(data: Data, how: Literal["threshold", "sample"]) -> Arrays:
    """``data`` with two levels: at half of the largest level, or drawn once, a grey value being the
    probability of a 1. DataError unless it has levels."""
    if not isinstance(data, Arrays) or data.levels is None:
        raise DataError(f"data.binarize is for images of grey levels, {data.name!r} is {data.described}")
    if data.levels == 2:
        return data
    levels, generator = data.levels, torch.Generator().manual_seed(_BINARIZE_SEED)

    def of(x: Tensor) -> Tensor:
        if how == "threshold":
            return (2 * x.int() >= levels - 1).to(torch.uint8)
        return (torch.rand(x.shape, generator=generator) * (levels - 1) < x).to(torch.uint8)

    train, heldout = of(data.train), of(data.heldout)
    return replace(data, train=train, heldout=heldout, sha256=digest(torch.cat([train, heldout])), levels=2)
