"""Keys and values of a prompt: made once while the same tensor is given, anew after any change."""

import pytest
import torch
import torch.nn.functional as F
from _unets import assert_as_stock, inputs, relative, unet_of

import encdiff
from encdiff.interop import state
from encdiff.interop.patch import states_of


@pytest.fixture
def projections(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the prompts that became keys and values."""
    made = []

    def linear(context, weight):
        made.append(tuple(context.shape))
        return F.linear(context, weight)

    monkeypatch.setattr(state, "F", type("F", (), {"linear": staticmethod(linear)}))
    return made


def test_a_prompt_is_projected_once(projections):
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    with torch.no_grad():
        for t in (9, 5, 1):
            first = unet(**given | {"timestep": t}).sample
        assert len(projections) == 2 * 4
        assert torch.equal(unet(**given | {"timestep": 1}).sample, first)


def test_keys_and_values_go_with_their_prompt():
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    kept = states_of(unet)[0].tokens
    with torch.no_grad():
        unet(**given)
        assert len(kept) == 4
        given = inputs("sd1")  # the next prompt takes the place of the last
        unet(**given)
        assert len(kept) == 4
    del given
    assert not kept


def changed_prompt(unet, given):
    given["encoder_hidden_states"].mul_(2)


def other_prompt(unet, given):
    given["encoder_hidden_states"] = 2 * given["encoder_hidden_states"]


def changed_weights(unet, given):
    for name, parameter in unet.named_parameters():
        if "to_v" in name:
            parameter.mul_(2)


def loaded_weights(unet, given):
    unet.load_state_dict({name: 1.1 * tensor for name, tensor in unet.state_dict().items()})


@pytest.mark.parametrize("change", [changed_prompt, other_prompt, changed_weights, loaded_weights])
def test_a_change_is_seen(change):
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    with torch.no_grad():
        before = unet(**given).sample
        change(unet, given)
        after = unet(**given).sample
        assert relative(after, before) > 1e-4
    assert_as_stock(unet, given, after)


def test_a_change_of_type_is_seen():
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    with torch.no_grad():
        before = unet(**given).sample
        unet.double()
        doubles = {name: given[name].double() for name in ("sample", "encoder_hidden_states")}
        assert relative(before.double(), unet(**given | doubles).sample) < 1e-5


def test_nothing_is_kept_under_inference_mode_or_with_gradients(projections):
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    unet(**given)
    with torch.inference_mode():
        unet(**given | {"encoder_hidden_states": given["encoder_hidden_states"].clone()})
    assert projections == []
