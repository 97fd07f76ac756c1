"""Small random models and trajectories for tests that need no decoding."""

import json
import random
from pathlib import Path

import numpy as np
import torch
import transformers

from tstar_ray.model import BlockDiffusionLM
from tstar_ray.trajectory import Request, Trajectory

VOCABULARY, MASK_ID = 64, 63


def make_model(seed: int = 0) -> BlockDiffusionLM:
    """A random two-layer Qwen3 with grouped queries; 64 tokens, the last two undefined and mask."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        initializer_range=0.08,
        tie_word_embeddings=False,
    )
    hf = transformers.Qwen3ForCausalLM._from_config(config, attn_implementation="block_diffusion")
    return BlockDiffusionLM(hf.eval(), mask_id=MASK_ID, token_limit=62).eval()


def make_qwen() -> BlockDiffusionLM:
    """The same shape, with norms that are not all ones."""
    model = make_model(seed=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def make_llama() -> BlockDiffusionLM:
    """A random three-layer Llama of the same vocabulary, with a bias in every linear map of a layer."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=96,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.1,
    )
    hf = transformers.LlamaForCausalLM._from_config(config, attn_implementation="block_diffusion").eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return BlockDiffusionLM(hf, mask_id=MASK_ID, token_limit=62)


def save_model(model: BlockDiffusionLM, folder: Path) -> Path:
    """A checkpoint folder of a model, with a word for every token it may predict but the mask."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(62)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t7")
    model.hf.config.mask_token_id = model.mask_id
    model.hf.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_requests(lengths: list[int], seed: int = 0) -> list[Request]:
    """Random prompts of the given lengths."""
    rng = random.Random(seed)
    return [
        Request(i, 0, tuple(rng.randrange(60) for _ in range(length)), seed=rng.getrandbits(60))
        for i, length in enumerate(lengths)
    ]


def make_trajectory(
    rng: np.random.Generator,
    *,
    prompt_len: int,
    blocks: int,
    block_size: int,
    group_id: int = 0,
    sample: int = 0,
    version: int = 0,
) -> Trajectory:
    """Random tokens with a random but valid step map that ends somewhere inside the last block."""
    first = prompt_len // block_size
    total = (first + blocks) * block_size
    steps: list[int] = []
    done = 0
    for k in range(first, first + blocks):
        here = block_size - max(0, prompt_len - k * block_size)
        count = int(rng.integers(1, here + 1))
        local = np.concatenate([np.arange(count), rng.integers(0, count, here - count)])
        steps.extend(done + 1 + rng.permutation(local))
        done += count
    length = total - prompt_len
    return Trajectory(
        group_id=group_id,
        sample=sample,
        token_ids=rng.integers(0, 60, total).astype(np.int32),
        prompt_len=prompt_len,
        completion_len=int(rng.integers(max(1, length - block_size + 1), length + 1)),
        step_map=np.asarray(steps, dtype=np.int32),
        logprobs=rng.normal(-3, 0.5, length).astype(np.float32),
        block_size=block_size,
        temperature=1.0,
        weight_versions=np.full(blocks, version, dtype=np.int64),
        stop_reason="stop",
    ).validate()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_checkpoint_folder(folder: Path, corpus: Path, *, model_type: str = "qwen3") -> Path:
    """A random checkpoint as SDAR ships its own: byte-level BPE trained on ``corpus``, ChatML, mask token, and a
    vocabulary larger than the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    with corpus.open() as lines:
        tokenizer.train_from_iterator([line for line, _ in zip(lines, range(200))], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", mask_token="<|MASK|>"
    )
    fast.chat_template = CHATML
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(fast) + 12,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    if model_type == "sdar":
        path = folder / "config.json"
        values = json.loads(path.read_text())
        values |= {
            "model_type": "sdar",
            "architectures": ["SDARForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
            "mask_token_id": fast.mask_token_id,
            "block_size": 4,
            "fuse_cross_entropy": True,
        }
        path.write_text(json.dumps(values))
    return folder
