"""The whole method in one go, small enough for two cores: look at a trained model, then train and evaluate one."""

import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encdiff.data import Dataset, open_dataset, to_float
from encdiff.data.shapes3d import write_shapes3d
from encdiff.evaluation import (
    evaluate,
    evaluate_model,
    format_table,
    plot_importance,
    read_scores,
    untrained,
    write_metrics,
)
from encdiff.files.checkpoint import locate
from encdiff.models import EncDiff
from encdiff.pictures import (
    attention_picture,
    concept_groups,
    concept_labels,
    factor_paths,
    factor_traversal,
    save_png,
    swap_grid,
    true_swaps,
)
from encdiff.terminal import console, progress_bar, say
from encdiff.training import TrainConfig, train
from encdiff.training.runs import RunFolder

DATA = "procedural:5,5,5,4,4,5"  # docs/recipes.md says why
METRICS, PAIRS = ("factor_vae", "dci", "counterfactual"), 32
SHOWN = "room64"  # of the models that come with the package


def demo(
    run: Path, seed: int, device: str, *, data: str = DATA, protocol: str = "paper", **changes: Any
) -> dict[str, dict]:
    """Show a model that comes with the package, then train one and show that.

    Pictures of the first go to `packaged/room64/pictures` beside the run's folder, and so does the data; scores and
    pictures of the other go into the run's folder, where an earlier run is replaced.

    `changes` go to the recipe. Returns the scores, as `evaluate_model` does.
    """
    began = time.monotonic()
    RunFolder(run, overwrite=True)  # refuses a folder with anything else in it
    run.parent.mkdir(parents=True, exist_ok=True)
    file, config = run.with_name(run.name + ".h5"), TrainConfig.from_preset("quickstart", seed=seed, **changes)

    def begin(text: str) -> None:
        say(f"{text} ({time.monotonic() - began:.0f} s)", "bold")

    begin(f"1/5 {SHOWN}, which comes with the package: its scores were stored with it, the pictures are drawn now")
    shown = run.parent / "packaged" / SHOWN / "pictures"
    shown.mkdir(parents=True, exist_ok=True)
    pretrained, stored = EncDiff.from_pretrained(SHOWN, device=device), stored_scores(SHOWN)
    console.print(format_table(stored))
    _save_all(_draw(pretrained, open_dataset(data, pretrained.config.image_size), stored["trained"], seed), shown)
    _point_to(shown)

    torch.manual_seed(seed)
    model = EncDiff.from_preset("quickstart").to(device)

    begin("2/5 rendering the data")
    with progress_bar("rendering") as report:
        write_shapes3d(file, open_dataset(data, model.config.image_size), progress=report)
    dataset = open_dataset(file)

    begin("3/5 training without labels: the model sees images only")
    threads = torch.get_num_threads()
    with get_context("spawn").Pool(1, _leave_signals_to_the_parent) as pool:
        # an untrained encoder is scored beside it: the model is too small to gain from a further core
        untrained_scores = pool.apply_async(score_untrained, (file, seed, protocol))
        torch.set_num_threads(max(1, threads - 1))
        model = train(model, dataset, run, config, overwrite=True)
        torch.set_num_threads(threads)

        begin("4/5 evaluating" + (" by the paper's protocol" if protocol == "paper" else ""))
        results = evaluate_model(
            model, dataset, metrics=METRICS, pairs=PAIRS, protocol=protocol, seed=seed, baseline=False
        )
        results["untrained"] = untrained_scores.get()
    write_metrics(run / "metrics.json", results)
    plot_importance(results["trained"], run / "importance.png")

    begin("5/5 drawing")
    pictures = run / "pictures"
    pictures.mkdir()
    _save_all(_draw(model, dataset, results["trained"], seed), pictures)

    console.print(format_table(results))
    _point_to(pictures)
    say(f"which concept carries which factor:   {run / 'importance.png'}")
    say(f"scores with their protocol:           {run / 'metrics.json'}")
    say(f"the trained model:                    {run / 'model'}")
    begin("done")
    return results


def stored_scores(name: str) -> dict[str, dict]:
    """The scores that were stored with a model of the package, in the form of `evaluate_model`."""
    return read_scores(locate(name, "metrics.json", {}))


def _save_all(drawn: dict[str, Image.Image], folder: Path) -> None:
    for name, picture in drawn.items():
        save_png(picture, folder / f"{name}.png")


def _point_to(pictures: Path) -> None:
    say(f"swap one concept between images:      {pictures / 'swap.png'}")
    say(f"move each factor through the data:    {pictures / 'traverse.png'}")
    say(f"where the model attends per concept:  {pictures / 'attend.png'}")


def score_untrained(file: Path, seed: int, protocol: str) -> dict:
    """The scores of the demo's model before training, on one core."""
    torch.set_num_threads(1)
    dataset = open_dataset(file)
    model = untrained(EncDiff.from_preset("quickstart"), dataset, seed)
    return evaluate(model, dataset, protocol=protocol, seed=seed, n_jobs=1)


def _leave_signals_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _draw(model: EncDiff, dataset: Dataset, result: dict, seed: int) -> dict[str, Image.Image]:
    groups = concept_groups(result["dci"]["importance"], dataset.factor_names)
    sources, targets = dataset.pairs(5, seed)

    def images(rows: np.ndarray) -> Tensor:
        return to_float(dataset.images(rows)).to(next(model.parameters()).device)

    truth = true_swaps(dataset, sources, targets, groups)
    with progress_bar("sampling swaps") as report:
        swapped = swap_grid(
            model, images(sources), images(targets), groups=groups, truth=truth, seed=seed, progress=report
        )
    hues = dataset.factors(targets)[:, :3]
    colourful = next((i for i, (floor, wall, thing) in enumerate(hues) if len({floor, wall, thing}) == 3), 0)
    paths = factor_paths(dataset, int(targets[colourful]), groups)
    with progress_bar("sampling traversals") as report:
        traversed = factor_traversal(model, images(targets)[colourful], paths, seed=seed, progress=report)
    attended = attention_picture(model, images(targets)[:4], labels=concept_labels(groups), seed=seed)
    return {"swap": swapped, "traverse": traversed, "attend": attended}
