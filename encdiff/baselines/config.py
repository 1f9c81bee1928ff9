"""What fixes a VAE's shapes and objective: one dataclass, in which each objective has its own hyper-parameters."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from encdiff.checked import Checked, Depth, NotNegative, Range, Width
from encdiff.errors import InputError

KIND = "vae"  # in config.json
Objective = Literal["beta", "anneal", "tc", "factor", "dip-i", "dip-ii"]
Share = Annotated[float, Range(0, 1, above=True)]

# What each objective has, with its default: from the published sweeps (docs/howto/baselines.md)
PARAMETERS: dict[str, dict[str, float]] = {
    "beta": {"beta": 4.0},
    "anneal": {"gamma": 1000.0, "capacity": 25.0, "capacity_rise": 1 / 3},
    "tc": {"beta": 6.0},
    "factor": {"gamma": 10.0, "discriminator_width": 1000, "discriminator_depth": 6},
    "dip-i": {"lambda_od": 10.0, "lambda_d": 100.0},
    "dip-ii": {"lambda_od": 10.0, "lambda_d": 10.0},
}
HELD = 24 * math.log(2)  # nats that a latent can hold in float32, whose numbers near 1 are 2^-24 from their rounding


@dataclass(frozen=True)
class VAEConfig(Checked):
    """The configuration of a `VAE`; the defaults are those of Locatello et al. 2019 for 64x64 images.

    A hyper-parameter that is None is its objective's default, or of another objective, which refuses it.
    """

    image_size: Width = 64
    concepts: Annotated[int, Range(1, 4096)] = 10  # N, the latents
    encoder_width: Width = 128  # the image encoder is EncDiff's
    decoder_hidden: Width = 256
    decoder_width: Annotated[int, Range(2, 2**14)] = 64  # of the last two maps before the image, half
    objective: Objective = "beta"
    beta: NotNegative | None = None  # beta, tc
    gamma: NotNegative | None = None  # anneal, factor
    capacity: NotNegative | None = None  # anneal: what C(t) rises to, in nats
    capacity_rise: Share | None = None  # anneal: part of the training over which it rises
    lambda_od: NotNegative | None = None  # dip: of covariances, and
    lambda_d: NotNegative | None = None  # of variances that are not 1
    discriminator_width: Width | None = None  # factor
    discriminator_depth: Depth | None = None  # factor: hidden layers

    def __post_init__(self) -> None:
        super().__post_init__()
        own = PARAMETERS[self.objective]
        for name in {name: None for each in PARAMETERS.values() for name in each}:
            value = getattr(self, name)
            if name in own and value is None:
                object.__setattr__(self, name, own[name])
            elif name not in own and value is not None:
                raise InputError(
                    f"{name} is {value}, but objective {self.objective!r} has none; it takes {', '.join(own)}"
                )
        halvings = (self.image_size // 4).bit_length() - 1
        if halvings < 1 or 4 * 2**halvings != self.image_size:
            raise InputError(f"image_size is {self.image_size}, must be 4 * 2**k with k >= 1: 8, 16, 32, 64, 128, ...")
        if self.capacity is not None and self.capacity > self.concepts * HELD:
            raise InputError(
                f"capacity is {self.capacity:g} nats, must be at most {self.concepts * HELD:.4g}: {self.concepts} "
                f"latents hold {HELD:.1f} each before float32 rounds their noise away"
            )

    @property
    def parameters(self) -> dict[str, float]:
        """The objective's own hyper-parameters, by name."""
        return {name: getattr(self, name) for name in PARAMETERS[self.objective]}

    @property
    def code_shape(self) -> tuple[int, ...]:
        """The shape of what the encoder makes of one image: (N,)."""
        return (self.concepts,)

    def changed(self, **changes: Any) -> "VAEConfig":
        """This one with some fields changed; another objective has its own defaults for what is not given."""
        if changes.get("objective", self.objective) != self.objective:
            changes = {name: None for each in PARAMETERS.values() for name in each} | changes
        return replace(self, **changes)

    def described(self) -> dict[str, Any]:
        """As `config.json` holds it: its kind first."""
        return {"kind": KIND, **asdict(self)}

    @classmethod
    def read(cls, values: Any, source: str) -> "VAEConfig":
        """The configuration that a file describes; InputError, naming `source`, for one of another kind of model."""
        if not (isinstance(values, dict) and values.get("kind") == KIND):
            raise InputError(f"{source}: is of no VAE; `encdiff train --preset beta-vae` makes one")
        return cls.from_dict({k: v for k, v in values.items() if k != "kind"}, source)
