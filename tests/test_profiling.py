import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from encdiff import profiling
from encdiff.profiling import capture, phase, ranges, trace

ROOT = Path(__file__).parent.parent
KERNEL = re.compile(r"^@triton\.jit.*\ndef (\w+_kernel\w*)\(", re.M)
CUDA_KERNEL = re.compile(r"^__global__ .*?(\w+_kernel)\(", re.M)


class Recorder:
    """Writes down what is opened and closed, in order."""

    def __init__(self):
        self.seen = []

    @contextmanager
    def __call__(self, name):
        self.seen.append(f"+{name}")
        yield
        self.seen.append(f"-{name}")


@pytest.fixture
def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


def test_ranges_nest_as_the_modules_do(network):
    recorder = Recorder()
    with ranges(network, recorder), phase("forward"):
        network(torch.zeros(1, 4))
    assert recorder.seen == ["+phase forward", "+0", "-0", "+1", "+1.0", "-1.0", "+1.1", "-1.1", "-1", "-phase forward"]


def test_nothing_is_left_and_nothing_runs_outside(network):
    recorder = Recorder()
    with ranges(network, recorder):
        assert hooks(network) == 6 + 2
    assert hooks(network) == 0
    network(torch.zeros(1, 4))
    with phase("backward"):
        pass
    assert recorder.seen == [] and phase("a") is phase("b")


def test_a_failing_forward_leaves_no_range_open(network):
    recorder = Recorder()
    with pytest.raises(RuntimeError), ranges(network, recorder):
        network(torch.zeros(1, 3))
    assert recorder.seen[0] == "+0" and hooks(network) == 0 and profiling._range is None
    with ranges(network, recorder):
        network(torch.zeros(1, 4))
    assert recorder.seen[-1] == "-1"


def test_trace_counts_calls_and_writes_a_trace(network, tmp_path):
    found = trace(network, lambda: network(torch.randn(8, 4)).sum().backward(), 3, tmp_path / "trace.json")
    by_name = {cost.name: cost for cost in found.ranges}
    assert by_name.keys() == {"phase all", "0", "1", "1.0", "1.1"}
    assert all(cost.calls == 3 and cost.host_ms > 0 for cost in found.ranges)
    assert by_name["phase all"].host_ms > by_name["1"].host_ms > by_name["1.1"].host_ms
    operators = {cost.name: cost.calls for cost in found.operators}
    assert operators["aten::addmm"] == 6 and not operators.keys() & by_name.keys()
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"1.1", "aten::addmm", "phase all"} <= names
    lines = found.table(2).splitlines()
    assert lines[1].split()[:3] == ["phase", "all", "3"] and len(lines) == 3 + 1 + 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it starts the profiler of the driver")
def test_capture_does_nothing_without_a_gpu():
    with capture():
        pass
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("what", ["train", "sample"])
def test_profile_command(encdiff, tmp_path, what):
    out = tmp_path / "profile"
    options = ["--phase", what, "--batch-size", 2, "--steps", 2, "--calls", 1, "--out", out, "--device", "cpu"]
    code, text = encdiff("profile", *options)
    assert code == 0, text
    table = (out / "table.txt").read_text()
    assert " ".join(table.split()) in text
    assert "model.diffusion_model.middle_block" in table
    assert "aten::convolution" in table or "aten::mkldnn_convolution" in table
    assert ("AdamW" in table) == (what == "train")
    assert json.loads((out / "trace.json").read_text())["traceEvents"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize(
    "options, message",
    [
        (["--nvtx", "--device", "cpu"], "--nvtx marks ranges for NVIDIA's tools, needs a GPU"),
        (["--preset", "nonsense"], "preset 'nonsense' is unknown"),
        (["--run", "nowhere"], "nowhere"),
        (["--run", "nowhere", "--preset", "quickstart"], "cannot both be given"),
        (["--engine", "warp"], "engine is 'warp', must be"),
    ],
    ids=["nvtx", "preset", "run", "both", "engine"],
)
def test_profile_refuses(encdiff, options, message):
    code, text = encdiff("profile", *options)
    assert code == 2 and message in text


def test_the_guide_names_every_kernel_and_no_other():
    there = {name for path in ROOT.glob("kernels/**/*.py") for name in KERNEL.findall(path.read_text())}
    there |= {name for path in ROOT.glob("csrc/*.cu") for name in CUDA_KERNEL.findall(path.read_text())}
    named = set(re.findall(r"\$NCU -k regex:\^?(\w+)", (ROOT / "docs" / "profiling.md").read_text()))
    assert len(there) > 10 and there - named == set() == named - there, "one line for each kernel, please"
