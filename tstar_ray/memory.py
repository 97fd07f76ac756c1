"""What a model needs of memory, from its configuration alone. Pure arithmetic; no torch, no weights.

    config.json or known sizes ──► ModelShape ──► parameters (exact), keys and values, activations
                                      └──► learner_parts, rollout_parts: GiB a rank or an actor needs, item by item

Parameters, optimizer states and caches are exact. Activations count what a transformers decoder keeps for its backward
pass (checked against PyTorch's own count in the tests); allocator fragmentation and libraries are an allowance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tstar_ray.config_learner import LearnerConfig

GIB = 2**30
ALLOWANCE_GIB = 3.0
"""CUDA context, NCCL, compiled kernels and fragmentation."""
PUBLISHED = "published weights"
"""Item of the host's memory that only rank 0 of the learner holds."""
_LEARNER_LOGITS = {"cuda": 2**25, "cpu": 2**21}
_ENGINE_LOGITS = {"cuda": 2**27, "cpu": 2**21}
_LOGIT_COPIES = 4


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a Qwen3, SDAR or Llama decoder."""

    hidden: int
    """Width."""
    layers: int
    """Decoder layers."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Width of a head."""
    intermediate: int
    """Width of the MLP."""
    vocabulary: int
    """Rows of the embedding."""
    tied: bool
    """Embedding and LM head are one matrix."""
    head_norms: bool = True
    """Queries and keys are normalised per head (Qwen3)."""
    attention_bias: bool = False
    """Projections of the attention have biases."""
    mlp_bias: bool = False
    """Those of the MLP have (Llama)."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From the contents of a config.json; raises ValueError naming what is missing."""
        try:
            heads = int(config["num_attention_heads"])
            model_type = config["model_type"]
            return cls(
                hidden=int(config["hidden_size"]),
                layers=int(config["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
                intermediate=int(config["intermediate_size"]),
                vocabulary=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", False)),
                head_norms=model_type in ("qwen3", "sdar"),
                attention_bias=bool(config.get("attention_bias", False)),
                mlp_bias=bool(config.get("mlp_bias", False)),
            )
        except KeyError as error:
            raise ValueError(f"config.json has no {error}") from error

    @property
    def head_parameters(self) -> int:
        """Of the LM head."""
        return self.vocabulary * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer."""
        query, pair = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden * query + 2 * self.hidden * pair
        attention += (query + 2 * pair + self.hidden) * self.attention_bias + 2 * self.head_dim * self.head_norms
        mlp = 3 * self.hidden * self.intermediate + (2 * self.intermediate + self.hidden) * self.mlp_bias
        return attention + mlp + 2 * self.hidden

    @property
    def backbone_parameters(self) -> int:
        """Of everything but an untied LM head."""
        return self.vocabulary * self.hidden + self.layers * self.layer_parameters + self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model; tied weights once."""
        return self.backbone_parameters + (0 if self.tied else self.head_parameters)

    def cache_bytes(self, itemsize: int) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize

    def layer_activation_bytes(self, itemsize: int) -> int:
        """What one layer keeps of one token for its backward pass.

        Norms keep their input in fp32 and what they scale; linear maps their input; attention query, key, value and
        output; the MLP gate, its activation, up and their product.
        """
        query, pair = self.heads * self.head_dim, self.kv_heads * self.head_dim
        norms = 2 * (self.hidden * (4 + itemsize) + self.hidden * itemsize)
        heads = (query + pair) * (4 + itemsize) if self.head_norms else 0
        rotary = (query + pair) * itemsize
        attention = (2 * query + 2 * pair) * itemsize
        return norms + heads + rotary + attention + 4 * self.intermediate * itemsize


KNOWN_MODELS: dict[str, ModelShape] = {
    "0.6b": ModelShape(1024, 28, 16, 8, 128, 3072, 151936, tied=True),
    "1.7b": ModelShape(2048, 28, 16, 8, 128, 6144, 151936, tied=False),
    "4b": ModelShape(2560, 36, 32, 8, 128, 9728, 151936, tied=False),
    "8b": ModelShape(4096, 36, 32, 8, 128, 12288, 151936, tied=False),
}
"""SDAR and TraDo of these sizes, as SDAR ships them (LM head apart), and the smallest Qwen3."""
_TIED_QWEN3 = {"1.7b", "4b"}


def known_shape(path: str) -> ModelShape | None:
    """Sizes of a hub name such as JetLM/SDAR-4B-Chat-b32 without a look at the hub; None: not known."""
    name = path.rsplit("/", 1)[-1].lower()
    if not name.startswith(("sdar-", "trado-", "qwen3-")):
        return None
    size = next((size for size in KNOWN_MODELS if f"-{size}-" in f"{name}-"), None)
    if size is None:
        return None
    tied = name.startswith("qwen3-") and size in _TIED_QWEN3
    return replace(KNOWN_MODELS[size], tied=True) if tied else KNOWN_MODELS[size]


@dataclass(frozen=True, slots=True)
class Part:
    """One item of what a process needs."""

    name: str
    """What it is."""
    gib: float
    """How much, on the device that computes."""
    host_gib: float = 0.0
    """How much in the machine's memory beside it."""
    how: str = ""
    """The arithmetic, for people."""


def learner_parts(
    shape: ModelShape,
    learner: LearnerConfig,
    *,
    gpu: bool,
    itemsize: int,
) -> list[Part]:
    """One rank of the learner under DeepSpeed."""
    count, ranks, stage = shape.parameters, learner.ranks, learner.zero_stage
    offload, everything = learner.offload != "none", learner.offload == "all"
    parts: list[Part] = []

    def states(name: str, count: int) -> None:
        weights = count * itemsize / (ranks if stage == 3 else 1)
        shard = f"/ {ranks} ranks" if stage == 3 and ranks > 1 else ""
        parts.append(_part(f"{name}weights", weights, f"{count:,} x {itemsize} B {shard}", host=everything))
        width = 4 if learner.fp32_gradients else itemsize
        gradient = count * width / (ranks if stage >= 2 else 1)
        shard = f"/ {ranks} ranks" if stage >= 2 and ranks > 1 else ""
        parts.append(_part(f"{name}gradients", gradient, f"{count:,} x {width} B {shard}"))
        split = ranks if stage else 1
        # Offloaded: the weights in the model's dtype once more, and under ZeRO-2 the gradients' sum.
        each = 16 + (itemsize * (1 + (stage == 2)) if offload else 0)
        parts.append(
            _part(
                f"{name}optimizer",
                count * each / split,
                f"{count:,} x {each} B (fp32 weights and gradients, two Adam moments{', copies' if offload else ''})"
                + (f" / {split} ranks" if split > 1 else ""),
                host=offload,
            )
        )

    states("", count)
    if stage == 3:
        largest = max(shape.head_parameters, shape.layer_parameters)
        parts.append(_part("gathered by ZeRO-3", 2 * largest * itemsize, f"two of {largest:,} x {itemsize} B"))
    if learner.loss.kl_coef and learner.loss.kl_reference != "old":
        parts.append(_part("KL reference", count * itemsize, f"{count:,} x {itemsize} B, whole on every rank"))
    if learner.value.kind == "separate":
        states("value model: ", shape.backbone_parameters + shape.hidden)
    tokens, one = learner.micro_batch_tokens, shape.layer_activation_bytes(itemsize)
    if learner.gradient_checkpointing:
        kept = shape.layers * shape.hidden * itemsize
        how = (
            f"{tokens:,} tokens x ({shape.layers} layer inputs {kept / 1024:.0f} KiB + one layer {one / 1024:.0f} KiB)"
        )
        parts.append(_part("activations", tokens * (kept + one), how))
    else:
        how = f"{tokens:,} tokens x {shape.layers} layers x {one / 1024:.0f} KiB"
        parts.append(_part("activations", tokens * shape.layers * one, how))
    logits = _LEARNER_LOGITS["cuda" if gpu else "cpu"]
    parts.append(
        _part(
            "vocabulary chunk",
            logits * 4 * _LOGIT_COPIES + shape.head_parameters * 4,
            f"{logits:,} logits x 4 B x {_LOGIT_COPIES} copies + the head's gradient in fp32",
        )
    )
    parts.append(Part(PUBLISHED, 0.0, 3 * count * itemsize / GIB, "flat buffer of rank 0, two versions stored"))
    parts.append(Part("allowance", ALLOWANCE_GIB if gpu else 0.5, 0.0, "context, libraries, fragmentation"))
    return parts


def rollout_parts(shape: ModelShape, *, cache_gb: float, gpu: bool, itemsize: int) -> list[Part]:
    """One rollout actor with the built-in engine."""
    logits = _ENGINE_LOGITS["cuda" if gpu else "cpu"]
    return [
        _part("weights", shape.parameters * itemsize, f"{shape.parameters:,} x {itemsize} B"),
        Part("keys and values", cache_gb, 0.0, "actors.cache_gb"),
        _part("vocabulary chunk", logits * 4 * _LOGIT_COPIES, f"{logits:,} logits x 4 B x {_LOGIT_COPIES} copies"),
        Part("new weights", 0.0, shape.parameters * itemsize / GIB, "mapped from the object store"),
        Part("allowance", ALLOWANCE_GIB if gpu else 0.5, 0.0, "context, libraries, fragmentation"),
    ]


def sequences_that_fit(shape: ModelShape, *, cache_gb: float, itemsize: int, tokens: int) -> int:
    """Sequences of so many tokens whose keys and values fit into a cache."""
    return int(cache_gb * GIB // (shape.cache_bytes(itemsize) * tokens))


def checkpoint_gib(shape: ModelShape, *, itemsize: int, value_model: bool) -> float:
    """One run checkpoint: weights and fp32 optimizer states, of the value model too."""
    count = shape.parameters + (shape.backbone_parameters if value_model else 0)
    return count * (itemsize + 12) / GIB


def fullest_device(
    learner_gib: float, rollout_gib: float, *, ranks: int, rank_gpus: float, actors: int, actor_gpus: float
) -> tuple[float, int, int]:
    """Most memory that one GPU may have to hold as Ray packs it: (GiB, ranks on it, actors on it)."""
    best = (0.0, 0, 0)
    for r in range(ranks + 1):
        for a in range(actors + 1):
            share = r * rank_gpus + a * actor_gpus
            need = (r and rank_gpus) and r * learner_gib / max(1.0, rank_gpus)
            need += (a and actor_gpus) and a * rollout_gib / max(1.0, actor_gpus)
            whole = max(rank_gpus if r else 0.0, actor_gpus if a else 0.0) > 1 and r + a == 1
            if (share <= 1 + 1e-9 or whole) and need > best[0]:
                best = (float(need), r, a)
    return best


def _part(name: str, size: float, how: str, *, host: bool = False) -> Part:
    return Part(
        name, 0.0 if host else size / GIB, size / GIB if host else 0.0, how + (", in host memory" if host else "")
    )
