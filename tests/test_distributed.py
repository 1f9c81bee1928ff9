"""Several processes: what they do is what one does, whatever their number; `make distributed` kills them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import _several
import numpy as np
import pytest
import torch
from _tiny import SET_SMALLER, TINY

from encdiff import EncDiff, TrainConfig, open_dataset
from encdiff.data.loader import Batches
from encdiff.distributed.processes import Processes, processes
from encdiff.distributed.share import Share
from encdiff.errors import InputError, Lost, Told
from encdiff.training.step import Training

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def by_several(count: int, out: Path, *names: str) -> list[dict[str, dict]]:
    """What each of several processes gave, by the names of work: forks, which are spared the imports."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "tests/_several.py"), "--processes", str(count), str(out), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [{n: torch.load(out / f"{n}-{rank}.pt", weights_only=False) for n in names} for rank in range(count)]


def assert_near(ours: dict, expected: dict, bound: float) -> None:
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and name != "indices":
            assert (ours[name].double() - value.double()).abs().max() < bound, name


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_the_same_run(several: list[dict], one: dict) -> None:
    assert (several[0]["losses"] - one["losses"]).abs().max() < 1e-5
    assert torch.equal(torch.cat([found["indices"] for found in several], dim=1), one["indices"])
    for found in several[1:]:
        same = [torch.equal(value, several[0][k]) for k, value in found.items() if k not in ("indices", "scale")]
        assert all(same), "every process has the same weights, to the bit"
    assert_near(several[0], one, 1e-5)


def test_four_processes_make_the_run_of_one(tmp_path):
    several = [found["training"] for found in by_several(4, tmp_path / "four", "training")]
    assert_the_same_run(several, _several.training(tmp_path))


def test_two_processes_do_what_one_does(tmp_path):
    """At once: a run, parts of a batch and a first stage, shards, masters, scores, a resumed run."""
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    names = ["training", "parts", "shards", "masters", "first_stage", "scores", "resumed", "norm", "rows"]
    _several.run(two / "begun", steps=3, decay=0.0)
    shutil.copytree(two / "begun", one / "begun")
    first, second = by_several(2, two, *names)
    expected = {name: _several.WORK[name](one) for name in names[:-1]}
    assert_the_same_run([first["training"], second["training"]], expected["training"])
    for name, bound in (("parts", 1e-4), ("shards", 1e-4), ("first_stage", 1e-3), ("resumed", 1e-4)):
        assert_near(first[name], expected[name], bound)
        weights = {key: value for key, value in first[name].items() if key not in ("indices", "scale")}
        assert all(torch.equal(value, second[name][key]) for key, value in weights.items()), "to the bit"
    for name in ("parts", "shards", "resumed"):
        assert (first[name]["losses"] - expected[name]["losses"]).abs().max() < 1e-5
    assert first["parts"]["scale"] == pytest.approx(expected["parts"]["scale"], rel=1e-6)
    assert_near(first["masters"], expected["masters"], 5e-3)  # gradients are rounded to bfloat16 once more
    assert first["scores"] == expected["scores"] == second["scores"]
    assert_batch_norm(first["norm"], second["norm"])
    assert_rows(first["rows"], second["rows"])


def assert_batch_norm(*parts: dict) -> None:
    """Against PyTorch's, in float64, on all rows."""
    generator = torch.Generator().manual_seed(5)
    x = (1000 + torch.randn(12, 3, 5, 7, generator=generator)).double().requires_grad_()
    weight, bias = (torch.randn(3, generator=generator).double().requires_grad_() for _ in range(2))
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    y.pow(3).sum().backward()
    near = {"rtol": 1e-3, "atol": 2e-3}  # float32 holds x to 6e-5
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]).double(), y, **near)
    torch.testing.assert_close(torch.cat([part["dx"] for part in parts]).double(), x.grad, rtol=1e-3, atol=5e-3)
    for name, grad in (("dw", weight.grad), ("db", bias.grad)):
        torch.testing.assert_close(sum(part[name] for part in parts).double(), grad, rtol=1e-3, atol=5e-2)
    for part in parts:
        torch.testing.assert_close(part["mean"].double(), x.detach().mean((0, 2, 3)), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            part["variance"].double(), x.detach().var((0, 2, 3), correction=0), rtol=1e-4, atol=0
        )


def assert_rows(first: dict, second: dict) -> None:
    assert first["whole"] and second["whole"]
    assert (first["calls"], second["calls"]) == ([(0, 12)], [(12, 11)])
    said = ["process 1: the last one cannot", "batch is 0 in process 0, but 1 in process 1"]
    said += ["depth is 1 in process 0, but 2 in process 1"]
    assert first["said"] == second["said"] == said
    assert first["mean"] == second["mean"] == [0.5, 1.0]
    assert first["says"] + second["says"] == 1, "what several meet is said once"
    assert first["told"] == second["told"] == 0 and first["gathered"] == second["gathered"] == [0, 1]


def test_parts_are_one_batch_where_nothing_depends_on_the_others():
    """In eval mode, without batch statistics, the gradient of a batch in parts is that of the batch."""
    data, found = open_dataset(_several.DATA, 16), []
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        training = Training(EncDiff(TINY), replace(_several.RECIPE, accumulate=parts))
        training.model.eval()
        terms = training.advance(torch.from_numpy(data.images(np.arange(8))), torch.arange(8))
        found.append((float(terms["loss"]), float(terms["gradient_norm"])))
    assert found[1:] == [pytest.approx(found[0], rel=1e-5)] * 2


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (2, 1), (3, 2), (4, 3), (1, 5)])
def test_shares_are_the_whole_batch_part_by_part(size, parts):
    batch = size * parts * 2
    rows = [Share(rank, size, parts).rows(batch) for rank in range(size)]
    assert sorted(np.concatenate(rows)) == list(range(batch))
    each = batch // parts
    for part in range(parts):  # the same samples whatever the number of processes
        own = [r[part * 2 : part * 2 + 2] for r in rows]
        assert sorted(np.concatenate(own)) == list(range(part * each, part * each + each))


@pytest.mark.parametrize("resident", [None, 0.0])
def test_batches_of_shares_are_the_batch(resident):
    data = open_dataset(_several.DATA, 16)
    whole = Batches(data, 12, 7, resident)
    shares = [Batches(data, 12, 7, resident, share=Share(rank, 3, 2)) for rank in range(3)]
    for step in (0, 5, 11):  # 11: across the end of an epoch
        images, indices = whole.batch(step)
        for one in shares:
            own, at = one.batch(step)
            assert torch.equal(at, indices[torch.from_numpy(one.rows)])
            assert torch.equal(own, images[torch.from_numpy(one.rows)])


def test_all_processes_hold_the_data_or_none(monkeypatch):
    """One has less memory free than the others: none reads its part of a whole that nobody else reads."""
    monkeypatch.setattr(Processes, "gather", lambda self, fits: [fits, False])
    assert not Batches(open_dataset(_several.DATA, 16), 4).resident


def test_who_speaks_when_the_store_is_gone():
    """It was kept by a process that ended: everyone left says what it met, in place of a traceback."""
    everyone, kept = Processes(1, 2), torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    everyone._store = torch.distributed.TCPStore("localhost", kept.port, is_master=False)
    assert everyone.says(Lost("x")) and not everyone.says(Lost("y")) and not everyone.says(Told("z"))
    del kept
    assert everyone.says(Lost("x"))


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(InputError, match=r"batch_size is 10, must be a multiple of 6, for 3 processes x 2 parts"):
        Share(0, 3, 2).rows(10)
    with pytest.raises(InputError, match=r"batch_size is 8, must be a multiple of 3, for 3 parts \(accumulate\)"):
        Training(EncDiff(TINY), TrainConfig(batch_size=8, accumulate=3))


@pytest.mark.parametrize(("count", "multiple"), [(0, 1), (1, 4), (23, 4), (100, 7), (5, 1)])
def test_parts_of_rows_follow_one_another(count, multiple):
    for size in (1, 2, 3, 5):
        parts = [Processes(rank, size).part(count, multiple) for rank in range(size)]
        assert parts[0][0] == 0 and parts[-1][1] == count
        assert all(a[1] == b[0] for a, b in zip(parts, parts[1:], strict=False))
        assert all(start % multiple == 0 or start == count for start, _ in parts)


def test_one_process_alone_needs_no_launch():
    alone = processes()
    assert (alone.rank, alone.size, alone.first) == (0, 1, True)
    x = torch.tensor([3.0])
    alone.mean_(x)
    assert x == 3 and alone.gather(5) == [5] and alone.by_first(lambda: 7) == 7 and alone.stacked(x).shape == (1, 1)


def test_engine_of_a_model_in_shards(monkeypatch):
    monkeypatch.setattr("encdiff.training.descent.processes", lambda: Processes(0, 2))
    monkeypatch.setattr("encdiff.training.descent.share_start", lambda *given: None)
    monkeypatch.setattr("encdiff.training.descent.shard", lambda *given: None)
    with pytest.raises(InputError, match="engine is 'compile', must be 'eager' or 'auto' with shard"):
        Training(EncDiff(TINY), TrainConfig(batch_size=8, engine="compile", shard=True))


def test_a_launch_is_stopped_and_refused_as_one_process_is(encdiff, tmp_path):
    """SIGTERM ends it with 0, one checkpoint and one line; what cannot be ends it with 2 and one line."""
    run, data = tmp_path / "run", ["--data", "procedural:2,2,2,2,2,2", "--batch-size", "6"]
    begin = ["train", "--processes", "2", "--run", str(run), *data]
    command = [
        sys.executable,
        "-m",
        "encdiff",
        *begin,
        *SET_SMALLER,
        "--steps",
        "100000",
        "--checkpoint-every",
        "100000",
    ]
    training = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)
    while training.poll() is None and not (run / "log.csv").is_file():
        time.sleep(0.1)
    code, refused = encdiff("train", "--run", run, *data, "--overwrite")
    training.send_signal(signal.SIGTERM)
    said, wrong = training.communicate(timeout=120)
    assert training.returncode == 0 and wrong == "", wrong
    assert said.count("stopped after step") == 1 and (run / "checkpoint.safetensors").is_file()
    assert code == 2 and refused.startswith("error: ") and "a training writes to it now, process" in refused


def test_commands_that_are_for_one_process():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1"]
    command += ["-m", "--", "encdiff", "swap", "room32"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode and "error: swap: is for one process; start it without torchrun\n" in done.stderr


def test_who_is_missing(tmp_path):
    """One of two machines never comes: an end in time, with a line that says so."""
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun keeps one
    kept = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "ENCDIFF_TIMEOUT": "2"}
    environment = ENVIRONMENT | alone | kept
    command = [sys.executable, "-m", "encdiff", "train", "--run", str(tmp_path / "run"), "--data", "procedural"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    where = f"localhost:{store.port}"
    assert done.stderr == f"error: of 2 processes 1 did not come to {where} within 2 s; start all of them\n"
