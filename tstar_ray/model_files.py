"""What a model's folder or hub name says besides its weights: config, tokenizer, mask token, stop ids.

This is all that a driver needs, and all that is imported for it: transformers' modeling code takes seconds, which
processes that hold a model spend (`tstar_ray.model`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from tstar_ray.embedded import EMBEDDED
from tstar_ray.mask_token import add_mask_token

ARCHITECTURES = {"qwen3": "Qwen3", "sdar": "Qwen3", "llama": "Llama"}
"""Names that transformers' classes begin with, by model_type."""
MASK_TOKENS = ("<|MASK|>", "<|mask|>", "<|mdm_mask|>")
"""Names under which published models have theirs."""
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
"""The tiny model shipped with the package, which the name "embedded" opens."""
_REMOTE_CODE_KEYS = ("auto_map", "architectures", "attn_implementation", "_attn_implementation", "model_type")


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A checkpoint without its weights: what an engine must know that loads them by itself."""

    path: str
    """Folder or hub name."""
    model_type: str
    """As its config says."""
    mask_id: int
    """Mask token."""
    token_limit: int
    """Ids from here on do not exist in the tokenizer and are never predicted."""
    max_positions: int
    """Longest sequence the model was made for."""
    layout: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of each parameter, in the order of the flat buffer (`tstar_ray.weights`)."""


def inspect_checkpoint(
    path: str | Path, *, mask_token_id: int | None = None, new_mask_token: str | None = None
) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """Tokenizer and stop ids without the weights: what a driver needs, and an early look at what may be wrong."""
    path = resolve(path)
    config_dict, _ = read_config(path)
    tokenizer = read_tokenizer(path)
    if new_mask_token and mask_token_id is None and config_dict.get("mask_token_id") is None:
        add_mask_token(tokenizer, new_mask_token, also=MASK_TOKENS)
    find_mask_id(path, mask_token_id, config_dict, tokenizer)
    return tokenizer, stop_ids(path, config_dict, tokenizer)


def resolve(path: str | Path) -> str:
    """Folder or hub name."""
    return str(EMBEDDED_FOLDER if path == EMBEDDED else path)


def read_config(path: str) -> tuple[dict[str, Any], Any]:
    """What config.json holds, and transformers' config of it. Raises ValueError for what is not served."""
    if "/" not in path and not os.path.exists(path):
        # Asking the hub would take half a minute where there is no network.
        raise ValueError(f"model.path={path}: no such folder, and no hub name (OWNER/NAME); or use {EMBEDDED}")
    try:
        config_dict, _ = transformers.PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        if os.path.isabs(path) or os.path.exists(path):
            raise ValueError(f"model.path={path}: no readable config.json there: {_brief(error)}") from error
        raise ValueError(
            f"model.path={path}: no such folder, and not readable as a hub model: {_brief(error)}"
        ) from error
    model_type = config_dict.get("model_type")
    if model_type is None:
        raise ValueError(f"model.path={path}: no readable config.json there, or one that names no model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"model {path}: model_type {model_type!r} is not served; known are {', '.join(ARCHITECTURES)}")
    if config_dict.get("use_sliding_window"):
        raise ValueError(f"model {path}: sliding-window attention cannot be combined with a block mask")
    config_class = getattr(transformers, f"{ARCHITECTURES[model_type]}Config")
    config = config_class(**{k: v for k, v in config_dict.items() if k not in _REMOTE_CODE_KEYS})
    rope = config.rope_parameters["rope_type"]
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"model {path}: rope_type {rope!r} rotates by the longest sequence in a batch, so that a token's "
            "probability would depend on what it is decoded with; served are rope_type default, linear, yarn and llama3"
        )
    return config_dict, config


def read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Raises ValueError."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {path}: its tokenizer cannot be read: {error}") from error


def find_mask_id(path: str, given: int | None, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """The one given, else that of config or tokenizer, else one of `MASK_TOKENS`. Raises ValueError."""
    if given is not None:
        size = config.get("vocab_size")
        if size is not None and given >= size:
            raise ValueError(f"model.mask_token_id={given}: the vocabulary of {path} ends at {size - 1}")
        return given
    if config.get("mask_token_id") is not None:
        return int(config["mask_token_id"])
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    vocabulary = tokenizer.get_vocab()
    for token in MASK_TOKENS:
        if token in vocabulary:
            return vocabulary[token]
    raise ValueError(
        f"model {path}: no mask token in its config or tokenizer; set model.mask_token_id, or adapt an "
        "autoregressive checkpoint to block diffusion first"
    )


def stop_ids(path: str, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every end-of-text id that tokenizer, config and generation config name. Raises ValueError without any."""
    try:
        generation = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        generation = None
    found: set[int] = set()
    for ids in (generation, config.get("eos_token_id"), tokenizer.eos_token_id):
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    if not found:
        raise ValueError(f"model {path}: no end-of-text token in tokenizer, config or generation config")
    return tuple(sorted(found))


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
