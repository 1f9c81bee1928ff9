"""The whole method in one go, small enough for two cores: render, train, evaluate, draw."""

import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from encdiff.data import open_dataset, to_float
from encdiff.data.shapes3d import write_shapes3d
from encdiff.evaluate import evaluate_model, format_table, plot_importance, write_metrics
from encdiff.models import EncDiff
from encdiff.runs import progress_bar
from encdiff.train import TrainConfig, train
from encdiff.visualize import (
    attention_picture,
    concept_groups,
    concept_labels,
    encode_images,
    save_png,
    swap_grid,
    traversal,
)

DATA = "procedural:5,5,5,4,4,5"  # docs/recipes.md says why


def demo(out: Path, seed: int, console: Console) -> None:
    """Write `room.h5`, `run/`, `metrics.json` and `importance.png`, `swap.png`, `traverse.png`, `attend.png` to out."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        console.print(f"[bold]{text}[/bold] [dim]({time.monotonic() - began:.0f} s)[/dim]")

    torch.manual_seed(seed)
    model = EncDiff.from_preset("quickstart")

    say("1/4 rendering the data")
    with progress_bar("rendering") as report:
        write_shapes3d(out / "room.h5", open_dataset(DATA, model.config.image_size), progress=report)
    dataset = open_dataset(out / "room.h5")

    say("2/4 training without labels: the model sees images only")
    model = train(model, dataset, out / "run", TrainConfig.from_preset("quickstart", seed=seed), overwrite=True)

    say("3/4 evaluating by the paper's protocol")
    results = evaluate_model(model, dataset, seed=seed)
    write_metrics(out / "metrics.json", results)
    plot_importance(results["trained"], out / "importance.png")

    say("4/4 drawing")
    pictures = _draw(model, dataset, results["trained"], seed)
    for name, picture in pictures.items():
        save_png(picture, out / f"{name}.png")

    console.print(format_table(results))
    console.print(f"swap one concept between images:      {out / 'swap.png'}")
    console.print(f"move one concept from low to high:    {out / 'traverse.png'}")
    console.print(f"where the model attends per concept:  {out / 'attend.png'}")
    console.print(f"which concept carries which factor:   {out / 'importance.png'}")
    console.print(f"scores with their protocol:           {out / 'metrics.json'}")
    console.print(f"the trained model:                    {out / 'run' / 'model'}")
    say("done")


def _draw(model: EncDiff, dataset, result: dict, seed: int) -> dict:
    groups = concept_groups(result["dci"]["importance"], dataset.factor_names)
    labels = concept_labels(groups)
    chosen = np.random.default_rng(seed).choice(len(dataset), 1000, replace=False)
    images = to_float(dataset.images(chosen))
    with progress_bar("sampling swaps") as report:
        swapped = swap_grid(model, images[:5], images[5:10], groups=groups, seed=seed, progress=report)
    with progress_bar("sampling traversals") as report:
        traversed = traversal(model, images[0], encode_images(model, images), labels=labels, seed=seed, progress=report)
    attended = attention_picture(model, images[:4], labels=labels, seed=seed)
    return {"swap": swapped, "traverse": traversed, "attend": attended}
