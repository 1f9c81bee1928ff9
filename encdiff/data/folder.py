"""A folder of images without labels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from encdiff.data.dataset import Dataset, Indices
from encdiff.errors import InputError
from encdiff.files.reading import refuse_special

FORMATS = ("PNG", "JPEG", "WEBP")  # whatever a file's name says: Pillow would run Ghostscript on others
PICTURES = 8  # of which decoding takes far longer than handing it to a thread
SLIMMEST = 1000  # sides at most so many times as long as each other
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class ImageFolder(Dataset):
    """Every png, jpg, jpeg and webp file under a folder, at any depth, in natural order (2 before 10), without labels.

    Each is turned upright by its EXIF tag, made RGB (transparency is dropped), resized so that its shorter side is
    `image_size`, and cropped at the centre. Hidden files and folders are left out; linked folders are followed, each
    folder once. InputError for a missing or empty folder, and from `images` for a file that is no readable 8-bit image.
    """

    images_per_thread = PICTURES

    def __init__(self, path: str | os.PathLike, image_size: int | None):
        self.path, self.name = Path(path), Path(path).resolve().name
        if image_size is None or image_size < 1:
            raise InputError(f"image_size: {image_size}; a folder of images needs one, such as 32 (--image-size 32)")
        self.image_size = image_size
        if not self.path.is_dir():
            raise InputError(f"{path}: no such folder")
        self.files = sorted(filter(self._wanted, _files(self.path)), key=self._natural)
        if not self.files:
            raise InputError(f"{path}: no images; must hold {', '.join(sorted(SUFFIXES))} files")

    def __len__(self) -> int:
        return len(self.files)

    def images(self, indices: Indices) -> np.ndarray:
        out = np.empty((len(indices), self.image_size, self.image_size, 3), np.uint8)
        for row, index in enumerate(self.check_indices(indices)):
            out[row] = load_square(self.files[index], self.image_size, self.files[index])
        return out

    def _wanted(self, file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(self.path).parts)
        return file.suffix.lower() in SUFFIXES and not hidden and file.is_file()

    def _natural(self, file: Path) -> tuple:
        parts = file.relative_to(self.path).parts
        return tuple([int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", part)] for part in parts), parts


def _files(root: Path) -> Iterator[Path]:
    """Every file under a folder. Linked folders come after the others and no folder twice: a link may lead back."""
    waiting, seen = [root], set()
    for start in waiting:
        for folder, inside, files in os.walk(start):
            status = os.stat(folder)
            if (place := (status.st_dev, status.st_ino)) in seen:
                inside.clear()
                continue
            seen.add(place)
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            waiting += [link for name in inside if (link := Path(folder, name)).is_symlink()]
            yield from (Path(folder, name) for name in files)


def load_square(source: Path | BinaryIO, size: int, name: str | Path) -> np.ndarray:
    """The centre of one image as uint8 (size, size, 3); InputError with `name` if it cannot be read."""
    return np.asarray(ImageOps.fit(load_rgb(source, name), (size, size), Image.Resampling.BICUBIC))


def load_rgb(source: Path | BinaryIO, name: str | Path) -> Image.Image:
    """One image file, upright and RGB; InputError with `name` if it cannot be read."""
    try:
        if isinstance(source, Path):
            refuse_special(source)
        with Image.open(source, formats=FORMATS) as image:
            if image.mode[0] in "IF":
                raise InputError(f"{name}: pixels of mode {image.mode}; must have 8 bits per channel")
            if max(image.size) > SLIMMEST * min(image.size):
                raise InputError(f"{name}: {image.width}x{image.height} pixels; must not be so narrow")
            return ImageOps.exif_transpose(image).convert("RGB")
    except InputError:
        raise
    except Exception as error:  # Pillow raises many kinds by kind of damage
        if isinstance(error, OSError) and error.errno:
            raise
        reason = str(error) or type(error).__name__
        raise InputError(f"{name}: not a readable image ({reason}); repair or remove it") from error
