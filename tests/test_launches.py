"""The count of kernels of a training step and of a sampling evaluation must not grow."""

from functools import cache

import pytest
import torch

from bench import launches
from bench.launches import Counting, count_sampling, count_update, imagined_gpu
from encdiff.ops.column_sum import column_sum

count_step, count_evaluation = cache(launches.count_step), cache(launches.count_evaluation)

# lower these with every kernel that is saved
STEP = {"ours, autocast": 2289, "ours, bf16 weights": 1502}
EVALUATION = {"ours, autocast": 730, "ours, bf16 weights": 322}
SAMPLING = 3520  # ten evaluations


@pytest.mark.parametrize("form", STEP)
def test_a_step_launches_no_more_than_it_did(form):
    assert count_step(form).total().launches <= STEP[form]


@pytest.mark.parametrize("form", EVALUATION)
def test_an_evaluation_launches_no_more_than_it_did(form):
    assert count_evaluation(form).total().launches <= EVALUATION[form]


def test_a_sampling_launches_no_more_than_it_did():
    counting = count_sampling()
    assert counting.total().launches <= SAMPLING
    assert counting.ops["rest: encdiff_native::step_out"] == 10  # all of a solver's step


def test_our_kernels_are_the_ones_counted():
    counting = count_evaluation("ours, bf16 weights")
    groups = counting.groups
    assert groups["GroupNorm"].launches == 73 and groups["attention"].launches == 32
    assert counting.ops["products: encdiff::projection"] == 80 and not {"GEGLU", "LayerNorm"} & groups.keys()
    assert groups["resampling"].launches == 6, "of both tensors of a block at once"


def test_what_is_counted():
    with imagined_gpu():
        x, w, b = torch.empty(4, 6), torch.empty(8, 6), torch.empty(8)
        conv = torch.nn.Conv2d(3, 5, 3, padding=1)
        with Counting() as counting:
            y = torch.nn.functional.linear(x, w, b)
            y.view(2, 16).T.bfloat16()
            conv(torch.empty(2, 3, 4, 4)).sum().backward()
    assert counting.groups["products"] == (1, 4 * (24 + 48 + 8 + 32))
    assert counting.groups["casts"] == (1, (4 + 2) * 32)
    assert counting.groups["convolutions"].launches == 2  # of an input that needs no gradient
    assert counting.groups["convolution biases"].launches == 2


def test_sums_of_many_rows_are_two_launches():
    with imagined_gpu(), Counting() as counting:
        column_sum(torch.empty(2048, 64))
        column_sum(torch.empty(2049, 64))
    assert counting.ops == {"sums: encdiff::column_sum": 3}


def test_every_bias_is_summed_by_the_kernel():
    counting = count_step("ours, bf16 weights")
    assert counting.ops["sums: encdiff::column_sum"] == 234 and "sums: aten::sum" not in counting.ops


def test_an_update_is_more_than_one_launch_and_reads_every_weight():
    assert 2 <= count_update().total().launches <= 60
