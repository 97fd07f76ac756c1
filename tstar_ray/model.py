"""Hugging Face checkpoints as block-diffusion models, without remote code.

A block-diffusion model is an ordinary decoder whose attention is told, for every token, what it may see. The
transformers model keeps its weights, projections, rotary embedding and MLP. Its attention function is replaced by
`block_attention`, which hands query, key and value to the `Layout` of the call: packed training rows (`TrainLayout`,
here) or an engine's cache; norms, last layer and LM head by quicker ones (`norm`, `last_layer`, `head`). There is no
implicit mask: a call without a layout fails, so neither a causal mask nor eager attention with a boolean mask (silently
wrong) can slip in.

Logits at position i predict token i (no shift; SDAR, dLLM-RL#43). The mask token and the ids beyond the
tokenizer get -inf, in sampling and in training alike (trap 25).

Served: Qwen3 and Llama architectures, and ``model_type: sdar`` (JetLM/SDAR-*, Gen-Verse/TraDo-*), which is
Qwen3 under another name; not with sliding windows, nor with RoPE that depends on the longest sequence of a batch. Saved
checkpoints open with plain transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tstar_ray.head import TargetHead
from tstar_ray.last_layer import LastLayer
from tstar_ray.mask_token import add_mask_embedding, add_mask_token
from tstar_ray.model_files import (
    ARCHITECTURES,
    MASK_TOKENS,
    Blueprint,
    find_mask_id,
    read_config,
    read_tokenizer,
    resolve,
    stop_ids,
)
from tstar_ray.norm import fuse_norms

_LOGITS_IN_CHUNK = {False: 2**21, True: 2**25}
"""On CPU and on CUDA: logits held at a time, a few copies of which are alive in the backward pass."""


class Layout(Protocol):
    """Who attends to whom in one forward pass."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query [R, H, N, D], key and value [R, Hkv, N, D] of this layer -> [R, N, H, D]."""


def block_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Layout,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function registered with transformers; everything is up to the layout."""
    return layout.attend(module.layer_idx, query, key, value, scaling), None


transformers.AttentionInterface.register("block_diffusion", block_attention)
transformers.utils.logging.disable_progress_bar()
# Where PyTorch prefers cuDNN's attention (H100, H200) it would make a plan, tens of milliseconds, for every new shape;
# an engine's passes are of many.
torch.backends.cuda.enable_cudnn_sdp(False)


class TrainLayout:
    """Packed rows under an explicit mask: SDPA with an additive bias built once for all layers."""

    def __init__(self, visible: torch.Tensor, dtype: torch.dtype) -> None:
        """``visible`` bool [R, N, N], query by key; every query must see something."""
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        self.bias_R1NN = bias.masked_fill_(~visible, -torch.inf)[:, None]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `Layout.attend`."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias_R1NN, scale=scale)
        return out.transpose(1, 2)


def _run_backbone(
    backbone: nn.Module, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, wanted: torch.Tensor | None
) -> torch.Tensor:
    out = backbone(
        input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False, layout=layout, wanted=wanted
    )
    return out.last_hidden_state


def hidden_at(
    backbone: nn.Module, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, index: torch.Tensor
) -> torch.Tensor:
    """`BlockDiffusionLM.hidden_at` of its backbone, or of a copy of that."""
    return _run_backbone(backbone, ids, positions, layout, index)[0]


class BlockDiffusionLM(nn.Module):
    """A transformers causal-LM module run as a block-diffusion model."""

    suppressed_V: torch.Tensor
    _suppressed_ids: torch.Tensor

    def __init__(self, hf: PreTrainedModel, *, mask_id: int, token_limit: int) -> None:
        """``token_limit``: ids from here on do not exist in the tokenizer and are never predicted."""
        super().__init__()
        vocabulary = hf.config.vocab_size
        if not 0 <= mask_id < vocabulary:
            raise ValueError(f"mask token id {mask_id} lies outside the model's vocabulary of {vocabulary}")
        hf.config._attn_implementation = "block_diffusion"
        fuse_norms(hf)
        hf.lm_head = TargetHead.of(hf.lm_head)
        hf.model.layers[-1] = LastLayer.of(hf.model.layers[-1])
        self.hf = hf
        self.mask_id = mask_id
        suppressed = torch.arange(vocabulary) >= token_limit
        suppressed[mask_id] = True
        self.register_buffer("suppressed_V", suppressed, persistent=False)
        self.register_buffer("_suppressed_ids", suppressed.nonzero().flatten(), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.hf.parameters()).dtype

    def checkpoint_activations(self) -> None:
        """Layers compute their activations again in the backward pass instead of keeping them."""
        # The name in newer versions of transformers, which warn of the other.
        enable = getattr(self.hf, "activation_checkpointing_enable", self.hf.gradient_checkpointing_enable)
        enable({"use_reentrant": False})

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, layout: Layout) -> torch.Tensor:
        """ids and positions [R, N] -> final hidden states [R, N, hidden]."""
        return _run_backbone(self.hf.model, ids, positions, layout, None)

    def hidden_at(
        self, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, index: torch.Tensor
    ) -> torch.Tensor:
        """The final hidden states [M, hidden] at flat indices ``index`` [M] into [R * N]; others are not computed."""
        return hidden_at(self.hf.model, ids, positions, layout, index)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [M, hidden] -> logits [M, V] in the model's dtype, undefined ids at -inf."""
        # In place: no vocabulary-sized copy more, and nothing saved for the backward pass is overwritten.
        return self.hf.lm_head(hidden).index_fill_(-1, self._suppressed_ids, -torch.inf)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        layout: Layout,
        index: torch.Tensor,
        targets: torch.Tensor,
        temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of ``targets`` [M] at flat indices ``index`` [M] into [R * N], and entropies; both [M]."""
        return self.score(self.hidden_at(ids, positions, layout, index), targets, temperature)

    def score(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, chunk: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [M] of ``targets`` [M] from hidden states [M, hidden].

        The LM head runs ``chunk`` targets at a time (None: as many as `_LOGITS_IN_CHUNK` allows) and again in the
        backward pass, so that a vocabulary of 152k never holds more than one chunk of logits.
        """
        chunk = chunk or max(16, _LOGITS_IN_CHUNK[self.device.type == "cuda"] // len(self.suppressed_V))
        return self.hf.lm_head(hidden, (targets, self._suppressed_ids, temperature, chunk))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A block-diffusion model with what is needed to use it."""

    model: BlockDiffusionLM
    """In evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    """The checkpoint's own."""
    stop_ids: tuple[int, ...]
    """Every end-of-text id that tokenizer, config and generation config name."""

    def save(self, folder: Path) -> None:
        """Write a folder that plain transformers opens, with ``mask_token_id`` in its config."""
        config = self.model.hf.config
        config.mask_token_id = self.model.mask_id
        self.model.hf.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def pick_device(*, gpus: float, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a process that was given ``gpus``; ``dtype`` as in `config.ModelConfig`."""
    device = torch.device("cuda" if gpus > 0 else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("a GPU was asked for, but this PyTorch sees none; install a CUDA build of torch 2.13.0")
    if dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, dtype)


def load_checkpoint(
    path: str | Path,
    *,
    mask_token_id: int | None = None,
    new_mask_token: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Load a local folder or hub name. Raises ValueError naming the path, what is wrong, and the remedy.

    ``new_mask_token``: make one of this name where the checkpoint has no mask token (`tstar_ray.mask_token`).
    """
    path = resolve(path)
    config_dict, config = read_config(path)
    tokenizer = read_tokenizer(path)
    known = len(tokenizer)
    if new_mask_token and mask_token_id is None and config_dict.get("mask_token_id") is None:
        add_mask_token(tokenizer, new_mask_token, also=MASK_TOKENS)
    mask_id = find_mask_id(path, mask_token_id, config_dict, tokenizer)
    try:
        hf, info = _model_class(config_dict).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation="block_diffusion",
            output_loading_info=True,
            use_safetensors=True,  # other formats are pickles, which run what they hold
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"model {path}: its weights cannot be read: {error}") from error
    problems = [f"missing {k}" for k in info["missing_keys"]] + [f"undefined {k}" for k in info["unexpected_keys"]]
    if problems:
        raise ValueError(f"model {path}: weights do not fit its config.json: {', '.join(sorted(problems)[:5])}")
    for name, parameter in hf.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"model {path}: {name} holds values that are not finite; the file is damaged")
    if mask_id >= known and len(tokenizer) > known:
        add_mask_embedding(hf, mask_id, known)
    model = BlockDiffusionLM(hf, mask_id=mask_id, token_limit=len(tokenizer)).to(device).eval()
    return Checkpoint(model=model, tokenizer=tokenizer, stop_ids=stop_ids(path, config_dict, tokenizer))


def _model_class(config: dict[str, Any]) -> Any:
    return getattr(transformers, f"{ARCHITECTURES[config['model_type']]}ForCausalLM")


def read_blueprint(path: str | Path, *, mask_token_id: int | None = None) -> Blueprint:
    """Raises ValueError as `load_checkpoint` does."""
    path = resolve(path)
    config_dict, config = read_config(path)
    tokenizer = read_tokenizer(path)
    with torch.device("meta"):
        module = _model_class(config_dict)(config)
    return Blueprint(
        path=path,
        model_type=config_dict["model_type"],
        mask_id=find_mask_id(path, mask_token_id, config_dict, tokenizer),
        token_limit=len(tokenizer),
        max_positions=config.max_position_embeddings,
        layout=tuple((name, tuple(p.shape)) for name, p in module.named_parameters()),
    )
