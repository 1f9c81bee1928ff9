"""Named models of fields, and how to train them."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

from encdiff.checked import Fraction, NotNegative, Positive, Range
from encdiff.errors import InputError
from encdiff.fields.config import FieldConfig
from encdiff.training.recipes import DescentConfig

Share = Annotated[float, Range(0, 1, above=True)]


@dataclass(frozen=True)
class FieldTrainConfig(DescentConfig):
    """How to train a field model: which sensors it meets, beside how it descends.

    A sample's sensors are random pixels, their number log-uniform between the ends of `observed`.
    """

    observed: tuple[Share, Share] = (0.002, 0.12)  # shares of all pixels
    noise: NotNegative = 0.25  # greatest deviation of a sensor's noise, in standard deviations of its channel
    exact: Fraction = 0.5  # share of the samples whose sensors have none; of the others it is uniform
    partial: Fraction = 0.2  # share of the samples in which only some channels are measured, where there are several
    sigma: tuple[float, Positive] = (-1.2, 1.2)  # mean and deviation of log(sigma), the diffusion's noise levels: EDM's
    held_out: Fraction = 0.2  # the last part of the data, which is not trained on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observed[0] > self.observed[1]:
            raise InputError(f"observed is {self.observed}, must be the lower share, then the higher")


FIELD_PRESETS = {
    "small": FieldConfig(
        token_patch=4, token_width=96, token_depth=2, base_width=48, multipliers=(1, 2), groups=16,
        self_attention=False, heads=4,
    ),
    # the published widths; 128x128 fields, 256 tokens
    "paper": FieldConfig(
        height=128, width=128, token_width=256, token_heads=8, patch=1, base_width=128, multipliers=(1, 2, 2, 2),
        depth=2, attention_levels=(2, 3), heads=8,
    ),
}  # fmt: skip
FIELD_RECIPES = {
    "small": FieldTrainConfig(
        steps=7000, batch_size=16, learning_rate=1e-3, warmup=200, decay=0.3, weight_decay=0.0, betas=(0.9, 0.99),
        gradient_clip=1.0, ema=0.999, picture_every=2500,
        sigma=(0.0, 1.6),  # more noise than EDM's, which is of pictures: there a field is found, not sharpened
    ),
    "paper": FieldTrainConfig(
        steps=100_000, batch_size=16, learning_rate=1e-4, warmup=0, weight_decay=0.0, picture_every=5000
    ),
}  # fmt: skip


def field_recipe(name: str, **changes: Any) -> FieldTrainConfig:
    """A named recipe with some fields changed."""
    if name not in FIELD_RECIPES:
        raise InputError(f"preset {name!r} is unknown, must be one of {', '.join(FIELD_RECIPES)}")
    return replace(FIELD_RECIPES[name], **changes)
