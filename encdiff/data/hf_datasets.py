"""Images of Hugging Face Datasets: what `save_to_disk` wrote, Parquet files, and data sets of the Hub by name."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from encdiff.data.dataset import Dataset, Indices
from encdiff.data.folder import PICTURES, SUFFIXES, load_square
from encdiff.errors import InputError

PREFIX = "hf:"
OPTIONS = ("split", "image", "config", "revision")
GRAMMAR = "hf:PATH or hf:OWNER/NAME, then perhaps :split=train,image=photo (also config, revision)"
MARKS = ({"dataset_dict.json"}, {"state.json", "dataset_info.json"})  # of save_to_disk: several splits, or one
PARQUET = b"PAR1"  # how such a file begins


class HubImages(Dataset):
    """The images of one column, in the order of the rows, without labels, treated as `ImageFolder` treats files.

    `where` is a folder of `save_to_disk`, a Parquet file or a folder of them, or the Hub's OWNER/NAME. Options: `split`
    (needed where there are several), `image`, the column (needed unless one alone is of images), and of the Hub
    `config` and `revision`. Rows are mapped, not read; Parquet is first converted into the library's cache. Nothing is
    run: no loading script, no unpickling; images must be bytes in the rows, paths to other files are refused.
    Needs the package `datasets`. InputError for all that cannot be opened, and from `images` for an unreadable one.
    """

    images_per_thread = PICTURES

    def __init__(self, where: Path | str, image_size: int | None, options: Mapping[str, str] | None = None):
        self.name = where.resolve().name if isinstance(where, Path) else where
        if image_size is None or image_size < 1:
            raise InputError(f"image_size: {image_size}; {self.name} needs one, such as 32 (--image-size 32)")
        self.image_size, options = image_size, dict(options or {})
        rows = _one_split(self.name, _load(where, options), options.get("split"))
        self.column = _image_column(self.name, rows.features, options.get("image"))
        datasets = _library(self.name)
        with _errors(self.name):
            rows = rows.select_columns([self.column]).with_format(None)
            rows.data.validate(full=True)  # offsets of a damaged file would be followed anywhere
            self._rows = rows.cast_column(self.column, datasets.Image(decode=False))
        if not len(self):
            raise InputError(f"{self.name}: holds no images")

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, indices: Indices) -> np.ndarray:
        wanted = self.check_indices(indices)
        out = np.empty((len(wanted), self.image_size, self.image_size, 3), np.uint8)
        with _errors(self.name):
            found = self._rows[wanted.tolist()][self.column] if len(wanted) else []
        for row, (index, value) in enumerate(zip(wanted.tolist(), found, strict=True)):
            said = f"{self.name}: row {index} of {self.column}"
            content = value and value.get("bytes")
            if not content:
                raise InputError(
                    f"{said}: holds no bytes of an image; write it anew by save_to_disk, which embeds them"
                )
            out[row] = load_square(io.BytesIO(content), self.image_size, said)
        return out


def is_hf(path: Path) -> bool:
    """Whether a folder is one of `save_to_disk`, or holds Parquet files and no pictures, or a file is Parquet."""
    if not path.is_dir():
        with open(path, "rb") as file:
            return file.read(len(PARQUET)) == PARQUET
    pictures = any(file.suffix.lower() in SUFFIXES for file in path.iterdir())
    return _saved(path) or (bool(_parquet_files(path)) and not pictures)


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """What `hf:NAME[:KEY=VALUE,...]` names, and its options; InputError for an unknown one, or one given twice."""
    found = re.fullmatch(r"hf:(?P<name>.+?)(?::(?P<options>[a-z]+=.*))?", spec, re.S)
    if not found:
        raise InputError(f"data {spec!r}: names nothing; must be {GRAMMAR}")
    options: dict[str, str] = {}
    for pair in (found["options"] or "").split(",") if found["options"] else []:
        key, _, value = pair.partition("=")
        if key not in OPTIONS or key in options or not value:
            raise InputError(f"data {spec!r}: {pair!r}; options are {', '.join(OPTIONS)}, each once, as in {GRAMMAR}")
        options[key] = value
    return found["name"], options


def is_hub_name(name: str) -> bool:
    """Whether it could be OWNER/NAME of the Hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def _load(where: Path | str, options: dict[str, str]) -> Any:
    """The library's Dataset, or one for each split."""
    datasets = _library(str(where))
    if isinstance(where, Path):
        if alien := sorted({"config", "revision"} & set(options)):
            raise InputError(f"{where}: {alien[0]} is of the Hub's data sets; of files split and image can be given")
        with _errors(str(where)):
            if where.is_dir() and _saved(where):
                return datasets.load_from_disk(str(where.resolve()))
            files = _by_split(_parquet_files(where) if where.is_dir() else [where])
            return datasets.load_dataset("parquet", data_files=files, split=options.get("split"))
    with _errors(where):  # names of the Hub alone: the library would take a folder, too
        return datasets.load_dataset(
            where, options.get("config"), split=options.get("split"), revision=options.get("revision")
        )


def _one_split(name: str, loaded: Any, split: str | None) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        given = "has several splits" if split is None else f"has no split {split!r}"
        raise InputError(f"{name}: {given}; must name one of {', '.join(map(str, loaded))}, as in {GRAMMAR}")
    return loaded[split]


def _image_column(name: str, features: Mapping[str, Any], column: str | None) -> str:
    """The one that was asked for, or else the only one of images."""
    kinds = {key: type(feature).__name__ for key, feature in features.items()}
    if column is not None:
        if column not in kinds:
            raise InputError(f"{name}: has no column {column!r}; has {', '.join(kinds) or 'none'}")
        if kinds[column] != "Image" and not _is_bytes(features[column]):
            raise InputError(f"{name}: column {column!r} is {features[column]}; must be of images, or of their bytes")
        return column
    images = [key for key, kind in kinds.items() if kind == "Image"]
    if len(images) != 1:
        has = f"columns of images {', '.join(images)}" if images else f"no column of images, but {', '.join(kinds)}"
        raise InputError(f"{name}: has {has}; must name the column, as in {GRAMMAR}")
    return images[0]


def _is_bytes(feature: Any) -> bool:
    """Encoded images of files without the library's own types: bytes, or a struct of bytes and path."""
    inner = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(inner, "dtype", None) in ("binary", "large_binary")


def _saved(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in mark) for mark in MARKS)


def _parquet_files(folder: Path) -> list[Path]:
    """Directly in a folder or in its `data`, where the Hub's have them, in the order of their names."""
    found = [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]
    return sorted(file for file in found if file.name != "metadata.parquet")  # which lies beside images


def _by_split(files: list[Path]) -> dict[str, list[str]]:
    """By what the names begin with: train-00000-of-00002.parquet; any other file belongs to train."""
    splits: dict[str, list[str]] = {}
    for file in files:
        named = re.fullmatch(r"(\w+)-\d+-of-\d+\.parquet", file.name, re.ASCII)
        splits.setdefault(named[1] if named else "train", []).append(str(file.resolve()))
    return splits


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{name}: needs the package datasets: pip install encdiff[datasets]") from None
    return datasets


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Errors of the library, of many kinds by kind of damage or of network, as one line that names the data set."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        causes = [error, *([error.__cause__] if error.__cause__ else [])]
        said = "; ".join(" ".join(f"{type(cause).__name__}: {cause}".split())[:300] for cause in causes)
        raise InputError(f"{name}: cannot be opened or read ({said})") from error
