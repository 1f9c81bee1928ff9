"""Which codes of kernels a training step of the paper's configuration launches, and which of them its checks do not.

    python tests/_launched.py bf16|autocast|float32

Nothing is launched: what Triton would compile for each call is written down, by its own specialisation of arguments.
Prints how many codes there are, then one line for each that no check has run.
"""

import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # kernels as they are compiled; imported before it is set again
sys.path.append(str(Path(__file__).parent.parent))

import torch
from encdiff.kernels import _gate
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from encdiff.models import EncDiff, EncDiffConfig
from encdiff.ops import _self_check, use_impl
from encdiff.ops._check import check
from encdiff.ops._families import FAMILIES

BATCH = 16
for module in _gate.modules():
    list(_gate.cases(module))  # imports its kernels
os.environ["TRITON_INTERPRET"] = "1"  # as the ops ask for before they take a kernel on a CPU
codes: set[tuple] = set()
asked: dict[tuple, None] = {}


def write_down(self, *args, grid=None, warmup=None, **options) -> None:
    given = dict(zip(self.arg_names, args, strict=False)) | options
    code = [
        given[p.name] if p.is_constexpr
        else native_specialize_impl(CUDABackend, given[p.name], False, not p.do_not_specialize, True)
        for p in self.params
    ]  # fmt: skip
    codes.add((self.fn.__name__, *zip(self.arg_names, code, strict=True), options.get("num_warps")))


def step(form: str) -> None:
    torch.manual_seed(0)
    model = EncDiff(EncDiffConfig()).train()
    if form == "bf16":
        model.to(torch.bfloat16)
    size = model.config.image_size
    images = torch.rand(BATCH, 3, size, size).to(model.encoder[0].weight.dtype, memory_format=torch.channels_last)
    x, t = torch.randn(BATCH, *model.latent_shape), torch.arange(BATCH)
    with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"), use_impl("triton"):
        scalars = model.encoder(images).unflatten(1, model.config.code_shape)
        model.denoise(x, t, model.tokens(scalars)).float().square().mean().backward()


def main(form: str) -> None:
    JITFunction.run = write_down
    _self_check.is_asked = lambda x: True
    _self_check._reasons = lambda *question: asked.setdefault(question[:3]) or []
    step(form)
    launched = set(codes)
    codes.clear()
    for family, variant, gradients in list(asked):
        check(FAMILIES[family], variant, gradients, "cpu")
    print(len(launched))
    for name, *code in sorted(launched - codes, key=str):
        print(name, *code)


if __name__ == "__main__":
    main(sys.argv[1])
