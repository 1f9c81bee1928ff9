"""What fixes a model's shapes and meaning: one dataclass and its named presets."""

from dataclasses import dataclass, fields
from typing import Any

from encdiff.errors import InputError


@dataclass(frozen=True)
class EncDiffConfig:
    """The configuration of an `EncDiff`; the defaults are the paper's for 64x64 images."""

    image_size: int = 64
    # image encoder and MLP bank
    concepts: int = 20  # N
    encoder_width: int = 128
    normalize_scalars: bool = False  # zero mean and unit variance over the batch, as the encoder's last layer
    token_width: int = 16  # d
    bank_widths: tuple[int, ...] = (64, 128)
    bank_activation: str = "elu"
    # first stage: "vq" (learnt, frozen) or "space_to_depth" (no parameters)
    first_stage: str = "vq"
    vq_width: int = 32
    vq_multipliers: tuple[int, ...] = (1, 2, 4)
    vq_depth: int = 2
    vq_codes: int = 2048
    patch: int = 4  # of space_to_depth
    scaling_factor: float = 1.0  # multiplies latents, so that their standard deviation is about 1
    # U-Net
    width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    depth: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    heads: int = 8
    transformer_depth: int = 1
    self_attention: bool = True
    feedforward: int = 4  # hidden width of a transformer's feed-forward layer, as a multiple
    scale_shift: bool = True
    resample: str = "residual"
    groups: int = 32
    # diffusion
    schedule: str = "scaled_linear"
    num_timesteps: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0155
    prediction: str = "epsilon"
    loss: str = "l1"

    def __post_init__(self) -> None:
        for field in fields(self):  # JSON has no tuples
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        for name in (
            "concepts",
            "encoder_width",
            "token_width",
            "patch",
            "width",
            "depth",
            "heads",
            "feedforward",
            "num_timesteps",
        ):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise InputError(f"{name} is {value!r}, must be a positive integer")
        if self.first_stage not in ("vq", "space_to_depth"):
            raise InputError(f"first_stage is {self.first_stage!r}, must be 'vq' or 'space_to_depth'")
        if not self.scaling_factor > 0:
            raise InputError(f"scaling_factor is {self.scaling_factor!r}, must be positive")
        stride = self.downsampling * 2 ** (len(self.multipliers) - 1)
        if self.image_size % stride:
            raise InputError(f"image_size is {self.image_size}, must be a multiple of {stride} for these levels")

    @property
    def downsampling(self) -> int:
        """Image pixels per latent position along each side."""
        return 2 ** (len(self.vq_multipliers) - 1) if self.first_stage == "vq" else self.patch

    @classmethod
    def from_preset(cls, name: str) -> "EncDiffConfig":
        if name not in PRESETS:
            raise InputError(f"preset {name!r} is unknown, must be one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "configuration") -> "EncDiffConfig":
        """Build from what JSON gives; `source` names the file in errors."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise InputError(f"{source}: unknown entries {', '.join(unknown)}; is it of another program or version?")
        return cls(**values)


PAPER = EncDiffConfig()

PRESETS: dict[str, EncDiffConfig] = {
    "shapes3d": PAPER,
    "mpi3d": PAPER,
    "cars3d": PAPER,
    "celeba": PAPER,  # the published code holds no CelebA configuration; the paper gives the same architecture
    # small enough to learn on a CPU: 32x32 images as 8x8x48 latents (docs/recipes.md)
    "quickstart": EncDiffConfig(
        image_size=32,
        concepts=10,
        encoder_width=64,
        first_stage="space_to_depth",
        patch=4,
        scaling_factor=2.0,
        width=64,
        multipliers=(1, 2),
        depth=1,
        attention_levels=(0, 1),
        heads=4,
    ),
}
