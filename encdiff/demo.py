"""The whole method in one go, small enough for two cores: render, train, evaluate, draw."""

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from encdiff.data import Dataset, open_dataset, to_float
from encdiff.data.shapes3d import write_shapes3d
from encdiff.evaluate import evaluate_model, format_table, plot_importance, write_metrics
from encdiff.models import EncDiff
from encdiff.runs import RunFolder, progress_bar
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


def demo(run: Path, seed: int, device: str, console: Console) -> None:
    """Write the data beside the run's folder, and scores and pictures into it; an earlier run there is replaced."""
    began = time.monotonic()
    RunFolder(run, overwrite=True)  # refuses a folder with anything else in it
    run.parent.mkdir(parents=True, exist_ok=True)
    data = run.with_suffix(".h5")

    def say(text: str) -> None:
        console.print(f"[bold]{text}[/bold] [dim]({time.monotonic() - began:.0f} s)[/dim]")

    torch.manual_seed(seed)
    model = EncDiff.from_preset("quickstart").to(device)
    config = TrainConfig.from_preset("quickstart", seed=seed)

    say("1/4 rendering the data")
    with progress_bar("rendering") as report:
        write_shapes3d(data, open_dataset(DATA, model.config.image_size), progress=report)
    dataset = open_dataset(data)

    say("2/4 training without labels: the model sees images only")
    model = train(model, dataset, run, config, overwrite=True)

    say("3/4 evaluating by the paper's protocol")
    results = evaluate_model(model, dataset, seed=seed)
    write_metrics(run / "metrics.json", results)
    plot_importance(results["trained"], run / "importance.png")

    say("4/4 drawing")
    pictures = run / "pictures"
    pictures.mkdir()
    for name, picture in _draw(model, dataset, results["trained"], seed).items():
        save_png(picture, pictures / f"{name}.png")

    console.print(format_table(results))
    console.print(f"swap one concept between images:      {pictures / 'swap.png'}")
    console.print(f"move one concept from low to high:    {pictures / 'traverse.png'}")
    console.print(f"where the model attends per concept:  {pictures / 'attend.png'}")
    console.print(f"which concept carries which factor:   {run / 'importance.png'}")
    console.print(f"scores with their protocol:           {run / 'metrics.json'}")
    console.print(f"the trained model:                    {run / 'model'}")
    say("done")


def _draw(model: EncDiff, dataset: Dataset, result: dict, seed: int) -> dict[str, Image.Image]:
    groups = concept_groups(result["dci"]["importance"], dataset.factor_names)
    labels = concept_labels(groups)
    chosen = np.random.default_rng(seed).choice(len(dataset), 1000, replace=False)
    images = to_float(dataset.images(chosen)).to(next(model.parameters()).device)
    with progress_bar("sampling swaps") as report:
        swapped = swap_grid(model, images[:5], images[5:10], groups=groups, seed=seed, progress=report)
    codes = encode_images(model, images)
    colourful = next(i for i, factors in enumerate(dataset.factors(chosen)) if len({*factors[:3]}) == 3)
    with progress_bar("sampling traversals") as report:
        traversed = traversal(model, images[colourful], codes, labels=labels, seed=seed, progress=report)
    attended = attention_picture(model, images[:4], labels=labels, seed=seed)
    return {"swap": swapped, "traverse": traversed, "attend": attended}
