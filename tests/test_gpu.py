"""bench.gpu without a GPU: what it says, what it keeps when something fails, and that it runs."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench.gpu import __main__ as gpu
from bench.gpu import checks, curves, room, shipped, workers
from bench.gpu.lab import Lab
from bench.gpu.steps import group_of
from encdiff import EncDiff
from encdiff.data.procedural import FACTOR_SIZES, SHAPES, factor_labels, render, view

SET_BY_MAIN = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "ENCDIFF_COMMIT", "ENCDIFF_SELF_CHECK")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What `main` sets is undone."""
    for name in SET_BY_MAIN:
        monkeypatch.setenv(name, os.environ.get(name, "unset"))


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path, tmp_path / "caches", cpu=True, end=time.monotonic() + 600)


class Session(gpu.Session):
    """Without workers but those it is given."""

    def start_workers(self):
        pass


# ---- the command line


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no GPU" in said and "--cpu" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "machine,speed"], "--only: no block 'speed', must be among beside, machine, "),
        (["--call", "4"], "argument --call: invalid choice: "),
        (["--minutes", "few"], "argument --minutes: invalid float value: 'few'"),
    ],
)
def test_an_unknown_choice_is_refused_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu.Session, "run", lambda session: pytest.fail("not refused"))
    with pytest.raises(SystemExit) as stopped:
        gpu.main([str(tmp_path / "out"), "--cpu", *arguments])
    *_, last = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and last.startswith(f"python -m bench.gpu: error: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option, known", [("--peers", "published step, "), ("--runs", "seed0, ")])
def test_a_peer_or_run_that_is_none_is_refused_in_one_line(option, known, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu.Session, "run", lambda session: pytest.fail("not refused"))
    assert gpu.main([str(tmp_path / "out"), "--cpu", option, "nobody"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"bench.gpu: {option}: no 'nobody', must be among {known}") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_block_of_a_call_has_its_time_and_its_code():
    for call in gpu.CALLS.values():
        assert set(call.split(",")) <= gpu.SECONDS.keys()
    assert all(hasattr(gpu.Session, f"block_{name}") or name in gpu.MEASURES for name in gpu.SECONDS)
    assert all(callable(gpu.named(name)) for name in (*gpu.MEASURES.values(), *gpu.LINES_OF.values()))


# ---- blocks


@pytest.mark.parametrize("failure", ["raises", "late"])
def test_a_block_that_fails_leaves_what_it_has_and_the_next_one_runs(failure, lab, monkeypatch, capsys):
    def block_sampling(session, seconds):
        session.lab.save("sampling", {"seconds": {"ours, B=1": 0.25}})
        if failure == "raises":
            raise ValueError("first\nsecond")
        time.sleep(60)

    monkeypatch.setitem(gpu.SECONDS, "sampling", 2)
    monkeypatch.setattr(Session, "block_sampling", block_sampling, raising=False)
    monkeypatch.setattr(Session, "block_machine", lambda session, seconds: ["a machine"], raising=False)
    Session(lab, ["sampling", "machine"]).run()
    summary = (lab.out / "summary.md").read_text()
    assert {"raises": "ValueError: first second\n", "late": "Late: out of time after 2 s\n"}[failure] in summary
    assert "250.000 ms an evaluation" in summary and summary.endswith("a machine\n")


def test_a_block_without_time_is_not_begun(lab):
    lab.end = time.monotonic() + gpu.TAIL + 1
    Session(lab, ["machine"]).run()
    assert "Late: not begun: no time left" in (lab.out / "summary.md").read_text()


def test_after_a_cuda_error_the_rest_runs_in_a_new_process(lab, monkeypatch):
    def fail(session, seconds):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def execv(path, arguments):
        raise SystemExit(" ".join(arguments[1:]))

    monkeypatch.setattr(Session, "block_step", fail, raising=False)
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit, match=r"^-m bench.gpu \S+ --go-on --only machine,ops --minutes [0-9.]+ --caches "):
        Session(lab, ["step", "machine", "ops"]).run()
    assert "illegal memory access" in Session(lab, []).said["step"][1][0]  # which the new process then finds


# ---- workers


def worker(lab, name: str, code: str) -> workers.Worker:
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    return workers.Worker(name, process, lab.out / f"{workers.slug_of(name)}.json")


def test_a_worker_that_fails_or_is_late_is_reported(lab):
    session = Session(lab, [])
    session.workers = {
        "right 0/2": worker(lab, "right 0/2", "import sys; sys.exit(3)"),
        "right 1/2": worker(lab, "right 1/2", "import time; time.sleep(60)"),
        "build": worker(lab, "build", f"open({str(lab.out / 'build.json')!r}, 'w').write('{{\"cuda\": true}}')"),
        "tests": worker(lab, "tests", "import sys; sys.exit(1)"),
    }
    for name in ("right 0/2", "build", "tests"):
        session.workers[name].process.wait()
    right = "\n".join(session.block_beside(3.2))
    assert "right 0/2: exit status 3, see its log" in right and "right 1/2: out of time" in right
    assert 'build: {"cuda": true}' in right
    assert session.workers["right 1/2"].process.poll() is not None
    assert [found["ok"] for found in lab.load("right")] == [False, False]
    assert "tests: error tests: exit status 1, see its log" in right and "compiled peers ready: none" in right


def test_what_a_worker_raises_is_its_result(lab, capsys):
    (lab.out / "parts").mkdir()
    workers.work(lab, "peer nobody", 0)
    assert json.loads((lab.out / "parts/peer-nobody.json").read_text()) == {"error": "KeyError: 'nobody'"}


# ---- what is said


def test_the_summary_has_at_most_120_lines(lab):
    session = Session(lab, [])
    session.said = {name: (1.0, [f"{name} {n}" for n in range(40)]) for name in gpu.SECONDS}
    session.said["machine"] = (1.0, ["one\nand two"])
    session.write_summary()
    lines = (lab.out / "summary.md").read_text().splitlines()
    assert 110 < len(lines) <= 120 and "one and two" in lines
    for name in set(gpu.SECONDS) - {"machine"}:
        shown = sum(line.startswith(f"{name} ") for line in lines)
        assert f"... {40 - shown} more in said.json" in lines
    assert len(json.loads((lab.out / "said.json").read_text())["step"][1]) == 40


@pytest.mark.parametrize(
    "kernel, group",
    [
        ("cross_attention_folded_fwd_kernel", "cross-attention"),
        ("self_attention_bwd_kernel", "self-attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "self-attention"),
        ("mlp_bank_bwd_kernel_sum", "MLP bank"),
        ("adamw_kernel", "adamw"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("nvjet_tst_128x64_64x6_2x1_v_bz_TNT", "products"),
        ("triton_poi_fused__to_copy_add_3", "Inductor"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, ...>", "fills"),
        ("a name of no kind", "other"),
    ],
)
def test_kernels_are_grouped_by_name(kernel, group):
    assert group_of(kernel) == group


def test_cases_that_did_not_run_are_wrong():
    said = checks.lines([checks.missing("right 0/2", "out of time")])
    assert said[0].startswith("1 cases, 1 wrong") and "out of time" in said[1]


# ---- images


def test_images_coloured_on_the_device_are_the_renderers(tmp_path):
    size, labels = 4, factor_labels()
    views = [view(s, SHAPES[int(k)], o, size) for s in labels[3] for k in labels[4] for o in labels[5]]
    np.save(tmp_path / "views.npy", np.stack(views))
    images = room.coloured(torch.device("cpu"), size, tmp_path / "views.npy")
    some = np.random.default_rng(0).integers(len(images), size=200)
    factors = np.stack(np.unravel_index(some, FACTOR_SIZES), axis=1)
    assert images.shape == (480_000, size, size, 3) and np.array_equal(images[some], render(factors, size))


# ---- all together


def test_the_whole_script_without_a_gpu(tmp_path):
    out, root = tmp_path / "out", Path(gpu.ROOT)
    command = [sys.executable, "-m", "bench.gpu", str(out), "--cpu", "--only", "machine,step,sampling,doctor"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith((out / "summary.md").read_text() + "\n")
    lines = (out / "summary.md").read_text().splitlines()
    blocks = [line.split(",")[0] for line in lines if line.startswith("==")]
    assert blocks == ["== machine", "== step", "== sampling", "== doctor"]
    assert len(lines) <= 120 and not any("Error" in line or "FAILED" in line for line in lines)
    assert lines[-1] == "12 of 12 checks made, 0 wrong"
    for name in ("machine.json", "step.json", "sampling.json", "doctor.json", "results.tgz"):
        assert (out / name).exists(), name


# ---- models for the package


def test_models_for_the_package_are_trained_side_by_side_and_kept_in_half(lab, monkeypatch):
    monkeypatch.setattr(shipped, "PLAN", (("room32", 3),))
    waited = []
    found = shipped.measure(lab, lambda: waited.append(1), 0.2)
    run = found["runs"]["room32-3"]
    assert waited == [1] and run["steps"] >= 2 and len(run["log"]) == run["steps"] - 1
    folder = lab.out / "shipped" / "room32-3"
    kinds = {t.dtype for t in load_file(folder / "model.safetensors").values()}
    assert torch.float16 in kinds and torch.float32 not in kinds
    model = EncDiff.from_pretrained(folder)
    assert model.encode(torch.zeros(1, 3, 32, 32)).dtype == torch.float32
    assert shipped.lines(found)[0].startswith(f"room32-3: {run['steps']} steps of 4 in 0 s, loss ")


def test_curves_are_drawn_of_what_was_kept(tmp_path):
    kept = gpu.ROOT / "docs/results/h200/run2"
    shutil.copy(kept / "paper.json", tmp_path)
    scores = json.loads((kept / "scores.json").read_text())
    for name, found in scores.items():
        (tmp_path / f"scores-{name}.json").write_text(json.dumps(found))
    assert list(curves.scores_of(tmp_path).items()) == list(scores.items()) == list(curves.scores_of(kept).items())
    with Image.open(curves.draw(tmp_path)) as picture:
        assert picture.width > 3 * picture.height and len(picture.convert("RGB").getcolors(2**20)) > 50


def test_a_call_waits_for_what_ran_beside_its_training(lab):
    session = Session(lab, ["whole"])
    result = lab.out / f"{workers.slug_of('aside whole')}.json"
    code = f"import json; json.dump({{'a - b': 0.5}}, open({str(result)!r}, 'w'))"
    session.workers["aside whole"] = worker(lab, "aside whole", code)
    session.run()
    assert lab.load("whole") == {"a - b": 0.5} and session.said["whole"][1] == ["a - b: 0.5"]
