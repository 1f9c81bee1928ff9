"""Every reader of files that the project has: whole files to damage, and how they are read to the last value."""

import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import lmdb
import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from encdiff import EncDiff, EncDiffConfig
from encdiff.baselines import VAE, VAEConfig, load_concepts
from encdiff.cli.support import factor_groups, rebuilt
from encdiff.data import describe, mpi3d, open_dataset
from encdiff.data.shapes3d import write_shapes3d
from encdiff.data.sharding import write_shards
from encdiff.edit import Edit, uce
from encdiff.evaluation import Direction, evaluate_codes, load_direction, rank_models
from encdiff.evaluation.codes import read_codes_alone
from encdiff.experiments.phases import seconds_per_step
from encdiff.fields.formats import open_fields
from encdiff.fields.grid import Grid
from encdiff.fields.rendering import render
from encdiff.fields.table import read_sensors
from encdiff.files.checkpoint import load_tensors, save_tensors, step_of
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.prior import DiffusionPrior, MixturePrior, load_prior
from encdiff.training import TrainConfig, Training
from encdiff.training.runs import CsvLog, read_config

TINY = EncDiffConfig(
    image_size=16, concepts=3, encoder_width=8, token_width=4, bank_widths=(8,), first_stage="space_to_depth", patch=4,
    width=16, multipliers=(1,), depth=1, attention_levels=(0,), heads=2, groups=8,
)  # fmt: skip
TINY_VAE = VAEConfig(
    image_size=16, concepts=3, encoder_width=8, decoder_hidden=12, decoder_width=8, objective="factor",
    discriminator_width=9, discriminator_depth=2,
)  # fmt: skip
RECIPE = TrainConfig(steps=2, batch_size=2)
LABELS = np.stack(np.unravel_index(np.arange(32), (2,) * 5), axis=1)


@dataclass(frozen=True)
class Reader:
    """`make` writes whole files into a folder, of which those that match `damaged` are damaged; `read` reads them."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    damaged: str = "*"


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def encoded(kind: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(9, 14, 3)).save(stream, kind, **options)
    return stream.getvalue()


def make_pictures(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in (("a.png", {}), ("b.jpeg", {"exif": exif, "progressive": True}), ("c.webp", {"exif": exif})):
        (folder / name).write_bytes(encoded(name[2:], **options))
    Image.fromarray(pixels(9, 14, 3)).quantize(16).save(folder / "d.png", pnginfo=None, transparency=3)


def read_all(path: Path, size: int | None = None) -> None:
    """Everything that a command reads of a data set."""
    dataset = open_dataset(path, size)
    describe(dataset)
    every = np.arange(min(len(dataset), 64))
    assert dataset.images(every).dtype == np.uint8
    if dataset.factor_sizes:
        dataset.labels(every)


def make_lmdb(folder: Path) -> None:
    with lmdb.open(str(folder), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for i in range(12):
            transaction.put(f"{i:03}".encode(), encoded("png") * (1 + 5 * (i % 2)))
        for i in range(400):
            transaction.put(f"x{i:03}".encode(), encoded("webp"))
    (folder / "lock.mdb").unlink()


def make_h5(folder: Path) -> None:
    write_shapes3d(folder / "sprites.h5", open_dataset("sprites:2,2,2,2,2", 8))
    write_shapes3d(folder / "room.h5", open_dataset("procedural:2,2,2,1,1,2", 8))


def make_shards(folder: Path) -> None:
    write_shards(folder, open_dataset("procedural:2,2,2,1,1,2", 8), 1000, overwrite=True)


def make_shards_of_faces(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as faces:
        make_celeba(Path(faces))
        write_shards(folder, open_dataset(faces, 8), 500, overwrite=True)


def make_npz(folder: Path) -> None:
    labels = np.c_[LABELS, LABELS[:, :1] * 0].astype(float)
    for name, save in (("stored", np.savez), ("packed", np.savez_compressed)):
        save(folder / f"{name}.npz", images=pixels(32, 8, 8, 3), labels=labels)
        values = np.c_[LABELS[:, :1] * 0, LABELS]
        latents = {"latents_classes": values, "latents_values": values.astype(float)}
        save(folder / f"dsprites-{name}.npz", imgs=pixels(32, 8, 8) // 128, **latents)
        save(folder / f"mpi3d-{name}.npz", images=pixels(288, 4, 4, 3))
        mpi3d.FAMILIES[288] = (4, 4, 2, 3, 3, 1, 1)


def car(packed: bool) -> bytes:
    stream = io.BytesIO()
    savemat(stream, {"im": pixels(4, 4, 3, 24, 4), "z": {"a": [1, "b"]}}, do_compression=packed)
    return stream.getvalue()


def make_fields(folder: Path) -> None:
    render(folder / "own.h5", "vorticity", 8, 3, processes=1, frames=2, duration=0.1)
    values = pixels(3, 2, 8, 8).astype(np.float32)
    with h5py.File(folder / "darcy.h5", "w") as file:
        file["nu"], file["tensor"], file["x-coordinate"] = values[:, 0], values[:, 1:], np.linspace(0, 1, 9)
    with h5py.File(folder / "groups.h5", "w") as file:
        for i in range(3):
            file.create_dataset(f"{i:04}/data", data=values[..., :2], compression="lzf")
            file[f"{i:04}/grid/t"] = np.arange(3.0)
    np.save(folder / "frames.npy", values)
    np.savez_compressed(folder / "pairs.npz", x=values[:, 0], y=values[:, 1])


def read_fields(path: Path) -> None:
    data = open_fields(path)
    describe(data)
    assert data.read(np.arange(min(len(data), 64))).dtype == np.float32
    data.statistics(64)


def make_cars(folder: Path) -> None:
    (folder / "list.txt").write_text("car_1.mat\ncar_2.mat\n")
    for i, packed in enumerate((True, False), start=1):
        (folder / f"car_{i}.mat").write_bytes(car(packed))


def make_cars_archive(folder: Path) -> None:
    for mode in ("w:gz", "w"):
        with tarfile.open(folder / f"cars.tar{mode[1:].replace(':', '.')}", mode) as archive:
            members = {"list.txt": b"car_1\ncar_2\n", "car_1.mat": car(True), "car_2.mat": car(False)}
            for name, content in members.items():
                entry = tarfile.TarInfo(f"data/cars/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def make_celeba(folder: Path, packed: bool = False) -> None:
    names = [f"{i:06}.jpg" for i in range(1, 5)]
    rows = [f"{name} 1 -1 {'-1' if i % 2 else '1'}" for i, name in enumerate(names)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(["4", "Bald Young Hat", *rows, ""]))
    (folder / "list_eval_partition.txt").write_text("".join(f"{name} {i % 3}\n" for i, name in enumerate(names)))
    if packed:
        import zipfile

        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(f"img_align_celeba/{name}", encoded("jpeg"))
    else:
        for name in names:
            (folder / name).write_bytes(encoded("jpeg"))


def read_celeba(folder: Path) -> None:
    read_all(folder, 8)
    read_all(Path(f"{folder}:train"), 8)


def make_norb(folder: Path) -> None:
    category, rest = LABELS[:, 0], np.c_[LABELS[:, 4:], LABELS[:, 1:4]]
    parts = {"dat": pixels(32, 2, 8, 8), "cat": category.astype("<i4"), "info": rest.astype("<i4")}
    for kind, array in parts.items():
        sizes = [*array.shape, *[1] * (3 - array.ndim)]
        magic = 0x1E3D4C55 if array.dtype == np.uint8 else 0x1E3D4C54
        content = np.array([magic, array.ndim, *sizes], "<i4").tobytes() + array.tobytes()
        (folder / f"smallnorb-training-{kind}.mat").write_bytes(content)


def make_norb_packed(folder: Path) -> None:
    make_norb(folder)
    for path in list(folder.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def make_codes(folder: Path) -> None:
    codes = LABELS[:, :4] + np.random.default_rng(0).normal(size=(32, 4))
    given = {"codes": codes, "factors": LABELS[:, :3], "factor_names": ["a", "b", "c"]}
    np.savez(folder / "stored.npz", **given)
    np.savez_compressed(folder / "packed.npz", **given)


def read_codes(path: Path) -> None:
    scores = evaluate_codes(path, metrics=("mig", "modularity", "irs", "mcc", "unsupervised", "tad"))
    json.dumps(scores, allow_nan=False)


def rank_codes(path: Path) -> None:
    codes = read_codes_alone(path)
    json.dumps(rank_models({"a": codes, "b": codes}), allow_nan=False)


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    EncDiff(TINY).save_pretrained(folder)
    (folder / "README.md").unlink()


def read_model(folder: Path) -> None:
    model = EncDiff.from_pretrained(folder)
    if model.config.image_size <= 64:
        assert model.encode(torch.zeros(1, 3, *[model.config.image_size] * 2)).isfinite().all()


def make_vae(folder: Path) -> None:
    torch.manual_seed(0)
    VAE(TINY_VAE).save_pretrained(folder)


def read_vae(folder: Path) -> None:
    model = load_concepts(folder)
    if model.config.image_size <= 64:
        assert model.encode(torch.zeros(1, 3, *[model.config.image_size] * 2)).isfinite().all()


def make_first_stage(folder: Path) -> None:
    torch.manual_seed(0)
    VQAutoencoder(32, (1, 1), 1, codebook_size=8).save_pretrained(folder)


def read_first_stage(folder: Path) -> None:
    VQAutoencoder.from_pretrained(folder).encode(torch.zeros(1, 3, 8, 8))


def make_published(folder: Path) -> None:
    torch.manual_seed(0)
    EncDiff(TINY).save_published(folder / "model.ckpt")


def make_run(folder: Path) -> None:
    torch.manual_seed(0)
    training = Training(EncDiff(TINY), RECIPE)
    for _ in range(2):
        training.advance(torch.from_numpy(pixels(2, 16, 16, 3)), torch.arange(2))
    save_tensors(folder / "checkpoint.safetensors", training.tensors(), {"step": "2", "scaling_factor": "1.0"})
    begun = {"model": asdict(TINY), "training": asdict(RECIPE), "data": "procedural", "fingerprint": {"image_size": 16}}
    (folder / "config.json").write_text(json.dumps(begun, indent=2))
    (folder / "log.csv").write_text("step,loss,seconds\n1,0.5,0.25\n2,0.25,0.5\n")
    scores = {"disentanglement": 0.5, "completeness": 0.5, "informativeness_test": 0.5, "importance": [[0.5, 0.2]] * 3}
    about = {"protocol": {"name": "paper", "seed": 0}, "data": {"name": "a", "factor_names": ["a", "b"]}}
    (folder / "metrics.json").write_text(json.dumps({"trained": {"dci": scores} | about}))


def read_run(folder: Path) -> None:
    """As `train --resume` and `swap` do."""
    begun, source = read_config(folder), folder / "checkpoint.safetensors"
    config = EncDiffConfig.from_dict(begun["model"], f"{folder}/config.json")
    recipe = TrainConfig.from_dict(begun["training"], f"{folder}/config.json")
    model = rebuilt(folder, config)
    tensors, metadata = load_tensors(source)
    Training(model, recipe).load(tensors, metadata, source)
    factor_groups(folder, model)
    seconds_per_step(folder)
    CsvLog(folder / "log.csv", ("step", "loss", "seconds"), step_of(metadata, source))


def make_direction(folder: Path) -> None:
    Direction(torch.ones(3), torch.ones(3), "ridge", 0.5, "R^2", 0.0, "scale").save(folder / "scale.safetensors")


def make_edit(folder: Path) -> None:
    uce(EncDiff(TINY), torch.ones(1, 4), torch.zeros(1, 4), name="hue").save(folder / "edit.safetensors")


def make_priors(folder: Path) -> None:
    codes = np.random.default_rng(0).normal(size=(64, 3))
    MixturePrior.fit(codes, 2).save(folder / "mixture.safetensors")
    DiffusionPrior.fit(codes, 1).save(folder / "diffusion.safetensors")


SENSORS = """# of a Tuesday
x,y,t,permeability,pressure,sigma_pressure
0.125,0.5,0,3,-1.25e-3,1e-4
0.75,1,0.5,,2.5e-2,1e-4

0.25,0.375,1,12,,
"""


READERS = {
    "pictures": Reader(make_pictures, lambda folder: read_all(folder, 8)),
    "lmdb": Reader(make_lmdb, lambda folder: read_all(folder, 8)),
    "hdf5": Reader(make_h5, read_all, "*.h5"),
    "shards": Reader(make_shards, read_all),
    "shards of faces": Reader(make_shards_of_faces, read_all),
    "npz": Reader(make_npz, read_all, "*.npz"),
    "fields": Reader(make_fields, read_fields, "*.*"),
    "cars": Reader(make_cars, read_all),
    "cars, packed": Reader(make_cars_archive, read_all, "*.tar*"),
    "celeba": Reader(make_celeba, read_celeba),
    "celeba, packed": Reader(lambda folder: make_celeba(folder, packed=True), read_celeba),
    "smallnorb": Reader(make_norb, read_all),
    "smallnorb, packed": Reader(make_norb_packed, read_all),
    "codes": Reader(make_codes, read_codes, "*.npz"),
    "codes alone": Reader(make_codes, rank_codes, "*.npz"),
    "model": Reader(make_model, read_model),
    "vae": Reader(make_vae, read_vae),
    "first stage": Reader(make_first_stage, read_first_stage),
    "published": Reader(make_published, lambda path: EncDiff.load_published(path, TINY), "*.ckpt"),
    "run": Reader(make_run, read_run),
    "direction": Reader(make_direction, lambda path: load_direction(path).ranked(), "*.safetensors"),
    "edit": Reader(make_edit, Edit.load, "*.safetensors"),
    "sensors": Reader(
        lambda folder: (folder / "sensors.csv").write_text(SENSORS),
        lambda path: read_sensors(path, Grid(("permeability", "pressure"), 8, 8)),
        "*.csv",
    ),
    "prior": Reader(make_priors, lambda path: load_prior(path).sample(2), "*.safetensors"),
}
