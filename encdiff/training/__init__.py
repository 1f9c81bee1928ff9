"""Training: recipes, the step, the loop around it, runs on disk, and the first stage.

Import the names below from here; imports pictures, engine, models and what lies below them.
"""

from encdiff.training.autoencoder import AutoencoderTrainConfig, train_autoencoder
from encdiff.training.recipes import RECIPES, TrainConfig
from encdiff.training.step import Training, train

__all__ = ["RECIPES", "AutoencoderTrainConfig", "TrainConfig", "Training", "train", "train_autoencoder"]
