"""`encdiff sample`: images without a source image."""

from enum import StrEnum
from typing import Annotated

import typer

from encdiff.cli.options import Device, Run, RunData, Seed
from encdiff.cli.pictures import Out, Sampler, SamplerName, Steps
from encdiff.cli.support import open_model, results, save_picture, writable_picture
from encdiff.errors import InputError
from encdiff.terminal import Tasks, console, progress_bar, say


class PriorName(StrEnum):
    mixture = "mixture"
    diffusion = "diffusion"


NOTE = """\
floor: as many images of the data's own codes, compared with the other codes. independent, the baseline: of codes whose
numbers are drawn from the data each by itself, as if none depended on another.
Frechet distances are from the codes of the data, of the images' codes, encoded again, and of the codes that these were
drawn from. As many codes of the data lie {mean:.3f} +- {std:.3f} from the others, in {draws} draws.
"""
FACTORS = """\
The distance is the root mean square over pixels, in 0..1. total variation: how far a factor's histogram, read by the
nearest true image, is from the data's, 0 to 1.
"""


def sample(
    run: Run,
    data: RunData = None,
    count: Annotated[int, typer.Option(help="How many images.", min=1)] = 16,
    prior: Annotated[PriorName, typer.Option(help="What is fitted to the codes of the data.")] = PriorName.mixture,
    components: Annotated[int | None, typer.Option(help="Gaussians of the mixture. Default: 50.", min=1)] = None,
    judge: Annotated[bool, typer.Option("--judge", help="Also compare with the data, in numbers.")] = False,
    sampler: Sampler = SamplerName.dpm_solver_pp,
    steps: Steps = 20,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: images without a source image, from codes that a prior draws.

    The prior is fitted, within a minute, to the codes of up to 10,000 images of the data.
    """
    from encdiff.pictures import sample_sheet
    from encdiff.prior import dataset_codes, fit_prior
    from encdiff.prior.codes import FITTED

    if components is not None and prior is not PriorName.mixture:
        raise InputError(f"--components {components} must be left out: it belongs to --prior mixture")
    model, dataset = open_model(run, data, device)
    path = writable_picture(out or results(run) / "pictures" / "sample.png")
    if judge and not 2 <= count <= min(FITTED, len(dataset)) // 2:
        half = min(FITTED, len(dataset)) // 2
        raise InputError(f"--count {count} must be in 2..{half}, half of the data's codes, for --judge")
    with progress_bar("encoding") as report:
        codes = dataset_codes(model, dataset, seed=seed, progress=report)
    with progress_bar("fitting") as report:
        fitted = fit_prior(codes, prior.value, components=components, seed=seed, progress=report)
    with progress_bar("sampling") as report:
        images = model.sample_prior(
            count, fitted, sampler=sampler.value, steps=steps, seed=seed, progress=report
        )  # fmt: skip
    save_picture(sample_sheet(images.cpu(), fitted.title, fitted.fitted), path)
    if judge:
        say_judgement(images, model, fitted, codes, dataset, sampler=sampler.value, steps=steps, seed=seed)


def say_judgement(images, model, prior, codes, dataset, **options) -> None:
    from encdiff.prior import format_judgement, judge

    with Tasks() as tasks:
        judgement = judge(images, model, prior, codes, dataset, progress=tasks, **options)
    console.print(format_judgement(judgement))
    say((NOTE.format(**judgement["chance"]) + FACTORS * ("factors" in judgement["sets"]["prior"])).strip())
