"""The interface of every data set: grids with several images a combination, parts of grids, fingerprints."""

import hashlib

import numpy as np
import pytest

from encdiff.data import Dataset, SubGrid, describe
from encdiff.errors import InputError


class Toy(Dataset):
    """A grid of 4 x 5 x 6 x 3 combinations, two images of each, whose pixels hold the factors and the instance."""

    name, image_size, instances, images_per_chunk = "toy", 2, 2, 7
    factor_names, factor_sizes = ("hue", "kind", "height", "late"), (4, 5, 6, 3)
    label_values = tuple(10.0 * i + np.arange(n) for i, n in enumerate((4, 5, 6, 3)))
    cyclic, categories = ("hue",), ("kind",)

    def images(self, indices):
        indices = self.check_indices(indices)
        a, b, c, d = self.factors(indices).T
        return np.stack([np.stack([a, b, c], -1), np.stack([d, indices % 2, 0 * d], -1)], 1)[:, :, None].repeat(
            2, 2
        ).astype(np.uint8)  # fmt: skip


class Attributes(Toy):
    is_grid, factor_sizes = False, (2, 2, 2, 2)

    def __len__(self):
        return 7


class Plain(Dataset):
    name, image_size = "plain", 2

    def __len__(self):
        return 3

    def images(self, indices):
        return np.zeros((len(indices), 2, 2, 3), np.uint8)


def test_instances_are_consecutive():
    toy = Toy()
    assert len(toy) == 720
    np.testing.assert_array_equal(toy.factors([0, 1, 2, 719]), [[0, 0, 0, 0]] * 2 + [[0, 0, 0, 1], [3, 4, 5, 2]])
    indices = np.arange(0, 720, 2)
    np.testing.assert_array_equal(toy.indices(toy.factors(indices)), indices)
    np.testing.assert_array_equal(toy.indices(toy.factors(indices + 1)), indices)


def test_an_instance_is_drawn():
    toy = Toy()
    factors = toy.factors(np.random.default_rng().integers(0, 720, 400))
    drawn = toy.indices(factors, np.random.RandomState(3))
    np.testing.assert_array_equal(toy.factors(drawn), factors)
    assert 120 < (drawn % 2).sum() < 280  # 200 expected; 8 standard deviations
    np.testing.assert_array_equal(drawn, toy.indices(factors, np.random.RandomState(3)))


def test_counts_are_spread_by_the_kind_of_factor():
    part = SubGrid(Toy(), (3, 3, 3, 2))
    assert [values.tolist() for values in part.values] == [[0, 1, 2], [0, 1, 2], [0, 2, 5], [0, 2]]
    assert part.factor_sizes == (3, 3, 3, 2) and len(part) == 108 and part.images_per_chunk == 7


@pytest.mark.parametrize("grid", [(4, 5, 6, 3), (1, 2, 3, 1), ((3, 0), (4,), 6, (2, 0, 1))], ids=str)
def test_a_part_shows_the_images_of_the_whole(grid):
    toy, part = Toy(), SubGrid(Toy(), grid)
    indices = np.random.default_rng().permutation(len(part))
    factors = part.factors(indices)
    full = np.stack([values[f] for values, f in zip(part.values, factors.T, strict=True)], axis=1)
    np.testing.assert_array_equal(part.images(indices), toy.images(toy.indices(full) + indices % 2))
    np.testing.assert_array_equal(part.labels(indices), toy.labels(toy.indices(full)))
    np.testing.assert_array_equal(part.indices(factors), indices - indices % 2)


def test_a_part_of_a_part():
    part = SubGrid(SubGrid(Toy(), (4, 5, (5, 3, 1), 3)), (1, 1, (2, 0), 1))
    assert part.images([0])[0, 0, 0].tolist() == [0, 0, 1] and part.images([2])[0, 0, 0].tolist() == [0, 0, 5]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SubGrid(Toy(), (1, 2, 3)), "grid: 3 entries; must be 4, one for each of hue, kind, height, late"),
        (lambda: SubGrid(Toy(), (1, 2, 3, 4)), "4 values of late; must be 1..3"),
        (lambda: SubGrid(Toy(), (0, 2, 3, 3)), "0 values of hue; must be 1..4"),
        (lambda: SubGrid(Toy(), (1, 2, (6,), 3)), "indices must lie in 0..5"),
        (lambda: SubGrid(Toy(), (1, 2, (1, 1), 3)), "a tuple of different indices"),
        (lambda: Toy().select("1,2,x,3"), "toy:1,2,x,3: must be values per factor such as 4,5,6,3"),
        (lambda: SubGrid(Attributes(), (1, 1, 1, 1)), "toy: is labelled, but no complete grid"),
        (lambda: Attributes().indices([[0, 0, 0, 0]]), "toy: is labelled, but no complete grid"),
        (lambda: Attributes().select("train"), "has no grid of factors to select from"),
        (lambda: Plain().select("1,2"), "plain: has no factors"),
        (lambda: Plain().select("train"), "has no grid of factors to select from"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(InputError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_fingerprint():
    toy = Toy()
    pixels = toy.images([0, 102, 205, 308, 410, 513, 616, 719])
    assert describe(toy) == {
        "name": "toy",
        "images": 720,
        "image_size": 2,
        "factor_names": ["hue", "kind", "height", "late"],
        "factor_sizes": [4, 5, 6, 3],
        "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
    }
