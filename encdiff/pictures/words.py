"""Words over an image: where a text-to-image U-Net looked for each token of its prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from encdiff.data import to_uint8
from encdiff.errors import InputError
from encdiff.pictures.cells import draw_colour_bar, heated
from encdiff.pictures.sheet import Column, Sheet, draw_panels

SIDE = 192  # the longer side of a cell, in pixels


def words_picture(
    image: Tensor | Image.Image, maps: Tensor, words: Mapping[int | tuple[int, ...], str] | Sequence[str]
) -> Image.Image:
    """The attention to chosen tokens over the image, one cell for each word, on one colour scale.

    Args:
        image: a PIL image, as a pipeline gives it, or (3, H, W) in [-1, 1] (its `output_type="pt"` is in [0, 1]).
        maps: (N, h, w), of one image: `record_maps(...)`'s `maps.mean()[i]`; in a guided batch i is of the second half.
        words: what to show: {place of the token: word}, {(places): word} for a word of several tokens, or a list for
            the places 0, 1, .. A CLIP prompt begins at place 1; place 0 takes most of the attention and says little.

    Raises:
        InputError: maps of another form, or a place beyond their tokens.
    """
    if not isinstance(maps, Tensor) or maps.ndim != 3:
        given = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(f"maps are {given}, must be a torch.Tensor (N, h, w), of one image: maps.mean()[0]")
    shares = [(word, maps[_places(place, len(maps))].sum(0).cpu()) for place, word in _pairs(words)]
    cell = _fitted(image)
    high = max(float(share.max()) for _, share in shares)
    sheet = Sheet(
        "Attention to words",
        "How much of its attention the U-Net gives to each word at every place of the image, averaged over the "
        f"recorded layers and steps and over heads. Everywhere all {len(maps)} tokens' shares add up to 100 %.",
    )
    columns = [Column([heated(cell, share.numpy(), high)], word) for word, share in shares]
    draw_panels(sheet, [""], [Column([cell], "image")], columns, "attention to each word")
    draw_colour_bar(sheet, high)
    return sheet.render()


def _pairs(words: Any) -> list[tuple[Any, str]]:
    """Places and words, in their order; a word may come twice."""
    listed = isinstance(words, Sequence) and not isinstance(words, str)
    pairs = list(words.items() if isinstance(words, Mapping) else enumerate(words) if listed else [])
    if not pairs or not all(isinstance(word, str) for _, word in pairs):
        raise InputError(f"words are {str(words)[:80]!r}, must be a list of words, or {{place of a token: word}}")
    return pairs


def _places(place: int | tuple[int, ...], tokens: int) -> list[int]:
    places = list(place) if isinstance(place, tuple) else [place]
    if not places or not all(isinstance(p, int) and 0 <= p < tokens for p in places):
        raise InputError(f"place {place!r} of a word must be in 0..{tokens - 1}, the tokens of the maps")
    return places


def _fitted(image: Tensor | Image.Image) -> Image.Image:
    if not isinstance(image, Image.Image):
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
            given = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise InputError(f"image is {given}, must be a torch.Tensor (3, H, W) in [-1, 1], or a PIL image")
        image = Image.fromarray(to_uint8(image[None]).cpu().numpy()[0])
    factor = SIDE / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST)
