"""How to train: the fields of a recipe, and the named ones (docs/recipes.md)."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from encdiff.checked import Batch, Checked, Count, Fraction, Natural, NotNegative, Positive, Range, Seed
from encdiff.errors import InputError
from encdiff.models.config import OBJECTIVES

Beta = Annotated[float, Range(0, 0.999999)]


@dataclass(frozen=True)
class DescentConfig(Checked):
    """How a network descends, whatever it learns; the defaults are those of EncDiff's public configuration."""

    steps: Count = 100_000
    batch_size: Batch = 128
    learning_rate: Positive = 2.56e-4  # the paper's 2e-6 for each image of a batch
    warmup: Natural = 10_000  # steps of linear warm-up
    decay: Fraction = 0.0  # the last part of the steps, over which the rate falls to zero in a line; 0: constant
    weight_decay: NotNegative = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    gradient_clip: NotNegative = 0.0  # greatest norm of all gradients; 0: none
    ema: Fraction = 0.9999  # the average decays by min(ema, (1 + n) / (10 + n))
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # tf32: on a GPU; bf16: on a GPU with masters
    engine: Literal["auto", "eager", "compile", "graph"] = "auto"  # how a step runs: encdiff.engine
    accumulate: Count = (
        1  # parts that a batch is cut into, one after the other: less memory; batch norm's are of a part
    )
    shard: bool = False  # of several processes each keeps a part of the U-Net's weights, moments and averages (FSDP2)
    checkpoint_activations: bool = False  # compute residual blocks anew in the backward pass: less memory, more time
    seed: Seed = 0
    log_every: Count = 50
    checkpoint_every: Count = 1000
    picture_every: Count = 5000


@dataclass(frozen=True)
class TrainConfig(DescentConfig):
    """How to train; the defaults are the paper's recipe in its public configuration."""

    timesteps: Literal["uniform", "logit-normal", "power"] = "uniform"  # their distribution: ops.timesteps

    @classmethod
    def from_preset(cls, name: str, *, objective: str | None = None, **changes: Any) -> "TrainConfig":
        """A named recipe with some fields changed; the learning rate follows a changed batch size unless given.

        `objective`, a name in `models.config.OBJECTIVES`, has changes of its own, which `changes` overrule.
        """
        changes = SUITED.get(objective or "", {}) | changes
        if name not in RECIPES:
            raise InputError(f"preset {name!r} is unknown, must be one of {', '.join(RECIPES)}")
        recipe = RECIPES[name]
        changed = replace(recipe, **changes)
        if "batch_size" in changes and "learning_rate" not in changes:
            rate = recipe.learning_rate * changed.batch_size / recipe.batch_size
            changed = replace(changed, learning_rate=rate)
        return changed


# what an objective changes in any recipe: a flow's straight path has much noise at few of its levels
SUITED: dict[str, dict[str, Any]] = {name: {"timesteps": "power"} for name in ("flow", "flow-orthogonal")}

PAPER = TrainConfig()
QUICKSTART = TrainConfig(  # docs/recipes.md
    steps=3000,
    batch_size=64,
    learning_rate=2e-3,
    warmup=100,
    decay=0.3,
    weight_decay=0.0,
    betas=(0.9, 0.99),
    gradient_clip=1.0,
    picture_every=1000,
)
ROOM32 = replace(QUICKSTART, steps=4000, learning_rate=1.5e-3, timesteps="power")
ROOM64 = replace(ROOM32, steps=5000, batch_size=128, ema=0.999)
RECIPES: dict[str, TrainConfig] = {
    "shapes3d": PAPER,
    "mpi3d": PAPER,
    "cars3d": PAPER,
    "celeba": PAPER,
    "quickstart": QUICKSTART,
    "room32": ROOM32,
    "room64": ROOM64,
    **{name: replace(QUICKSTART, **SUITED.get(name, {})) for name in OBJECTIVES},
}
