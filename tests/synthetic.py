"""Small random models and trajectories for tests that need no decoding."""

import numpy as np
import torch
import transformers

from tstar_ray.model import BlockDiffusionLM
from tstar_ray.trajectory import Trajectory

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
