"""Checkpoints: what loads, that it computes what plain transformers computes, and what is refused and how."""

import json
import shutil

import pytest
import torch
import transformers
from reference import plain_twin
from safetensors.torch import load_file, save_file
from synthetic import make_llama, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tstar_ray.blocks import train_visibility
from tstar_ray.head import TargetScores
from tstar_ray.model import TrainLayout, load_checkpoint
from tstar_ray.model_files import EMBEDDED_FOLDER
from tstar_ray.weights import checksum, flatten, load_flat


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for key, value in changes.items():
        values.pop(key, None)
        if value is not None:
            values[key] = value
    path.write_text(json.dumps(values))


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(EMBEDDED_FOLDER, tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return tmp_path / "model"


def staircase(length, block):
    grid = torch.arange(length) // block
    return (grid[None] <= grid[:, None])[None]


def model_and_twin(architecture):
    """The same weights as a block-diffusion model and in plain transformers."""
    model = make_model() if architecture == "qwen3" else make_llama()
    return model, plain_twin(model)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_logits_equal_plain_transformers_under_the_same_mask(architecture):
    model, twin = model_and_twin(architecture)
    ids, visible = torch.randint(0, 60, (2, 21)), staircase(21, 4).expand(2, 21, 21)
    positions = torch.arange(21).expand(2, 21)
    expected = twin(ids, attention_mask=visible[:, None], position_ids=positions).logits
    found = model.hf.lm_head(model.hidden(ids, positions, TrainLayout(visible, torch.float32)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_hidden_states_at_an_index_and_their_gradients_are_those_of_a_whole_pass(architecture, checkpointed):
    model, twin = model_and_twin(architecture)
    ids, visible = torch.randint(0, 60, (2, 21)), staircase(21, 4).expand(2, 21, 21)
    positions, index = torch.arange(21).expand(2, 21), torch.tensor([40, 3, 3, 22, 20])
    whole = twin.model(ids, attention_mask=visible[:, None], position_ids=positions).last_hidden_state
    expected, weight = whole.flatten(0, 1)[index], torch.randn(5, whole.shape[-1])
    (weight * expected).sum().backward()
    seen = []
    last = model.hf.model.layers[-1].mlp
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    if checkpointed:
        model.train().checkpoint_activations()
    found = model.hidden_at(ids, positions, TrainLayout(visible, torch.float32), index)
    (weight * found).sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = dict(model.hf.model.named_parameters())
    for name, parameter in twin.model.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-4, rtol=1e-4, msg=name)
    assert seen == [5] * (1 + checkpointed), "only they pass through the last MLP"


def test_a_forward_without_a_layout_fails_instead_of_running_causally():
    with pytest.raises(TypeError, match="layout"):
        make_model().hf(torch.tensor([[1, 2, 3]]))


@torch.no_grad()
def test_trap_5_padding_and_packing_do_not_change_log_probs():
    model = make_model()
    ids, position = torch.randint(0, 60, (1, 12)), torch.arange(12)[None]
    zeros = torch.zeros_like(ids)
    index, targets = torch.arange(12), torch.randint(0, 60, (12,))

    def logprobs(ids, position, document, block, offset):
        visible = train_visibility(document, block, torch.full_like(ids, -1))
        return model(ids, position, TrainLayout(visible, torch.float32), index + offset, targets)[0]

    alone = logprobs(ids, position, zeros, position // 4, 0)
    pad = torch.full_like(ids, 3)
    left = logprobs(
        torch.cat([pad, ids], 1),
        torch.cat([zeros, position], 1),
        torch.cat([zeros - 1, zeros], 1),
        torch.cat([zeros, position // 4], 1),
        12,
    )
    other = torch.cat([torch.randint(0, 60, (1, 12)), ids], 1)
    packed = logprobs(other, position.repeat(1, 2), torch.cat([zeros, zeros + 1], 1), (position // 4).repeat(1, 2), 12)
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 12, 4096])
def test_the_head_in_chunks_gives_plain_log_probs_entropies_and_gradients(chunk):
    model = make_model()
    ids, position = torch.randint(0, 60, (1, 12)), torch.arange(12)[None]
    layout = TrainLayout(staircase(12, 4), torch.float32)
    targets, scale = torch.arange(12) * 5, torch.randn(12)
    results = []
    for plain in (True, False):
        model.zero_grad()
        hidden = model.hidden(ids, position, layout)[0]
        if plain:
            everything = torch.log_softmax(model.logits(hidden) / 0.7, dim=-1)
            logprobs = everything[torch.arange(12), targets]
            entropy = -(everything.exp() * everything.masked_fill(everything == -torch.inf, 0)).sum(-1)
        else:
            logprobs, entropy = model.score(hidden, targets, 0.7, chunk)
        (scale * logprobs).sum().backward()
        results.append((logprobs.detach(), entropy.detach(), flatten_grad(model)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [2, 100])
def test_the_gradient_of_the_head_equals_finite_differences(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.double, generator=generator, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.double, generator=generator, requires_grad=True)
    targets = torch.randint(0, 9, (7,), generator=generator)

    def scores(h, w):
        return TargetScores.apply(h, w, targets, torch.tensor([9, 10]), 0.6, chunk)[0]

    assert torch.autograd.gradcheck(scores, (hidden, weight))


def test_many_chunks_in_bf16_add_up_as_one_does():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1024, 16, generator=generator).bfloat16()
    targets, none = torch.randint(0, 50, (1024,), generator=generator), torch.zeros(0, dtype=torch.long)
    start = torch.randn(50, 16, generator=generator).bfloat16()
    gradients = []
    for chunk in (1024, 4):
        weight = start.clone().requires_grad_()
        TargetScores.apply(hidden, weight, targets, none, 1.0, chunk)[0].sum().backward()
        gradients.append(weight.grad.float())
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 0.004, "bf16 holds 8 bits"


def flatten_grad(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def test_trap_25_undefined_ids_have_no_probability():
    model = make_model()
    logits = model.logits(torch.randn(3, 48))
    assert (logits[:, 62:] == -torch.inf).all(), "beyond the tokenizer, and the mask token"
    assert torch.isfinite(logits[:, :62]).all()


def test_sdar_checkpoints_load_as_qwen3_without_remote_code(folder):
    plain = load_checkpoint(folder).model
    edit_config(
        folder,
        model_type="sdar",
        architectures=["SDARForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        fuse_cross_entropy=True,
        attn_implementation="flex_attention",
    )
    found = load_checkpoint(folder)
    assert found.model.mask_id == plain.mask_id
    assert torch.equal(flatten(found.model), flatten(plain))


def test_saved_checkpoints_open_with_plain_transformers(folder, tmp_path):
    edit_config(folder, model_type="sdar")
    found = load_checkpoint(folder)
    found.save(tmp_path / "out")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(reopened) is transformers.Qwen3ForCausalLM
    assert torch.equal(flatten(reopened), flatten(found.model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == found.tokenizer.get_vocab()
    again = load_checkpoint(tmp_path / "out")
    assert (again.model.mask_id, again.stop_ids) == (found.model.mask_id, found.stop_ids)


def test_trap_18_every_end_of_text_id_stops(folder):
    edit_config(folder, eos_token_id=[5, 6])
    assert set(load_checkpoint(folder).stop_ids) == {0, 5, 6}


def drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def poison_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def lose_mask(folder):
    edit_config(folder, mask_token_id=None)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<|MASK|>", "<|other|>").replace('"mask_token"', '"other_token"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no readable config.json there"),
        (lambda f: edit_config(f, model_type="gpt2"), "model_type 'gpt2' is not served; known are qwen3, sdar, llama"),
        (lambda f: edit_config(f, use_sliding_window=True), "sliding-window attention"),
        (lambda f: edit_config(f, rope_parameters=DYNAMIC_ROPE), "rope_type 'dynamic' rotates by the longest sequence"),
        (lambda f: edit_config(f, rope_parameters=None, rope_scaling=DYNAMIC_ROPE), "rope_type 'dynamic' rotates by"),
        (lambda f: edit_config(f, mask_token_id=4000), "mask token id 4000 lies outside"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
        (lose_mask, "no mask token in its config or tokenizer; set model.mask_token_id"),
        (drop_weight, "missing model.layers.0.self_attn.q_proj.weight"),
        (poison_weight, "model.norm.weight holds values that are not finite"),
        (truncate_weights, "its weights cannot be read"),
        (pickle_weights, "no file named model.safetensors"),
    ],
)
def test_an_unusable_checkpoint_is_named_with_what_is_wrong(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError) as error:
        load_checkpoint(folder)
    assert message in str(error.value)


def test_flat_weights_round_trip_and_prove_themselves():
    source, target = make_model(1), make_model(2)
    flat = flatten(source)
    assert checksum(flat) != checksum(flatten(target))
    load_flat(target, flat)
    assert checksum(flatten(target)) == checksum(flat)
    one_bit = flat.clone()
    one_bit.view(torch.int32)[1234] ^= 1
    assert checksum(one_bit) != checksum(flat)
    with pytest.raises(ValueError, match="flat buffer holds"):
        load_flat(target, flat[:-1])


def test_tied_embeddings_travel_once():
    embedded = load_checkpoint("embedded").model
    assert embedded.hf.config.tie_word_embeddings
    assert flatten(embedded).numel() == sum(p.numel() for p in set(embedded.parameters()))
