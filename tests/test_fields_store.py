"""Files of fields: rendered by any number of processes, gone on with after an interruption, and read."""

import fcntl
import json
import os
from concurrent.futures import BrokenExecutor

import h5py
import numpy as np
import pytest

from encdiff.data import describe
from encdiff.errors import InputError, Stopped
from encdiff.fields import equations, rendering
from encdiff.fields.darcy import Darcy
from encdiff.fields.equations import samples
from encdiff.fields.formats import open_fields
from encdiff.fields.rendering import render
from encdiff.fields.store import ABOUT, FieldData
from encdiff.fields.vorticity import Vorticity

FLOW = {"frames": 3, "duration": 0.1}


@pytest.fixture
def small(monkeypatch):
    """Two samples of 8x8 at a time."""
    monkeypatch.setattr(rendering, "BATCH", 2 * 2 * 64)


@pytest.fixture
def darcy(tmp_path):
    render(tmp_path / "darcy.h5", "darcy", 8, 9, seed=3, processes=1)
    return tmp_path / "darcy.h5"


def stop_after(number):
    """A progress that is interrupted when so many samples or more are done."""

    def progress(done, total):
        if done >= number:
            raise KeyboardInterrupt

    return progress


def test_sample_i_depends_on_seed_and_i_alone(tmp_path, small):
    render(tmp_path / "one.h5", "darcy", 8, 7, seed=3, processes=1)
    render(tmp_path / "two.h5", "darcy", 8, 11, seed=3, processes=2)
    one, two = (open_fields(tmp_path / f"{name}.h5").read(range(7)) for name in ("one", "two"))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[5:], samples(Darcy(8), 3, 5, 7))
    assert len(np.unique(one[:, 1, 0, 0])) == 7
    assert not np.array_equal(one[0], samples(Darcy(8), 4, 0, 1)[0])


def test_what_the_file_says(tmp_path):
    render(tmp_path / "flow.h5", "vorticity", 8, 2, seed=1, processes=1, **FLOW)
    data = open_fields(tmp_path / "flow.h5")
    np.testing.assert_array_equal(data.read([1, 0]), samples(Vorticity(8, **FLOW), 1, 0, 2)[::-1])
    assert data.read([]).shape == (0, 3, 1, 8, 8)
    assert data.grid == Vorticity(8).grid and data.grid.periodic
    np.testing.assert_array_equal(data.times, [0, 0.05, 0.1])
    assert repr(data) == "<flow.h5: 2 samples, 3 frames of 8x8, vorticity>"
    with h5py.File(tmp_path / "flow.h5") as file:
        assert file["fields"].dtype == np.float32 and file["fields"].shape == (2, 3, 1, 8, 8)
        about = json.loads(file.attrs[ABOUT])
    assert (about["kind"], about["seed"], about["settings"]["duration"]) == ("vorticity", 1, 0.1)


def test_an_interrupted_rendering_goes_on(tmp_path, small, monkeypatch):
    render(tmp_path / "whole.h5", "darcy", 8, 9, processes=1)
    path, partial = tmp_path / "darcy.h5", tmp_path / "darcy.h5.partial"
    with pytest.raises(Stopped, match=r"darcy.h5.partial: stopped; 4 of 9 samples are kept, the same command goes on"):
        render(path, "darcy", 8, 9, processes=1, progress=stop_after(3))
    assert partial.exists() and not path.exists()
    with pytest.raises(InputError, match=r"darcy.h5.partial: is unfinished, must hold 9 samples"):
        open_fields(partial)
    solved, told = [], []
    monkeypatch.setattr(
        equations, "generator", lambda seed, i, f=equations.generator: (solved.append(i), f(seed, i))[1]
    )
    render(path, "darcy", 8, 9, processes=1, progress=lambda *step: told.append(step))
    assert solved == [4, 5, 6, 7, 8] and told == [(4, 9), (6, 9), (8, 9), (9, 9)]
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes() and not partial.exists()


def test_what_was_being_written_when_a_process_was_killed_is_made_again(tmp_path, small):
    render(tmp_path / "whole.h5", "darcy", 8, 9, processes=1)
    path = tmp_path / "darcy.h5"
    with pytest.raises(Stopped):
        render(path, "darcy", 8, 9, processes=1, progress=stop_after(4))
    with h5py.File(tmp_path / "darcy.h5.partial", "r+") as file:
        file["fields"][4, 0] = 7
    render(path, "darcy", 8, 9, processes=1)
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_process_that_is_killed_is_told_of(tmp_path, small, monkeypatch):
    def killed(equation, seed, start, stop):  # as joblib raises it
        if start == 4:
            raise BrokenExecutor("a worker was killed")
        return samples(equation, seed, start, stop)

    monkeypatch.setattr(rendering, "samples", killed)
    with pytest.raises(OSError, match=r"darcy.h5.partial: a process was killed, .*; 4 of 9 samples are kept"):
        render(tmp_path / "darcy.h5", "darcy", 8, 9, processes=1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"count": 8}, "count 9, now it is 8"),
        ({"size": 16}, "size 8, now it is 16"),
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"high": 6.0}, "high 12.0, now it is 6.0"),
        ({"kind": "vorticity"}, "kind darcy, now it is vorticity"),
    ],
)
def test_other_settings_than_those_begun_with_are_refused(tmp_path, small, change, words):
    begun = {"kind": "darcy", "size": 8, "count": 9, "processes": 1}
    with pytest.raises(Stopped):
        render(tmp_path / "darcy.h5", **begun, progress=stop_after(3))
    before = (tmp_path / "darcy.h5.partial").read_bytes()
    with pytest.raises(
        InputError, match=f"darcy.h5.partial: was begun with {words}; render as it was begun, or delete"
    ):
        render(tmp_path / "darcy.h5", **begun | change)
    assert (tmp_path / "darcy.h5.partial").read_bytes() == before


def test_a_partial_file_that_is_none_of_ours(tmp_path):
    (tmp_path / "darcy.h5.partial").write_text("mine")
    with pytest.raises(InputError, match="darcy.h5.partial: a damaged or truncated HDF5 file"):
        render(tmp_path / "darcy.h5", "darcy", 8, 1, processes=1)
    assert (tmp_path / "darcy.h5.partial").read_text() == "mine"


@pytest.mark.parametrize(
    "change", [{"fields": None}, {"done": None}, {"done": np.zeros(1)}, {"done": np.int64(10)}, {"done": np.int64(-1)}]
)
def test_a_partial_file_that_is_damaged(tmp_path, small, change):
    with pytest.raises(Stopped):
        render(tmp_path / "darcy.h5", "darcy", 8, 9, processes=1, progress=stop_after(3))
    rewrite(tmp_path / "darcy.h5.partial", **change)
    with pytest.raises(InputError, match="darcy.h5.partial: is damaged; delete it to begin anew"):
        render(tmp_path / "darcy.h5", "darcy", 8, 9, processes=1)


def test_one_process_writes_at_a_time(tmp_path, small):
    with pytest.raises(Stopped):
        render(tmp_path / "darcy.h5", "darcy", 8, 9, processes=1, progress=stop_after(3))
    with open(tmp_path / "darcy.h5.partial", "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="darcy.h5.partial: another process is writing it"):
            render(tmp_path / "darcy.h5", "darcy", 8, 9, processes=1)


def test_a_full_disk_is_met_before_anything_is_solved(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(rendering, "samples", lambda *_: pytest.fail("solved"))
    with pytest.raises(OSError, match=r"No space left on device: '.*darcy.h5.partial'"):
        render(tmp_path / "darcy.h5", "darcy", 8, 1, processes=1)
    assert not list(tmp_path.iterdir())


def test_more_than_the_disk_holds(tmp_path):
    """HDF5 would end the process."""
    with pytest.raises(OSError, match=r"needs .* GiB of disk, .* are free: '.*darcy.h5.partial'"):
        render(tmp_path / "darcy.h5", "darcy", 1024, 2**31 - 1, processes=1)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_replaced_when_asked_for(darcy):
    with pytest.raises(InputError, match="darcy.h5: exists already, of other samples; "):
        render(darcy, "darcy", 8, 2, processes=1)
    render(darcy, "darcy", 8, 2, processes=1, overwrite=True)
    assert len(open_fields(darcy)) == 2
    made = darcy.stat().st_mtime_ns
    render(darcy, "darcy", 8, 2, processes=1)  # just these samples: they are there
    assert darcy.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    "given, words",
    [
        ({"kind": "heat"}, "kind is 'heat', must be one of darcy, vorticity"),
        ({"count": 0}, "count is 0, must be an integer of at least 1"),
        ({"seed": -1}, "seed is -1, must be"),
        ({"processes": 0}, "processes is 0, must be"),
        ({"size": 2}, "darcy: size is 2, must be an integer at least 4 and at most 1024"),
        ({"frames": 3}, "frames is no setting of darcy, must be one of size, low, high, alpha, tau"),
        ({"path": "nowhere/x.h5"}, "nowhere/x.h5: must be a file name in an existing folder"),
    ],
)
def test_impossible_arguments(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        render(**{"path": "x.h5", "kind": "darcy"} | given)
    assert not list(tmp_path.iterdir())


# ---- reading


def test_indices(darcy):
    data = open_fields(darcy)
    everything = data.read(np.arange(9))
    assert everything.dtype == np.float32 and everything.shape == (9, 2, 8, 8)
    np.testing.assert_array_equal(data.read([7, 0, 7, 1]), everything[[7, 0, 7, 1]])
    with pytest.raises(InputError, match=r"indices: -1..0; darcy.h5 has 0..8"):
        data.read([0, -1])
    with pytest.raises(InputError, match=r"indices: 9..9; "):
        data.read([9])
    with pytest.raises(InputError, match=r"indices: float64 of shape \(1,\); must be integers"):
        data.read([0.5])


def test_parts(darcy):
    data = open_fields(darcy)
    part = open_fields(f"{darcy}:2:6")
    assert len(part) == 4 and part.spec == f"{darcy.resolve()}:2:6"
    np.testing.assert_array_equal(part.read([3, 0]), data.read([5, 2]))
    with pytest.raises(InputError, match=r"indices: 4..4"):
        part.read([4])
    for wrong in ("6:6", "0:10"):
        with pytest.raises(InputError, match=f"part {wrong} of darcy.h5: must lie in 0:9 and hold a sample"):
            open_fields(f"{darcy}:{wrong}")


def test_statistics(darcy, monkeypatch):
    data = open_fields(darcy)
    fields = data.read(np.arange(9)).astype(np.float64)
    monkeypatch.setattr("encdiff.fields.store.CHUNK", 4 * 2 * 2 * 64)  # two samples at a time, and one
    mean, std = data.statistics()
    np.testing.assert_allclose(mean, fields.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, fields.std((0, 2, 3)), rtol=1e-12)
    summary = data.summary()
    np.testing.assert_array_equal(summary.low, fields.min((0, 2, 3)))
    np.testing.assert_array_equal(summary.high, fields.max((0, 2, 3)))
    some = data.summary(most=4, seed=1)
    assert some.samples == 4 and summary.samples == 9
    subset = np.random.default_rng(1).choice(9, 4, replace=False)
    np.testing.assert_allclose(some.mean, fields[subset].mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_array_equal(some.mean, data.statistics(4, 1)[0])
    with pytest.raises(InputError, match="most is 0"):
        data.statistics(0)


def test_statistics_of_what_varies_little(tmp_path):
    fields = 1000 + 1e-3 * np.random.default_rng(2).standard_normal((50, 1, 4, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", fields.astype(np.float32))
    exact = np.load(tmp_path / "x.npy").astype(np.float64).std()
    np.testing.assert_allclose(open_fields(tmp_path / "x.npy").statistics()[1], exact, rtol=1e-9)


def test_fingerprints(darcy, tmp_path):
    found = describe(open_fields(darcy))
    assert (found["images"], found["channels"], found["size"]) == (9, ["permeability", "pressure"], [8, 8])
    assert found == json.loads(json.dumps(describe(open_fields(darcy))))
    render(tmp_path / "other.h5", "darcy", 8, 9, seed=4, processes=1)
    assert describe(open_fields(tmp_path / "other.h5"))["sha256"] != found["sha256"]


# ---- files that are not what they should be


def rewrite(path, about=None, **datasets):
    """The file with other contents, None for without."""
    with h5py.File(path, "r+") as file:
        if about is not None:
            file.attrs[ABOUT] = np.bytes_(json.dumps(json.loads(file.attrs[ABOUT]) | about))
        for key, value in datasets.items():
            del file[key]
            if value is not None:
                file[key] = value


F = np.ones((9, 2, 8, 8), np.float32)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"fields": F[:, :1]}, r"fields are float32 \(9, 1, 8, 8\), must be float32 \(n, 2, 8, 8\)"),
        ({"fields": F.astype(np.float64)}, r"fields are float64 \(9, 2, 8, 8\), must be float32"),
        ({"fields": F[:0]}, r"fields are float32 \(0, 2, 8, 8\), must be"),
        ({"fields": None}, "fields are none, must be"),
        ({"fields": F[:4]}, "is unfinished, must hold 4 samples"),
        ({"done": None}, "is unfinished"),
        ({"done": np.int64(8)}, "is unfinished"),
        ({"about": {"version": 2}}, "is of version 2, must be 1"),
        ({"about": {"format": "x"}}, "an HDF5 file of another kind"),
        ({"about": {"channels": ["a"]}}, r"fields are .* must be float32 \(n, 1, 8, 8\)"),
        ({"about": {"channels": ["a", "a"]}}, "channels are a, a, must be at least one, each once"),
        ({"about": {"height": 10**9}}, "height is 1000000000, must be"),
        ({"about": {"domain": [0, 1]}}, "domain is"),
        ({"about": {"times": [1, 1]}}, r"times are \[1, 1\], must be increasing numbers"),
        ({"about": {"times": ["x"]}}, "times are"),
    ],
)
def test_foreign_contents(darcy, change, words):
    rewrite(darcy, **change)
    with pytest.raises(InputError, match=f"darcy.h5: {words}"):
        open_fields(darcy)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sample_that_is_not_finite_is_named(darcy, value):
    with h5py.File(darcy, "r+") as file:
        file["fields"][5, 1, 2, 3] = value
    data = open_fields(darcy)
    assert data.read([4, 6]).shape == (2, 2, 8, 8)
    with pytest.raises(InputError, match="darcy.h5: sample 5 holds NaN or infinity, must hold finite numbers"):
        data.read([6, 5, 4])
    with pytest.raises(InputError, match="sample 5"):
        data.statistics()
    with pytest.raises(InputError, match="sample 3 "):
        data.part(2, 9).read([3])


def test_truncated_files(darcy):
    content = darcy.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100, 10, 0):
        darcy.write_bytes(content[:size])
        with pytest.raises(InputError, match="darcy.h5: "):
            open_fields(darcy)


def test_text_of_variable_length_is_not_read(darcy):
    with h5py.File(darcy, "r+") as file:
        text = file.attrs[ABOUT].decode()
        file.attrs[ABOUT] = text
    with pytest.raises(InputError, match="an HDF5 file of another kind"):
        open_fields(darcy)


def test_damaged_bytes_are_no_crash(darcy):
    """In what HDF5 keeps before the samples."""
    content, rng = darcy.read_bytes(), np.random.default_rng(8)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[rng.integers(3000)] = rng.integers(256)
        darcy.write_bytes(damaged)
        try:
            data = open_fields(darcy)
            assert isinstance(data, FieldData) and data.read([0, 8]).shape[0] == 2
        except InputError as error:
            assert "darcy.h5" in str(error) and "\n" not in str(error)
