"""DeepSpeed as configured here: bf16 gradients added up in fp32, and shards put together."""

import pytest
import torch
from ranks import on_ranks

STAGES = [(1, "none"), (2, "none"), (3, "none"), (3, "all")]


def test_bf16_gradients_of_many_micro_batches_are_added_up_in_fp32_and_looked_at():
    """300 times a gradient of ones: in bf16 the sum would end at 256, where adding 1 changes nothing."""
    for case, (norms, message, moved) in zip(STAGES, on_ranks(2, _many_micro_batches), strict=True):
        assert norms == pytest.approx([1200, 1200]), case
        assert "gradient is not finite" in message, case
        assert moved == 0.0, case


def _many_micro_batches():
    from learner.backend import Backend, UpdateError
    from tstar_ray.config import LearnerConfig

    found, ones = [], torch.ones(1, 4, dtype=torch.bfloat16)
    for stage, offload in STAGES:
        module = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
        backend = Backend(module, [[module.weight]], LearnerConfig(zero_stage=stage, offload=offload, grad_clip=1e9))
        norms = []
        for _ in range(2):
            for i in range(300):
                backend.backward(backend(ones).sum() / 2, last=i == 299)  # two ranks
            norms.append(backend.step([1e-2]))
        with backend.full_parameters():
            before = module.weight.detach().clone()
        backend.backward(backend(ones).sum() * float("inf"), last=True)
        with pytest.raises(UpdateError) as caught:
            backend.step([1e-2])
        with backend.full_parameters():
            found.append((norms, str(caught.value), float((module.weight - before).abs().max())))
    return found


def test_weights_are_published_from_a_few_shards_at_a_time():
    same, shards, together = on_ranks(2, _published_in_parts)
    assert same
    assert shards == [0, 0], "shards before, and left so"
    assert together == [320_000, 320_000, 320_000, 490_000, 160_000], "as many as 400,000 have room for, or one"


def _published_in_parts():
    from learner import backend
    from tstar_ray.config import LearnerConfig
    from tstar_ray.weights import flatten

    backend._GATHERED_AT_ONCE = 400_000
    torch.manual_seed(0)
    # DeepSpeed leaves small ones whole.
    shapes = [(400, 400), (3,), (400, 400), (700, 700), (400, 400)]
    module = torch.nn.ParameterList(torch.randn(shape) for shape in shapes)
    large = [p for p in module if p.dim() == 2]
    expected = flatten(module)
    policy = backend.Backend(module, [list(module)], LearnerConfig(zero_stage=3))
    before = sum(p.numel() for p in large)
    together = [sum(p.numel() for p in large) for _ in policy.whole(module.parameters())]
    flat = flatten(module, whole=policy.whole(module.parameters()))
    return torch.equal(flat, expected), [before, sum(p.numel() for p in large)], together
