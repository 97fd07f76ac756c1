"""Qwen3 as vLLM builds it (paged attention, tensor parallel layers), without logits where nothing is masked.

    runner ──hidden states of all canvases──► compute_logits (hands them on) ──► sampler ──masked rows──► logits

On CPU vLLM packs the weights of linear layers and throws the originals away. Here they are kept, so that new ones can
be copied into place and what is served can be read back (invariant 8).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.platforms import current_platform


class _KeptLinear(UnquantizedLinearMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_linear = F.linear


class _KeptEmbedding(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_linear = F.linear


class BlockDiffusionForCausalLM(Qwen3ForCausalLM):
    """The model class that `actors.vllm_plugin.register` names."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = self.config
        suppressed = [config.mask_token_id, *range(config.token_limit, config.vocab_size)]
        self.register_buffer("suppressed_ids", torch.tensor(sorted(set(suppressed))), persistent=False)
        if current_platform.is_cpu():
            layers: Any = self.modules()
            for layer in layers:
                method = getattr(layer, "quant_method", None)
                if type(method) is UnquantizedLinearMethod:
                    layer.quant_method = _KeptLinear()
                elif type(method) is UnquantizedEmbeddingMethod:
                    layer.quant_method = _KeptEmbedding()

    @staticmethod
    def get_model_state_cls() -> Any:
        """How vLLM finds what else this model needs."""
        from actors.vllm_plugin.state import BlockDiffusionState

        return BlockDiffusionState

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing yet: only the sampler knows which rows are masked."""
        return hidden_states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [M, hidden] -> logits [M, V] in the model's dtype, undefined ids at -inf."""
        logits = self.logits_processor(self.lm_head, hidden)
        return logits.index_fill_(-1, self.suppressed_ids, -torch.inf)
