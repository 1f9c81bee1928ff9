"""Which function measures a block, and which says it in words."""

import importlib
from collections.abc import Callable

MEASURES = {  # of blocks that are one function of the lab
    "machine": "machine.measure", "step": "steps.measure", "profile": "steps.measure_profile",
    "published": "steps.measure_published", "tuned": "tiles.measure_tuned", "unet": "sampling.measure_unet",
    "whole": "sampling.check", "sampling": "sampling.measure", "ops": "operations.measure", "doctor": "doctor.measure",
    "switches": "switches.measure", "prompts": "prompts.measure",
}  # fmt: skip
LINES_OF = {  # what a block's result is in words
    "right": "checks.lines", "machine": "machine.lines", "step": "steps.lines", "published": "steps.lines",
    "profile": "steps.profile_lines", "unet": "steps.lines", "shipped": "shipped.lines",
    "whole": "sampling.check_lines", "compiled": "compiled.lines", "ops": "operations.lines",
    "sampling": "sampling.lines", "tiles": "tiles.lines", "tuned": "tiles.tuned_lines", "paper": "paper.lines",
    "doctor": "doctor.lines", "switches": "switches.lines", "prompts": "prompts.lines",
}  # fmt: skip


def named(function: str) -> Callable:
    """A function of this package, `module.name`; imported here, after the environment is set."""
    module, name = function.split(".")
    return getattr(importlib.import_module(f"bench.gpu.{module}"), name)
