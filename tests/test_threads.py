"""One model, several threads: each call has its own state."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from encdiff import ops
from encdiff.ops import _dispatch, _native


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Threads take turns a thousand times as often as they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def together(*works):
    """Results of works that begin at the same time in threads of their own."""
    barrier = threading.Barrier(len(works))

    def run(work):
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(run, work) for work in works]]


def test_a_gated_sampling_changes_no_other(model):
    scalars = torch.randn(2, model.config.concepts)
    plain, gated = model.sample(scalars, steps=8), model.sample(scalars, steps=8, gate=2)
    assert not torch.equal(plain, gated)
    others = together(*[lambda g=g: model.sample(scalars, steps=8, gate=g) for g in (None, 2, None, 2)])
    for actual, expected in zip(others, (plain, gated, plain, gated), strict=True):
        assert torch.equal(actual, expected)


def test_two_samplings_of_other_tokens_change_neither(model):
    codes = [torch.randn(2, model.config.concepts) for _ in range(3)]
    expected = [model.sample(c, steps=6) for c in codes]
    for actual, image in zip(together(*[lambda c=c: model.sample(c, steps=6) for c in codes]), expected, strict=True):
        assert torch.equal(actual, image)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_what_it_was_before_all(model, training):
    model.train(training)
    scalars, entered, leave = torch.randn(2, model.config.concepts), threading.Event(), threading.Event()

    def first():  # is inside when the second enters, and leaves before it
        return model.sample(scalars, steps=2, progress=lambda done, _: done == 1 and (entered.set(), leave.wait(20)))

    def second():
        entered.wait(20)
        return model.sample(scalars, steps=4, progress=lambda done, _: leave.set() if done == 1 else None)

    together(first, second)
    assert model.training is training and model.unet.training is training


def test_a_forced_implementation_is_the_threads_own():
    """Also where blocks end in another order than they began."""
    x, entered, left = torch.randn(3, 8), threading.Event(), threading.Event()

    def first():
        with ops.use_impl("reference"), ops.record_impls() as ran:
            entered.set()
            left.wait(20)
            ops.geglu(x)
        return ran

    def second():
        entered.wait(20)
        with ops.use_impl("native"), ops.record_impls() as ran:
            ops.geglu(x)
            left.set()
        return ran

    assert together(first, second) == [[("geglu", "reference")], [("geglu", "native")]]
    assert _dispatch._here.forced is None and "native: chosen" in ops.explain("geglu", x)


def test_a_new_thread_chooses_for_itself():
    with ops.use_impl("reference"):
        assert together(lambda: ops.explain("geglu", torch.randn(2, 4)))[0].count("chosen") == 1


def test_the_native_engine_is_loaded_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(_native, "_loaded", None)
    monkeypatch.setattr(_native, "_load", lambda: loaded.append(1) or (None, False))
    assert together(*[_native.load] * 8) == [(None, False)] * 8
    assert loaded == [1]


def test_what_is_carried_holds_in_another_thread():
    x = torch.randn(2, 4)
    with ops.use_impl("reference"), ops.record_impls() as ran:
        run = _dispatch.carried(lambda: ops.geglu(x))
    together(run)
    ops.geglu(x)
    assert ran == [("geglu", "reference")]


def test_checkpointed_activations_are_recomputed_as_they_were(model, images):
    """Backward in another thread, as on a GPU."""
    model.train()
    model.unet.checkpoint_activations = True
    with ops.use_impl("reference"), ops.record_impls() as ran:
        loss = model.loss(images, seed=0, sample_ids=torch.arange(len(images)))
        count = len(ran)
    together(loss.backward)
    assert len(ran) > count and {impl for op, impl in ran if op == "group_norm"} == {"reference"}
