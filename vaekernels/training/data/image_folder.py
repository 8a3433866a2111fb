"""Folders of image files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import Data
from vaekernels.training.data.shapes import as_arrays
from vaekernels.training.errors import DataError

__all__ = ["load_images"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_GREY = ("1", "L")
_COLOUR = ("RGB", "P", "RGBA", "CMYK", "YCbCr", "LA", "PA")  # become RGB


def load_images(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``images:DIR``: the images in a folder and the folders below it, in the order of their paths, all of
    one size. Grey if all are, else RGB; transparency is dropped."""
    root = Path(config.name.partition(":")[2])
    paths = _paths(root)
    say(f"reading {len(paths)} images under {root} ...")
    first = _read(paths[0])
    images = [first]
    for path in paths[1:]:
        image = _read(path)
        if image.shape[:2] != first.shape[:2]:
            raise DataError(
                f"images of different size: {paths[0]} is {_size(first)}, {path} is {_size(image)}; resize "
                f"them to one size"
            )
        images.append(image)
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.stack([image] * 3, axis=2) for image in images]
    return as_arrays(config.name, torch.from_numpy(np.stack(images)), str(root))


def _paths(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"cannot read {root}: {'not a folder' if root.exists() else 'No such folder'}")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"no images under {root}; known are {', '.join(_SUFFIXES)}")
    return paths


def _read(path: Path) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3]."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.mode in _GREY:
                return np.asarray(image.convert("L"))
            if image.mode in _COLOUR:
                return np.asarray(image.convert("RGB"))
            raise DataError(f"{path}: pixels of mode {image.mode!r}; takes 8-bit grey or colour images")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: damaged or no image ({error})") from error


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
