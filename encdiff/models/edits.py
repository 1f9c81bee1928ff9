"""What people change of an image: its concepts taken from another, or set to a value."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from encdiff.errors import InputError

Progress = Callable[[int, int], None]  # (done, total)


class Edits:
    """A part of `EncDiff`. Every method ends in `EncDiff.sample`, which says what the options are."""

    def reconstruct(
        self, images: Tensor, *,
        x_T: Tensor | None = None, sampler: str = "dpm-solver++", steps: int = 20, eta: float = 0.0,
        gate: int | None = None, seed: int = 0, sample_ids: Tensor | None = None, token_bias: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """Encode images (B, 3, S, S), then sample from the scalars alone: (B, 3, S, S)."""
        return self.sample(
            self._codes(images), x_T=x_T, sampler=sampler, steps=steps, eta=eta, gate=gate, seed=seed,
            sample_ids=sample_ids, token_bias=token_bias, progress=progress,
        )  # fmt: skip

    def swap(
        self, source: Tensor, target: Tensor, concepts: int | Sequence[int], *,
        x_T: Tensor | None = None, sampler: str = "dpm-solver++", steps: int = 20, eta: float = 0.0,
        gate: int | None = None, seed: int = 0, sample_ids: Tensor | None = None, token_bias: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """The target images with the given concepts taken from the source images; both (B, 3, S, S), as the result.

        x_T, sample_ids and token_bias are of the B images; for the targets' own starts x_T is `invert(target)` and the
        sampler "ddim" in as many steps.
        """
        if source.shape != target.shape:
            raise InputError(f"source {tuple(source.shape)} and target {tuple(target.shape)} must have one shape")
        chosen = [self._check_concept(c) for c in (concepts if isinstance(concepts, Iterable) else [concepts])]
        scalars = self._codes(target).clone()
        scalars[:, chosen] = self._codes(source)[:, chosen]
        return self.sample(
            scalars, x_T=x_T, sampler=sampler, steps=steps, eta=eta, gate=gate, seed=seed,
            sample_ids=sample_ids, token_bias=token_bias, progress=progress,
        )  # fmt: skip

    def traverse(
        self, image: Tensor, concept: int, values: Sequence[float] | Tensor, *,
        x_T: Tensor | None = None, sampler: str = "dpm-solver++", steps: int = 20, eta: float = 0.0,
        gate: int | None = None, seed: int = 0, sample_ids: Tensor | None = None, token_bias: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """One image (3, S, S) or (1, 3, S, S) with one scalar set to each of the values: (len(values), 3, S, S).

        x_T, sample_ids and token_bias have a row for each value.
        """
        image = image[None] if image.ndim == 3 else image
        if len(image) != 1:
            raise InputError(f"image is {tuple(image.shape)}, must be one image (3, S, S)")
        values = torch.as_tensor(values, dtype=torch.float32, device=image.device)
        codes, each = self._codes(image), self.config.code_shape[1:]
        if values.shape[1:] != each or values.ndim == 0 or not values.isfinite().all():
            wanted = f"vectors of {each[0]} finite numbers" if each else "finite numbers"
            raise InputError(f"values are {values.tolist()}, must be a list of {wanted}")
        scalars = codes.repeat_interleave(len(values), 0)
        scalars[:, self._check_concept(concept)] = values
        return self.sample(
            scalars, x_T=x_T, sampler=sampler, steps=steps, eta=eta, gate=gate, seed=seed,
            sample_ids=sample_ids, token_bias=token_bias, progress=progress,
        )  # fmt: skip

    def _check_concept(self, concept: SupportsIndex) -> int:
        try:
            index = -1 if isinstance(concept, bool) else operator.index(concept)
        except TypeError:
            index = -1
        if not 0 <= index < self.config.concepts:
            raise InputError(f"concept is {concept!r}, must be an integer in 0..{self.config.concepts - 1}")
        return index
