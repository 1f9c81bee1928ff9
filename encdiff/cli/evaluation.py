"""`encdiff evaluate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from encdiff.cli.options import RUN_HELP, Device, RunData, Seed, Several
from encdiff.cli.support import importance_plot, metric_names, open_model, results, spread, writable
from encdiff.errors import InputError
from encdiff.terminal import console, say


def evaluate(
    run: Annotated[Path, typer.Argument(help=RUN_HELP + "; or an .npz of codes and factors.", show_default=False)],
    data: RunData = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="paper, heldout, quick, published-cars3d: docs/metrics.md. Default: paper; of an .npz heldout."
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="Such as factor_vae,dci,counterfactual; or all of codes (but tad, dci_quick and flatness, which needs "
            "a complete grid); or all,flatness."
        ),
    ] = "factor_vae,dci",
    seeds: Annotated[int, typer.Option(help="Score with so many, from --seed up.", min=1)] = 1,
    pairs: Annotated[
        int | None, typer.Option(help="Swaps that counterfactual judges, for each factor. Default: 128.", min=1)
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Also score an untrained encoder.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="The JSON to write. Default: metrics.json in the run, or X-metrics.json.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    several: Several = None,
) -> None:
    """Score a model's encoder, or the codes of any other. An untrained one is scored beside it.

    An .npz holds codes (n, N), factors (n, F) and, if you like, factor_names: four fifths of the rows teach the
    metrics, the others are scored.
    """
    spread(several)
    from encdiff.distributed.processes import processes
    from encdiff.evaluation import evaluate_codes, evaluate_model, stages
    from encdiff.evaluation.drawn import DRAWN

    everyone = processes()

    options: dict[str, Any] = {"metrics": metric_names(metrics), "seed": seed, "seeds": seeds}
    if pairs and "counterfactual" not in options["metrics"]:
        raise InputError(f"--pairs {pairs}: needs counterfactual among --metrics")
    options |= {"pairs": pairs} if pairs else {}
    if run.suffix.lower() == ".npz" and not run.is_dir():
        if data or protocol not in (None, "heldout"):
            raise InputError(f"{run}: codes have no --data, and their --protocol is heldout")
        if everyone.size > 1:
            raise InputError(f"{run}: codes are scored by one process; leave out --processes and torchrun")
        if drawn := DRAWN.keys() & options["metrics"]:
            raise InputError(f"--metrics {min(drawn)}: is of what a model draws; an .npz holds codes alone")
        out = writable(out or run.with_name(f"{run.stem}-metrics.json"))
        with stages(run.stem) as report:
            scores = {run.stem: evaluate_codes(run, progress=report, **options)}
    else:
        if protocol == "published-cars3d":  # the paper's, on images read as the published evaluation misreads them
            protocol, data = "paper", f"{protocol}:{data}" if data else protocol
        model, dataset = open_model(run, data, device)
        out = out or results(run) / "metrics.json"
        everyone.by_first(lambda: writable(out) and None)
        scores = evaluate_model(model, dataset, protocol=protocol or "paper", baseline=baseline, **options)
    everyone.by_first(lambda: _write(out, scores))


def _write(out: Path, scores: dict[str, dict]) -> None:
    """Print the scores, and write them and DCI's plot."""
    from encdiff.evaluation import format_swaps, format_table, plot_importance, write_metrics

    console.print(format_table(scores))
    if "counterfactual" in next(iter(scores.values())):
        console.print(format_swaps(scores["trained"]["counterfactual"]))
    write_metrics(out, scores)
    say(f"scores: {out}")
    first = next(iter(scores.values()))
    if "dci" in first:
        plot = importance_plot(out)
        plot_importance(first, plot)
        say(f"plot:   {plot}")
