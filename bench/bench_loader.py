"""Random batches of a data set that is not kept in memory, against what bounds them.

`ours` is `Batches`, reading ahead; `bound`, for arrays, is one plain copy of as many bytes, and for pictures Pillow
decoding, resizing and cropping them in as many threads, without batches, order or checks. `samples_per_second` are
images; files lie in the page cache, as they do from the second epoch on if they fit.

    python -m bench.bench_loader [rounds [kind ...]]    # images/s of each kind, the best of interleaved rounds
"""

import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import torch
from PIL import Image, ImageOps

from bench.cases import cases
from encdiff.data import Dataset, open_dataset
from encdiff.data.loader import Batches
from encdiff.data.readahead import DEPTH, ReadAhead
from encdiff.data.shapes3d import write_shapes3d
from encdiff.data.sharding import write_shards

SIZE, PHOTO = 64, 256  # pixels on a side: of the images of a batch, and of the files that they are decoded from
BATCH, COUNT, SHARDS = 128, {"shards": 24_000, "h5": 4_000, "jpeg": 1_000, "lmdb": 1_000}, 8
KINDS = tuple(COUNT)
CASES = [(kind, impl) for kind in KINDS for impl in ("ours", "bound")]


class Pixels(Dataset):
    """Random ones, as a grid of one factor."""

    name, image_size, factor_names = "pixels", SIZE, ("number",)

    def __init__(self, count: int):
        self.factor_sizes, self.label_values = (count,), (np.arange(count, dtype=float),)

    def images(self, indices):
        rng = np.random.default_rng(int(indices[0]))
        return rng.integers(0, 256, (len(indices), SIZE, SIZE, 3), np.uint8)


def photo(seed: int, path: Path) -> None:
    """A JPEG of smooth colours and some noise, 20 to 30 kB."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
    smooth = np.asarray(small.resize((PHOTO, PHOTO), Image.Resampling.BICUBIC), np.float32)
    noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(path, quality=90)


def make(kind: str, count: int, folder: Path) -> Dataset:
    """So many images of a kind, written into the folder and opened."""
    if kind == "shards":
        write_shards(folder / kind, Pixels(count), 128 + math.ceil(count / SHARDS) * 3 * SIZE**2)
    elif kind == "h5":
        write_shapes3d(folder / kind, open_dataset("procedural", SIZE).select(f"10,10,{max(1, count // 400)},2,2,1"))
    else:
        (folder / "jpeg").mkdir(exist_ok=True)
        files = [folder / "jpeg" / f"{i:05}.jpg" for i in range(count)]
        for i, file in enumerate(files):
            photo(i, file)
        if kind == "lmdb":
            with lmdb.open(str(folder / kind), map_size=2**30) as database, database.begin(write=True) as transaction:
                for file in files:
                    transaction.put(file.name.encode(), file.read_bytes())
    return open_dataset(folder / kind, SIZE)


def ours(data: Dataset, batch: int) -> Callable[[], torch.Tensor]:
    """Batch after batch."""
    batches, steps = Batches(data, batch, resident_gib=0), itertools.count()
    return lambda: batches.images(next(steps))


def bound(data: Dataset, batch: int, folder: Path) -> Callable[[], object]:
    files = sorted((folder / "jpeg").glob("*.jpg"))
    if not files:
        whole, out = data.images(np.arange(len(data))), np.empty((batch, SIZE, SIZE, 3), np.uint8)
        parts = itertools.cycle(np.split(whole, np.arange(batch, len(whole) - batch + 1, batch)))
        return lambda: np.copyto(out, next(parts)[: len(out)])
    pool, rows = ThreadPoolExecutor(ReadAhead(data).threads), itertools.cycle(files)

    def decode(file: Path) -> np.ndarray:
        with Image.open(file) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC))

    return lambda: list(pool.map(decode, itertools.islice(rows, batch)))


@cases("kind, impl", CASES, lambda kind, impl: kind == "shards")
def test_batches(measure, smoke, tmp_path, kind, impl):
    count, batch = (16, 4) if smoke else (COUNT[kind], BATCH)
    data = make(kind, count, tmp_path)
    batches = Batches(data, batch, resident_gib=0)
    for step in (0, 1, 7):
        images, indices = batches.batch(step)
        np.testing.assert_array_equal(images, data.images(indices.numpy()))
    run = ours(data, batch) if impl == "ours" else bound(data, batch, tmp_path)
    labels = {"op": "batches", "impl": impl, "phase": "read", "shape": f"{kind} {batch}x{SIZE}x{SIZE}"}
    moved = 2 * batch * 3 * SIZE**2  # of float32 is the copy that they are held against
    measure(run, **labels, dtype=torch.float32, bytes=moved, flops=0, samples=batch, why_not="it reads files")


def main() -> None:
    """The two take turns of four batches and 0.1 seconds at least; the best turn of each counts."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 25
    print(f"best of {rounds} rounds, batches of {BATCH} of {SIZE}x{SIZE}, images/s")
    for kind in sys.argv[2:] or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            data = make(kind, COUNT[kind], Path(folder))
            rates = compare(Batches(data, BATCH, resident_gib=0), bound(data, BATCH, Path(folder)), rounds)
        share = 100 * rates[0] / rates[1]
        print(f"{kind:8} ours {rates[0]:10,.0f}, bound {rates[1]:10,.0f}: {share:.0f} %", flush=True)


def compare(batches: Batches, plain: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Images a second of both."""
    steps, ours, others = itertools.count(), 0.0, 0.0
    for _ in range(rounds):
        for _ in range(DEPTH + 1):  # what was read ahead took no time
            batches.images(next(steps))
        ours = max(ours, rate(lambda: batches.images(next(steps))))
        batches._ahead.wait()  # else its threads work beside the other
        others = max(others, rate(plain))
    return ours, others


def rate(run: Callable[[], object], seconds: float = 0.1, least: int = 4) -> float:
    begin, calls = time.perf_counter(), 0
    while calls < least or time.perf_counter() - begin < seconds:
        run()
        calls += 1
    return calls * BATCH / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
