"""Hugging Face Datasets: what the library wrote is read by row; names go to it; damage and refusals are one line."""

import io
import os
import pickle
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from encdiff.data import open_dataset
from encdiff.data.folder import load_square
from encdiff.data.hf_datasets import HubImages, is_hf, parse_spec
from encdiff.data.loader import Batches
from encdiff.errors import InputError

COLOURS = np.random.default_rng(7).integers(0, 256, (13, 3), np.uint8)


def encoded(i, kind="png"):
    stream = io.BytesIO()
    Image.new("RGB", (9 + i, 12), tuple(map(int, COLOURS[i]))).save(stream, kind)
    return stream.getvalue()


def refuses(spec, words, size=6):
    with pytest.raises(InputError, match=words) as error:
        data = open_dataset(spec, size)
        data.images(np.arange(len(data)))
    assert str(error.value).isprintable() and "\n" not in str(error.value)


# ---- without the library


@pytest.mark.parametrize(
    "spec, name, options",
    [
        ("hf:faces", "faces", {}),
        ("hf:owner/name", "owner/name", {}),
        ("hf:owner/name:split=train", "owner/name", {"split": "train"}),
        ("hf:/a/b:c/d:split=train[:10%],image=photo", "/a/b:c/d", {"split": "train[:10%]", "image": "photo"}),
        ("hf:a/b:revision=main,config=small", "a/b", {"config": "small", "revision": "main"}),
        ("hf:a/b:image=x=y", "a/b", {"image": "x=y"}),
    ],
)
def test_the_grammar(spec, name, options):
    assert parse_spec(spec) == (name, options)


@pytest.mark.parametrize(
    "spec", ["hf:", "hf:a/b:colour=red", "hf:a/b:split=", "hf:a/b:split=x,split=y", "hf:a/b:split=x,"]
)
def test_bad_specs(spec):
    refuses(spec, "data 'hf:")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/etc/nowhere", "../x", "https://x.org/y"])
def test_what_is_no_name_of_the_hubs_is_never_sent(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    refuses(f"hf:{name}", "not found here, and no name of the Hub's")


class Rows:
    """As much of the library's Dataset as is used."""

    def __init__(self, features, rows=4):
        self.features, self.rows = features, rows
        self.data = SimpleNamespace(validate=lambda full: None)

    def select_columns(self, names):
        return Rows({name: self.features[name] for name in names}, self.rows)

    def with_format(self, kind):
        return self

    def cast_column(self, name, feature):
        assert feature == "not decoded"
        return self

    def __len__(self):
        return self.rows

    def __getitem__(self, indices):
        return {name: [{"bytes": encoded(i), "path": None} for i in indices] for name in self.features}


def stub(monkeypatch, load):
    def image(decode):
        assert decode is False
        return "not decoded"

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load, Image=image))


PICTURE = type("Image", (), {})()


def test_names_go_to_the_library_and_nothing_else(monkeypatch):
    asked = []
    stub(monkeypatch, lambda *given, **options: asked.append((given, options)) or Rows({"photo": PICTURE, "label": 0}))
    data = open_dataset("hf:owner/name:split=test,config=small,revision=v1", 6)
    assert asked == [(("owner/name", "small"), {"split": "test", "revision": "v1"})]
    assert (data.name, data.spec) == ("owner/name", "hf:owner/name:split=test,config=small,revision=v1")
    np.testing.assert_array_equal(data.images([3, 0])[:, 2, 2], COLOURS[[3, 0]])
    with pytest.raises(InputError, match="indices"):
        data.images([4])


def test_a_connection_that_fails_is_one_line(monkeypatch):
    def load(*given, **options):
        try:
            raise OSError("no\nroute")
        except OSError as error:
            raise ConnectionError("could not\nreach the Hub") from error

    stub(monkeypatch, load)
    refuses(
        "hf:owner/name", "owner/name: cannot be opened or read .ConnectionError: could not reach.*OSError: no route"
    )


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for spec in ("hf:owner/name", f"hf:{tmp_path / 'x.parquet'}", tmp_path / "x.parquet"):
        refuses(spec, r"needs the package datasets: pip install encdiff\[datasets\]")
    refuses("hf:owner/name", "needs one, such as 32", size=None)


@pytest.mark.parametrize(
    "features, image, words",
    [
        ({"a": PICTURE, "b": PICTURE}, None, "columns of images a, b; must name the column"),
        ({"a": 0, "b": 1}, None, "no column of images, but a, b"),
        ({"a": PICTURE}, "c", "has no column 'c'; has a"),
        ({"a": PICTURE, "b": SimpleNamespace(dtype="string")}, "b", "column 'b' is .*must be of images"),
        ({"a": [PICTURE]}, "a", "column 'a' is"),
    ],
)
def test_columns(monkeypatch, features, image, words):
    stub(monkeypatch, lambda *given, **options: Rows(features))
    refuses("hf:owner/name" + (f":image={image}" if image else ""), words)


def test_pictures_beside_parquet_stay_a_folder_of_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    for name in ("x.parquet", "state.json"):
        (tmp_path / name).write_bytes(b"PAR1")
    assert not is_hf(tmp_path) and len(open_dataset(tmp_path, 6)) == 1
    (tmp_path / "a.png").unlink()
    assert is_hf(tmp_path)
    (tmp_path / "x.parquet").rename(tmp_path / "metadata.parquet")
    assert not is_hf(tmp_path)


# ---- with it


@pytest.fixture
def library(tmp_path_factory, monkeypatch):
    library = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    library.disable_progress_bars()
    return library


def rows(library, count=13, **columns):
    content = [{"bytes": encoded(i, "webp" if i % 2 else "png"), "path": None} for i in range(count)]
    made = library.Dataset.from_dict({"label": list(range(count)), "photo": content} | columns)
    return made.cast_column("photo", library.Image())


def expected(indices, size=6):
    return [load_square(io.BytesIO(encoded(i, "webp" if i % 2 else "png")), size, "x") for i in indices]


def checked(spec, indices=(12, 0, 3, 3)):
    data = open_dataset(spec, 6)
    assert isinstance(data, HubImages) and data.factor_names == ()
    np.testing.assert_array_equal(data.images(list(indices)), np.reshape(expected(indices), (-1, 6, 6, 3)))
    assert data.images([]).shape == (0, 6, 6, 3)
    return data


def test_saved_to_disk(library, tmp_path, monkeypatch):
    rows(library).save_to_disk(tmp_path / "faces", num_shards=3)
    monkeypatch.chdir(tmp_path)
    data = checked("faces")
    assert (data.name, data.spec, len(data)) == ("faces", str(tmp_path / "faces"), 13)
    pickled = pickle.dumps(data)
    assert len(pickled) < 3000, "its rows stay in their files"
    monkeypatch.chdir(os.sep)
    np.testing.assert_array_equal(pickle.loads(pickled).images([5]), expected([5]))
    monkeypatch.setenv("ENCDIFF_DATA", str(tmp_path))
    assert checked("hf:faces:image=photo").spec == f"hf:{tmp_path / 'faces'}:image=photo"
    batches = Batches(data, 10, resident_gib=0)
    np.testing.assert_array_equal(batches.images(1), expected(batches.batch_indices(1)))


def test_splits(library, tmp_path):
    whole = rows(library)
    library.DatasetDict(train=whole, test=whole.select([5, 4])).save_to_disk(tmp_path / "faces")
    checked(f"hf:{tmp_path / 'faces'}:split=train")
    assert len(checked(f"hf:{tmp_path / 'faces'}:split=test,image=photo", indices=()).images([1])) == 1
    refuses(tmp_path / "faces", "faces: has several splits; must name one of train, test")
    refuses(f"hf:{tmp_path / 'faces'}:split=valid", "has no split 'valid'")
    refuses(f"hf:{tmp_path / 'faces'}:revision=v1", "revision is of the Hub's")


def test_parquet(library, tmp_path):
    whole = rows(library)
    whole.to_parquet(tmp_path / "all.parquet")
    (tmp_path / "set" / "data").mkdir(parents=True)
    whole.select(range(7)).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet")
    whole.select(range(7, 13)).to_parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet")
    (tmp_path / "all.parquet").rename(tmp_path / "misnamed.h5")
    checked(tmp_path / "misnamed.h5")
    checked(tmp_path / "set")
    assert len(checked(f"hf:{tmp_path / 'set'}:split=train[:4]", indices=[1, 3])) == 4
    whole.select([2]).to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    refuses(tmp_path / "set", "several splits; must name one of test, train")
    checked(f"hf:{tmp_path / 'set'}:split=train")


def test_bytes_of_other_writers(library, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {"raw": [encoded(i, "webp" if i % 2 else "png") for i in range(13)], "where": ["/etc/passwd"] * 13}
    import pyarrow

    parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    refuses(tmp_path / "x.parquet", "no column of images, but raw, where; must name the column")
    checked(f"hf:{tmp_path / 'x.parquet'}:image=raw")
    refuses(f"hf:{tmp_path / 'x.parquet'}:image=where", "column 'where' is .*must be of images, or of their bytes")


def test_paths_in_rows_are_not_followed(library, tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(1))
    made = library.Dataset.from_dict({"photo": [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 3})
    made = made.cast_column("photo", library.Image(decode=False))
    pyarrow = pytest.importorskip("pyarrow")
    path, table = str(tmp_path / "x.arrow"), made.data.table
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    made.save_to_disk(tmp_path / "faces")
    shard = next((tmp_path / "faces").glob("*.arrow"))
    shutil.copy(tmp_path / "x.arrow", shard)
    refuses(tmp_path / "faces", "row 0 of photo: holds no bytes of an image")


def test_rows_that_are_no_image(library, tmp_path):
    made = rows(library, 4).cast_column("photo", library.Image(decode=False)).to_list()
    made[2]["photo"]["bytes"] = b"%!PS-Adobe-3.0 EPSF-3.0 (no image)"
    made = library.Dataset.from_list(made).cast_column("photo", library.Image())
    made.save_to_disk(tmp_path / "faces")
    data = open_dataset(tmp_path / "faces", 6)
    np.testing.assert_array_equal(data.images([3]), expected([3]))
    with pytest.raises(InputError, match="faces: row 2 of photo: not a readable image"):
        data.images([3, 2])


@pytest.mark.parametrize("damage", ["cut", "cut short", "offsets", "state", "info", "gone", "empty"])
def test_damage(library, tmp_path, damage):
    folder = tmp_path / "faces"
    rows(library).save_to_disk(folder)
    (shard,) = folder.glob("*.arrow")
    content = bytearray(shard.read_bytes())
    if damage.startswith("cut"):
        del content[len(content) // 2 if damage == "cut" else 100 :]
    elif damage == "offsets":  # of the bytes of the images: the second one's end
        offsets = (
            np.cumsum([0, *[len(encoded(i, "webp" if i % 2 else "png")) for i in range(13)]]).astype("<i4").tobytes()
        )
        at = content.find(offsets)
        assert at > 0
        content[at + 4 : at + 8] = (2**31 - 1).to_bytes(4, "little")
    shard.write_bytes(content)
    if damage == "state":
        (folder / "state.json").write_text('{"_data_files": [{"filename": "../../../nowhere.arrow"}]}')
    if damage == "info":
        (folder / "dataset_info.json").write_text("{")
    if damage == "gone":
        shard.unlink()
    if damage == "empty":
        shutil.rmtree(folder)
        rows(library).select([]).save_to_disk(folder)
    refuses(folder, "faces: (cannot be opened or read|holds no images)|faces.*: ")
