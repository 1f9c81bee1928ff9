"""Every test runs offline, from a seed of its own, and on one thread where workers share the machine."""

import gc
import os
import random
import sys
from zlib import crc32

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub and matplotlib read them
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("ENCDIFF_IMPL", None)  # a user's settings must not decide what is tested
os.environ.pop("ENCDIFF_DATA", None)

import numpy as np
import pytest
import torch
from _place import DEVICE
from _tiny import TINY
from hypothesis import settings
from PIL import ImageDraw

from encdiff import EncDiff
from encdiff.cli import app
from encdiff.pictures import swap_grid

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

settings.register_profile("encdiff", deadline=None)  # a busy machine is not a failure
settings.load_profile("encdiff")


def pytest_collection_finish() -> None:
    """What is imported by now stays: half a million objects that no search for garbage need walk through again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_unconfigure() -> None:
    """Libraries say at the end what of theirs was not freed."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeds(request) -> None:
    """Seed the global generators from the test's name: the same draws in any order, alone or together."""
    seed = crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def rng(request) -> np.random.Generator:
    """A generator seeded likewise."""
    return np.random.default_rng(crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def default_device(request) -> None:
    """Tests marked on_gpu build their tensors on the GPU if there is one, but for those of them marked on_cpu."""
    marked = request.node.get_closest_marker
    if marked("on_gpu") and not marked("on_cpu"):
        torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture
def model() -> EncDiff:
    """Of the configuration TINY, in eval mode."""
    torch.manual_seed(0)
    model = EncDiff(TINY)
    for parameter in model.parameters():  # at the published initialisation the concepts have no effect yet
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    """Four images (4, 3, 16, 16) of different colours."""
    generator = torch.Generator().manual_seed(1)
    colours, texture = torch.rand(4, 3, 1, 1, generator=generator), torch.rand(4, 3, 16, 16, generator=generator)
    return (0.7 * colours + 0.3 * texture) * 2 - 1


@pytest.fixture
def quick_pictures(monkeypatch) -> None:
    """Trainings draw their swap grids, still of their weights, in one step of sampling in place of 20."""
    monkeypatch.setattr("encdiff.training.step.swap_grid", lambda *images, steps: swap_grid(*images, steps=1))


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """What is written on pictures while the test runs."""
    written, draw = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, xy, text, **how: (written.append(text), draw(self, xy, text, **how))
    )
    return written


@pytest.fixture
def encdiff(monkeypatch, capsys):
    """Run a command line in this process; gives exit code and what it printed."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["encdiff", *map(str, args)])
        try:
            app.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return code, " ".join((printed.out + printed.err).split())

    return call
