"""Whether a kernel computes what its formula says, on the device at hand: outputs and every gradient, against float64.

A family is a kernel with its backward kernels. A *variant* of it is a tuple of names, numbers and flags that decides
which code runs; the families and their variants are in `_families`. Inputs are small and drawn from the variant's own
seed on the CPU, so that they are the same everywhere, and rounded to the types that the kernel reads: the formula gets
the same numbers. An error is ||result - exact|| / ||exact||; NaN never passes.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from encdiff.ops._triton import NAMES

TYPES = {name: dtype for dtype, name in NAMES.items()}
# of one kernel: a few roundings of operands and results (2^-9 in bfloat16), sums in float32
LIMITS = {"float32": 2e-5, "bfloat16": 1.5e-2, "float16": 2e-3}

# what a compiler says of a kernel; others, such as a full disk, may pass
LASTING = (
    "CompilationError",
    "CompileTimeAssertionFailure",
    "OutOfResources",
    "PTXASError",
    "UnsupportedLanguageConstruct",
)

Variant = tuple[str | int | bool, ...]
Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]


class Draw:
    """Random tensors (torch.float32, on the CPU) from a variant's own seed."""

    def __init__(self, seed: str):
        self.generator = torch.Generator().manual_seed(crc32(seed.encode()))

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu", dtype=torch.float32) * scale + shift


class Family(NamedTuple):
    """`make(draw, *variant)` gives the inputs in the types that the kernel reads; `kernel(inputs, *variant)` and
    `exact(inputs, *variant)` the outputs. `variants()` are every tile, in the types and with the flags that matter.

    products: it multiplies matrices in the variant's types, so that a result in a wider one is no more exact.
    """

    name: str
    variants: Callable[[], Iterable[Variant]]
    make: Callable[..., Tensors]
    kernel: Callable[..., Outputs]
    exact: Callable[..., Outputs]
    differentiable: bool = True
    products: bool = False


FAMILIES: dict[str, Family] = {}  # by name; `_families` fills it, which imports every op


class Finding(NamedTuple):
    """What became of one variant; `wrong` is empty where it passes, `errors` where it did not run."""

    family: str
    variant: Variant
    gradients: bool
    errors: dict[str, float]
    wrong: list[str]
    lasting: bool = True  # whether it will be so tomorrow: not of a machine that had no room for a moment

    def __str__(self) -> str:
        return title(self.family, self.variant, self.gradients)


def title(family: str, variant: Variant, gradients: bool) -> str:
    return " ".join([family, *map(str, variant), *["gradients"] * gradients])


def check(family: Family, variant: Variant, gradients: bool, device: torch.device | str) -> Finding:
    """Run one variant and its formula. What the kernel raises is a finding, too, but for a device without memory.

    On a GPU it runs twice: results that differ are a race.
    """
    gradients = gradients and family.differentiable
    inputs = family.make(Draw(title(family.name, variant, False)), *variant)
    upstream: list[Tensor] = []
    exact = _results({n: t.double() for n, t in inputs.items()}, family.exact, variant, gradients, upstream)
    placed = {n: t.to(device) for n, t in inputs.items()}
    times = 2 if torch.device(device).type == "cuda" else 1
    try:
        first, *again = (_results(placed, family.kernel, variant, gradients, upstream) for _ in range(times))
        if times == 2:
            torch.cuda.synchronize(device)  # launches are not waited for: what one did wrong is said here
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever compiler and driver have to say is why it cannot be used
        said, lasting = " ".join(str(error).split())[:200], type(error).__name__ in LASTING or is_lost(device)
        return Finding(family.name, variant, gradients, {}, [f"{type(error).__name__}: {said}"], lasting)
    errors = {name: relative_error(first[name], exact[name]) for name in exact}
    limits = {name: _limit(family, variant, first[name]) for name in exact}
    wrong = [f"{n} is off by {e:.2g}, at most {limits[n]:.2g}" for n, e in errors.items() if not e <= limits[n]]
    unstable = [n for n in first if any(not torch.equal(first[n], other[n]) for other in again)]
    wrong += [f"{n} differs from call to call" for n in unstable if not math.isnan(errors[n])]
    return Finding(family.name, variant, gradients, errors, wrong)


def is_lost(device: torch.device | str) -> bool:
    """Whether a GPU serves this process no more: an illegal access stays with it."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _limit(family: Family, variant: Variant, result: Tensor) -> float:
    types = [NAMES[result.dtype], *(part for part in variant if family.products and part in LIMITS)]
    return max(LIMITS[name] for name in types)


def _results(
    inputs: Tensors, run: Callable[..., Outputs], variant: Variant, gradients: bool, upstream: list[Tensor]
) -> Tensors:
    """Outputs y0, y1, ... and gradients of the inputs; the first call draws the upstream gradients."""
    leaves = {name: t.detach().clone().requires_grad_(gradients) for name, t in inputs.items()}
    outputs = run(leaves, *variant)
    if not upstream:
        draw = Draw(f"upstream {variant}")
        upstream += [draw(*y.shape) for y in outputs]
    results = {f"y{n}": y.detach() for n, y in enumerate(outputs)}
    if gradients:
        pairs = [(y, u) for y, u in zip(outputs, upstream, strict=True) if y.requires_grad]
        given = [_rounded(u, variant).to(y.device, y.dtype) for y, u in pairs]
        found = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), given, materialize_grads=True)
        results |= {f"d{name}": g for name, g in zip(leaves, found, strict=True)}
    return results


def _rounded(upstream: Tensor, variant: Variant) -> Tensor:
    """As the features are, whose type is the variant's first: both sides then get the same numbers."""
    return upstream.to(TYPES[str(variant[0])])


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||, exact in float64 on the CPU."""
    difference, size = (actual.double().cpu() - exact).norm().item(), exact.norm().item()
    return difference / size if size else difference
