import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence

from encdiff.diffusion.bottleneck import PAPER, bottleneck, bottleneck_curves, plot_bottleneck
from encdiff.diffusion.schedules import alphas_cumprod, make_betas, zero_terminal_snr
from encdiff.errors import InputError


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
