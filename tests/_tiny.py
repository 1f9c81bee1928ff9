"""A model small enough for every test."""

from encdiff import EncDiffConfig

TINY = EncDiffConfig(
    image_size=16, concepts=3, encoder_width=8, token_width=4, bank_widths=(8,), first_stage="space_to_depth", patch=4,
    width=16, multipliers=(1, 2), depth=1, attention_levels=(0, 1), heads=2, groups=8,
)  # fmt: skip
SMALLER = ["image_size=16", "encoder_width=8", "width=16", "groups=8", "heads=2"]  # the preset quickstart, for --set
SET_SMALLER = [word for change in SMALLER for word in ("--set", change)]
