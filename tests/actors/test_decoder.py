"""The engine's forward pass computes what transformers' modules compute, with the model's own parameters."""

import copy

import pytest
import torch
from synthetic import make_llama, make_qwen, save_model
from torch.utils._python_dispatch import TorchDispatchMode

from actors.decoder import Decoder
from tstar_ray.model import TrainLayout, load_checkpoint
from tstar_ray.weights import flatten, load_flat

MODELS = pytest.mark.parametrize("make", [make_qwen, make_llama])


def inputs(tokens=21, block=4):
    torch.manual_seed(0)
    position = torch.arange(tokens)
    visible = position[None] // block <= position[:, None] // block
    return torch.randint(0, 60, (tokens,)), position + 3, TrainLayout(visible[None], torch.float32)


def assert_computes(decoder, model):
    ids, position, layout = inputs()
    expected = model.hidden(ids[None], position[None], layout)[0]
    torch.testing.assert_close(decoder.hidden(ids, position, layout), expected, atol=1e-5, rtol=1e-5)
    wanted = torch.tensor([20, 3, 3, 11])
    found = decoder.hidden(ids, position, layout, wanted)
    torch.testing.assert_close(found, expected[wanted], atol=1e-5, rtol=1e-5)


@MODELS
@torch.inference_mode()
def test_hidden_states_are_those_of_transformers(make):
    assert_computes(Decoder(make()), make())


@MODELS
def test_parameters_stay_the_models_own(make, tmp_path):
    """New weights, an optimizer's steps and another decoder of the model are seen at once, and nothing is renamed."""
    model, untouched, other = make(), make(), make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    decoder, again = Decoder(model), Decoder(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in untouched.named_parameters()]
    assert torch.equal(flatten(model), flatten(untouched))
    ids, position, layout = inputs()
    model.hidden(ids[None], position[None], layout).square().sum().backward()
    assert all(p.grad is not None for p in model.hf.model.parameters())
    optimizer.step()
    assert not torch.equal(flatten(model), flatten(untouched))
    with torch.inference_mode():
        for same in (decoder, again):
            assert_computes(same, model)
        load_flat(model, flatten(other))
        for same in (decoder, again, Decoder(copy.deepcopy(model))):
            assert_computes(same, other)
    assert_computes_after_saving(model, other, tmp_path)


@torch.inference_mode()
def assert_computes_after_saving(model, expected, folder):
    found = load_checkpoint(save_model(model, folder)).model
    assert torch.equal(flatten(found), flatten(expected))
    assert_computes(Decoder(found), expected)


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to compute, views aside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class NoAttention:
    """A layout that computes nothing."""

    def attend(self, layer, query, key, value, scale):
        return query.transpose(1, 2)


@MODELS
@torch.inference_mode()  # where a norm is one operation, as it is one kernel of a GPU
def test_beside_attention_it_takes_far_fewer_operations(make):
    model, (ids, position, _) = make(), inputs()
    with Operations() as theirs:
        model.hidden(ids[None], position[None], NoAttention())
    decoder = Decoder(model)
    with Operations() as ours:
        decoder.hidden(ids, position, NoAttention())
    assert ours.count < 0.65 * theirs.count, (ours.count, theirs.count)
