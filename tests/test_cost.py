import pytest
import torch

from bench.baselines import PAPER, SMOKE
from bench.cost import sampling_cost, train_step_cost, unet_cost

F32, BF16 = torch.float32, torch.bfloat16


def test_flop_of_the_paper_unet():
    """About 2.0 GFLOP forward per latent, 0.77 TFLOP forward and backward at batch 128."""
    assert unet_cost(PAPER, 1, "forward", F32)["flops"] == pytest.approx(2.0e9, rel=0.02)
    assert unet_cost(PAPER, 128, "forward_backward", F32)["flops"] == pytest.approx(0.77e12, rel=0.02)


def test_bytes_of_the_paper_unet_hold_its_weights_once_and_grow_with_the_batch():
    one, two, three = (unet_cost(PAPER, batch, "forward", F32)["bytes"] for batch in (1, 2, 3))
    assert three - two == two - one > 0
    weights = one - (two - one)
    assert weights == pytest.approx(4 * 37.47e6, rel=0.005)  # all but the norms'
    assert unet_cost(PAPER, 1, "forward", BF16)["bytes"] * 2 == one
    assert unet_cost(PAPER, 1, "forward_backward", F32)["bytes"] == 3 * one


def test_a_step_adds_the_optimiser_and_the_average_once():
    costs = [train_step_cost(PAPER, batch, BF16)["bytes"] for batch in (1, 2)]
    fixed = 2 * costs[0] - costs[1]
    assert fixed == pytest.approx(1.1e9 + 0.3e9 + 3 * 2 * 39.4e6, rel=0.1)
    whole, without = (train_step_cost(SMOKE, 2, F32, first_stage) for first_stage in (True, False))
    assert whole["bytes"] > without["bytes"] and whole["flops"] > without["flops"]


def test_sampling_is_its_evaluations_and_one_decoding():
    three, five = (sampling_cost(SMOKE, 2, steps, F32) for steps in (3, 5))
    unet = unet_cost(SMOKE, 2, "forward", F32)
    for what in ("bytes", "flops"):
        assert five[what] - three[what] == 2 * unet[what] and three[what] > 3 * unet[what]
