"""What fixes a model's shapes and meaning: one dataclass and its named presets."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from encdiff.checked import Checked, Codes, Depth, Multiple, Natural, NotNegative, Positive, Range, Width
from encdiff.errors import InputError

BLOCKS, MLPS = 512, 8192  # of the U-Net and the bank, at most: a file cannot ask for what takes minutes to build


Probability = Annotated[float, Range(0, 0.99)]


@dataclass(frozen=True)
class EncDiffConfig(Checked):
    """The configuration of an `EncDiff`; the defaults are the paper's for 64x64 images."""

    image_size: Width = 64
    # image encoder and MLP bank
    concepts: Annotated[int, Range(1, 4096)] = 20  # N
    encoder_width: Width = 128
    normalize_scalars: bool = False  # zero mean and unit variance over the batch, as the encoder's last layer
    concept_width: Width = 1  # m, numbers per concept: 1 is the paper's scalar, more make it a vector
    token_width: Width = 16  # d
    bank_widths: tuple[Width, ...] = (64, 128)
    bank_activation: Literal["elu", "silu", "gelu", "relu"] = "elu"
    bank_shared: bool = False  # one MLP for all concepts
    bank_gain: Positive = 1.0  # multiplies the bank's initial weights after its first layer; 1 is PyTorch's own start
    # first stage: "vq" (learnt, frozen) or "space_to_depth" (no parameters)
    first_stage: Literal["vq", "space_to_depth"] = "vq"
    vq_width: Width = 32
    vq_multipliers: tuple[Multiple, ...] = (1, 2, 4)
    vq_depth: Depth = 2
    vq_codes: Codes = 2048
    patch: Annotated[int, Range(1, 1024)] = 4  # of space_to_depth
    scaling_factor: Positive = 1.0  # multiplies latents, so that their standard deviation is about 1
    # U-Net
    width: Annotated[int, Range(2, 2**14)] = 64
    multipliers: tuple[Multiple, ...] = (1, 2, 4, 4)
    depth: Depth = 2
    attention_levels: tuple[Natural, ...] = (0, 1, 2)
    heads: Width = 8
    transformer_depth: Depth = 1
    self_attention: bool = True
    feedforward: Multiple = 4  # hidden width of a transformer's feed-forward layer, as a multiple
    scale_shift: bool = True
    conditioning: Literal["cross_attention", "adagn"] = "cross_attention"  # adagn: tokens join the timestep's embedding
    resample: Literal["residual", "conv"] = "residual"
    groups: Width = 32
    # diffusion
    schedule: str = "scaled_linear"
    num_timesteps: Annotated[int, Range(1, 10**6)] = 1000
    beta_start: Positive = 0.0015
    beta_end: Positive = 0.0155
    prediction: Literal["epsilon", "v", "x0", "flow"] = "epsilon"  # flow: e - x0 on x_t = (1 - s) x0 + s e
    flow_output: Literal["velocity", "x0"] = "velocity"  # what the U-Net gives of a flow; x0: made a velocity of it
    loss: Literal["l1", "mse"] = "l1"
    # what the field adds to that objective (encdiff.objectives), weights and probabilities
    anchors: Annotated[int, Range(0, 256)] = 0  # components of a Gaussian mixture that a scalar is drawn to: DyGA
    skip_dropout: Probability = 0.0  # of the U-Net's skip connections: DyGA
    mutual_information: NotNegative = 0.0
    orthogonality: NotNegative = 0.0
    token_dropout: Probability = 0.0  # of all tokens of an image, for guidance

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.multipliers or not self.vq_multipliers:
            raise InputError("multipliers and vq_multipliers must hold at least one level")
        blocks = len(self.multipliers) * (2 * self.depth + 1) * (1 + self.transformer_depth)
        if blocks > BLOCKS:
            raise InputError(f"multipliers, depth, transformer_depth: {blocks} blocks, must be {BLOCKS} at most")
        mlps = self.concepts * (1 + len(self.bank_widths))
        if mlps > MLPS:
            raise InputError(f"concepts, bank_widths: {mlps} layers in the bank, must be {MLPS} at most")
        stride = self.downsampling * 2 ** (len(self.multipliers) - 1)
        if self.image_size % stride:
            raise InputError(f"image_size is {self.image_size}, must be a multiple of {stride} for these levels")
        drawn = {"schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0155}  # of a DDPM schedule
        if self.prediction == "flow" and (other := [name for name in drawn if getattr(self, name) != drawn[name]]):
            raise InputError(f"{other[0]} is {getattr(self, other[0])!r}, has no meaning for prediction 'flow'")
        if self.prediction != "flow" and self.flow_output != "velocity":
            raise InputError(f"flow_output is 'x0', needs prediction 'flow', not {self.prediction!r}")
        if self.anchors and (self.concept_width > 1 or not self.normalize_scalars):
            lacks = "concept_width 1: scalars" if self.concept_width > 1 else "normalize_scalars: unit variance"
            raise InputError(f"anchors is {self.anchors}, needs {lacks} are drawn to them")
        if self.orthogonality and self.concepts < 2:
            raise InputError("orthogonality is of two concepts, concepts is 1; must be 2 at least")
        if self.conditioning == "adagn" and not self.scale_shift:
            raise InputError("conditioning is 'adagn', needs scale_shift: tokens scale and shift normalised features")

    @property
    def downsampling(self) -> int:
        """Image pixels per latent position along each side."""
        return 2 ** (len(self.vq_multipliers) - 1) if self.first_stage == "vq" else self.patch

    @property
    def draws(self) -> bool:
        """Whether the loss needs random numbers beside timestep and noise."""
        return bool(self.anchors or self.skip_dropout or self.orthogonality or self.token_dropout)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """The shape of what the encoder makes of one image, (N,), or (N, m) where a concept is a vector."""
        return (self.concepts,) if self.concept_width == 1 else (self.concepts, self.concept_width)

    @classmethod
    def from_preset(cls, name: str) -> "EncDiffConfig":
        if name not in PRESETS:
            raise InputError(f"preset {name!r} is unknown, must be one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def with_objective(self, name: str) -> "EncDiffConfig":
        """This configuration with another objective of OBJECTIVES; InputError where it cannot carry that."""
        if name not in OBJECTIVES:
            raise InputError(f"objective {name!r} is unknown, must be one of {', '.join(OBJECTIVES)}")
        return replace(self, **OBJECTIVES[name])


PAPER = EncDiffConfig()

# small enough to learn within minutes on a CPU: 32x32 images as 4x4x192 latents (docs/recipes.md)
QUICKSTART = EncDiffConfig(
    image_size=32,
    concepts=40,
    encoder_width=32,
    normalize_scalars=True,
    bank_gain=2.45,  # sqrt(6)
    first_stage="space_to_depth",
    patch=8,
    width=32,
    multipliers=(1,),
    depth=1,
    attention_levels=(0,),
    heads=4,
    self_attention=False,
    feedforward=2,
    groups=8,
    prediction="x0",
)
# sharper, as 8x8x48 and 16x16x48 latents: the first 23 minutes on one core, the second a minute on a GPU
ROOM32 = replace(QUICKSTART, concepts=20, patch=4, width=48, multipliers=(1, 2), attention_levels=(0, 1), groups=16)
ROOM64 = replace(ROOM32, image_size=64, encoder_width=64, width=64, multipliers=(1, 2, 2), attention_levels=(0, 1, 2))

# x0, which a U-Net can tell that is narrower than the latents have channels, through which no noise would come
FLOW: dict[str, Any] = {"prediction": "flow", "flow_output": "x0"}
# other objectives of the field, each some fields of any configuration changed
OBJECTIVES: dict[str, dict[str, Any]] = {
    "flow": FLOW,
    "flow-orthogonal": FLOW | {"orthogonality": 0.01},
    "dyga": {"anchors": 16, "skip_dropout": 0.2, "normalize_scalars": True},
    "mutual-information": {"mutual_information": 0.3},
    "guided": {"token_dropout": 0.1},
}

PRESETS: dict[str, EncDiffConfig] = {
    "shapes3d": PAPER,
    "mpi3d": PAPER,
    "cars3d": PAPER,
    "celeba": PAPER,  # the published code holds no CelebA configuration; the paper gives the same architecture
    "quickstart": QUICKSTART,
    "room32": ROOM32,
    "room64": ROOM64,
    **{name: replace(QUICKSTART, **changed) for name, changed in OBJECTIVES.items()},
}
