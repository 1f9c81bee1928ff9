"""Calling a model is its loss, so that PyTorch's own ways to train on several devices take it as it is."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _tiny import TINY

from encdiff import EncDiff

ROOT = Path(__file__).parent.parent
RANK = """
import copy, sys
rank, size, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
import torch
sys.path.insert(0, "tests")
from torch.nn.parallel import DistributedDataParallel
from _tiny import TINY
from encdiff import EncDiff
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
torch.manual_seed(rank)  # another start in each process: the first one's counts
model = EncDiff(TINY).eval()  # statistics of batch norm would be those of each half
parallel = DistributedDataParallel(model)
whole = copy.deepcopy(model)
generator = torch.Generator().manual_seed(7)
for step in range(2):  # what was left out of a step fails the next one
    images = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    noise, t = torch.randn(4, *model.latent_shape, generator=generator), torch.tensor([1, 200, 500, 900])
    part = slice(rank * 4 // size, (rank + 1) * 4 // size)
    model.zero_grad()
    whole.zero_grad()
    parallel(images[part], noise=noise[part], t=t[part]).backward()
    whole.loss(images, noise=noise, t=t).backward()
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters()):
        assert ours.requires_grad == (ours.grad is not None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_of_distributed_data_parallel_are_those_of_the_whole_batch(size, tmp_path):
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(tmp_path / "meeting")], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * size, said


def test_calling_a_model_is_its_loss():
    torch.manual_seed(0)
    model, images = EncDiff(TINY).eval(), torch.rand(4, 3, 16, 16) * 2 - 1
    assert torch.equal(model(images, seed=3), model.loss(images, seed=3))
    assert torch.equal(torch.nn.DataParallel(model)(images, seed=3), model.loss(images, seed=3))
    assert inspect.signature(model.forward) == inspect.signature(model.loss)


@pytest.mark.parametrize("method", ["reconstruct", "swap", "traverse"])
def test_what_samples_names_the_options_of_sample(method):
    of_sample = inspect.signature(EncDiff.sample).parameters
    own = inspect.signature(getattr(EncDiff, method)).parameters
    options = {name: p for name, p in of_sample.items() if p.kind is p.KEYWORD_ONLY}
    assert {name: p for name, p in own.items() if p.kind is p.KEYWORD_ONLY} == options
    assert not any(p.kind is p.VAR_KEYWORD for p in own.values()) and getattr(EncDiff, method).__doc__


def test_every_option_reaches_the_sampler(monkeypatch):
    model, images = EncDiff(TINY).eval(), torch.zeros(1, 3, 16, 16)
    given = dict(
        x_T=torch.zeros(1, *model.latent_shape), sampler="ddim", steps=3, eta=0.5, gate=2, guidance=1.5, seed=4,
        sample_ids=torch.tensor([5]), token_bias=torch.zeros(1, 3), progress=print,
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(EncDiff, "sample", lambda self, scalars, **options: seen.append(options))
    model.reconstruct(images, **given)
    model.swap(images, images, 0, **given)
    model.traverse(images, 0, [1.0], **given)
    assert all(options.keys() == given.keys() for options in seen) and len(seen) == 3
    assert all(options[name] is given[name] for options in seen for name in given)


def test_a_model_card_says_what_the_model_is(tmp_path):
    EncDiff(TINY).save_pretrained(tmp_path / "model", model_card_kwargs={"unused": 1})
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert "pushed to the Hub" not in card and "3 concepts" in card and "16x16" in card and "2402.09712" in card
    assert card.startswith("---\n") and "license: mit" in card.split("---")[1]
