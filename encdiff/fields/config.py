"""What fixes a field model's shapes and meaning, and its named presets."""

from dataclasses import dataclass
from typing import Annotated, Literal

from encdiff.checked import Checked, Depth, Multiple, Natural, NotNegative, Positive, Range, Width
from encdiff.errors import InputError
from encdiff.fields.grid import Grid

Patch = Annotated[int, Range(1, 64)]
SIGMA_DATA = 0.5  # standard deviation of the fields as the network has them (arXiv 2206.00364, table 1)


@dataclass(frozen=True)
class FieldConfig(Checked):
    """The configuration of a `FieldModel`; the defaults are a small model's for fields of 64x64."""

    # the fields
    channels: tuple[str, ...] = ("permeability", "pressure")
    height: Width = 64
    width: Width = 64
    domain: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0)  # x0, x1, y0, y1
    periodic: bool = False
    mean: tuple[float, ...] = (0.0, 0.0)  # of each channel, over the training's fields
    std: tuple[Positive, ...] = (1.0, 1.0)
    # sensors that measured at several times; 0: all at the field's. In units of time: ages are divided by it
    memory: NotNegative = 0.0
    speed: NotNegative = 0.0  # lengths of the domain: a sensor is farther by so many for a unit of age
    # what is learnt, and how what was measured enters
    objective: Literal["diffusion", "regression"] = "diffusion"
    condition: Literal["tokens", "input", "none"] = "tokens"
    # the condition's encoder
    token_patch: Patch = 8
    token_width: Width = 128
    token_depth: Depth = 4
    token_heads: Depth = 4
    # the U-Net
    patch: Patch = 4  # pixels on a side of what it takes as one position
    base_width: Width = 64
    multipliers: tuple[Multiple, ...] = (1, 2)
    depth: Depth = 1
    attention_levels: tuple[Natural, ...] = (0, 1)
    heads: Depth = 4
    self_attention: bool = True
    groups: Width = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        grid = self.grid
        for name in ("mean", "std"):
            if len(getattr(self, name)) != len(self.channels):
                raise InputError(f"{name} has {len(getattr(self, name))} numbers, must have {len(self.channels)}")
        for name in ("patch", "token_patch"):
            side = getattr(self, name) * (2 ** (len(self.multipliers) - 1) if name == "patch" else 1)
            if grid.height % side or grid.width % side:
                raise InputError(
                    f"fields of {grid.height}x{grid.width} must be a multiple of {side} for {name}; crop or pad them"
                )
        if self.token_width % 4 or self.token_width % self.token_heads:
            raise InputError(
                f"token_width is {self.token_width}, must be a multiple of 4 and of token_heads {self.token_heads}"
            )
        if (self.memory > 0) != (self.speed > 0):
            raise InputError(
                f"memory and speed are {self.memory:g} and {self.speed:g}, must both be above 0, or both 0"
            )
        if self.objective == "regression" and self.condition == "none":
            raise InputError("condition is 'none', must be 'tokens' or 'input' for objective 'regression'")

    @property
    def grid(self) -> Grid:
        return Grid(self.channels, self.height, self.width, self.domain, self.periodic)

    @property
    def timed(self) -> bool:
        """Whether sensors have times."""
        return self.memory > 0
