"""Models of a given shape with random weights, and traces of the real engine: what benchmarks run on.

The LM head is scaled up, so that a random model is confident about some tokens and not about others, and blocks
take different numbers of steps; the threshold of dynamic unmasking is searched until traces have a wanted number
of tokens per forward. Published TPF at these block sizes: 2.3 at B=4 (TraceRL, SDAR-4B), 4.8 at
B=32 (LightningRL, SDAR-8B).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
import transformers

from actors.torch_engine import TorchEngine
from tstar_ray.decoding import Decoding
from tstar_ray.model import BlockDiffusionLM, load_checkpoint
from tstar_ray.trajectory import Request, Trajectory, tokens_per_forward

PUBLISHED_TPF = {1: 1.0, 2: 1.5, 4: 2.3, 8: 3.0, 16: 4.0, 32: 4.8}
SHAPES = {
    # hidden, layers, heads, key-value heads, head dim, MLP, vocabulary
    "8M": (192, 6, 4, 2, 48, 512, 16384),  # as many logits for each activation as SDAR-1.7B under checkpointing
    "8M-vocab152k": (192, 6, 4, 2, 48, 512, 151936),  # the same body under SDAR's vocabulary
    "20M": (320, 8, 5, 1, 64, 896, 16384),
    "sdar-1.7b": (2048, 28, 16, 8, 128, 6144, 151936),
    "sdar-4b": (2560, 36, 32, 8, 128, 9728, 151936),
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model`` a name of `SHAPES` or a checkpoint folder, ``--device``, ``--threads``, ``--seed``."""
    parser.add_argument("--model", default="8M", help=f"{', '.join(SHAPES)} (random weights), or a checkpoint folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="compute threads on CPU")
    parser.add_argument("--seed", type=int, default=0)


def make_model(arguments: argparse.Namespace) -> BlockDiffusionLM:
    """fp32 on CPU, bf16 on CUDA."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if arguments.model not in SHAPES:
        return load_checkpoint(arguments.model, dtype=dtype, device=device).model
    return random_model(SHAPES[arguments.model], device=device, dtype=dtype, seed=arguments.seed)


def random_model(shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype, seed: int) -> BlockDiffusionLM:
    """A Qwen3 of a shape as in `SHAPES`; its last token is the mask token."""
    torch.manual_seed(seed)
    hidden, layers, heads, kv_heads, head_dim, mlp, vocabulary = shape
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        max_position_embeddings=32768,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        hf = transformers.Qwen3ForCausalLM._from_config(config, attn_implementation="block_diffusion", dtype=dtype)
    with torch.no_grad():
        hf.lm_head.weight.mul_(8)
    return BlockDiffusionLM(hf, mask_id=vocabulary - 1, token_limit=vocabulary - 1).to(device)


def make_requests(model: BlockDiffusionLM, lengths: list[int], seed: int) -> list[Request]:
    """Random prompts of the given lengths."""
    rng = np.random.default_rng(seed)
    limit = min(model.mask_id, model.hf.config.vocab_size - 2)
    return [Request(i, 0, tuple(rng.integers(0, limit, n).tolist()), seed=seed + i) for i, n in enumerate(lengths)]


def tuned_decoding(model: BlockDiffusionLM, block_size: int, new_tokens: int, tpf: float) -> Decoding:
    """Dynamic unmasking whose threshold gives about ``tpf`` tokens per forward on this model."""
    engine = TorchEngine(model)
    probes = make_requests(model, [32] * 8, seed=99)
    decoding = Decoding(block_size=block_size, max_new_tokens=min(new_tokens, 128), stop_ids=())
    low, high = -14.0, 0.0  # log threshold; a lower one reveals more
    for _ in range(12):
        middle = (low + high) / 2
        decoding = replace(decoding, threshold=float(np.exp(middle)))
        if tokens_per_forward(engine.generate(probes, decoding), commits=False) > tpf:
            low = middle
        else:
            high = middle
    return replace(decoding, max_new_tokens=new_tokens)


def make_traces(
    model: BlockDiffusionLM, block_size: int, *, count: int, prompt: int, new_tokens: int, tpf: float, seed: int
) -> list[Trajectory]:
    """``count`` trajectories of the real engine at about ``tpf`` tokens per forward.

    Answers have lengths as solutions do: log-normal, their median below half of ``new_tokens``, the cap.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(1, prompt - 16), prompt + 17, count).tolist()
    decoding = tuned_decoding(model, block_size, new_tokens, tpf)
    caps = np.clip(rng.lognormal(np.log(0.45 * new_tokens), 0.5, count), 2 * block_size, new_tokens).astype(int)
    engine, requests = TorchEngine(model), make_requests(model, lengths, seed)
    return [
        engine.generate([request], replace(decoding, max_new_tokens=int(cap)))[0]
        for request, cap in zip(requests, caps)
    ]


def device_name(device: str) -> str:
    """For the JSON."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    import platform

    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
