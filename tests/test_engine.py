import gc
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from _tiny import TINY
from test_train import CONFIG

from bench.baselines import SMOKE, fresh_model
from bench.clock import captured
from encdiff import EncDiff, InputError, SamplingEngine
from encdiff.data import open_dataset
from encdiff.engine import Graph, choose
from encdiff.training import Training, train
from encdiff.training.descent import lerp

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def losses(tmp_path, engine: str, of=TINY, **changes) -> list[float]:
    """The loss of every step of a short training."""
    torch.manual_seed(0)
    seen, model = [], EncDiff(of).to(DEVICE)
    data = open_dataset("procedural:2,2,2,2,2,2", TINY.image_size)
    config = replace(CONFIG, engine=engine, log_every=1, **changes)
    train(model, data, tmp_path / engine, config, overwrite=True)
    rows = (tmp_path / engine / "log.csv").read_text().splitlines()[1:]
    seen = [float(row.split(",")[1]) for row in rows]
    assert len(seen) == config.steps
    return seen


def test_checkpointed_activations_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # else a GPU's sums come in any order
    assert losses(tmp_path, "eager", checkpoint_activations=True) == losses(tmp_path, "eager")


def test_compiled_and_eager_steps_agree(tmp_path, monkeypatch):
    # traced and differentiated as for Inductor, whose C++ compiler would take minutes
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    of = replace(TINY, multipliers=(1,), attention_levels=(0,))  # test_masters.py traces two levels
    compiled, eager = (losses(tmp_path, engine, of, steps=20) for engine in ("compile", "eager"))
    assert compiled == pytest.approx(eager, rel=1e-3) and eager[-1] < eager[0]


@pytest.mark.parametrize("weight", [0.75, 1e-3])
def test_averages_move_by_a_weight_on_the_device(weight):
    into, of = ([torch.randn(3, 4), torch.randn(5)] for _ in range(2))
    expected = [torch.lerp(a.double(), b.double(), weight).float() for a, b in zip(into, of, strict=True)]
    moved = [a.to(DEVICE) for a in into]
    lerp(moved, [b.to(DEVICE) for b in of], torch.tensor(weight, device=DEVICE))
    torch.testing.assert_close([a.cpu() for a in moved], expected)


@needs_gpu
@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("change", [{}, {"precision": "bf16"}, {"precision": "bf16", "gradient_clip": 1.0}])
def test_a_step_does_not_wait_for_the_device(engine, change):
    training = Training(EncDiff(TINY).cuda(), replace(CONFIG, engine=engine, **change))
    images, indices = torch.randint(256, (8, 16, 16, 3), dtype=torch.uint8).cuda(), torch.arange(8).cuda()
    try:
        for step in range(8):
            torch.cuda.set_sync_debug_mode("error" if step > 4 else "default")  # warm, and captured, by then
            training.advance(images, indices)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.step == 8


@needs_gpu
def test_graph_and_eager_steps_agree(tmp_path):
    graph, eager = losses(tmp_path, "graph", steps=200), losses(tmp_path, "eager", steps=200)
    assert graph[:20] == pytest.approx(eager[:20], rel=1e-3)
    assert graph == pytest.approx(eager, rel=0.1)


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_graph_holds_compiled_code_that_is_compiled_once(precision, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = losses(tmp_path, "compile", steps=20, precision=precision)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled == pytest.approx(losses(tmp_path, "eager", steps=20, precision=precision), rel=1e-2)


class Replayed:
    """Stands for a CUDA graph where there is no GPU: what was captured is run again on the captured tensors."""

    def replay(self):
        for into, new in zip(self.outputs, self.work(**self.inputs), strict=True):
            into.copy_(new)


def test_a_graph_runs_each_call_once_on_its_own_inputs(monkeypatch):
    runs = []

    def work(x, y):
        runs.append(x.clone())
        return (x + y,)

    def capture(graph, inputs):
        graph.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        graph.outputs = tuple(torch.empty_like(out) for out in work(**graph.inputs))
        runs.pop()  # a capture runs nothing
        graph.graph = Replayed()
        graph.graph.work, graph.graph.inputs, graph.graph.outputs = work, graph.inputs, graph.outputs

    monkeypatch.setattr(Graph, "_aside", lambda graph, inputs: graph.work(**inputs))
    monkeypatch.setattr(Graph, "_capture", capture)
    graph = Graph(work)
    for i in range(6):
        (out,) = graph(x=torch.full((2,), float(i)), y=torch.ones(2))
        assert out.tolist() == [i + 1.0] * 2 and len(runs) == i + 1


@pytest.fixture
def mocked_cuda(monkeypatch):
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: Mock())
    for name in ("stream", "device", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)


def test_warm_up_and_capture_share_their_compiled_code(mocked_cuda):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    graph = Graph(torch.compile(lambda x: (x + 1,), backend=backend))
    for _ in range(4):
        graph(x=torch.ones(2, device="cpu"))
    assert graph.graph is not None and len(graphs) == 1


class Dead:
    """A cycle that only the collector frees, as a graph that nobody replays any more may be part of."""

    def __init__(self, said: list[str]):
        self.itself = self
        weakref.finalize(self, said.append, "freed").atexit = False


@pytest.mark.parametrize("enabled", [True, False], ids=["collector on", "collector off"])
@pytest.mark.parametrize("of", ["engine", "bench.gpu"])
def test_nothing_dead_is_freed_during_a_capture(of, enabled, mocked_cuda, monkeypatch):
    said = []

    @contextmanager
    def recording(*_, **__):
        said.append("begin")
        yield
        said.append("end")

    def work(**_):
        Dead(said)
        gc.collect(0) if gc.isenabled() else None  # as the collector does sooner or later where it is on
        return (torch.ones(2),)

    monkeypatch.setattr(torch.cuda, "graph", recording)
    gc.collect()
    (gc.enable if enabled else gc.disable)()
    try:
        Dead(said)  # of before
        Graph(work, warm_up=0)(x=torch.ones(2)) if of == "engine" else captured(work)
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    assert said[:3] == ["freed", "begin", "end"]  # what work left may be freed by now


@pytest.mark.parametrize("engine, masters", [("eager", False), ("compile", False), ("eager", True)])
def test_a_training_is_freed_with_its_last_reference(engine, masters, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: partial(f))  # holds what it is given, and takes no time
    config = replace(CONFIG, engine=engine, precision="bf16" if masters else "float32")
    training = Training(EncDiff(TINY), config, masters=masters)
    training.advance(torch.randint(256, (8, 16, 16, 3), dtype=torch.uint8), torch.arange(8))
    gone = weakref.ref(training)
    gc.collect()
    gc.disable()
    try:
        del training
        assert gone() is None
    finally:
        gc.enable()


def test_the_engine_of_a_device():
    assert choose("auto", torch.device("cpu")) == "eager" and choose("auto", torch.device("cuda")) == "graph"
    assert choose("compile", torch.device("cpu")) == "compile"
    with pytest.raises(InputError, match="engine is 'graph', which is a CUDA graph, but the model is on cpu"):
        choose("graph", torch.device("cpu"))
    with pytest.raises(InputError, match="engine is 'fast', must be one of auto, eager, compile, graph"):
        choose("fast", torch.device("cpu"))


@pytest.mark.parametrize("size", [0, 1, 3, 4])
def test_a_sampling_engine_gives_what_sample_gives(size):
    torch.manual_seed(0)
    model, options = EncDiff(TINY).eval().to(DEVICE), {"steps": 3, "seed": 5}
    draw = SamplingEngine(model, **options)
    for _ in range(3):
        scalars = torch.randn(size, TINY.concepts, device=DEVICE)
        bias = torch.randn(size, TINY.concepts, device=DEVICE)
        tolerance = {"rtol": 0, "atol": 1e-4 if DEVICE == "cuda" else 0}
        torch.testing.assert_close(draw(scalars), model.sample(scalars, **options), **tolerance)
        expected = model.sample(scalars, token_bias=bias, **options)
        torch.testing.assert_close(draw(scalars, token_bias=bias), expected, **tolerance)


def test_a_sampling_engine_in_bfloat16_samples_near_float32(model):
    model, options = model.to(DEVICE), {"steps": 5, "seed": 5}
    scalars = torch.randn(3, TINY.concepts, device=DEVICE)
    exact = model.sample(scalars, **options)
    with torch.autocast(DEVICE, torch.bfloat16):
        allowed = 2 * (model.sample(scalars, **options) - exact).norm()  # of a U-Net that amplifies: it learnt nothing
    draw = SamplingEngine(model, precision="bf16", **options)
    for _ in range(3):
        images = draw(scalars)
    assert images.dtype == torch.float32 and 0 < (images - exact).norm() <= allowed
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert draw.model.bank is model.bank
    with pytest.raises(InputError, match="precision is 'fp8', must be float32 or bf16"):
        SamplingEngine(model, precision="fp8")


def test_a_sampling_engine_in_bfloat16_rounds_unet_and_decoder_alone():
    model = fresh_model(SMOKE, torch.device(DEVICE)).eval()
    copied = SamplingEngine(model, precision="bf16", steps=2).model
    for rounded in (copied.unet, copied.first_stage.decoder):
        assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in rounded.parameters() if p.ndim == 4)
    for name in ("encoder", "quantize", "quant_conv", "post_quant_conv"):
        assert copied.first_stage.get_submodule(name) is model.first_stage.get_submodule(name)
    assert copied.bank is model.bank and copied.encoder is model.encoder
    latents = torch.randn(3, *model.latent_shape, device=DEVICE)
    images, exact = copied.to_images(latents), model.to_images(latents)
    assert images.dtype == torch.float32 and 0 < (images - exact).norm() < 0.04 * exact.norm()


def test_a_sampling_engine_refuses_what_belongs_to_its_calls():
    with pytest.raises(InputError, match="foo is no option of the engine, must be among eta, gate, .*, steps; x_T"):
        SamplingEngine(EncDiff(TINY), foo=3)
    with pytest.raises(InputError, match="x_T is no option of the engine"):
        SamplingEngine(EncDiff(TINY), x_T=torch.zeros(1))


def saved_bytes(model: EncDiff, batch: int) -> int:
    """What a training step keeps for its backward pass, weights not counted."""
    weights, storages, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def pack(tensor):
        kept.append(tensor)  # alive, so that no address comes twice
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images, x0 = torch.rand(batch, 3, 64, 64) * 2 - 1, torch.randn(batch, 3, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model.loss(images, x0=x0, seed=0)
    return sum(size for address, size in storages.items() if address not in weights)


def test_a_batch_of_1024_of_the_paper_needs_less_than_24_gb():
    model = EncDiff.from_preset("shapes3d").train()
    states = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4 * 5  # weight, gradient, moments, average

    def total() -> float:
        three, one = saved_bytes(model, 3), saved_bytes(model, 1)
        return states + one + 1023 * (three - one) / 2  # some of it is weights in bfloat16, once for all

    plain = total()
    model.unet.checkpoint_activations = True
    assert plain < 20e9 and total() < plain / 3
