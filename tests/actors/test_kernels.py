"""The Triton kernels, computed by Triton's interpreter on the CPU and compiled for GPUs:

    TRITON_INTERPRET=1 ./tstar vllm test tests/actors/test_kernels.py

Triton reads that variable when it is imported, and does not come with PyTorch for CPU but with vLLM. The interpreter
cuts numbers off where they are made bf16, so that what a kernel rounds is shown in fp16. Their speed, and what a GPU's
products round, is left to benchmarks/gpu.sh.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from engines import NO_STOP, RULES, assert_equal
from pretend_cuda import CUDA, PretendCuda
from reference import Changing, plain_twin
from synthetic import make_llama, make_model, make_qwen, make_requests
from torch.nn import functional as F

from actors import kernels
from actors.decoder import Decoder
from actors.kv_cache import FixedTensors, FusedLayout, KVCache
from actors.torch_engine import TorchEngine
from tstar_ray.model import TrainLayout
from tstar_ray.trajectory import Request
from tstar_ray.weights import flatten

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter: TRITON_INTERPRET=1 ./tstar vllm test tests/actors/test_kernels.py",
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def rotary(x, cos, sin):
    """As transformers does it; x [N, heads, D]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def assert_rounds_alike(found, expected):
    """A sum in another order, or another exponential, rounds to a neighbour now and then, in fp32; from there to fp16
    next to never."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, atol=4 * eps, rtol=4 * eps)
    if found.dtype == torch.float16:
        assert (found == expected).float().mean() > 0.98


@DTYPES
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 24), (9, 3, 64)])
def test_norm_and_rotation_round_where_the_learners_modules_do(dtype, norms, heads, kv_heads, dim):
    torch.manual_seed(0)
    x = torch.randn(7, heads + 2 * kv_heads, dim).to(dtype)
    angle = torch.rand(7, dim // 2).repeat(1, 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    weights = [(torch.rand(dim) + 0.5).to(dtype) if norms else None for _ in range(2)]
    parts, eps = list(x.split([heads, kv_heads, kv_heads], dim=1)), 1e-2
    for part, weight in enumerate(weights):
        normed = F.rms_norm(parts[part], (dim,), weight, eps) if norms else parts[part]
        parts[part] = rotary(normed, cos, sin)
    expected = torch.cat(parts, dim=1)
    kernels.norm_rotate_(x, cos, sin, *weights, heads, kv_heads, eps)
    assert torch.equal(x[:, heads + kv_heads :], expected[:, heads + kv_heads :]), "values stay"
    assert_rounds_alike(x, expected)


@DTYPES
def test_keys_and_values_go_to_their_places(dtype):
    keys, values = torch.randn(5, 9, 20, 24).to(dtype), torch.randn(5, 9, 20, 24).to(dtype)
    slot, position = torch.tensor([0, 0, 1, 4, 4]), torch.tensor([0, 7, 3, 19, 2])
    qkv = torch.randn(5, 20, 24).to(dtype)
    key, value = qkv[:, 2:11], qkv[:, 11:]
    expected = keys.clone(), values.clone()
    for cache, new in zip(expected, (key, value), strict=True):
        cache[slot, :, position] = new
    kernels.store_(keys, values, key, value, slot, position)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


@DTYPES
@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize(
    ("rows", "queries", "heads", "kv_heads", "dim", "length"),
    [(3, 4, 4, 2, 16, 50), (2, 9, 6, 2, 24, 70), (1, 40, 2, 1, 64, 150), (2, 3, 3, 3, 8, 5)],
    ids=["a few", "odd width", "several tiles", "narrow"],
)
def test_attention_is_a_softmax_over_what_each_query_sees(dtype, placed, rows, queries, heads, kv_heads, dim, length):
    torch.manual_seed(1)
    keys, values = (torch.randn(rows + 1, kv_heads, length, dim).to(dtype) for _ in range(2))
    keys[:, :, -1], values[:, :, -1] = torch.nan, torch.nan  # what nobody has written yet
    tokens = rows * queries
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype)
    end = torch.randint(1, length, (rows, queries))
    token = torch.arange(tokens).view(rows, queries)
    if placed:
        token = torch.randperm(tokens).view(rows, queries)
        token[-1, queries // 2 :] = -1
    found = kernels.attend(qkv[:, :heads], keys, values, end, token if placed else None, 0.3)
    assert found.shape == (rows, queries, heads, dim)
    assert not found.isnan().any()
    for row in range(rows):
        for query in range(queries):
            if (index := int(token[row, query])) < 0:
                continue
            for head in range(heads):
                seen = slice(0, int(end[row, query]))
                key, value = (cache[row, head // (heads // kv_heads), seen].double() for cache in (keys, values))
                expected = torch.softmax(key @ qkv[index, head].double() * 0.3, dim=0) @ value
                atol = 1e-5 if dtype == torch.float32 else 2e-3
                torch.testing.assert_close(found[row, query, head].double(), expected, atol=atol, rtol=0)


@DTYPES
def test_the_gate_rounds_before_it_multiplies(dtype):
    torch.manual_seed(2)
    x = (4 * torch.randn(5, 2 * 1100)).to(dtype)
    gate, up = x.chunk(2, dim=-1)
    expected = F.silu(gate.float()).to(dtype) * up
    assert_rounds_alike(kernels.silu_mul(x), expected)


@pytest.mark.parametrize("make", [make_qwen, make_llama])
@pytest.mark.parametrize("even", [True, False])
@torch.inference_mode()
def test_hidden_states_are_those_of_transformers(make, even):
    """Of two rows, whose tokens stand in order or are padded in attention."""
    model, rows, length = make(), 2, 12
    torch.manual_seed(0)
    ids, position = torch.randint(0, 60, (rows, length)), torch.arange(length).expand(rows, -1)
    visible = position[:, None] // 4 <= position[..., None] // 4
    expected = model.hidden(ids, position, TrainLayout(visible, torch.float32)).flatten(0, 1)
    decoder = Decoder(model, fused=True)
    cache = KVCache(model.hf.config, dtype=torch.float32, device=model.device)
    cache.resize(3, 16, kept=0)
    slot, place = torch.arange(rows).repeat_interleave(length), torch.arange(rows * length)
    end = (position // 4 + 1) * 4
    tokens = place
    if not even:  # the second row has no last block; the first token fills up, as in actors.graphs
        tokens = torch.cat([place[:-4], place[:1].expand(4)])
        end = end.clone()
        end[1, -4:] = 1
    at = FixedTensors(slot[tokens], position.flatten()[tokens], None if even else tokens, end.contiguous())
    found = decoder.hidden(ids.flatten()[tokens], position.flatten()[tokens], FusedLayout(cache, at))
    torch.testing.assert_close(found, expected[tokens], atol=1e-5, rtol=1e-5)


def test_invariant_1_all_rules_decode_together_with_kernels_in_recorded_graphs(model, twin):
    prompts = make_requests([5, 14])
    asked = [
        ([Request(i, 0, r.prompt_ids, seed=i) for i, r in enumerate(prompts)], replace(rule, max_new_tokens=16))
        for rule in RULES
    ]
    with PretendCuda() as cuda:
        engine = TorchEngine(make_model(seed=2).to(CUDA), cuda_graphs=True, triton_kernels=True)
        streams = [engine.stream(requests, rule) for requests, rule in asked]
        found = [list(stream) for stream in streams]
    assert sum(graph.replays for graph in cuda.graphs) == engine.stats.graphed > 5
    recorded = {call[0].overloadpacket.__name__ for call in cuda.graphs[0].calls}
    assert {"norm_rotate_", "store_", "attend", "silu_mul"} <= recorded
    for (requests, rule), trajectories in zip(asked, found, strict=True):
        for trajectory in trajectories:
            assert_equal(trajectory, requests[trajectory.group_id], twin, model, rule)


def test_trap_31_weights_in_flight_reach_the_kernels():
    start, other = make_model(seed=2), make_model(seed=8)
    rule = replace(NO_STOP, max_new_tokens=24)
    requests = [replace(r, max_new_tokens=cap) for r, cap in zip(make_requests([5, 9]), (8, 24), strict=True)]
    engine = TorchEngine(make_model(seed=2), cuda_graphs=True, triton_kernels=True)
    stream = engine.stream(requests, rule)
    found, switch = [next(stream)], engine.stats.forwards
    assert engine.stats.graphed
    engine.load_weights(flatten(other), 1)
    found += stream
    assert found[-1].weight_versions[-1] == 1
    for trajectory in found:
        twin = Changing(plain_twin(start), plain_twin(other), switch=switch)
        assert_equal(trajectory, requests[trajectory.group_id], twin, start, rule)


def test_they_fit_into_gpus_without_spilling_registers():
    """Compiled for an A100 and an H200, as the engine launches them for SDAR-4B; nothing is run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled", "--capabilities", "80", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["results"]
    for capability in (80, 90):
        for dtype in ("bfloat16", "float32"):
            ours = [row for row in found if (row["capability"], row["dtype"]) == (capability, dtype)]
            assert {row["kernel"] for row in ours} == {"normed_rotated", "stored", "attended", "gated"}
            assert all(0 < row["registers"] < 255 and row["stack"] == 0 for row in ours), ours
    tiles = {row["queries"] for row in found if row["kernel"] == "attended" and row["dtype"] == "bfloat16"}
    assert tiles == {16, 32, 64}
