"""VAEs small enough for every test, one of each objective."""

from encdiff.baselines import VAEConfig, VAETrainConfig
from encdiff.baselines.config import PARAMETERS

SIZES = {"image_size": 16, "concepts": 3, "encoder_width": 8, "decoder_hidden": 12, "decoder_width": 8}
OBJECTIVES = tuple(PARAMETERS)
SHORT = VAETrainConfig(
    steps=6, batch_size=5, learning_rate=2e-3, warmup=2, decay=0.3, log_every=2, checkpoint_every=4, picture_every=100
)


def tiny(objective: str = "beta", **changes) -> VAEConfig:
    own = {"discriminator_width": 9, "discriminator_depth": 2} if objective == "factor" else {}
    return VAEConfig(**SIZES | {"objective": objective} | own | changes)
