"""Damaged and hostile files of data: one line with the file's name, before anything is allocated, mapped or run."""

import io
import os
import struct
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from encdiff.data import open_dataset
from encdiff.data.celeba import CelebA
from encdiff.data.hdf5 import read_names
from encdiff.data.npz import open_zip, read_array
from encdiff.data.shapes3d import Shapes3D, write_shapes3d
from encdiff.errors import InputError
from encdiff.evaluation import evaluate_codes
from encdiff.evaluation.codes import read_codes

IMAGES = np.arange(32 * 8 * 8 * 3, dtype=np.uint8).reshape(32, 8, 8, 3)
VALUES = np.stack(np.unravel_index(np.arange(32), (2,) * 5), axis=1)
LABELS = np.c_[VALUES, VALUES[:, :1] * 0].astype(float)


def refuses(path, words, *size):
    with pytest.raises(InputError, match=words) as error:
        dataset = open_dataset(path, *size)
        dataset.images(np.arange(len(dataset)))
    assert str(error.value).isprintable() and path.name in str(error.value)


# ---- pictures


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF", "BMP", "PPM", "PCX", "ICO", "TGA"])
def test_only_promised_formats_are_opened(tmp_path, kind, monkeypatch):
    """Whatever the name: Pillow runs Ghostscript on EPS."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, kind)
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    refuses(tmp_path, r"a\.png: not a readable image", 8)
    (tmp_path / "list_attr_celeba.txt").write_text("1\nYoung\na.jpg 1\n")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"a\.jpg: not a readable image"):
        CelebA(tmp_path, 8).images([0])


def test_pictures_that_are_too_narrow_or_too_large(tmp_path):
    Image.new("1", (5000, 2)).save(tmp_path / "a.png")
    refuses(tmp_path, "5000x2 pixels; must not be so narrow", 8)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
    refuses(tmp_path, "not a readable image .*decompression bomb", 8)


def test_pictures_with_impossible_chunks(tmp_path):
    whole = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add(b"eXIf", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" * 3)
    Image.new("RGB", (9, 9)).save(whole, "PNG", pnginfo=info)
    (tmp_path / "a.png").write_bytes(whole.getvalue())
    try:
        open_dataset(tmp_path, 8).images([0])
    except InputError as error:
        assert "a.png: not a readable image" in str(error)


# ---- HDF5


def h5(path, images=IMAGES, **options):
    with h5py.File(path, "w") as file:
        if images is not None:
            file.create_dataset("images", data=images, **options)
        labels = file.create_dataset("labels", data=LABELS)
        labels.attrs["factor_names"] = list("abcdef")
    return path


def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"the password" * 1000)
    return path


def outside(tmp_path, kind):
    path, other = h5(tmp_path / "x.h5", None), h5(tmp_path / "other.h5")
    with h5py.File(path, "a") as file:
        if kind == "external storage":
            file.create_dataset("images", IMAGES.shape, np.uint8, external=[(str(secret(tmp_path)), 0, IMAGES.nbytes)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout(IMAGES.shape, np.uint8)
            layout[:] = h5py.VirtualSource(other, "images", IMAGES.shape)
            file.create_virtual_dataset("images", layout)
        elif kind == "external link":
            file["images"] = h5py.ExternalLink(str(other), "/images")
        elif kind == "soft link to it":
            file["there"] = h5py.ExternalLink(str(other), "/")
            file["images"] = h5py.SoftLink("/there/images")
        else:
            file["images"], file["pictures"] = h5py.SoftLink("/pictures"), h5py.SoftLink("/images")
    return path


@pytest.mark.parametrize("kind", ["external storage", "virtual", "external link", "soft link to it", "loop of links"])
def test_hdf5_that_shows_other_files(tmp_path, kind):
    refuses(outside(tmp_path, kind), "must be an array of the file itself")


def test_hdf5_that_declares_more_than_it_holds(tmp_path):
    for name, shape, options in (
        ("images", (2**40, 8, 8, 3), {"chunks": (1, 8, 8, 3)}),
        ("images", (2**40, 8, 8, 3), {}),
        ("labels", (2**40, 6), {"chunks": (1, 6)}),
    ):
        with h5py.File(h5(tmp_path / "x.h5", None), "a") as file:
            if name == "labels":
                del file["labels"]
                file["images"] = IMAGES
            file.create_dataset(name, shape, np.uint8 if name == "images" else float, **options)
        refuses(tmp_path / "x.h5", f"{name} declare .* bytes, and holds")


def test_hdf5_with_chunks_that_fill_memory(tmp_path):
    with h5py.File(h5(tmp_path / "x.h5", None), "a") as file:
        images = file.create_dataset(
            "images", (2**15, 128, 128, 3), np.uint8, chunks=(2**15, 128, 128, 3), compression="gzip"
        )
        images.id.write_direct_chunk((0, 0, 0, 0), b"x" * 2**21)
    refuses(tmp_path / "x.h5", "a chunk must be at most")


@pytest.mark.parametrize(
    "value, words",
    [
        (np.arange(6), "is int64, must be texts"),
        (["a"] * 5000, "holds .* texts, must be one"),
        (b"\xff\xfe", "labels are|damaged"),
    ],
)
def test_hdf5_attributes(tmp_path, value, words):
    with h5py.File(h5(tmp_path / "x.h5"), "a") as file:
        del file["labels"].attrs["factor_names"]
        file["labels"].attrs["factor_names"] = np.array(value, "S1") if isinstance(value, list) else value
    with pytest.raises(InputError, match=words):
        Shapes3D(tmp_path / "x.h5")
    assert read_names(h5(tmp_path / "x.h5"), "cyclic", "factor_names") == [(), tuple("abcdef")]


def test_hdf5_attributes_of_a_type_that_the_library_cannot_read(tmp_path):
    write_shapes3d(tmp_path / "x.h5", open_dataset("sprites:2,2,2,2,2", 8))
    whole = (tmp_path / "x.h5").read_bytes()
    place = whole.find(b"factor_names\0") + 16  # where the attribute's type begins
    for kind in range(256):
        (tmp_path / "x.h5").write_bytes(whole[:place] + bytes([kind]) + whole[place + 1 :])
        try:
            open_dataset(tmp_path / "x.h5")
        except InputError as error:
            assert "x.h5: " in str(error)


@pytest.mark.parametrize("offset, value", [(8, 0), (8, 2**40), (208, 0), (208, 8), (208, 2**60), (208, 0xF00)])
def test_hdf5_heaps_that_have_no_end(tmp_path, offset, value):
    """In which HDF5 would look for the end for ever."""
    write_shapes3d(tmp_path / "x.h5", open_dataset("sprites:2,2,2,2,2", 8))
    content = bytearray((tmp_path / "x.h5").read_bytes())
    heap = content.find(b"GCOL")
    assert struct.unpack_from("<Q", content, heap + 208)[0] == 4096 - 200, "what is free, at the end"
    struct.pack_into("<Q", content, heap + offset, value)
    (tmp_path / "x.h5").write_bytes(content)
    refuses(tmp_path / "x.h5", "damaged")


def test_hdf5_that_a_writer_holds_is_not_called_damaged(tmp_path):
    path = h5(tmp_path / "x.h5")
    code = f"import h5py, sys; f = h5py.File({str(path)!r}, 'a'); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        refuses(path, r"x\.h5: another process is writing it")
        writer.communicate(b"")
    assert len(open_dataset(path)) == 32


# ---- npz


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path


def npy(shape, descr="<f8", content=b"", fortran=False):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return stream.getvalue() + content


def flip(path, offset, value, signature=b"PK\x01\x02"):
    """Put 16 bits into every header of a zip file, of both kinds."""
    content = bytearray(path.read_bytes())
    for sign, place in ((signature, offset), (b"PK\x03\x04", offset - 2)):
        at = content.find(sign)
        while at >= 0:
            struct.pack_into("<H", content, at + place, value)
            at = content.find(sign, at + 1)
    path.write_bytes(content)
    return path


BAD_NPZ = {
    "no zip": lambda p: p.write_bytes(b"hello"),
    "empty": lambda p: p.write_bytes(b""),
    "encrypted": lambda p: flip(archive(p, {"codes.npy": npy((1, 1), content=b"\0" * 8)}), 8, 1),
    "unknown compression": lambda p: flip(archive(p, {"codes.npy": npy((1, 1), content=b"\0" * 8)}), 10, 97),
    "bzip2": lambda p: archive(p, {"codes.npy": npy((1, 1), content=b"\0" * 8)}, zipfile.ZIP_BZIP2),
    "10^12 elements": lambda p: archive(p, {"codes.npy": npy((10**12, 1))}),
    "negative": lambda p: archive(p, {"codes.npy": npy((-1, 8), content=b"\0" * 8)}),
    "no array": lambda p: archive(p, {"codes.npy": b"text"}),
    "version 9": lambda p: archive(p, {"codes.npy": b"\x93NUMPY\x09\x00" + bytes(100)}),
    "header cut": lambda p: archive(p, {"codes.npy": npy((1, 1))[:40]}),
    "header of brackets": lambda p: archive(p, {"codes.npy": b"\x93NUMPY\x01\x00\xe0\x2e" + b"(" * 12_000}),
    "objects": lambda p: np.savez(p, codes=np.array([{}], object)),
    "fields": lambda p: np.savez(p, codes=np.zeros(3, [("a", int)])),
    "bytes": lambda p: np.savez(p, codes=np.array([b"a"])),
    "dates": lambda p: np.savez(p, codes=np.array(["2020"], "M8")),
    "complex": lambda p: np.savez(p, codes=np.zeros((8, 2), complex)),
    "characters that are none": lambda p: archive(p, {"codes.npy": npy((1,), "<U1", b"\xff" * 4)}),
}


@pytest.mark.parametrize("kind", BAD_NPZ)
def test_bad_npz(tmp_path, kind):
    path = tmp_path / "x.npz"
    BAD_NPZ[kind](path)
    for read in (read_codes, evaluate_codes):
        with pytest.raises(InputError, match=r"x\.npz: ") as error:
            read(path)
        assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_a_damaged_deflate(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", codes=np.random.rand(50, 4), factors=VALUES)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[200:260] = b"\xaa" * 60
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match="damaged or foreign"):
        read_codes(tmp_path / "x.npz")


def test_a_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as out, out.open("codes.npy", "w") as member:
        member.write(npy((2**18, 160)))
        for _ in range(320):
            member.write(bytes(2**20))
    with pytest.raises(InputError, match="would fill .* bytes of memory out of"):
        read_codes(tmp_path / "x.npz")


GOOD = {"codes": np.random.default_rng(0).normal(size=(32, 4)), "factors": VALUES}


@pytest.mark.parametrize("names", [np.array("abc"), np.array([b"a"] * 5), np.arange(5), np.array([["a"] * 5]), "abcde"])
def test_factor_names_are_texts_one_for_each(tmp_path, names):
    np.savez(tmp_path / "x.npz", **GOOD, factor_names=names)
    with pytest.raises(InputError, match="factor_names (for 5 factors|are .S1)"):
        read_codes(tmp_path / "x.npz")


def test_whole_npz_of_every_kind_is_read(tmp_path):
    arrays = {
        "a": np.zeros((0, 3)), "b": np.array(2.5), "c": np.asfortranarray(GOOD["codes"]), 
        "d": np.array(["x", "yz", ""]), "e": VALUES.astype(">i4"), "f": np.ones(3, bool), "g": np.zeros((2, 0), "U3"),
    }  # fmt: skip
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        with open_zip(tmp_path / "x.npz") as opened:
            for key, array in arrays.items():
                found = read_array(tmp_path / "x.npz", opened, key)
                assert found.dtype == array.dtype and np.array_equal(found, array)


def test_boolean_factors_count_for_every_metric(tmp_path):
    np.savez(tmp_path / "x.npz", codes=np.random.rand(200, 3), factors=np.random.rand(200, 2) > 0.5)
    scores = evaluate_codes(tmp_path / "x.npz", metrics=("mig", "dci_quick", "factor_vae", "sap"), n_jobs=1)
    assert set(scores) > {"mig", "dci_quick", "factor_vae", "sap"}


def test_stored_images_that_end_behind_the_file(tmp_path):
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=LABELS)
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole.replace(b"(32, 8, 8, 3)", b"(99, 8, 8, 3)"))
    refuses(tmp_path / "x.npz", "damaged or foreign")


def test_rendered_files_are_still_read(tmp_path):
    write_shapes3d(tmp_path / "x.h5", open_dataset("sprites:3,2,2,2,2", 8))
    write_shapes3d(tmp_path / "empty.h5", open_dataset("sprites:1,1,1,1,1", 8))
    assert len(open_dataset(tmp_path / "x.h5")) == 48 and os.path.getsize(tmp_path / "empty.h5") < 2**20
