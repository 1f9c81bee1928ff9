"""Opening data, float and back, and batches that are a function of the step."""

import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encdiff.data import Dataset, open_dataset, to_float, to_uint8
from encdiff.data.folder import ImageFolder
from encdiff.data.loader import LISTED, Batches, read_all
from encdiff.data.order import KeyedPermutation
from encdiff.data.procedural import ProceduralShapes3D
from encdiff.data.readahead import BYTES, DEPTH, ReadAhead
from encdiff.data.shapes3d import Shapes3D, write_shapes3d
from encdiff.errors import InputError


class Numbered(Dataset):
    """Image i is filled with i."""

    name, image_size = "numbered", 2

    def __init__(self, count):
        self.count, self.threads = count, set()

    def __len__(self):
        return self.count

    def images(self, indices):
        self.threads.add(threading.current_thread())
        return np.tile(self.check_indices(indices)[:, None, None, None].astype(np.uint8), (1, 2, 2, 3))


@settings(max_examples=40)
@given(st.integers(1, 50), st.integers(1, 120), st.integers(0, 2**40), st.integers(0, 10**9))
def test_indices_follow_the_shuffled_epochs(count, batch, seed, step):
    indices = Batches(Numbered(count), batch, seed).batch_indices(step)
    assert indices.dtype == np.int64 and indices.shape == (batch,)
    for i in (0, batch // 2, batch - 1):
        epoch, offset = divmod(step * batch + i, count)
        assert indices[i] == np.random.default_rng((seed, epoch)).permutation(count)[offset]


@pytest.mark.parametrize("count, batch", [(10, 4), (7, 7), (5, 13), (1, 3)])
def test_every_epoch_visits_everything_once(count, batch):
    batches = Batches(Numbered(count), batch, seed=3)
    stream = np.concatenate([batches.batch_indices(s) for s in range(4 * count)])
    for epoch in stream[: len(stream) // count * count].reshape(-1, count):
        assert sorted(epoch) == list(range(count))


def test_order_depends_on_seed_and_step_only():
    one, two = Batches(Numbered(100), 16, seed=1), Batches(Numbered(100), 16, seed=1)
    forward = [one.batch_indices(s) for s in range(40)]
    for step in np.random.default_rng().permutation(40):
        np.testing.assert_array_equal(two.batch_indices(int(step)), forward[step])
    assert (Batches(Numbered(100), 16, seed=2).batch_indices(0) != forward[0]).any()
    assert (np.concatenate(forward[:6]) != np.concatenate(forward[7:13])).any()


def test_images_are_those_of_the_indices():
    data = ProceduralShapes3D(6, (2, 2, 2, 2, 2, 3))
    resident, streamed = Batches(data, 5, 9), Batches(data, 5, 9, resident_gib=0)
    assert resident.resident and not streamed.resident
    for step in [0, 1, 2, 30, 31, 7, 7, 0]:  # in order, and jumping as a resumed run does
        expected = data.images(resident.batch_indices(step))
        for batches in (resident, streamed):
            images = batches.images(step)
            assert images.dtype == torch.uint8 and images.shape == (5, 6, 6, 3)
            np.testing.assert_array_equal(images.numpy(), expected)


def test_budget_is_in_bytes_of_the_set():
    data = Numbered(100)  # 1200 bytes
    assert Batches(data, 3, resident_gib=1200 / 2**30).resident
    assert not Batches(data, 3, resident_gib=1199 / 2**30).resident


def test_next_batches_are_read_by_a_thread():
    data = Numbered(50)
    batches = Batches(data, 4, resident_gib=0)
    batches.images(0)
    batches._ahead.wait()
    assert len(data.threads) == 1 and threading.current_thread() not in data.threads


def test_a_failing_read_is_raised():
    data = Numbered(50)
    batches = Batches(data, 4, resident_gib=0)
    batches.images(0)
    batches._ahead.wait()

    def fail(indices):
        raise InputError("7.png: not a readable image")

    data.images = fail
    for step in range(1, 1 + DEPTH):  # were read before
        batches.images(step)
    for _ in range(2):
        with pytest.raises(InputError, match=r"7\.png"):
            batches.images(1 + DEPTH)


class Many(Numbered):
    """Of a billion; read by many threads, in parts whose sizes are kept."""

    images_per_thread = 8

    def __init__(self, count, shape=(2, 2, 3)):
        super().__init__(count)
        self.shape, self.parts = shape, []

    @property
    def sample_shape(self):
        return self.shape

    def read(self, indices):
        self.threads.add(threading.current_thread())
        self.parts.append(len(indices))
        pixels = (indices % 251).astype(np.uint8)[:, None, None, None]
        return np.broadcast_to(pixels, (len(indices), *self.shape)).copy()


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr("encdiff.data.readahead._cores", lambda: 3)


def test_a_billion_in_no_memory():
    tracemalloc.start()
    begin = time.thread_time()
    batches = Batches(Many(10**9), 500, 11)
    seen = np.concatenate([batches.batch_indices(step) for step in (0, 1, 10**6, 5 * 10**12)])
    assert time.thread_time() - begin < 0.5 and tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()
    assert seen.dtype == np.int64 and len(set(seen.tolist())) > 1990 and seen.min() >= 0 and seen.max() < 10**9
    epoch, offset = divmod(10**6 * 500, 10**9)
    np.testing.assert_array_equal(seen[1000:1500], KeyedPermutation(10**9, 11, epoch)[offset + np.arange(500)])


@pytest.mark.parametrize("over", [0, 1])
def test_the_order_is_a_list_up_to_its_length(over, monkeypatch):
    monkeypatch.setattr("encdiff.data.loader.LISTED", 1000)
    count = 1000 + over
    batches = Batches(Numbered(count), 300, 5)
    stream = np.concatenate([batches.batch_indices(step) for step in range(12)])
    for epoch in range(3):
        listed = np.random.default_rng((5, epoch)).permutation(count)
        expected = KeyedPermutation(count, 5, epoch)[np.arange(count)] if over else listed
        np.testing.assert_array_equal(stream[epoch * count : (epoch + 1) * count], expected)


def test_lists_reach_to_a_length_that_is_never_changed():
    assert LISTED == 2**24, "else runs on sets between the two would resume on other images"


def test_threads_share_a_batch(cores):
    data = Many(10**9)
    batches = Batches(data, 100, 3)
    for step in (0, 1, 2, 40, 41, 3, 3, 0):
        images, indices = batches.batch(step)
        np.testing.assert_array_equal(indices.numpy(), batches.batch_indices(step))
        np.testing.assert_array_equal(
            images.numpy(), np.broadcast_to((indices % 251).view(-1, 1, 1, 1), (100, 2, 2, 3))
        )
    batches._ahead.wait()
    assert set(data.parts) == {33, 34} and 1 < len(data.threads) <= 3
    assert threading.current_thread() not in data.threads


@pytest.mark.parametrize("count, parts", [(1, [1]), (15, [15]), (16, [8, 8]), (23, [11, 12])])
def test_small_batches_are_cut_less(cores, count, parts):
    data = Many(10**9)
    ReadAhead(data).read(0, lambda step: np.arange(count if step == 0 else 0))
    assert sorted(n for n in data.parts if n) == parts


def test_a_part_that_fails_fails_the_batch(cores):
    data = Many(10**9)
    batches = Batches(data, 90, 3)
    bad = batches.batch_indices(4)[77]

    def read(indices):
        if bad in indices:
            raise InputError(f"{bad}.png: not a readable image")
        return Many.read(data, indices)

    data.read = read
    for step in (3, 4, 4, 5, 4, 6):
        if step == 4:
            with pytest.raises(InputError, match=f"{bad}.png"):
                batches.images(step)
        else:
            assert batches.images(step).shape == (90, 2, 2, 3)


@pytest.mark.parametrize("side, depth", [(2, DEPTH), (1672, 3), (4000, 1)])
def test_batches_ahead_are_bounded_by_memory(side, depth):
    """Of 10 images; of those nothing is made."""
    ahead, asked = ReadAhead(Many(100, (side, side, 3))), []
    ahead._begin = lambda batches: [Reading(asked.append(0), batch) for batch in batches]
    ahead.read(0, lambda step: np.arange(10))
    assert len(asked) == 1 + depth == 1 + max(1, min(DEPTH, BYTES // (30 * side**2)))
    ahead.read(1, lambda step: np.arange(10))
    assert len(asked) == 2 + depth, "one more"


class Reading:
    parts, shared = (), False

    def __init__(self, _, indices):
        self.indices = indices

    def result(self):
        return None


@pytest.mark.parametrize("jumps", [(0, 1, 2, 3, 30, 31, 32, 33, 34, 35, 2), (5, 7, 8, 10, 13, 9, 9)])
def test_several_batches_at_once(cores, jumps):
    """Of seven images each, of which thirty are worth a thread."""
    data = Many(10**9)
    data.images_per_thread = 30
    batches = Batches(data, 7, 3)
    for step in jumps:
        images, indices = batches.batch(step)
        np.testing.assert_array_equal(indices.numpy(), batches.batch_indices(step))
        np.testing.assert_array_equal(images.numpy(), np.broadcast_to((indices % 251).view(-1, 1, 1, 1), (7, 2, 2, 3)))
        batches._ahead.wait()
        assert 4 <= len(batches._ahead._begun) <= 8
    assert set(data.parts) == {7, 28}


def test_one_that_fails_among_several_fails_alone(cores):
    data = Many(10**9)
    data.images_per_thread = 30
    batches = Batches(data, 7, 3)
    bad = batches.batch_indices(4)[5]

    def read(indices):
        if bad in indices:
            raise InputError(f"{bad}.png: not a readable image")
        return Many.read(data, indices)

    data.read = read
    for step in range(9):
        if step == 4:
            with pytest.raises(InputError, match=f"{bad}.png"):
                batches.images(step)
        else:
            assert batches.images(step).shape == (7, 2, 2, 3)


def test_threads_end_with_their_batches():
    batches = Batches(Many(10**9), 16)
    batches.images(0)
    threads = list(batches._ahead._pool._threads)
    assert threads and Batches(Numbered(9), 3)._ahead is None, "a resident set has none"
    del batches
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_changing_a_batch_changes_nothing_else():
    batches = Batches(Numbered(9), 9)
    batches.images(0).zero_()
    assert batches.images(1).sum() == 12 * sum(range(9))


def test_read_all_reports_progress():
    seen = []
    images = read_all(Numbered(1100), lambda done, total: seen.append((done, total)))
    assert images.shape == (1100, 2, 2, 3) and seen == [(512, 1100), (1024, 1100), (1100, 1100)]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Batches(Numbered(3), 0), "batch_size: 0"),
        (lambda: Batches(Numbered(3), -4), "batch_size: -4"),
        (lambda: Batches(Numbered(3), 1, seed=-1), "seed: -1"),
        (lambda: Batches(Numbered(0), 1), "holds no images"),
        (lambda: Batches(Numbered(3), 1).batch_indices(-1), "step: -1"),
    ],
)
def test_bad_batches(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_float_and_back(kind):
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1) ^ np.array([0, 85, 170], np.uint8)
    floats = to_float(kind(levels))
    assert floats.shape == (1, 3, 16, 16) and floats.dtype == torch.float32 and floats.is_contiguous()
    assert floats.min() == -1 and floats.max() == 1
    np.testing.assert_allclose(floats[0, 1, 3, 5], levels[0, 3, 5, 1] / 127.5 - 1, atol=1e-6)
    back = to_uint8(floats)
    assert back.dtype == torch.uint8
    np.testing.assert_array_equal(back.numpy(), levels)


def test_to_uint8_clips_and_rounds():
    values = torch.tensor([-7.0, 9.0, 0.0039 * 0.49]).reshape(1, 3, 1, 1).requires_grad_()
    assert to_uint8(values).flatten().tolist() == [0, 255, 128]


@pytest.mark.parametrize(
    "call, bad",
    [
        (to_float, np.zeros((2, 4, 4, 3), np.float32)),
        (to_float, np.zeros((4, 4, 3), np.uint8)),
        (to_float, np.zeros((2, 3, 4, 4), np.uint8)),
        (to_uint8, torch.zeros(2, 4, 4, 3)),
        (to_uint8, torch.zeros(2, 3, 4, 4, dtype=torch.uint8)),
        (to_uint8, torch.zeros(3, 4, 4)),
    ],
)
def test_wrong_images(call, bad):
    with pytest.raises(InputError, match=r"images: .* must be (uint8|float) of shape \(n"):
        call(bad)


def test_open_procedural():
    full, part = open_dataset("procedural"), open_dataset("procedural:5,5,5,4,4,5", 16)
    assert isinstance(full, ProceduralShapes3D) and len(full) == 480_000 and full.image_size == 64
    assert part.factor_sizes == (5, 5, 5, 4, 4, 5) and part.image_size == 16


def test_open_tells_files_by_content(tmp_path, monkeypatch):
    room = ProceduralShapes3D(8, (1, 1, 1, 2, 2, 2))
    write_shapes3d(tmp_path / "misnamed.npz", room)
    np.savez(tmp_path / "other.npz", images=room.images(range(8)), labels=room.labels(range(8)))
    (tmp_path / "other.npz").rename(tmp_path / "misnamed.h5")
    for name in ("misnamed.npz", "misnamed.h5"):
        data = open_dataset(tmp_path / name, 4)
        assert isinstance(data, Shapes3D) and len(data) == 8 and data.image_size == 4
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    assert isinstance(open_dataset(str(tmp_path), 5), ImageFolder)
    monkeypatch.setenv("ENCDIFF_DATA", str(tmp_path))
    assert len(open_dataset("misnamed.npz")) == 8
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(InputError, match=f"not found here nor in ENCDIFF_DATA={tmp_path}"):
        open_dataset("absent.h5")


@pytest.mark.parametrize("spec", ["procedural:", "procedural:a,b", "procedural:1;2", "absent.h5", ""])
def test_open_lists_what_is_accepted(spec, tmp_path, monkeypatch):
    monkeypatch.delenv("ENCDIFF_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match=r"procedural\[:5,5,5,4,4,5\].*\.h5.*npz.*folder"):
        open_dataset(spec or tmp_path / "text")


def test_open_refuses(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="image_size: None; a folder of images needs one"):
        open_dataset(tmp_path)
    with pytest.raises(InputError, match="grid: 2 entries"):
        open_dataset("procedural:3,4")
    with pytest.raises(InputError, match="image_size: 0"):
        open_dataset("procedural", 0)


def test_large_chunks_are_warned_of(caplog):
    class Chunked(Dataset):
        name, image_size, images_per_chunk = "chunked", 4, 1000

        def __len__(self):
            return 10

        def images(self, indices):
            return np.zeros((len(indices), 4, 4, 3), np.uint8)

    Batches(Chunked(), 8, resident_gib=0)
    assert "chunked keeps 1000 images in a chunk" in caplog.text and "encdiff data convert" in caplog.text
    caplog.clear()
    Batches(Chunked(), 8)  # held in memory: read once, in order
    assert not caplog.text
