"""How float32 products on a GPU are computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Inside, float32 products and convolutions on a GPU are rounded to TF32 (10 bits of mantissa), or are exact."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
