"""Memory arithmetic: parameters of real models, hand-made sums, and PyTorch's own count of what it saves."""

import pytest
import torch
import transformers

from tstar_ray.config_learner import LearnerConfig
from tstar_ray.memory import (
    GIB,
    KNOWN_MODELS,
    ModelShape,
    checkpoint_gib,
    fullest_device,
    known_shape,
    learner_parts,
    rollout_parts,
    sequences_that_fit,
)

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 96, "vocab_size": 130}
TINY = [
    transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False, attention_bias=True),
    transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
]


@pytest.mark.parametrize("config", TINY, ids=lambda c: f"{c.model_type}-{c.tie_word_embeddings}")
def test_parameters_are_those_of_the_real_model(config):
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert ModelShape.from_config(config.to_dict()).parameters == sum(p.numel() for p in model.parameters())


def test_the_embedded_model_has_the_parameters_it_has():
    import json

    from tstar_ray.model import load_checkpoint
    from tstar_ray.model_files import EMBEDDED_FOLDER

    shape = ModelShape.from_config(json.loads((EMBEDDED_FOLDER / "config.json").read_text()))
    assert shape.parameters == sum(p.numel() for p in load_checkpoint("embedded").model.parameters())


def test_known_sizes_by_hand():
    """Qwen3-8B: 8.19 billion; 4B: 4.02 with a tied head, 4.41 without; 1.7B: 1.72 and 2.03; 0.6B: 0.60, tied."""
    assert KNOWN_MODELS["0.6b"].parameters == 596_049_920
    assert KNOWN_MODELS["8b"].parameters == 8_190_735_360
    assert KNOWN_MODELS["4b"].backbone_parameters == 4_022_468_096
    assert KNOWN_MODELS["4b"].parameters == 4_022_468_096 + 151_936 * 2560
    assert KNOWN_MODELS["1.7b"].backbone_parameters == 1_720_574_976
    assert KNOWN_MODELS["8b"].cache_bytes(2) == 2 * 36 * 8 * 128 * 2 == 147_456
    assert known_shape("JetLM/SDAR-4B-Chat-b32") is KNOWN_MODELS["4b"]
    assert known_shape("Gen-Verse/TraDo-8B-Instruct") is KNOWN_MODELS["8b"]
    assert known_shape("JetLM/SDAR-1.7B-Chat") is KNOWN_MODELS["1.7b"]
    assert known_shape("Qwen/Qwen3-1.7B-Base").parameters == 1_720_574_976
    assert known_shape("Qwen/Qwen3-4B").parameters == 4_022_468_096
    assert known_shape("Qwen/Qwen3-8B") is KNOWN_MODELS["8b"]
    assert known_shape("JetLM/SDAR-30B-A3B-Chat") is None
    assert known_shape("someone/else-4B") is None


def named(parts):
    return {p.name: p for p in parts}


def test_learner_by_hand():
    """SDAR-4B, P = 4.411 billion, two ranks, ZeRO-2, bf16: 2 P + 4 P / 2 + 16 P / 2 bytes of states on each GPU."""
    shape, count = KNOWN_MODELS["4b"], 4_411_424_256
    learner = LearnerConfig(ranks=2, zero_stage=2, gradient_checkpointing=True, micro_batch_tokens=8192)
    found = named(learner_parts(shape, learner, gpu=True, itemsize=2))
    assert found["weights"].gib == pytest.approx(2 * count / GIB)
    assert found["gradients"].gib == pytest.approx(2 * count / GIB)
    assert found["optimizer"].gib == pytest.approx(8 * count / GIB)
    layer = 2 * (2560 * 6 + 2560 * 2) + 5120 * 6 + 5120 * 2 + 10240 * 2 + 4 * 9728 * 2
    assert found["activations"].gib == pytest.approx(8192 * (36 * 2560 * 2 + layer) / GIB)
    assert found["vocabulary chunk"].gib == pytest.approx((2**25 * 16 + 151936 * 2560 * 4) / GIB)
    offloaded = named(learner_parts(shape, learner.model_copy(update={"offload": "optimizer"}), gpu=True, itemsize=2))
    assert offloaded["gradients"].gib == pytest.approx(count / GIB)
    assert (offloaded["optimizer"].gib, offloaded["optimizer"].host_gib) == (0, pytest.approx(10 * count / GIB))
    third = learner.model_copy(update={"zero_stage": 3, "offload": "all"})
    found = named(learner_parts(shape, third, gpu=True, itemsize=2))
    assert (found["weights"].gib, found["weights"].host_gib) == (0, pytest.approx(count / GIB))
    assert found["gathered by ZeRO-3"].gib == pytest.approx(2 * 151936 * 2560 * 2 / GIB)


def test_a_reference_and_a_value_model_are_counted():
    shape = KNOWN_MODELS["1.7b"]
    plain = LearnerConfig()
    more = LearnerConfig(loss={"kl_reference": "initial"}, value={"kind": "separate"})
    extra = sum(p.gib for p in learner_parts(shape, more, gpu=True, itemsize=2)) - sum(
        p.gib for p in learner_parts(shape, plain, gpu=True, itemsize=2)
    )
    value = shape.backbone_parameters + shape.hidden
    assert extra == pytest.approx((shape.parameters * 2 + value * 22) / GIB)


def test_rollout_cache_and_disk_by_hand():
    shape = KNOWN_MODELS["8b"]
    found = named(rollout_parts(shape, cache_gb=20, gpu=True, itemsize=2))
    assert found["weights"].gib == pytest.approx(15.26, abs=0.01)
    assert found["keys and values"].gib == 20
    assert sequences_that_fit(shape, cache_gb=20, itemsize=2, tokens=1024) == 142
    assert checkpoint_gib(shape, itemsize=2, value_model=False) == pytest.approx(14 * 8_190_735_360 / GIB)


@pytest.mark.parametrize(
    ("ranks", "rank_gpus", "actors", "actor_gpus", "expected"),
    [
        (2, 1, 6, 1, (50.0, 1, 0)),
        (1, 0.5, 1, 0.5, (80.0, 1, 1)),
        (1, 0.5, 4, 0.25, (120.0, 0, 4)),
        (0, 1, 2, 0.5, (60.0, 0, 2)),
        (1, 0, 2, 0, (0.0, 0, 0)),
    ],
)
def test_the_fullest_gpu_is_found_under_rays_packing(ranks, rank_gpus, actors, actor_gpus, expected):
    shares = {"ranks": ranks, "rank_gpus": rank_gpus, "actors": actors, "actor_gpus": actor_gpus}
    assert fullest_device(50.0, 30.0, **shares) == expected


def test_activations_are_what_pytorch_saves():
    """Bytes of distinct storages that autograd keeps for the layers of a fused-attention forward, against the sum."""
    from tstar_ray.model import BlockDiffusionLM, TrainLayout

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, head_dim=32,
        intermediate_size=384, vocab_size=64,
    )  # fmt: skip
    hf = transformers.Qwen3ForCausalLM._from_config(config, attn_implementation="block_diffusion")
    model = BlockDiffusionLM(hf, mask_id=63, token_limit=63).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens, saved = 512, {}
    ids = torch.randint(0, 60, (1, tokens))
    layout = TrainLayout(torch.ones(1, tokens, tokens, dtype=torch.bool), torch.float32)
    bias = layout.bias_R1NN.untyped_storage().data_ptr()

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() != bias:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model.hidden(ids, torch.arange(tokens)[None], layout)
    assert hidden.requires_grad
    total = sum(size for size, _ in saved.values())
    estimate = tokens * config.num_hidden_layers * ModelShape.from_config(config.to_dict()).layer_activation_bytes(4)
    assert estimate == pytest.approx(total, rel=0.2)
