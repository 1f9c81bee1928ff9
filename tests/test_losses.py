import pytest
import torch

from encdiff.diffusion.losses import diffusion_loss, min_snr_weight, p2_weight, snr
from encdiff.diffusion.schedules import alphas_cumprod, make_betas
from encdiff.errors import InputError
from encdiff.ops.noise import PREDICTIONS, q_sample

ALPHA_BAR = alphas_cumprod(make_betas("cosine"))


@pytest.mark.parametrize("kind,expected", [("l1", (1 + 3 + 0 + 2) / 4), ("mse", (1 + 9 + 0 + 4) / 4)])
def test_known_answers(kind, expected):
    prediction, target = torch.tensor([[1.0, -1.0], [5.0, 2.0]]), torch.tensor([[2.0, 2.0], [5.0, 0.0]])
    assert diffusion_loss(prediction, target, kind).item() == expected
    weighted = diffusion_loss(prediction, target, kind, torch.tensor([0.0, 10.0]))
    assert weighted.item() == {"l1": 10 * (0 + 2) / 4, "mse": 10 * (0 + 4) / 4}[kind]


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_weight_of_ones_changes_nothing_and_gradients_are_right(kind):
    prediction, target = (torch.randn(3, 2, 5, dtype=torch.float64) for _ in range(2))
    prediction.requires_grad_()
    ones = torch.ones(3)
    torch.testing.assert_close(diffusion_loss(prediction, target, kind, ones), diffusion_loss(prediction, target, kind))
    weight = torch.tensor([0.5, 0.0, 3.0])
    torch.autograd.gradcheck(lambda p: diffusion_loss(p, target, kind, weight), (prediction,))


def test_half_precision_is_averaged_in_float32():
    prediction = torch.full((4, 100, 100), 0.1, dtype=torch.float16)
    loss = diffusion_loss(prediction, torch.zeros_like(prediction), "mse")  # float16 squares would lose digits
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(prediction[0, 0, 0].item() ** 2, rel=1e-5)


def test_vectors_of_one_number_per_sample():
    assert diffusion_loss(torch.tensor([1.0, 2.0]), torch.zeros(2), weight=torch.tensor([2.0, 3.0])).item() == 4.0


def test_snr_known_answers():
    torch.testing.assert_close(snr(torch.tensor([0.5, 0.8, 0.0])), torch.tensor([1.0, 4.0, 0.0]).double())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_of_x0_alike_for_every_prediction(prediction):
    t = torch.tensor([0, 30, 300, 600, 900])
    x0, error = torch.randn(5, 40, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    x_t, target = q_sample(x0, torch.randn_like(x0), t, ALPHA_BAR, prediction)
    guess, a = x0 + error, ALPHA_BAR[t, None]  # what a model says that takes x0 for `guess`
    output = q_sample(guess, (x_t - a.sqrt() * guess) / (1 - a).sqrt(), t, ALPHA_BAR, prediction)[1]
    ratio = snr(ALPHA_BAR)[t]
    ours = min_snr_weight(ratio, prediction, gamma=3.0) * (output - target).square().mean(1)
    torch.testing.assert_close(ours, ratio.clamp(max=3.0) * error.square().mean(1), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_p2_weighs_the_error_of_x0_alike_for_every_prediction(prediction):
    t, x0, error = torch.tensor([0, 300, 900]), torch.randn(3, 40).double(), torch.randn(3, 40).double()
    x_t, target = q_sample(x0, torch.randn_like(x0), t, ALPHA_BAR, prediction)
    guess, a = x0 + error, ALPHA_BAR[t, None]
    output = q_sample(guess, (x_t - a.sqrt() * guess) / (1 - a).sqrt(), t, ALPHA_BAR, prediction)[1]
    ratio = snr(ALPHA_BAR)[t]
    ours = p2_weight(ratio, prediction, gamma=0.5, k=2.0) * (output - target).square().mean(1)
    torch.testing.assert_close(ours, ratio / (2 + ratio) ** 0.5 * error.square().mean(1), rtol=1e-8, atol=1e-12)


def test_p2_known_answers():
    assert p2_weight(torch.tensor([0.0, 1.0, 3.0]), "epsilon").tolist() == [1.0, 0.5, 0.25]


def test_min_snr_at_pure_noise():
    assert [min_snr_weight(torch.zeros(1), p).item() for p in PREDICTIONS] == [1.0, 0.0, 0.0]


X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: diffusion_loss(X, X, "l2"), "loss kind is 'l2'"),
        (lambda: diffusion_loss(X, X[:1]), r"\(3, 2\) and target \(1, 2\)"),
        (lambda: diffusion_loss(X, X, weight=X), r"weight \(3, 2\) must be \(3,\)"),
        (lambda: diffusion_loss(X[:0], X[:0]), r"prediction \(0, 2\) is empty"),
        (lambda: min_snr_weight(X, "eps"), "prediction is 'eps'"),
        (lambda: min_snr_weight(X, "v", gamma=0.0), "gamma is 0.0"),
        (lambda: p2_weight(X, "score"), "prediction is 'score'"),
        (lambda: p2_weight(X, "v", k=0.0), "gamma, k are 1.0, 0.0"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()
