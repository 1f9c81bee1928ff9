"""From what a user types to a data set: where the file lies, and what its content shows it to be."""

from __future__ import annotations

import difflib
import os
import zipfile
from pathlib import Path

from encdiff.data.dataset import ACCEPTED, Dataset, Progress
from encdiff.errors import InputError
from encdiff.files.reading import refuse_special

# Each format's module is imported where it is opened: `encdiff.data` alone loads neither h5py nor lmdb.

RENDERED = ("procedural", "sprites")
PUBLISHED_CARS = "published-cars3d"
FILES = {  # what each bare name stands for in the folder ENCDIFF_DATA, the first that exists
    "shapes3d": ("3dshapes.h5", "3dshapes.npz", "shapes3d"),
    "mpi3d_toy": ("mpi3d_toy.npz",),
    "mpi3d_realistic": ("mpi3d_realistic.npz",),
    "mpi3d_real": ("mpi3d_real.npz",),
    "mpi3d_real_complex": ("real3d_complicated_shapes_ordered.npz", "mpi3d_real_complex.npz"),
    "cars3d": ("nips2015-analogy-data.tar.gz", "data/cars", "cars", "cars3d"),
    "dsprites": ("dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", "dsprites.npz"),
    "smallnorb": ("smallnorb", *(f"smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat{end}" for end in (".gz", ""))),
    "celeba": ("celeba", "CelebA", "list_attr_celeba.txt"),
}


def open_dataset(spec: str | os.PathLike, image_size: int | None = None, progress: Progress | None = None) -> Dataset:
    """The data set that `spec` names, told by content, not by file name; `docs/data.md` lists the formats.

    `procedural` (a room) and `sprites` are rendered, 64x64 unless `image_size` says otherwise. Anything else is the
    path of a file or folder, or, in the folder that the environment's ENCDIFF_DATA names, a relative path or one of
    the names shapes3d, mpi3d_toy, mpi3d_realistic, mpi3d_real, mpi3d_real_complex, cars3d, dsprites, smallnorb and
    celeba. A part is selected after a colon: values per factor of a grid (`procedural:5,5,5,4,4,5`), or the train,
    valid or test images of CelebA. `published-cars3d[:PATH]` is Cars3D as the published evaluation misreads it.
    `hf:PATH` and `hf:OWNER/NAME`, then perhaps `:split=train,image=photo`, are Hugging Face Datasets.
    Images are reduced to `image_size` if it is given; a folder of images needs it. `progress(done, total)` is called
    where a file must be unpacked or read whole first. InputError for anything else.
    """
    spec = os.fspath(spec)
    kind, colon, selection = spec.partition(":")
    if kind in RENDERED:
        dataset = _render(kind, 64 if image_size is None else image_size, selection if colon else None)
        dataset.spec = spec
        return dataset
    if kind == "hf":
        return _open_hf(spec, image_size)
    published = kind == PUBLISHED_CARS
    path, selection = _find((selection if colon else "cars3d") if published else spec)
    dataset = _open_cars(path, image_size, progress, True) if published else open_path(path, image_size, progress)
    if selection is not None:
        dataset = dataset.select(selection)
    prefix, suffix = f"{PUBLISHED_CARS}:" * published, "" if selection is None else f":{selection}"
    dataset.spec = f"{prefix}{path.resolve()}{suffix}"
    return dataset


def open_path(path: Path, image_size: int | None = None, progress: Progress | None = None) -> Dataset:
    """The data set in a file or folder, told by its content."""
    refuse_special(path)
    if path.is_dir():
        return _open_folder(path, image_size, progress)
    import h5py

    if h5py.is_hdf5(path):
        return _open_shapes3d(path, image_size, progress)
    if zipfile.is_zipfile(path):
        return _open_zip(path, image_size, progress)
    from encdiff.data.cars3d import is_tar
    from encdiff.data.celeba import ATTRIBUTES, CelebA
    from encdiff.data.hf_datasets import HubImages, is_hf
    from encdiff.data.lmdb_images import LmdbImages, is_lmdb
    from encdiff.data.smallnorb import SmallNORB, is_smallnorb

    if path.name == ATTRIBUTES:  # of CelebA's files the one that has a name of its own
        return CelebA(path.parent, image_size)
    if is_smallnorb(path):
        return SmallNORB(path.parent, image_size, progress)
    if is_lmdb(path):
        return LmdbImages(path, image_size)
    if is_hf(path):
        return HubImages(path, image_size)
    if is_tar(path):
        return _open_cars(path, image_size, progress, False)
    return _open_shapes3d(path, image_size, progress)  # names what is wrong


def _open_folder(path: Path, image_size: int | None, progress: Progress | None) -> Dataset:
    from encdiff.data.cars3d import cars_folder
    from encdiff.data.celeba import ATTRIBUTES, CelebA
    from encdiff.data.folder import ImageFolder
    from encdiff.data.hf_datasets import HubImages, is_hf
    from encdiff.data.lmdb_images import LmdbImages, is_lmdb
    from encdiff.data.shards import ShardedArrays, is_sharded
    from encdiff.data.smallnorb import SmallNORB, smallnorb_files

    if is_sharded(path):
        return ShardedArrays(path, image_size)
    if cars_folder(path):
        return _open_cars(path, image_size, progress, False)
    if (path / ATTRIBUTES).is_file():
        return CelebA(path, image_size)
    if smallnorb_files(path):
        return SmallNORB(path, image_size, progress)
    if is_lmdb(path):
        return LmdbImages(path, image_size)
    if is_hf(path):
        return HubImages(path, image_size)
    return ImageFolder(path, image_size)


def _open_hf(spec: str, image_size: int | None) -> Dataset:
    """A file or folder here, or in ENCDIFF_DATA, before the Hub's data set of that name."""
    from encdiff.data.hf_datasets import GRAMMAR, HubImages, is_hf, is_hub_name, parse_spec

    name, options = parse_spec(spec)
    path = next((path for path in _candidates(name) if path.exists()), None)
    if path is not None:
        refuse_special(path)
        if not is_hf(path):
            raise InputError(f"{path}: neither a folder of save_to_disk nor Parquet; must be {GRAMMAR}")
    elif not is_hub_name(name):
        raise InputError(f"data {spec!r}: not found here, and no name of the Hub's; must be {GRAMMAR}")
    dataset = HubImages(path or name, image_size, options)
    dataset.spec = f"hf:{path.resolve() if path else name}{spec.removeprefix('hf:' + name)}"
    return dataset


def _open_zip(path: Path, image_size: int | None, progress: Progress | None) -> Dataset:
    from encdiff.data.arrays import npz_header
    from encdiff.data.npz import open_zip

    with open_zip(path) as archive:
        members = set(archive.namelist())
    if "imgs.npy" in members:
        from encdiff.data.dsprites import DSprites

        return DSprites(path, image_size, progress)
    if "images.npy" in members and "labels.npy" not in members:
        from encdiff.data.mpi3d import FAMILIES, MPI3D

        shape, _ = npz_header(path, "images")
        if shape[:1] and shape[0] in FAMILIES:
            return MPI3D(path, image_size, progress)
    if any(name.lower().endswith(".jpg") for name in members):
        from encdiff.data.celeba import CelebA

        return CelebA(path, image_size)
    return _open_shapes3d(path, image_size, progress)


def _open_shapes3d(path: Path, image_size: int | None, progress: Progress | None) -> Dataset:
    from encdiff.data.shapes3d import Shapes3D

    return Shapes3D(path, image_size, progress)


def _open_cars(path: Path, image_size: int | None, progress: Progress | None, published: bool) -> Dataset:
    from encdiff.data.cars3d import Cars3D

    return Cars3D(path, image_size, published_misalignment=published, progress=progress)


def _render(kind: str, image_size: int, counts: str | None) -> Dataset:
    from encdiff.data.procedural import ProceduralShapes3D
    from encdiff.data.sprites import ProceduralSprites

    if kind == "sprites":
        full = ProceduralSprites(image_size)
        return full if counts is None else full.select(counts)
    if counts is None:
        return ProceduralShapes3D(image_size)
    try:
        return ProceduralShapes3D(image_size, [int(count) for count in counts.split(",")])
    except InputError:
        raise
    except ValueError:
        raise InputError(f"data 'procedural:{counts}': {ACCEPTED}") from None


def _find(spec: str) -> tuple[Path, str | None]:
    """The file or folder that a spec names, and the selection behind its last colon."""
    text, _, selection = spec.rpartition(":")
    for name, part in ((spec, None), (text, selection)):
        found = name and next((path for path in _candidates(name) if path.exists()), None)
        if found:
            return found, part
    folder = os.environ.get("ENCDIFF_DATA")
    also = f" nor in ENCDIFF_DATA={folder}" if folder else ""
    named = FILES.get(spec) or FILES.get(text)
    also += "".join(f"; did you mean {name}?" for name in _meant(text or spec) if not named)
    must = f"ENCDIFF_DATA must name the folder of its files ({named[0]})" if named else ACCEPTED
    raise InputError(f"data {spec!r}: not found here{also}; {must}")


def _meant(name: str) -> list[str]:
    """The name of a data set that is most like one that is unknown, or whose file bears it."""
    files = {Path(file).stem.lower(): known for known, named in FILES.items() for file in named}
    names = {known: known for known in (*FILES, *RENDERED, PUBLISHED_CARS)} | files
    return [names[close] for close in difflib.get_close_matches(name.lower(), names, 1, 0.7)]


def _candidates(name: str) -> list[Path]:
    folder = os.environ.get("ENCDIFF_DATA")
    data = [Path(os.path.expanduser(folder))] if folder else []  # pathlib's raises where there is no home folder
    files = FILES.get(name, ())
    here = Path(os.path.expanduser(name))
    return [here, *(root / name for root in data), *(root / f for root in data for f in files)]
