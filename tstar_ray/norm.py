"""RMS normalisation in PyTorch's own kernel.

transformers writes it out in eight operations, each of which a GPU launches by itself and reads and writes all hidden
states for; a Qwen3 layer has four norms. PyTorch's is one. In fp32 on CPU both give the same bits, forward and
backward; in bf16 PyTorch's rounds once, at the end, transformers' also before it multiplies with the weight.
"""

from __future__ import annotations

from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


def fuse_norms(model: nn.Module) -> None:
    """Replace the norms of a Qwen3 or Llama model in place: parameters are shared, and keep names and order."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, (LlamaRMSNorm, Qwen3RMSNorm)):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, device="meta")
                norm.weight = child.weight
                setattr(parent, name, norm)
