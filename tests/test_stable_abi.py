"""The native library uses no more of PyTorch than the stable ABI of the oldest torch that is served."""

import os
import re

import torch

from encdiff.ops import _build

# What csrc/ may use of PyTorch: read off the headers of torch 2.11, the oldest that is served. Newer ones have more,
# such as STABLE_TORCH_ERROR_CODE_CHECK, so that a build against them proves nothing. Look in 2.11 before adding a name.
STABLE_ABI = {
    "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_FRAGMENT", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK",
    "TORCH_BOX", "TORCH_ERROR_CODE_CHECK", "aoti_torch_get_current_cuda_stream", "torch::headeronly::ScalarType",
    "torch::stable::Tensor", "torch::stable::accelerator::DeviceGuard", "torch::stable::empty_like",
    "torch::stable::new_empty", "torch::stable::parallel_for",
    "torch/csrc/stable/accelerator.h", "torch/csrc/stable/library.h", "torch/csrc/stable/ops.h",
    "torch/csrc/stable/tensor.h",
}  # fmt: skip
STABLE_NAME = re.compile(
    r"\b(?:(?:STABLE_|STD_)?TORCH_\w+|aoti_torch_\w+|torch_[a-z]\w*(?=\()|torch::\w+(?:::\w+)*)|(?<=<)torch/[\w/]+\.h"
)


def test_the_torch_here_has_the_stable_abi():
    assert _build.find_torch().samefile(os.path.dirname(torch.__file__))


def stable_names(code: str) -> set[str]:
    """What a source uses of PyTorch, comments aside: macros, functions, types and headers."""
    return set(STABLE_NAME.findall(re.sub(r"//.*", "", code)))


def test_names_of_the_stable_abi_are_read():
    code = """#include <torch/csrc/stable/stream.h>
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_current_stream(0, &s));  // not TORCH_BOX
    torch::stable::Tensor y = torch::stable::empty_like(x);"""
    assert stable_names(code) - STABLE_ABI == {
        "torch/csrc/stable/stream.h", "STABLE_TORCH_ERROR_CODE_CHECK", "torch_get_current_stream",
    }  # fmt: skip


def test_the_oldest_torch_has_all_that_is_used_of_the_stable_abi():
    used = {path.name: stable_names(path.read_text()) for path in _build.sources().iterdir()}
    assert len(used["noise.cpp"]) > 10
    assert {name: names - STABLE_ABI for name, names in used.items() if names - STABLE_ABI} == {}
