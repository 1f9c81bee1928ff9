"""A pytest plugin, `-p bench.on_gpu`: tests of kernels run compiled, on the GPU, instead of interpreted on the CPU.

Tests that build their tensors on the default device then build them on the GPU.
"""

import os

import torch


def pytest_configure(config) -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # set by tests/conftest.py, read when a test imports a kernel
    torch.set_default_device("cuda")
