"""A model small enough for every test."""

import torch

from encdiff import EncDiff, EncDiffConfig

TINY = EncDiffConfig(
    image_size=16, concepts=3, encoder_width=8, token_width=4, bank_widths=(8,), first_stage="space_to_depth", patch=4,
    width=16, multipliers=(1, 2), depth=1, attention_levels=(0, 1), heads=2, groups=8,
)  # fmt: skip
SMALLER = ["image_size=16", "encoder_width=8", "width=16", "groups=8", "heads=2"]  # the preset quickstart, for --set
SET_SMALLER = [word for change in SMALLER for word in ("--set", change)]


def shaken(config: EncDiffConfig) -> EncDiff:
    """A model whose every weight matters: at the published initialisation the concepts have no effect yet."""
    model = EncDiff(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return model.eval()
