"""What the processes of `torchrun` do in the tests of several processes: one launch for many questions.

    torchrun --nproc-per-node N tests/_several.py OUT     # writes OUT/process-R.pt
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from _tiny import TINY

from encdiff import EncDiff, TrainConfig, open_dataset, train
from encdiff.distributed.processes import joined

RECIPE = TrainConfig(
    steps=50, batch_size=8, learning_rate=1e-3, warmup=5, decay=0.3, gradient_clip=1.0, ema=0.99, seed=3,
    log_every=1, checkpoint_every=1000, picture_every=1000,
)  # fmt: skip
DATA = "procedural:3,2,3,2,2,2"


def training(out: Path, **changes) -> dict[str, torch.Tensor]:
    """Losses, and what each step saw."""
    losses = []
    torch.manual_seed(int(changes.pop("start", 0)))
    model = EncDiff(replace(TINY, normalize_scalars=True))
    train(
        model, open_dataset(DATA, 16), out, replace(RECIPE, **changes),
        on_step=lambda t: losses.append(t),
    )  # fmt: skip
    return {}


def main(out: Path) -> None:
    with joined() as everyone:
        training(out / f"run{everyone.size}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
