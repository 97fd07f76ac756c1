"""PyTorch's RMS norm in place of transformers': the same bits in fp32, one rounding less in bf16."""

import copy

import pytest
import torch
from synthetic import make_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tstar_ray.norm import fuse_norms

TINY = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "kind", "norms"), [(Qwen3Config, Qwen3ForCausalLM, 9), (LlamaConfig, LlamaForCausalLM, 5)]
)
def test_a_model_with_fused_norms_gives_the_same_bits_forward_and_backward(config, kind, norms):
    torch.manual_seed(3)
    given = kind(config(**TINY)).train()
    with torch.no_grad():
        for name, parameter in given.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    fused = copy.deepcopy(given)
    fuse_norms(fused)
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in given.named_parameters()]
    assert sum(isinstance(module, nn.RMSNorm) for module in fused.modules()) == norms
    ids = torch.randint(0, 40, (2, 17))
    logits = [model(ids).logits for model in (given, fused)]
    assert torch.equal(*logits)
    for result in logits:
        result.square().mean().backward()
    for (name, a), (_, b) in zip(given.named_parameters(), fused.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_the_norms_of_a_block_diffusion_model_are_fused_and_in_bf16_nearer_to_fp32():
    norm = next(m for m in make_model(seed=2).modules() if isinstance(m, nn.RMSNorm))
    size = norm.weight.shape[0]
    hidden, weight = torch.randn(400, size).bfloat16(), (torch.rand(size) + 0.5).bfloat16()
    exact = nn.functional.rms_norm(hidden.double(), (size,), weight.double(), norm.eps)
    once = nn.functional.rms_norm(hidden, (size,), weight, norm.eps)
    wide = hidden.float()
    twice = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).bfloat16()
    assert (once - exact).abs().mean() < (twice - exact).abs().mean()
