"""Where kernels are tested: compiled on the GPU, or interpreted on the CPU where there is none.

`CUDA_VISIBLE_DEVICES= pytest tests` hides a GPU.
"""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if GPU:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before cuBLAS starts: deterministic algorithms ask for it
    torch.backends.cudnn.allow_tf32 = False  # tolerances are those of float32
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: one program of a kernel after the other

interpreted = pytest.mark.skipif(GPU, reason="of kernels interpreted on the CPU; with this GPU they are compiled")
