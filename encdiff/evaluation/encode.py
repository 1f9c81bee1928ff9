"""Codes of a whole data set, by any encoder."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from encdiff.data import Dataset, to_float
from encdiff.distributed.processes import Processes
from encdiff.errors import InputError
from encdiff.models import ConceptModel

M = TypeVar("M", bound=ConceptModel)
Encode = Callable[[torch.Tensor], torch.Tensor]  # float32 (B,3,H,W) in [-1,1] -> (B,N)


@torch.no_grad()
def untrained(model: M, dataset: Dataset, seed: int = 0, batches: int = 50, batch_size: int = 64) -> M:
    """A model of the same configuration with random weights, and the statistics of its BatchNorms taken from the data.

    Without these an untrained encoder's codes would hardly vary, and any other would look good beside it.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(model.config).to(device).train()
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        fresh.encode(to_float(dataset.images(rng.integers(len(dataset), size=batch_size))).to(device))
    return fresh.eval()


@torch.inference_mode()
def encode_dataset(
    encode: Encode,
    dataset: Dataset,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
    rows: np.ndarray | None = None,
    among: Processes | None = None,
) -> np.ndarray:
    """Codes float32 (n, N) of all images in file order, or of those whose indices (n,) `rows` holds.

    encode: images float32 (B,3,H,W) in [-1,1], on the CPU, to codes (B,N) on any device; put its model in eval mode,
    else batch norm makes a code depend on its batch. `progress(done, n)` follows each batch. Raises InputError for an
    empty data set, a batch size below 1, codes of another shape and codes that are not finite. `among` several
    processes each encodes its part of the batches that one alone would, and all get all codes.
    """
    n = len(dataset) if rows is None else len(rows)
    if n < 1 or batch_size < 1:
        raise InputError(f"{dataset.name} has {n} images and batch_size is {batch_size}; both must be at least 1")
    among = among or Processes()
    first, last = among.part(n, batch_size)

    def own() -> np.ndarray:
        codes = np.empty((0, 0), np.float32)
        for start in range(first, last, batch_size):
            indices = np.arange(start, min(start + batch_size, last))
            images = dataset.images(indices if rows is None else rows[indices])
            batch = torch.as_tensor(encode(to_float(images))).float().cpu().numpy()
            if not len(codes):
                codes = np.empty((last - first, batch.shape[-1] if batch.ndim else 0), np.float32)
            if batch.shape != (len(indices), codes.shape[1]) or not np.isfinite(batch).all():
                raise InputError(f"encode returned {batch.shape} codes; they must be ({len(indices)}, N) and finite")
            codes[indices - first] = batch
            if progress:
                progress(int(indices[-1]) + 1 - first, last - first)
        return codes

    return among.concatenated(among.together(own))
