"""Words over an image: where a text-to-image U-Net looked for each token of its prompt."""

from collections.abc import Mapping, Sequence

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
        image: (3, H, W) in [-1, 1], or a PIL image, as a pipeline gives it.
        maps: (N, h, w), of one image: `record_maps(...)`'s `maps.mean()[i]`; in a guided batch i is of the second half.
        words: what to show: {place of the token: word}, {(places): word} for a word of several tokens, or a list for
            the places 0, 1, .. A CLIP prompt begins at place 1; place 0 takes most of the attention and says little.

    Raises:
        InputError: maps of another form, or a place beyond their tokens.
    """
    if not isinstance(maps, Tensor) or maps.ndim != 3:
        given = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(f"maps are {given}, must be a torch.Tensor (N, h, w), of one image: maps.mean()[0]")
    chosen = dict(words) if isinstance(words, Mapping) else dict(enumerate(words))
    shares = {word: maps[_places(place, len(maps))].sum(0).cpu() for place, word in chosen.items()}
    if not shares:
        raise InputError("words are none, must name at least one token")
    cell = _fitted(image)
    high = max(float(share.max()) for share in shares.values())
    sheet = Sheet(
        "Attention to words",
        "How much of its attention the U-Net gives to each word at every place of the image, averaged over the "
        f"recorded layers and steps and over heads. Everywhere all {len(maps)} tokens' shares add up to 100 %.",
    )
    columns = [Column([heated(cell, share.numpy(), high)], word) for word, share in shares.items()]
    draw_panels(sheet, [""], [Column([cell], "image")], columns, "attention to each word")
    draw_colour_bar(sheet, high)
    return sheet.render()


def _places(place: int | tuple[int, ...], tokens: int) -> list[int]:
    places = [place] if isinstance(place, int) else list(place)
    if not places or any(not isinstance(p, int) or not 0 <= p < tokens for p in places):
        raise InputError(f"place {place!r} of a word must be in 0..{tokens - 1}, the tokens of the maps")
    return places


def _fitted(image: Tensor | Image.Image) -> Image.Image:
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise InputError(f"image is {tuple(image.shape)}, must be (3, H, W), or a PIL image")
        image = Image.fromarray(to_uint8(image[None]).cpu().numpy()[0])
    factor = SIDE / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST)
