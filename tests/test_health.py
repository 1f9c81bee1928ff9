"""`encdiff doctor`: on this machine kernels are interpreted, by processes of their own."""

import io
import json
import subprocess
import sys

import pytest
import torch
from _place import interpreted
from typer.testing import CliRunner

import encdiff
from encdiff.cli.app import app
from encdiff.errors import InputError
from encdiff.health import Report, kernels, report
from encdiff.ops._check import Finding

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Nothing is run: every check passes but for those in the list that is returned."""
    wrong: list[str] = []

    def check_all(device, names, tell):
        checks = kernels.every(device, names)
        found = [Finding(f.name, v, g, {"y0": 1e-7}, wrong if f.name == "geglu" else []) for f, v, g in checks]
        tell(found[-1], len(checks), len(checks))
        return found

    monkeypatch.setattr(kernels, "check_all", check_all)
    monkeypatch.setattr(report, "_compile_ahead", lambda: ("compiled for sm_90, not run: 1", []))
    return wrong


@interpreted
def test_two_families_from_the_command_line(encdiff, tmp_path):
    """The whole way: processes of the checks, interpreter, compiler, report, exit code."""
    out = tmp_path / "doctor.json"
    code, said = encdiff("doctor", "--device", "cpu", "--kernels", "geglu,adamw", "--out", out)
    assert code == 0, said
    assert "all 30 checks passed" in said and "0 failed" in said and "interpreted: no GPU" in said
    found = json.loads(out.read_text())
    assert found["ok"] and len(found["findings"]) == 30
    assert {f["family"] for f in found["findings"]} == {"geglu", "adamw"}
    assert 0 < max(max(f["errors"].values()) for f in found["findings"]) < 1.5e-2


def test_the_report_says_what_there_is(quick):
    ticks = []
    found = encdiff.doctor("cpu", progress=lambda *tick: ticks.append(tick))
    assert isinstance(found, Report) and found.ok and ticks == [(len(found.findings),) * 2]
    said = str(found)
    assert torch.__version__ in said and encdiff.__version__ in said and "GB/s" in said
    for name in ("cross_attention", "mlp_bank", "q_sample", "adamw", "step"):
        assert f"  {name} " in said, "what each op takes"
    assert "mlp_bank                reference; not triton: " in said
    assert set(found.choices) == set(encdiff.ops.OPS) - {"timesteps"}


def test_a_wrong_kernel_is_named_and_the_exit_code_is_1(quick):
    quick.append("dx is off by 0.3, at most 0.015")
    found = encdiff.doctor("cpu", families=["geglu", "adamw"])
    assert not found.ok and len(found.problems) == 18
    assert "18 wrong:\n  geglu float32 64 gradients: dx is off by 0.3" in str(found)
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--kernels", "geglu"])
    assert done.exit_code == 1 and "dx is off by 0.3" in done.stdout
    quick.extend(["x"] * 30)
    assert CliRunner().invoke(app, ["doctor", "--device", "cpu", "--kernels", "adamw"]).exit_code == 0


def test_bad_input(quick):
    with pytest.raises(InputError, match="kernel 'nope' must be one of cross_attention_folded, "):
        encdiff.doctor("cpu", families=["nope"])
    for name in ("nope", "meta", "cuda:99"):
        with pytest.raises(InputError, match=f"device '{name}'"):
            encdiff.doctor(name)


class Process:
    """Stands for a process that says some lines and ends with a code."""

    def __init__(self, lines: list[str], code: int):
        self.stdout, self.code = io.StringIO("".join(lines)), code

    def wait(self) -> int:
        return self.code

    def kill(self) -> None:
        self.code = -9


def scripted(monkeypatch, *lives: tuple[int, int]):
    """Processes that make so many checks and end with that code, in turn; the rest make all."""
    lives, started = list(lives), []

    def start(device, names, first, step, complaint):
        checks = range(first, len(kernels.every(device, names)), step)
        count, code = lives.pop(0) if lives else (len(checks), 0)
        started.append(first)
        complaint.write("Segmentation fault")
        return Process([json.dumps((n, {"y0": 0.0}, [], True)) + "\n" for n in checks[:count]], code)

    monkeypatch.setattr(kernels, "_start", start)
    monkeypatch.setattr(kernels.os, "cpu_count", lambda: 1)
    return started


def test_a_process_that_dies_is_a_finding_and_the_others_go_on(monkeypatch):
    started = scripted(monkeypatch, (3, -11), (0, -11), (2, kernels.LOST))
    found = kernels.check_all(CPU, ["adamw"], lambda *_: None)
    assert len(found) == 12 and started == [0, 4, 5, 7]
    dead = [n for n, f in enumerate(found) if f.wrong]
    assert dead == [3, 4] and found[3].wrong == ["the process died, -11: Segmentation fault"]


def test_a_kernel_that_never_ends_is_a_finding(monkeypatch):
    monkeypatch.setattr(kernels, "SILENCE", 0.5)
    endless = [sys.executable, "-c", "import time; time.sleep(60)"]
    process = subprocess.Popen(endless, stdout=subprocess.PIPE, text=True)
    assert list(kernels._lines(process)) == [] and process.wait(20) == -9


def test_processes_that_cannot_begin_are_an_error(monkeypatch):
    scripted(monkeypatch, (0, 1))
    with pytest.raises(RuntimeError, match="kernels cannot be checked, the process ended with 1: Segmentation fault"):
        kernels.check_all(CPU, ["adamw"], lambda *_: None)


def test_an_interruption_leaves_no_process(monkeypatch):
    """Ctrl-C, or the time limit of a block of bench.gpu, while processes are at work."""
    started, start = [], kernels._start

    def remember(*given):
        started.append(start(*given))
        return started[-1]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "_start", remember)
    with pytest.raises(KeyboardInterrupt):
        kernels.check_all(CPU, ["geglu", "group_norm"], interrupt)
    assert started and all(process.wait(60) is not None for process in started)


def test_on_a_gpu_the_verdicts_are_kept(quick, monkeypatch):
    """With a stand-in for the card: what is asked of it besides the kernels."""
    kept = []
    monkeypatch.setattr(report, "_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(report._self_check, "replace", lambda index, findings: kept.extend(findings))
    monkeypatch.setattr(report._self_check, "card", lambda index: "Fake 9000 (sm_90)")
    monkeypatch.setattr(report.machine, "rates", lambda device: {"copy B/s": 3e12})
    monkeypatch.setattr(report, "choices", lambda device: {})
    monkeypatch.setattr(kernels, "not_for", lambda device: [])
    found = encdiff.doctor(families=["geglu", "layer_norm"])
    assert "compiled, on Fake 9000 (sm_90)" in str(found) and "copy 3 TB/s" in str(found)
    assert {f.family for f in kept} == {"geglu", "layer_norm"}


def test_without_triton_the_native_engine_is_checked_alone(quick, monkeypatch):
    monkeypatch.setattr("encdiff.ops._triton._INSTALLED", False)
    found = encdiff.doctor("cpu")
    assert found.ok and {f.family.split()[0] for f in found.findings} == {"native"}
    assert "kernels, none of Triton: triton is not installed" in str(found)


def test_an_engine_that_cannot_be_built_is_wrong_but_one_without_a_compiler_is_not(quick, monkeypatch):
    described = {"native engine": "the native engine is not built: the build failed, failure.txt says why"}
    monkeypatch.setattr(report.machine, "describe", lambda device: described)
    assert not encdiff.doctor("cpu", families=["geglu"]).ok
    described["native engine"] = "the native engine is not built: no C++ compiler on PATH, and CXX names none"
    assert encdiff.doctor("cpu", families=["geglu"]).ok


@interpreted
def test_the_gate_in_brief(monkeypatch):
    from encdiff.kernels import _gate

    asked = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which it takes away from its process
    monkeypatch.setattr(_gate, "rows", lambda names, **flags: asked.append((list(names), flags)) or iter(()))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert _gate.main(["--brief", "geglu"]) == 0
    assert asked == [(["geglu"], {"brief": True, "hopper": False})]
