"""Priors over codes, images drawn from them, and how these are judged."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _tiny import TINY
from PIL import Image

from encdiff import EncDiff, InputError, open_dataset, to_float
from encdiff.data import Dataset
from encdiff.files.checkpoint import load_tensors, save_tensors
from encdiff.metrics.fid import frechet_distance
from encdiff.pictures import sample_sheet
from encdiff.prior import DiffusionPrior, MixturePrior, dataset_codes, fit_prior, format_judgement, judge, load_prior
from encdiff.prior import diffusion as diffusion_module
from encdiff.prior.judging import Given, shuffle_columns

DATA = "procedural:2,2,2,2,2,2"
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[0.0, 0.0], [5.0, 400.0], [-5.0, 500.0]], dtype=torch.float64)  # in very different units
FACTORS = torch.tensor([[[1.0, 0], [60, 80]], [[0.5, 0], [0, 50]], [[1.0, 0], [-90, 30]]], dtype=torch.float64)


@pytest.fixture(scope="module")
def mixture() -> MixturePrior:
    return MixturePrior(WEIGHTS, MEANS, FACTORS, (2,), 0)


@pytest.fixture(scope="module")
def model() -> EncDiff:
    torch.manual_seed(0)
    return EncDiff(TINY).eval()


@pytest.fixture(scope="module")
def data() -> Dataset:
    return open_dataset(DATA, TINY.image_size)


def two_modes(count: int) -> torch.Tensor:
    """Correlated and bimodal: around (2, 2) and (-2, -2), in units of 1 and 10."""
    rng = np.random.default_rng(3)
    sign = rng.choice([-1, 1], (count, 1))
    return torch.from_numpy((2 * sign + 0.3 * rng.normal(size=(count, 2))) * [1, 10])


def test_samples_of_a_mixture_have_its_moments(mixture):
    codes = mixture.sample(40_000, seed=1).double()
    mean = WEIGHTS @ MEANS
    within = torch.einsum("k,kij->ij", WEIGHTS, mixture.covariances)
    between = torch.einsum("k,ki,kj->ij", WEIGHTS, MEANS - mean, MEANS - mean)
    unit = torch.tensor([3.0, 250.0], dtype=torch.float64)
    assert ((codes.mean(0) - mean) / unit).abs().max() < 0.03  # 5 standard errors
    assert ((codes.T.cov() - within - between) / unit[:, None] / unit).abs().max() < 0.06


def test_a_mixture_is_recovered(mixture):
    fitted = MixturePrior.fit(mixture.sample(6000, seed=2), 3, seed=0)
    order = torch.cdist(MEANS / MEANS.std(0), fitted.means / MEANS.std(0)).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    unit = torch.tensor([1.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(fitted.weights[order], WEIGHTS, atol=0.02, rtol=0)
    torch.testing.assert_close(fitted.means[order] / unit, MEANS / unit, atol=0.1, rtol=0)
    scaled = [p.covariances / unit[:, None] / unit for p in (fitted, mixture)]
    torch.testing.assert_close(scaled[0][order], scaled[1], atol=0.1, rtol=0)


@pytest.fixture(scope="module")
def learnt() -> DiffusionPrior:
    return DiffusionPrior.fit(two_modes(2000), 300, seed=0)


def test_the_diffusion_learns_what_independent_codes_do_not(learnt):
    data, drawn = two_modes(4000), learnt.sample(2000, seed=5)
    independent = shuffle_columns(data[:2000], np.random.default_rng(0))

    def agree(codes):  # 1 of the data, a half where one number knows nothing of the other
        return (codes.sign().prod(1) > 0).double().mean().item()

    unit = torch.tensor([1.0, 10.0])
    distance, baseline = (frechet_distance(np.asarray(c / unit), np.asarray(data / unit)) for c in (drawn, independent))
    assert agree(independent) < 0.6 and agree(drawn) > 0.97
    assert distance < baseline / 20, (distance, baseline)
    assert 0.4 < (drawn[:, 0] > 0).double().mean() < 0.6, "both modes"
    spread = (drawn.abs() / unit - 2).std(0)
    assert (0.2 < spread).all() and (spread < 0.45).all(), spread  # 0.3


def test_training_is_a_function_of_codes_and_seed():
    codes = two_modes(50)
    first, again, other = (DiffusionPrior.fit(codes, 3, seed=seed).tensors() for seed in (4, 4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["leave.weight"], other["leave.weight"])


@pytest.fixture(params=["mixture", "diffusion"])
def prior(request, mixture, learnt):
    return {"mixture": mixture, "diffusion": learnt}[request.param]


def test_the_same_seed_gives_the_same_codes(prior):
    codes = prior.sample(9, seed=3)
    assert codes.dtype == torch.float32 and codes.shape == (9, 2) and codes.device.type == "cpu"
    assert torch.equal(codes, prior.sample(9, seed=3))
    assert (codes != prior.sample(9, seed=4)).all()
    torch.testing.assert_close(prior.sample(4, seed=3), codes[:4])


@pytest.mark.parametrize("name", ["mine.safetensors", "folder"])
def test_a_saved_prior_is_the_same_to_the_bit(prior, name, tmp_path):
    file = prior.save(tmp_path / name)
    assert file == (tmp_path / name if "." in name else tmp_path / name / "prior.safetensors")
    read = load_prior(tmp_path / name)
    assert type(read) is type(prior) and (read.code_shape, read.fitted) == (prior.code_shape, prior.fitted)
    assert torch.equal(read.sample(20, seed=6), prior.sample(20, seed=6))


@pytest.mark.parametrize("fit", [lambda c: MixturePrior.fit(c, 2), lambda c: DiffusionPrior.fit(c, 2)])
def test_codes_of_vectors_keep_their_shape(fit, tmp_path):
    codes = np.random.default_rng(0).normal(size=(30, 2, 3)).astype(np.float32)
    codes[:, 1, 2] = 7  # does not vary
    fitted = fit(codes)
    drawn = fitted.sample(5)
    assert drawn.shape == (5, 2, 3) and (drawn[:, 1, 2] == 7).all()
    assert torch.equal(load_prior(fitted.save(tmp_path)).sample(5), drawn)


def test_progress_is_told():
    told = []
    fit_prior(two_modes(20), components=2, progress=lambda *at: told.append(at))
    assert told == [(0, 1), (1, 1)]
    told.clear()
    DiffusionPrior.fit(two_modes(20), 2, progress=lambda *at: told.append(at))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("width", [1, 2])
def test_sample_prior_samples_what_the_prior_gives(width):
    torch.manual_seed(1)
    model, told = EncDiff(replace(TINY, concept_width=width)), []
    prior = MixturePrior.fit(torch.randn(20, *model.config.code_shape), 2)
    images = model.sample_prior(5, prior, seed=3, steps=2, batch_size=2, progress=lambda *at: told.append(at))
    expected = model.sample(prior.sample(5, seed=3), seed=3, steps=2, sample_ids=torch.arange(5))
    torch.testing.assert_close(images, expected)
    assert told == [(2, 5), (4, 5), (5, 5)] and model.training
    assert not torch.allclose(images, model.sample_prior(5, prior, seed=4, steps=2))


def test_codes_of_the_data_are_those_of_different_images(model, data):
    codes = dataset_codes(model, data, 20, seed=1)
    every = model.encode(to_float(data.images(range(64)))).detach()
    gaps = torch.cdist(codes, every)
    assert codes.shape == (20, 3) and gaps.min(1).values.max() < 1e-5 and len(set(gaps.argmin(1).tolist())) == 20
    torch.testing.assert_close(dataset_codes(model, data), every)


def test_true_images_are_judged_as_such(model, data):
    """Images whose floor has one hue of two, read by themselves: only that histogram is off, by a half."""
    chosen = np.flatnonzero(data.factors(range(64))[:, 0] == 0)[:16]
    shares = {n: abs(np.bincount(f, minlength=2) / 16 - 0.5).sum() / 2 for n, f in zip(
        data.factor_names, data.factors(chosen).T, strict=True)}  # fmt: skip
    images, codes, told = to_float(data.images(chosen)), dataset_codes(model, data), []
    own = codes[chosen]
    found = judge(images, model, Given(own), codes, data, steps=1, seed=2, progress=lambda *at: told.append(at))
    prior, floor = found["sets"]["prior"], found["sets"]["floor"]
    assert prior["factors"] == pytest.approx(shares) and prior["factors"]["floor_hue"] == 0.5
    assert prior["distance"] < 1e-3 < floor["distance"]
    wanted = frechet_distance(own.numpy(), codes.numpy())
    assert prior["frechet_codes"] == pytest.approx(wanted) and prior["frechet"] == pytest.approx(wanted, rel=1e-4)
    order = np.random.default_rng(2).permutation(64)
    parts = codes.numpy()[order[:16]], codes.numpy()[order[16:]]
    assert floor["frechet_codes"] == pytest.approx(frechet_distance(*parts))
    assert (found["images"], found["codes"]) == (16, 64)
    assert 0 < found["chance"]["std"] < found["chance"]["mean"] < 4 * floor["frechet_codes"]
    assert {stage for stage, *_ in told} == {"sampling, floor", "sampling, independent", "nearest images"}
    assert format_judgement(found).row_count == 3 + 6


def test_images_without_factors_are_judged_by_their_codes_alone(model, data, tmp_path):
    for i in range(12):
        Image.fromarray(data.images([5 * i])[0]).save(tmp_path / f"{i}.png")
    folder = open_dataset(tmp_path, TINY.image_size)
    codes = dataset_codes(model, folder)
    prior = MixturePrior.fit(codes, 1)
    images = model.sample_prior(4, prior, steps=1)
    found = judge(images, model, prior, codes, folder, steps=1)
    assert [set(row) for row in found["sets"].values()] == [{"frechet", "frechet_codes"}] * 3
    assert format_judgement(found).row_count == 2


def test_shuffled_columns_keep_their_values_alone():
    codes = two_modes(500).reshape(500, 1, 2)
    shuffled = shuffle_columns(codes, np.random.default_rng(0))
    assert torch.equal(shuffled.sort(0).values, codes.sort(0).values) and shuffled.shape == codes.shape
    correlations = [c.flatten(1).T.corrcoef()[0, 1].item() for c in (codes, shuffled)]
    assert correlations[0] > 0.9 and abs(correlations[1]) < 0.15


def test_a_sheet_says_what_it_shows():
    page = sample_sheet(torch.zeros(9, 3, 16, 16), "a mixture of 2 Gaussians", 1234)
    assert page.info["Title"] == "Sampled without a source image"
    assert "a mixture of 2 Gaussians" in page.info["Description"] and "1,234 images" in page.info["Description"]
    rows, columns = np.nonzero((np.asarray(page) == 128).all(-1))
    assert len(rows) == 9 * 96 * 96 and np.ptp(columns) + 1 == 8 * 100 - 4  # eight in a row
    assert sample_sheet(torch.zeros(65, 3, 16, 16), "", 1).width > 1600  # sixteen


def test_bad_codes():
    for codes, said in (
        (two_modes(3), r"^codes are 3, must be as many as the components or more: 4$"),
        (two_modes(9) / 0, r"^codes hold NaN, infinite or huge numbers, must be finite and within 1e\+30$"),
        (two_modes(9) * 1e40, "^codes hold NaN, infinite or huge numbers"),
        (
            torch.zeros(9),
            r"^codes are torch.float32 \(9,\), must be floating point \(n, N\) or \(n, N, m\), n at least",
        ),
        (torch.zeros(9, 2, dtype=torch.int64), r"^codes are torch.int64 \(9, 2\), must be floating point"),
        (torch.zeros(1, 2), r"^codes are torch.float32 \(1, 2\), must be"),
        (torch.zeros(9, 0), r"^codes are torch.float32 \(9, 0\), must be"),
        ("codes", r"^codes are a str, must be numbers \(n, N\)"),
    ):
        with pytest.raises(InputError, match=said):
            fit_prior(codes, components=4)
    for codes in (two_modes(9) / 0, torch.zeros(9)):
        with pytest.raises(InputError, match="^codes "):
            fit_prior(codes, "diffusion")


def test_bad_arguments(mixture, model, data):
    with pytest.raises(InputError, match="^kind is 'flow', must be one of mixture, diffusion$"):
        fit_prior(two_modes(9), "flow")
    with pytest.raises(InputError, match="^components is 4, must be left out: it belongs to the mixture$"):
        fit_prior(two_modes(9), "diffusion", components=4)
    with pytest.raises(InputError, match="^components is 0, must be a whole number, at least 1"):
        fit_prior(two_modes(9), components=0)
    with pytest.raises(InputError, match="^steps is 1.5, must be a whole number"):
        DiffusionPrior.fit(two_modes(9), 1.5)
    with pytest.raises(InputError, match="^count is 0, must be a whole number, at least 1"):
        mixture.sample(0)
    with pytest.raises(InputError, match="^seed is -1, must be a whole number, at least 0"):
        mixture.sample(1, seed=-1)
    with pytest.raises(InputError, match=r"^prior gives codes \(4, 2\), must give \(4, 3\) for this model$"):
        model.sample_prior(4, mixture)
    with pytest.raises(InputError, match="^prior is a str, must have sample"):
        model.sample_prior(4, "mixture")
    with pytest.raises(InputError, match="^count is 0, must be a whole number of at least 1$"):
        model.sample_prior(0, mixture)
    with pytest.raises(InputError, match="images are 32 pixels wide, must be the model's 16$"):
        dataset_codes(model, open_dataset(DATA, 32))
    with pytest.raises(InputError, match="^images are 1 and codes 64; must be at least 2, and twice as many codes$"):
        judge(torch.zeros(1, 3, 16, 16), model, mixture, torch.zeros(64, 3), data)
    with pytest.raises(InputError, match="^images are none"):
        sample_sheet(torch.zeros(0, 3, 16, 16), "", 1)


def test_a_damaged_file_is_refused(prior, tmp_path):
    file = prior.save(tmp_path)
    tensors, about = load_tensors(file)
    name = "means" if "means" in tensors else "enter.weight"

    def said(**changed):
        save_tensors(file, changed.get("tensors", tensors), about | changed.get("about", {}))
        with pytest.raises(InputError) as raised:
            load_prior(tmp_path)
        assert str(raised.value).startswith(str(file)) and "\n" not in str(raised.value)
        return str(raised.value)

    assert "is no prior of kind mixture or diffusion" in said(about={"prior": "flow"})
    assert "names no code_shape" in said(about={"code_shape": "2,-1"})
    assert "names no code_shape" in said(about={"fitted": "many"})
    assert "must be 65536 numbers at most" in said(about={"code_shape": "300,300"})
    assert said(about={"code_shape": "3"})
    assert said(tensors={k: v for k, v in tensors.items() if k != name})
    assert "finite" in said(tensors=tensors | {name: tensors[name] / 0})
    for negative in {"weights", "scale"} & tensors.keys():
        assert "negative" in said(tensors=tensors | {negative: -tensors[negative]})
    file.write_bytes(prior.save(tmp_path).read_bytes()[:200])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_prior(file)
    with pytest.raises(InputError, match="no such file"):
        load_prior(tmp_path / "none.safetensors")


@pytest.fixture
def sample(encdiff, monkeypatch, tmp_path):
    """Run `encdiff sample` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: encdiff("sample", *args)


def test_the_command(model, sample, tmp_path, monkeypatch):
    model.save_pretrained("mine")
    short = ("mine", "--data", DATA, "--steps", 1)
    code, text = sample(*short, "--components", 3, "--count", 4, "--judge", "--seed", 1)
    assert code == 0 and "picture: mine/pictures/sample.png" in text, text
    for said in ("prior", "floor", "independent", "Frechet distance", "floor hue, total variation", "the baseline"):
        assert said in text, text
    with Image.open(tmp_path / "mine/pictures/sample.png") as picture:
        assert "a mixture of 3 Gaussians, which was fitted to the codes of 64 images" in picture.text["Description"]
    monkeypatch.setattr(diffusion_module, "_train", lambda *_: None)  # seconds
    code, text = sample(*short, "--prior", "diffusion", "--count", 1, "--out", "one.png")
    assert code == 0 and text.endswith("picture: one.png") and (tmp_path / "one.png").is_file(), text

    for options, said in (
        (("--components", 65), "error: codes are 64, must be as many as the components or more: 65"),
        (("--prior", "diffusion", "--components", 3), "error: --components 3 must be left out: it belongs to --prior"),
        (("--judge", "--count", 1), "error: --count 1 must be in 2..32, half of the data's codes, for --judge"),
        (("--judge", "--count", 33), "error: --count 33 must be in 2..32"),
        (("--count", 0), "Invalid value for '--count'"),
        (("--prior", "flow"), "Invalid value for '--prior'"),
    ):
        code, text = sample(*short, *options)
        assert code == 2 and said in text, text
