"""Any data set into a folder of `.npy` files, whole or not at all; `encdiff.data.shards` reads it."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from encdiff.data.dataset import Dataset, Progress
from encdiff.data.readahead import ReadAhead
from encdiff.data.shards import FACTORS, FORMAT, INDEX, INTEGERS, MOST, VERSION, is_sharded, shard_name
from encdiff.errors import InputError
from encdiff.files.temporaries import atomic_path

HEADER = 128  # bytes before the images of a file
BATCH = 2**22  # bytes read and written at once, more where a chunk has more
UNITS = {"B": 1}
UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}


def write_shards(
    path: str | os.PathLike,
    dataset: Dataset,
    shard_bytes: int,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a data set of any kind as the folder `path`, which `open_dataset` opens, in files of `shard_bytes` at most.

    The folder appears, or with `overwrite` replaces an older one of this format, only when complete; an error or Ctrl-C
    leaves nothing behind. `progress(done, total)` is called after each batch. InputError for files too small for one
    image, an empty data set, a missing parent folder, and a `path` that is there but is of another format.
    """
    path, per_image = Path(path), 3 * dataset.image_size**2
    length = (shard_bytes - HEADER) // per_image
    if length < 1:
        raise InputError(f"{path}: files of {shard_bytes} bytes; must be at least {per_image + HEADER}, for one image")
    if not len(dataset):
        raise InputError(f"{dataset.name}: holds no images")
    check_place(path, overwrite)
    with atomic_path(path) as partial:
        partial.mkdir()
        _write_images(partial, dataset, length, progress)
        _write_index(partial, dataset, length)
        if path.exists():  # no call exchanges two folders: the old one waits in the temporary folder for its end
            os.rename(path, partial.with_name(f"{path.name}.old"))


def check_place(path: Path, overwrite: bool) -> None:
    """InputError unless a folder of this format may be written as `path`."""
    if not path.name or not path.absolute().parent.is_dir():
        raise InputError(f"{path}: must be a name in an existing folder")
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not (is_sharded(path) or (path.is_dir() and not any(path.iterdir()))):
        raise InputError(f"{path}: is there, and no folder of shards; move it, or write elsewhere")
    if not overwrite:
        raise InputError(f"{path}: exists already; use --overwrite to replace it")


def parse_bytes(text: str, option: str = "--shards") -> int:
    """The bytes of 1GB, 500 MB, 64MiB, 1.5TB or 4096B; InputError, naming the option, for any other text."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?I?B)\s*", text.upper(), re.ASCII)
    size = float(found[1]) * UNITS.get(found[2], 0) if found else 0
    if not 1 <= size <= MOST:
        raise InputError(f"{option} {text!r} must be a size of files such as 1GB, 500MB or 64MiB")
    return int(size)


def _lengths(total: int, length: int) -> list[int]:
    return [min(length, total - start) for start in range(0, total, length)]


def _write_images(folder: Path, dataset: Dataset, length: int, progress: Progress | None) -> None:
    """Batch by batch, none of which is of two files, read ahead by threads."""
    total, shape, ahead = len(dataset), dataset.sample_shape, ReadAhead(dataset)
    batch = min(length, max(1, BATCH // math.prod(shape), dataset.images_per_chunk))
    per_file = math.ceil(length / batch)

    def indices(step: int) -> np.ndarray:
        shard, number = divmod(step, per_file)
        start = shard * length + number * batch
        return np.arange(min(start, total), min(start + batch, (shard + 1) * length, total))

    for shard, count in enumerate(_lengths(total, length)):
        with open(folder / shard_name(shard), "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for step in range(shard * per_file, shard * per_file + math.ceil(count / batch)):
                images, written = ahead.read(step, indices)
                file.write(np.ascontiguousarray(images.numpy()).data)
                if progress:
                    progress(int(written[-1]) + 1, total)


def _write_index(folder: Path, dataset: Dataset, length: int) -> None:
    """Last, and its beginning first: by it the folder is known."""
    index: dict[str, Any] = {"format": FORMAT, "version": VERSION, "image_size": int(dataset.image_size)}
    index |= {"lengths": _lengths(len(dataset), length), "factors": None}
    if dataset.factor_sizes:
        index["factors"] = {
            "names": list(dataset.factor_names), "sizes": [int(size) for size in dataset.factor_sizes],
            "labels": [np.asarray(values, np.float64).tolist() for values in dataset.label_values],
            "cyclic": list(dataset.cyclic), "categories": list(dataset.categories),
            "grid": bool(dataset.is_grid), "instances": int(dataset.instances),
        }  # fmt: skip
        if not dataset.is_grid:
            kind = next(k for k in INTEGERS if max(dataset.factor_sizes) - 1 <= np.iinfo(k).max)
            np.save(folder / FACTORS, dataset.factors(np.arange(len(dataset))).astype(kind))
    (folder / INDEX).write_text(json.dumps(index) + "\n", "utf-8")
