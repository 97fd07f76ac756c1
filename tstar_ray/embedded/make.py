"""Make the embedded start model: an autoregressive model of the built-in task, adapted to block diffusion at B=4.

    python -m tstar_ray.embedded.make --out FOLDER [--ar-weights FILE] [--sft-steps N]
    python -m tstar_ray.embedded.make --out FOLDER --mixture 4:1                        one that fails in larger blocks

1. **AR pre-training** from random weights: next-token prediction under a causal mask.
2. **Block-diffusion SFT** by `tstar_ray.adapt` (SDAR's recipe; learner.adaptation). Most steps are at B=4; a share of
   larger blocks gives a model that, as SDAR does, gets worse when decoded in larger blocks and does not fail
   altogether. The learning rate is constant, as SDAR's is: a model annealed to the bottom of the SFT loss leaves RL
   little to gain, and is thrown off it by the first updates.

About ten minutes on two cores. The result is evaluated by the torch engine at B = 4, 8 and 16. The committed weights
were made by the same recipe with the random numbers of an earlier script: a new run gives a model like them, not them.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tstar_ray import arithmetic
from tstar_ray.blocks import ceil_to_block
from tstar_ray.decoding import Decoding
from tstar_ray.model import BlockDiffusionLM, Checkpoint, TrainLayout, load_checkpoint
from tstar_ray.model_files import EMBEDDED_FOLDER
from tstar_ray.problems import Problem

EOS, MASK, UNKNOWN = "<|endoftext|>", "<|MASK|>", "<|unknown|>"
_PIECES = Regex(r"\\boxed\{| ?[A-Za-z]+|.")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word (with the space before it), digit or sign; decoding joins them back exactly."""
    words = (*arithmetic.NAMES, *arithmetic.THINGS, *arithmetic.GAIN, *arithmetic.LOSS, *arithmetic.SCALE)
    words = (*words, "has", "them", "half", "How", "many")
    vocabulary = [EOS, MASK, UNKNOWN, *"0123456789+-*/=;.? }", "\\boxed{"]
    vocabulary += [prefix + word for word in words for prefix in ("", " ")]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_PIECES, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, mask_token=MASK, unk_token=UNKNOWN
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> BlockDiffusionLM:
    """A random Qwen3 of 0.4M parameters."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    hf = transformers.Qwen3ForCausalLM._from_config(config, attn_implementation="block_diffusion")
    return BlockDiffusionLM(hf, mask_id=tokenizer.mask_token_id, token_limit=len(tokenizer))


class Corpus:
    """Tokenised training problems in batches of similar length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> None:
        found = arithmetic.problems("train", count, seed=seed)
        self.eos = tokenizer.eos_token_id
        prompts = tokenizer([p.question for p in found])["input_ids"]
        answers = tokenizer([p.solution for p in found])["input_ids"]
        self.rows = [(np.array(p), np.array([*a, self.eos])) for p, a in zip(prompts, answers)]
        self.rows.sort(key=lambda row: len(row[0]) + len(row[1]))

    def batch(self, rng: random.Random, size: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids [R, N] filled with end-of-text, prompt lengths [R], and lengths up to the last block's end [R]."""
        first = rng.randrange(len(self.rows) - size)
        rows = self.rows[first : first + size]
        prompt = [len(p) for p, _ in rows]
        length = [ceil_to_block(len(p) + len(a), block) for p, a in rows]
        ids = np.full((size, max(length)), self.eos)
        for r, (p, a) in enumerate(rows):
            ids[r, : len(p)] = p
            ids[r, len(p) : len(p) + len(a)] = a
        return torch.from_numpy(ids), torch.tensor(prompt), torch.tensor(length)


def ar_loss(model: BlockDiffusionLM, ids: torch.Tensor, prompt: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy, the answer weighted in full and the prompt at a tenth."""
    position = torch.arange(ids.shape[1]).expand_as(ids)
    causal = (position[:, :, None] >= position[:, None, :]) & (position < length[:, None])[:, None, :]
    hidden = model.hidden(ids, position, TrainLayout(causal, torch.float32))
    losses = torch.nn.functional.cross_entropy(
        model.hf.lm_head(hidden[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none"
    )
    target = position[:, 1:]
    weight = torch.where(target < prompt[:, None], 0.1, 1.0) * (target < length[:, None])
    return (losses * weight).sum() / weight.sum()


def train(
    model: BlockDiffusionLM,
    loss_of: Callable[[], torch.Tensor],
    *,
    steps: int,
    lr: float,
    final: float,
    label: str,
) -> None:
    """AdamW, linear warm-up, cosine to ``final`` times ``lr``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    start, total = time.time(), 0.0
    model.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 50)
        cosine = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * cosine
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"{label} {step + 1}/{steps}  loss {total / 100:.4f}  {time.time() - start:.0f} s", flush=True)
            total = 0.0
    model.eval()


def adapt(model: BlockDiffusionLM, tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> None:
    """Write the autoregressive model, adapt it, and put the result where it is wanted."""
    from tstar_ray.adapt import launch
    from tstar_ray.config_adapt import AdaptConfig

    shares = dict(pair.split(":") for pair in arguments.mixture.split(","))
    with tempfile.TemporaryDirectory(prefix="tstar-embedded-") as folder:
        start = Path(folder) / "ar"
        model.hf.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        Checkpoint(model, tokenizer, (tokenizer.eos_token_id,)).save(start)
        config = AdaptConfig.model_validate(
            {
                "run": {"name": "sft", "dir": folder, "seed": arguments.seed, "log_every": 100},
                "model": {"path": str(start)},
                "data": {"train": "arithmetic", "limit": arguments.problems},
                "stages": [{"steps": arguments.sft_steps, "mixture": {int(b): float(w) for b, w in shares.items()}}],
                "train": {
                    "batch": arguments.batch,
                    "lr": arguments.sft_lr,
                    "final_lr": arguments.sft_final,
                    "warmup": 0.06,
                    "betas": (0.9, 0.98),
                    "weight_decay": 0.01,
                    "threads": arguments.threads,
                },
            }
        )
        if launch(config):
            raise SystemExit("the block-diffusion SFT did not end well; see above")
        shutil.copytree(Path(folder) / "sft" / "final", arguments.out, dirs_exist_ok=True)


def evaluate(checkpoint: Checkpoint, problems: list[Problem], temperature: float) -> list[str]:
    """Accuracy and tokens per forward at B = 4, 8, 16, as the rollout actors decode."""
    from actors.torch_engine import TorchEngine
    from reward.grading import grade
    from tstar_ray.trajectory import Request, tokens_per_forward

    engine = TorchEngine(checkpoint.model)
    prompts = checkpoint.tokenizer([p.question for p in problems])["input_ids"]
    requests = [Request(i, 0, tuple(ids), seed=i) for i, ids in enumerate(prompts)]
    lines = []
    for block in (4, 8, 16):
        decoding = Decoding(block_size=block, max_new_tokens=96, stop_ids=checkpoint.stop_ids, temperature=temperature)
        found = engine.generate(requests, decoding)
        texts = checkpoint.tokenizer.batch_decode([t.completion_ids.tolist() for t in found], skip_special_tokens=True)
        correct = sum(grade(text, p.answer) == "correct" for text, p in zip(texts, problems))
        tpf = tokens_per_forward(found, commits=False)
        lines.append(f"{decoding.describe()}: accuracy {correct / len(problems):.3f}, TPF {tpf:.2f}")
    return lines


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=EMBEDDED_FOLDER)
    parser.add_argument(
        "--ar-weights", type=Path, help="file to keep the AR weights in, and to start from if it is there"
    )
    parser.add_argument("--ar-steps", type=int, default=1500)
    parser.add_argument("--ar-lr", type=float, default=3e-3)
    parser.add_argument("--sft-steps", type=int, default=800)
    parser.add_argument("--sft-lr", type=float, default=1e-3)
    parser.add_argument("--sft-final", type=float, default=1.0, help="last learning rate of the SFT over its first")
    parser.add_argument("--mixture", default="4:0.6,8:0.2,16:0.2", help="share of each block size in the SFT")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--problems", type=int, default=60_000)
    parser.add_argument("--held-out", type=int, default=512, help="problems of the final evaluation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, arguments.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    corpus, rng = Corpus(tokenizer, arguments.problems, seed=1), random.Random(arguments.seed)
    if arguments.ar_weights and arguments.ar_weights.exists():
        model.hf.load_state_dict(torch.load(arguments.ar_weights, weights_only=True))
    else:
        train(
            model,
            lambda: ar_loss(model, *corpus.batch(rng, arguments.batch, 1)),
            steps=arguments.ar_steps,
            lr=arguments.ar_lr,
            final=0.05,
            label="AR",
        )
        if arguments.ar_weights:
            torch.save(model.hf.state_dict(), arguments.ar_weights)
    adapt(model, tokenizer, arguments)
    checkpoint = load_checkpoint(arguments.out)
    held_out = arithmetic.problems("heldout", arguments.held_out)
    for temperature in (0.0, 1.0):
        print("\n".join(evaluate(checkpoint, held_out, temperature)), flush=True)


if __name__ == "__main__":
    main()
