"""What people do with a model of concepts: rebuild, swap, move and mix them; whatever draws the images."""

import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, SupportsIndex

import torch
import torch.nn as nn
from torch import Tensor

from encdiff.diffusion.gate import Gate
from encdiff.diffusion.schedulers import Sampler
from encdiff.errors import InputError
from encdiff.models.directions import Direction
from encdiff.models.encoder import ImageEncoder
from encdiff.models.layers import part
from encdiff.models.mode import evaluating

Progress = Callable[[int, int], None]  # (done, total)


class CodePrior(Protocol):
    """What codes can be drawn from: `encdiff.prior` has some."""

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """(count, N) floats, the same for the same seed."""
        ...


class ConceptModel(nn.Module):
    """An encoder of images to concepts, and something that draws images from these: `EncDiff`, or a VAE.

    The methods here run in eval mode without gradients; most end in `sample`, which says what the options are.
    """

    config: Any  # image_size, concepts, code_shape: of one image's codes
    inverts_by = "ddim"  # the sampler that comes back from what `invert` gives

    @property
    @abstractmethod
    def encoder(self) -> ImageEncoder: ...

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> codes (B, N); (B, N, m) where a concept is a vector."""

    @abstractmethod
    def sample(
        self, scalars: Tensor, *,
        x_T: Tensor | None = None, sampler: Sampler = "dpm-solver++", steps: int = 20, eta: float = 0.0,
        gate: Gate = None, guidance: float = 1.0, seed: int = 0, sample_ids: Tensor | None = None,
        token_bias: Tensor | None = None, progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """Codes, as `encode` gives them -> images (B, 3, S, S)."""

    def invert(self, images: Tensor, steps: int = 50) -> Tensor:
        """The x_T from which `sample` comes back to these images by their own codes; InputError where none can be."""
        raise InputError(f"invert: a {type(self).__name__} draws from its codes alone, without noise to be found")

    def attention_maps(self, images: Tensor, steps: int = 10, seed: int = 0) -> Tensor:
        """Where the model attends to each concept: (B, N, S, S); InputError where nothing attends."""
        raise InputError(f"attention_maps: a {type(self).__name__} has no cross-attention to look at")

    def reconstruct(
        self, images: Tensor, *,
        x_T: Tensor | None = None, sampler: Sampler = "dpm-solver++", steps: int = 20, eta: float = 0.0,
        gate: Gate = None, guidance: float = 1.0, seed: int = 0, sample_ids: Tensor | None = None,
        token_bias: Tensor | None = None, progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """Encode images (B, 3, S, S), then sample from the scalars alone: (B, 3, S, S)."""
        return self.sample(
            self._codes(images), x_T=x_T, sampler=sampler, steps=steps, eta=eta, gate=gate, guidance=guidance,
            seed=seed, sample_ids=sample_ids, token_bias=token_bias, progress=progress,
        )  # fmt: skip

    def swap(
        self, source: Tensor, target: Tensor, concepts: int | Sequence[int], *,
        x_T: Tensor | None = None, sampler: Sampler = "dpm-solver++", steps: int = 20, eta: float = 0.0,
        gate: Gate = None, guidance: float = 1.0, seed: int = 0, sample_ids: Tensor | None = None,
        token_bias: Tensor | None = None, progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """The target images with the given concepts taken from the source images; both (B, 3, S, S), as the result.

        x_T, sample_ids and token_bias are of the B images; for the targets' own starts x_T is `invert(target)` and the
        sampler `inverts_by` in as many steps.
        """
        if source.shape != target.shape:
            raise InputError(f"source {tuple(source.shape)} and target {tuple(target.shape)} must have one shape")
        chosen = self._check_concepts(concepts)
        scalars = self._codes(target).clone()
        scalars[:, chosen] = self._codes(source)[:, chosen]
        return self.sample(
            scalars, x_T=x_T, sampler=sampler, steps=steps, eta=eta, gate=gate, guidance=guidance,
            seed=seed, sample_ids=sample_ids, token_bias=token_bias, progress=progress,
        )  # fmt: skip

    def traverse(
        self, image: Tensor, concept: int, values: Sequence[float] | Tensor, *,
        x_T: Tensor | None = None, sampler: Sampler = "dpm-solver++", steps: int = 20, eta: float = 0.0,
        gate: Gate = None, guidance: float = 1.0, seed: int = 0, sample_ids: Tensor | None = None,
        token_bias: Tensor | None = None, progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """One image (3, S, S) or (1, 3, S, S) with one scalar set to each of the values: (len(values), 3, S, S).

        x_T, sample_ids and token_bias have a row for each value.
        """
        image = _one(image, "image")
        values = torch.as_tensor(values, dtype=torch.float32, device=image.device)
        codes, each = self._codes(image), self.config.code_shape[1:]
        if values.shape[1:] != each or values.ndim == 0 or not values.isfinite().all():
            wanted = f"vectors of {each[0]} finite numbers" if each else "finite numbers"
            raise InputError(f"values are {values.tolist()}, must be a list of {wanted}")
        scalars = codes.repeat_interleave(len(values), 0)
        scalars[:, self._check_concept(concept)] = values
        return self.sample(
            scalars, x_T=x_T, sampler=sampler, steps=steps, eta=eta, gate=gate, guidance=guidance,
            seed=seed, sample_ids=sample_ids, token_bias=token_bias, progress=progress,
        )  # fmt: skip

    def interpolate(
        self, source: Tensor, target: Tensor, frames: int = 7, *, concepts: int | Sequence[int] | None = None,
        x_T: Tensor | None = None, sampler: Sampler = "dpm-solver++", steps: int = 20, eta: float = 0.0,
        gate: Gate = None, guidance: float = 1.0, seed: int = 0, sample_ids: Tensor | None = None,
        token_bias: Tensor | None = None, progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """From one image (3, S, S) or (1, 3, S, S) to another: (frames, 3, S, S).

        The scalars move in a straight line, in equal steps, so that the first frame is the source's reconstruction and
        the last the target's. With `concepts` these alone move; the others stay the source's. x_T, sample_ids and
        token_bias have a row for each frame.
        """
        if not isinstance(frames, int) or isinstance(frames, bool) or frames < 2:
            raise InputError(f"frames is {frames!r}, must be an integer of at least 2")
        first, last = (self._codes(_one(i, name)) for i, name in ((source, "source"), (target, "target")))
        moved = self._check_concepts(range(self.config.concepts) if concepts is None else concepts)
        way = torch.linspace(0, 1, frames, dtype=first.dtype, device=first.device)
        scalars = first.repeat_interleave(frames, 0)
        scalars[:, moved] = first[:, moved].lerp(last[:, moved], way.reshape(-1, *[1] * (first.ndim - 1)))
        return self.sample(
            scalars, x_T=x_T, sampler=sampler, steps=steps, eta=eta, gate=gate, guidance=guidance,
            seed=seed, sample_ids=sample_ids, token_bias=token_bias, progress=progress,
        )  # fmt: skip

    def edit(
        self, images: Tensor, direction: Direction | Tensor, strength: float | Sequence[float] | Tensor = 1.0, *,
        x_T: Tensor | None = None, sampler: Sampler = "dpm-solver++", steps: int = 20, eta: float = 0.0,
        gate: Gate = None, guidance: float = 1.0, seed: int = 0, sample_ids: Tensor | None = None,
        token_bias: Tensor | None = None, progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """Images (B, 3, S, S) with `strength` times the direction added to their scalars: (B, 3, S, S).

        direction: what `encdiff.evaluation.fit_direction` found, or a tensor (N,); of the shape of one image's codes.
        strength: one number, or one for each image (B,). At 0 an image is its reconstruction.
        """
        vector = direction.vector if isinstance(direction, Direction) else direction
        if not isinstance(vector, Tensor) or vector.shape != self.config.code_shape or not vector.isfinite().all():
            given = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise InputError(
                f"direction is {given}, must be finite numbers {self.config.code_shape}, one for each code"
            )
        codes = self._codes(images)
        by = torch.as_tensor(strength, dtype=codes.dtype, device=codes.device)
        if by.shape not in ((), (len(codes),)) or not by.isfinite().all():
            raise InputError(f"strength is {strength}, must be a finite number, or {len(codes)}, one for each image")
        by = by.expand(len(codes)).reshape(-1, *[1] * vector.ndim)
        return self.sample(
            codes + by * vector.to(codes), x_T=x_T, sampler=sampler, steps=steps, eta=eta, gate=gate, guidance=guidance,
            seed=seed, sample_ids=sample_ids, token_bias=token_bias, progress=progress,
        )  # fmt: skip

    def sample_prior(
        self, count: int, prior: CodePrior, *,
        sampler: Sampler = "dpm-solver++", steps: int = 20, eta: float = 0.0, gate: Gate = None,
        guidance: float = 1.0, seed: int = 0,
        batch_size: int = 64, progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """`count` images (count, 3, S, S) without a source image: `sample` of codes that the prior draws by `seed`.

        Image i has the noise of sample id i, whatever the batch size; `progress` is called with (images done, count).
        """
        if not hasattr(prior, "sample"):
            raise InputError(f"prior is a {type(prior).__name__}, must have sample(count, seed): fit_prior makes one")
        for name, whole in (("count", count), ("batch_size", batch_size)):
            if not isinstance(whole, int) or whole < 1:
                raise InputError(f"{name} is {whole!r}, must be a whole number of at least 1")
        codes = prior.sample(count, seed=seed)
        if not isinstance(codes, Tensor) or not codes.isfinite().all():
            raise InputError("prior gives codes that are no torch.Tensor, or not finite; must be finite numbers")
        if tuple(codes.shape) != (count, *self.config.code_shape):
            wanted = (count, *self.config.code_shape)
            raise InputError(f"prior gives codes {tuple(codes.shape)}, must give {wanted} for this model")
        device, done = next(self.parameters()).device, []
        for ids in torch.arange(count, device=device).split(batch_size):
            scalars = codes[ids[0] : ids[-1] + 1].to(device, torch.float32)
            done.append(
                self.sample(
                    scalars,
                    sampler=sampler,
                    steps=steps,
                    eta=eta,
                    gate=gate,
                    guidance=guidance,
                    seed=seed,
                    sample_ids=ids,
                )
            )
            if progress:
                progress(sum(map(len, done)), count)
        return torch.cat(done)

    def _codes(self, images: Tensor) -> Tensor:
        with evaluating(self):
            self._check_images(images, values=True)
            return self.encode(images)

    def _check_concepts(self, concepts: int | Iterable[int]) -> list[int]:
        return [self._check_concept(c) for c in (concepts if isinstance(concepts, Iterable) else [concepts])]

    def _check_concept(self, concept: SupportsIndex) -> int:
        try:
            index = -1 if isinstance(concept, bool) else operator.index(concept)
        except TypeError:
            index = -1
        if not 0 <= index < self.config.concepts:
            raise InputError(f"concept is {concept!r}, must be an integer in 0..{self.config.concepts - 1}")
        return index

    def _check_images(self, images: Tensor, values: bool = False) -> Tensor:
        """The images in the model's dtype; `values` also reads them on a GPU, which stalls it."""
        size = self.config.image_size
        if not isinstance(images, Tensor):
            raise InputError(f"images are {type(images).__name__}, must be a torch.Tensor; see encdiff.data.to_float")
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise InputError(f"images are {tuple(images.shape)}, must be (B, 3, {size}, {size})")
        if not images.is_floating_point():
            raise InputError(f"images are {images.dtype}, must be floating point in [-1, 1]; see encdiff.data.to_float")
        if (values or images.device.type == "cpu") and images.numel() and not torch.compiler.is_compiling():
            low, high = images.aminmax()
            if not (low >= -1.001 and high <= 1.001):  # false for NaN
                raise InputError(f"images span {low:.4g} to {high:.4g}, must lie in [-1, 1] without NaN")
        return images.to(part(self.encoder, 0, nn.Conv2d).weight.dtype)


def _one(image: Tensor, name: str) -> Tensor:
    image = image[None] if image.ndim == 3 else image
    if len(image) != 1:
        raise InputError(f"{name} is {tuple(image.shape)}, must be one image (3, S, S)")
    return image
