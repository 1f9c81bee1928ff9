import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence
from typer.testing import CliRunner

from encdiff import EncDiff
from encdiff.cli.app import app
from encdiff.diffusion.bottleneck import PAPER, bottleneck, bottleneck_curves, channel_capacity, plot_bottleneck
from encdiff.diffusion.schedules import alphas_cumprod, make_betas, zero_terminal_snr
from encdiff.errors import InputError
from encdiff.experiments.capacity import model_bottleneck, read_rise
from encdiff.models import PRESETS


@pytest.mark.parametrize("variance", [1.0, 0.3])
def test_equals_the_mean_over_samples(variance):
    """x_0 and x_t are drawn, the posterior is Bayes' rule on q(x_{t-1} | x_0) and q(x_t | x_{t-1})."""
    betas = make_betas("scaled_linear", 20, 0.01, 0.3)
    alpha_bar = alphas_cumprod(betas)
    curve = bottleneck(alpha_bar, variance)
    x0 = torch.randn(400_000, dtype=torch.float64) * variance**0.5
    for t in (1, 7, 19):
        x_t = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * torch.randn_like(x0)
        precision = 1 / (1 - alpha_bar[t - 1]) + (1 - betas[t]) / betas[t]
        mean = alpha_bar[t - 1].sqrt() * x0 / (1 - alpha_bar[t - 1]) + (1 - betas[t]).sqrt() * x_t / betas[t]
        posterior = Normal(mean / precision, precision**-0.5)
        expected = kl_divergence(posterior, Normal(torch.zeros_like(mean), 1.0)).mean()
        torch.testing.assert_close(curve[t - 1], expected, rtol=0.01, atol=1e-3)


def test_curves_of_the_paper_fall():
    curves = bottleneck_curves(num_timesteps=200)
    assert tuple(curves) == PAPER
    for curve in curves.values():
        assert curve.shape == (199,) and curve.dtype == torch.float64
        assert (curve > 0).all() and (curve.diff() < 0).all()
    whole = bottleneck_curves()
    assert whole["ldm:sqrt"][100] < whole["ldm:linear"][100] < whole["ldm:cosine"][100]


def test_pure_noise_at_the_end_leaves_only_the_step_before():
    alpha_bar = alphas_cumprod(zero_terminal_snr(make_betas("scaled_linear", 50)))
    previous = alpha_bar[-2]
    # x_T says nothing, so the posterior is q(x_{T-1} | x_0)
    expected = (1 - previous + previous - 1 - (1 - previous).log()) / 2
    torch.testing.assert_close(bottleneck(alpha_bar)[-1], expected)


def test_plot(tmp_path):
    plot_bottleneck(bottleneck_curves(("linear", "cosine"), 30), tmp_path / "bottleneck.png")
    assert Image.open(tmp_path / "bottleneck.png").size == (720, 480)
    with pytest.raises(InputError, match="^curves is empty"):
        plot_bottleneck({}, tmp_path / "none.png")
    assert [p.name for p in tmp_path.iterdir()] == ["bottleneck.png"]


@pytest.mark.parametrize(
    "alpha_bar, variance, message",
    [
        ([0.9], 1.0, "^alphas_cumprod"),
        ([0.5, 0.9], 1.0, "^alphas_cumprod"),
        ([1.0, 0.9], 1.0, "^alphas_cumprod"),
        ([0.9, float("nan")], 1.0, "^alphas_cumprod"),
        ([0.9, 0.5], 0.0, "^data_variance"),
    ],
)
def test_bad_input(alpha_bar, variance, message):
    with pytest.raises(InputError, match=message):
        bottleneck(torch.tensor(alpha_bar), variance)


def test_what_a_level_can_say_is_the_information_of_two_normal_numbers():
    alpha_bar = alphas_cumprod(make_betas("scaled_linear", 20, 0.01, 0.3))
    x_t, given_x0 = Normal(0.0, torch.ones(20, dtype=torch.float64)), Normal(0.0, (1 - alpha_bar).sqrt())
    torch.testing.assert_close(channel_capacity(alpha_bar), x_t.entropy() - given_x0.entropy())


# beside a VAE's capacity


def rising(folder, latents: int = 3, capacity: bool = True):
    folder.mkdir()
    columns = ["step", "loss", *(["capacity"] if capacity else []), *(f"kl_{i}" for i in range(latents)), "seconds"]
    rows = [
        [50 * s, 1.0, *([s / 2] if capacity else []), *(s * 0.1 * (i + 1) for i in range(latents)), s]
        for s in (1, 2, 7)
    ]
    (folder / "log.csv").write_text("\n".join(",".join(map(str, row)) for row in [columns, *rows]) + "\n")
    return folder


def test_the_rise_is_what_the_log_says(tmp_path):
    rise = read_rise(rising(tmp_path / "run"))
    assert rise.steps.tolist() == [50, 100, 350] and rise.capacity.tolist() == [0.5, 1.0, 3.5]
    assert np.allclose(rise.latents, [[0.1 * s * i for i in (1, 2, 3)] for s in (1, 2, 7)])
    assert read_rise(rising(tmp_path / "other", capacity=False)).capacity is None


def test_the_bottleneck_of_a_model_is_of_all_its_dimensions():
    of = model_bottleneck(PRESETS["quickstart"])
    assert of.dimensions == 4 * 4 * 192
    assert torch.allclose(of.steps, 3072 * bottleneck(EncDiff.from_preset("quickstart").schedule))
    at = of.opens(25.0)
    assert of.levels[at] >= 25 > of.levels[at + 1] and of.opens(1e9) is None
    with pytest.raises(InputError, match="^prediction is 'flow', without the reverse steps"):
        model_bottleneck(PRESETS["flow"])


@pytest.mark.parametrize("capacity", [True, False])
def test_both_in_one_picture(capacity, tmp_path):
    run = rising(tmp_path / "run", 12, capacity)
    result = CliRunner().invoke(app, ["bottleneck", "--compare", str(run)])
    assert result.exit_code == 0, result.output
    assert "12 of 12 latents hold more than 0.1 nats, all together 54.60" in " ".join(result.output.split())
    with Image.open(run / "bottleneck.png") as picture:
        assert picture.width > 1000
    alone = CliRunner().invoke(app, ["bottleneck", "--preset", "room64", "--out", str(tmp_path / "alone.png")])
    assert alone.exit_code == 0 and (tmp_path / "alone.png").is_file()


def test_what_is_no_vaes_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no log.csv; must be the folder of a VAE's training"):
        read_rise(tmp_path)
    run = rising(tmp_path / "run")
    (run / "log.csv").write_text("step,loss\n50,1.0\n")
    with pytest.raises(InputError, match="has no kl_0, kl_1, ... of latents; must be of a VAE"):
        read_rise(run)
    (run / "log.csv").write_text("step,kl_0\n50,1.0\n100,\n")
    with pytest.raises(InputError, match="holds a row that is torn or no numbers"):
        read_rise(run)
