"""Dropout by keyed numbers: of all tokens of an image, and of a U-Net's skip connections."""

from torch import Tensor

from encdiff.objectives.keys import SKIPS, TOKENS, Key


def drop_tokens(tokens: Tensor, probability: float, key: Key) -> Tensor:
    """Tokens (B, N, d), of each image with that probability all zero: what guidance takes for "no concepts".

    With tokens of zero cross-attention gives its bias alone, whatever the image.
    Source: classifier-free guidance, arXiv 2207.12598.
    """
    keep = key.uniform((len(tokens), 1), TOKENS) >= probability
    return tokens * keep[:, :, None]


class SkipDropout:
    """Dropout on what a U-Net's skip connections carry: numbers are zero with that probability, the others grow by it.

    So that less of the image comes by without the concepts. Source: DyGA, arXiv 2410.23820, with 0.2.
    """

    def __init__(self, probability: float, key: Key):
        self.probability, self.key = probability, key

    def __call__(self, skip: Tensor, place: int) -> Tensor:
        """skip (B, C, H, W) of the output block at `place`."""
        keep = self.key.uniform(tuple(skip.shape), SKIPS + place) >= self.probability
        return skip * (keep / (1 - self.probability)).to(skip.dtype)
