"""Gradients of weights that are written to a sink: those of autograd, wherever and whenever they are computed."""

from contextlib import nullcontext

import pytest
import torch
from _place import DEVICE, GPU

from encdiff import ops
from encdiff.models.attention import pointwise
from encdiff.models.layers import Conv2d, Linear
from encdiff.models.unet import ResBlock
from encdiff.ops import _beside
from encdiff.ops._beside import Beside, Sink, adjoining, give, joined, sink_of

pytestmark = pytest.mark.on_gpu

LAYERS = {  # layer, input
    "linear": (lambda: Linear(5, 7), (3, 4, 5)),
    "linear without a bias": (lambda: Linear(16, 32, bias=False), (2, 16)),
    "no row": (lambda: Linear(3, 4), (0, 3)),
    "convolution": (lambda: Conv2d(4, 8, 3, padding=1), (2, 4, 6, 5)),
    "down, without a bias": (lambda: Conv2d(3, 8, 4, 2, 1, bias=False), (2, 3, 8, 8)),
    "no image": (lambda: Conv2d(3, 8, 3), (0, 3, 8, 8)),
}


def layer_and_input(name, dtype=torch.float32):
    make, shape = LAYERS[name]
    layer, x = make().to(DEVICE, dtype), torch.randn(shape, device=DEVICE, dtype=dtype)
    if len(shape) == 4:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return layer, x


def sunk(layer, beside):
    """The gradients' places, filled with what must be overwritten."""
    places = [torch.full_like(p, torch.nan) for p in layer.parameters()]
    for p, place in zip(layer.parameters(), places, strict=True):
        give(p, Sink(beside, place))
    return places


def gradients(run, layer, x, upstream=None):
    """Of x and the parameters; and the upstream gradient."""
    x = x.clone().requires_grad_()
    y = run(x)
    upstream = torch.randn_like(y) if upstream is None else upstream
    y.backward(upstream)
    found, layer_grads = x.grad, [p.grad for p in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    return found, layer_grads, upstream


def beside_here():
    return Beside(torch.device(DEVICE) if GPU else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_sinks_get_what_autograd_would_give(name, dtype):
    layer, x = layer_and_input(name, dtype)
    dx, usual, upstream = gradients(layer, layer, x)
    beside = beside_here()
    places = sunk(layer, beside)
    for _ in range(2):  # a second pass begins anew
        beside.begin()
        mine, left, _ = gradients(layer, layer, x, upstream)
        beside.join()
        assert left == [None] * len(places) and not beside.pending
        torch.testing.assert_close(mine, dx)
        for place, gradient in zip(places, usual, strict=True):
            torch.testing.assert_close(place, gradient)


def test_a_weight_used_twice_gets_the_sum():
    layer, x = layer_and_input("linear")
    square = Linear(5, 5).to(DEVICE)
    twice = lambda x: square(square(x))  # noqa: E731
    dx, usual, upstream = gradients(twice, square, x)
    beside = beside_here()
    places = sunk(square, beside)
    mine, _, _ = gradients(twice, square, x, upstream)
    beside.join()
    for place, gradient in zip((mine, *places), (dx, *usual), strict=True):
        torch.testing.assert_close(place, gradient)


def test_a_pointwise_convolution_writes_through_its_matrix():
    conv = Conv2d(4, 8, 1).to(DEVICE).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 3, 3, device=DEVICE).to(memory_format=torch.channels_last)
    dx, usual, upstream = gradients(lambda x: pointwise(x, conv), conv, x)
    beside = beside_here()
    places = sunk(conv, beside)
    mine, left, _ = gradients(lambda x: pointwise(x, conv), conv, x, upstream)
    beside.join()
    assert left == [None, None]
    for place, gradient in zip((mine, *places), (dx, *usual), strict=True):
        torch.testing.assert_close(place, gradient)


def test_the_biases_of_a_residual_block():
    """The first is summed with the parameters of the norm behind it, the second by itself; all go into their sinks."""
    block = ResBlock(8, 16, 12, True, 4, None).to(DEVICE).to(memory_format=torch.channels_last)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, emb = torch.randn(2, 8, 4, 6).to(memory_format=torch.channels_last), torch.randn(2, 12)
    names, beside = [name for name, _ in block.named_parameters()], beside_here()

    def run(x):
        with ops.use_impl("triton"):
            return block(x, emb)

    dx, usual, upstream = gradients(run, block, x)
    places = sunk(block, beside)
    mine, left, _ = gradients(run, block, x, upstream)
    beside.join()
    torch.testing.assert_close(mine, dx)
    for name, place, gradient, expected in zip(names, places, left, usual, strict=True):
        assert (gradient is None) == (place.data_ptr() in beside.written), name
        torch.testing.assert_close(place if gradient is None else gradient, expected, rtol=1e-4, atol=1e-4)
    assert left == [None] * len(names)


def test_a_norm_used_twice_gets_the_sum():
    """Of both passes at once, since one launch writes the gradients of weight and bias."""
    norm = torch.nn.LayerNorm(8).to(DEVICE)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 8, device=DEVICE)

    def twice(x):
        with ops.use_impl("triton"):
            once = ops.layer_norm(x, norm.weight, norm.bias, with_input=True)[0]
            return ops.layer_norm(once, norm.weight, norm.bias)

    dx, usual, upstream = gradients(twice, norm, x)
    beside = beside_here()
    places = sunk(norm, beside)
    mine, left, _ = gradients(twice, norm, x, upstream)
    beside.join()
    assert left == [None, None]
    for place, gradient in zip((mine, *places), (dx, *usual), strict=True):
        torch.testing.assert_close(place, gradient)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("width", [8, 5])
def test_attention_writes_its_projections(packed, width):
    """Queries, keys and values as one product of what lies together, or each by itself where it does not."""
    heads, inner, channels = 2, 2 * width, 16
    shapes = [(inner, channels)] * 3 + [(channels, inner)]
    sizes = [64 * -(-a * b // 64) + (0 if packed else 64) for a, b in shapes]  # whole multiples, if they are to adjoin
    memory, room = (torch.randn(sum(sizes), device=DEVICE) / 4 for _ in range(2))
    views = [[m.split(sizes)[i][: a * b].view(a, b) for i, (a, b) in enumerate(shapes)] for m in (memory, room)]
    weights, places = [torch.nn.Parameter(w) for w in views[0]], views[1]
    assert adjoining(weights[:3]) == (packed and width == 8)
    x = torch.randn(2, 6, channels, device=DEVICE)

    def run():
        return ops.self_attention(x, *weights, heads=heads, residual=True, impl="triton")

    y = run()
    upstream = torch.randn_like(y)
    usual = torch.autograd.grad(y, weights, upstream)
    beside = beside_here()
    for w, place in zip(weights, places, strict=True):
        give(w, Sink(beside, place.fill_(torch.nan)))
    run().backward(upstream)
    beside.join()
    for w, place, gradient in zip(weights, places, usual, strict=True):
        torch.testing.assert_close(place if w.grad is None else w.grad, gradient, rtol=1e-5, atol=1e-5)
    written = {place.data_ptr() for place in places} & beside.written
    assert len(written) == (0 if width % 8 else 4 if packed else 1)
    give(weights[1], None)
    assert joined(x, *weights[:3]).data_ptr() != weights[0].data_ptr()


def test_a_part_that_was_used_alone_before_is_added_to():
    memory, room = torch.randn(3, 8, 8, device=DEVICE), torch.full((3, 8, 8), torch.nan, device=DEVICE)
    beside, weights = beside_here(), [torch.nn.Parameter(w) for w in memory]
    x = torch.randn(5, 8, device=DEVICE)

    def run():
        return ops.linear(x, weights[1]).sum() + ops.linear(x, joined(x, *weights)).square().sum()

    usual = torch.autograd.grad(run(), weights)
    for w, place in zip(weights, room, strict=True):
        give(w, Sink(beside, place))
    run().backward()
    beside.join()
    for place, gradient in zip(room, usual, strict=True):
        torch.testing.assert_close(place, gradient, rtol=1e-5, atol=1e-5)


def test_only_what_asks_for_a_gradient_is_written():
    layer, x = layer_and_input("linear")
    beside = beside_here()
    weight, bias = sunk(layer, beside)
    layer.bias.requires_grad_(False)
    gradients(layer, layer, x)
    beside.join()
    assert weight.isfinite().all() and bias.isnan().all()
    with torch.no_grad():
        layer(x)
    assert beside.written == {weight.data_ptr()}


def test_a_norm_writes_nothing_for_parameters_that_learn_nothing():
    norm = torch.nn.LayerNorm(8).to(DEVICE)
    x, beside = torch.randn(3, 5, 8, device=DEVICE), beside_here()

    def run(x):
        with ops.use_impl("triton"):
            return ops.layer_norm(x, norm.weight, norm.bias)

    dx, usual, upstream = gradients(run, norm, x)
    places = sunk(norm, beside)
    norm.bias.requires_grad_(False)
    for learning in (norm.weight, None):
        mine, (of_weight, of_bias), _ = gradients(run, norm, x, upstream)
        torch.testing.assert_close(mine, dx)
        assert of_bias is None and not beside.written and all(place.isnan().all() for place in places)
        if learning is not None:
            torch.testing.assert_close(of_weight, usual[0])
        norm.weight.requires_grad_(False)


def test_where_sinks_do_not_serve_gradients_go_the_usual_way():
    layer, x = layer_and_input("linear")
    beside = beside_here()
    places = sunk(layer, beside)
    with torch.autocast(DEVICE, torch.bfloat16):
        _, usual, _ = gradients(layer, layer, x)
    assert all(g is not None for g in usual) and all(place.isnan().all() for place in places)
    grad = torch.func.grad(lambda w: ops.linear(x, w, layer.bias).sum())(layer.weight)
    assert grad.isfinite().all() and places[0].isnan().all()
    give(layer.bias, None)  # both or neither
    _, usual, _ = gradients(layer, layer, x)
    assert all(g is not None for g in usual) and not beside.written
    assert sink_of(None) is None and sink_of(torch.zeros(1)) is None


@pytest.mark.on_cpu
def test_inputs_are_let_go_once_they_are_many_or_large(monkeypatch):
    said = []

    class Stream:
        device = None

        def __init__(self, name="main"):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            said.append("event")
            return len(said)

        def wait_event(self, event):
            said.append(f"{self.name} waits")

    main = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(_beside, "PENDING", 3)
    monkeypatch.setattr(_beside, "BYTES", 1000)
    beside, small, large = Beside("any"), torch.zeros(10, device="cpu"), torch.zeros(200, device="cpu")

    def put(*inputs):
        said.clear()
        with beside.aside(*inputs):
            said.append("work")
        return said.count("main waits"), len(beside.pending), beside.bytes

    assert [put(small, None) for _ in range(4)] == [(0, 1, 40), (0, 2, 80), (0, 3, 120), (1, 3, 120)]
    assert said == ["side waits for main", "work", "event", "main waits"]
    assert put(large) == (1, 3, 880) and put(large) == (3, 1, 800) and put(large, large) == (2, 0, 0)
    with pytest.raises(ValueError), beside.aside(small):
        raise ValueError
    said.clear()
    beside.join()
    beside.join()
    assert said == ["main waits for side"] and not beside.pending and beside.bytes == 0


@pytest.mark.skipif(not GPU, reason="needs a GPU: streams and a CUDA graph")
def test_in_a_cuda_graph_on_a_stream_of_its_own(monkeypatch):
    """A chain long enough that inputs are let go before the end; its memory is used again meanwhile."""
    monkeypatch.setattr(_beside, "PENDING", 3)
    layers = [Linear(64, 64).to(DEVICE) for _ in range(12)]
    beside = Beside(torch.device(DEVICE))
    places = [sunk(layer, beside) for layer in layers]
    x = torch.randn(4096, 64, device=DEVICE)

    def work():
        beside.begin()
        h = x
        for layer in layers:
            h = torch.nn.functional.silu(layer(h))
        h.square().sum().backward()
        beside.join()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(5):
        x.normal_()
        for layer_places in places:
            for place in layer_places:
                place.fill_(torch.nan)
        graph.replay()
        for layer in layers:
            for p in layer.parameters():
                give(p, None)
        h = x
        for layer in layers:
            h = torch.nn.functional.silu(layer(h))
        h.square().sum().backward()
        for layer, layer_places in zip(layers, places, strict=True):
            for p, place in zip(layer.parameters(), layer_places, strict=True):
                torch.testing.assert_close(place, p.grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max().item())
                p.grad = None
