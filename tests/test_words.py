"""The picture of words over an image."""

import numpy as np
import pytest
import torch
from PIL import Image

from encdiff.errors import InputError
from encdiff.pictures import words_picture


def maps_of(size=(8, 8)) -> torch.Tensor:
    """Four tokens; the third has the left half, the fourth the right half."""
    maps = torch.zeros(4, *size)
    maps[2, :, : size[1] // 2] = maps[3, :, size[1] // 2 :] = 1.0
    return maps


def brightness(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L")).astype(float)


def test_each_word_is_bright_where_it_is_attended_to(texts):
    picture = words_picture(torch.full((3, 16, 16), -1.0), maps_of(), {2: "left", 3: "right", (2, 3): "both"})
    assert {"left", "right", "both", "image"} <= set(texts)
    grey = brightness(picture)
    top = grey.shape[0] - 150  # a row through the cells, which stand above the colour bar
    row = grey[top]
    starts = [90 + 192 + 22 + i * 196 for i in range(3)]
    halves = [(row[x + 20 : x + 70].mean(), row[x + 120 : x + 170].mean()) for x in starts]
    assert halves[0][0] > 2 * halves[0][1] and halves[1][1] > 2 * halves[1][0]
    assert min(halves[2]) > 0.9 * max(halves[2])


def test_a_pil_image_of_any_sides_and_a_list_of_words(texts):
    wide = Image.new("RGB", (300, 100), "green")
    words_picture(wide, maps_of((4, 12)), ["begin", "a", "cat"])
    assert {"begin", "a", "cat"} <= set(texts)


def test_a_word_may_come_twice(texts):
    words_picture(Image.new("RGB", (32, 32)), maps_of(), ["a", "cat", "a", "dog"])
    assert texts.count("a") == 2


@pytest.mark.parametrize("image, maps, words, said", [
    (torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), ["a"], r"maps are \(1, 4, 8, 8\), must be a torch.Tensor"),
    (torch.zeros(3, 8, 8), [[0.0]], ["a"], "maps are list, must be"),
    (torch.zeros(3, 8, 8), maps_of(), {4: "cat"}, r"place 4 of a word must be in 0..3"),
    (torch.zeros(3, 8, 8), maps_of(), {(): "cat"}, r"place \(\) of a word"),
    (torch.zeros(3, 8, 8), maps_of(), {}, "words are '{}', must be a list of words"),
    (torch.zeros(1, 8, 8), maps_of(), ["a"], r"image is \(1, 8, 8\), must be a torch.Tensor \(3, H, W\)"),
    (np.zeros((8, 8, 3)), maps_of(), ["a"], "image is ndarray, must be a torch.Tensor"),
    (torch.zeros(3, 8, 8), maps_of(), "a cat", "words are 'a cat', must be a list of words"),
    (torch.zeros(3, 8, 8), maps_of(), {1: 5}, "must be a list of words"),
    (torch.zeros(3, 8, 8), maps_of(), {"a": 1}, "must be a list of words"),
])  # fmt: skip
def test_bad_input(image, maps, words, said):
    with pytest.raises(InputError, match=said):
        words_picture(image, maps, words)
