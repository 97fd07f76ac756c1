"""The adaptation's ranks in real processes over gloo: rank count, ZeRO, micro-batches, resume, held-out loss."""

import dataclasses

import numpy as np
import pytest
from ranks import on_ranks
from synthetic import make_model

from tstar_ray.config_adapt import NoiseConfig, TrainConfig


def make_adapter(**settings):
    from learner.adapter import Adapter
    from tstar_ray.model import Checkpoint

    config = TrainConfig(**{"lr": 1e-3, "micro_batch_tokens": 256} | settings).learner()
    return Adapter(Checkpoint(make_model(), None, (1,)), config, NoiseConfig(), fill_id=1, seed=5)


def make_examples(step, count=6):
    from learner.adaptation import Example

    rng = np.random.default_rng(step)
    lengths = [(int(rng.integers(0, 9)), int(rng.integers(1, 30))) for _ in range(count)]
    return [Example(rng.integers(0, 60, p + a).astype(np.int32), p) for p, a in lengths]


def train(adapter, steps, *, count=6):
    from learner.adaptation import StepPlan

    plans = [StepPlan((4, 8)[step % 2], 1e-3) for step in steps]
    return [adapter.update(make_examples(s, count), plan, update=s) for s, plan in zip(steps, plans)]


def several_steps(count=6, **settings):
    adapter = make_adapter(**settings)
    start = adapter.flat_weights().numpy()
    reports = [dataclasses.asdict(r) for r in train(adapter, range(4), count=count)]
    held_out = adapter.losses(make_examples(99, 9), (1, 4, 16))
    return start, adapter.flat_weights().numpy(), reports, held_out


@pytest.fixture(scope="module")
def alone():
    return on_ranks(1, several_steps)


def assert_same(found, expected):
    moved = np.linalg.norm(expected[1] - expected[0])
    assert moved > 1e-2
    assert np.linalg.norm(found[1] - expected[1]) < 1e-3 * moved
    for got, want in zip(found[2], expected[2], strict=True):
        for name in ("loss", "cross_entropy", "grad_norm"):
            assert got[name] == pytest.approx(want[name], rel=1e-5), name
        assert (got["masked"], got["answer_tokens"]) == (want["masked"], want["answer_tokens"])
    assert found[3] == pytest.approx(expected[3], rel=1e-3)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_invariant_3_rank_count_does_not_change_an_adaptation(alone, zero_stage):
    assert_same(on_ranks(2, several_steps, zero_stage=zero_stage), alone)


def test_invariant_3_micro_batches_and_packed_rows_do_not_change_an_adaptation(alone):
    assert_same(on_ranks(1, several_steps, micro_batch_tokens=64, row_tokens=64), alone)


def test_a_rank_without_samples_does_not_deadlock():
    one, two = (on_ranks(world, several_steps, count=1) for world in (1, 2))
    assert_same(two, one)


def test_the_loss_falls_and_the_held_out_loss_repeats():
    first, last, again = on_ranks(1, _memorise)
    assert last < 0.5 * first
    assert again == last


def _memorise():
    from learner.adaptation import StepPlan

    adapter, examples = make_adapter(), make_examples(1)
    first = adapter.losses(examples, (4,))[4]
    for step in range(120):
        adapter.update(examples, StepPlan(4, 3e-3), update=step)
    return first, *(adapter.losses(examples, (4,))[4] for _ in range(2))


def test_resume_is_bit_exact(tmp_path):
    straight, resumed = on_ranks(2, _resume, folder=str(tmp_path))
    np.testing.assert_array_equal(straight, resumed)


def _resume(folder):
    adapter = make_adapter()
    train(adapter, range(2))
    adapter.save(folder)
    train(adapter, range(2, 4))
    straight = adapter.flat_weights().numpy()
    adapter.load(folder)
    train(adapter, range(2, 4))
    return straight, adapter.flat_weights().numpy()


def test_a_step_that_is_not_finite_is_not_taken():
    before, after, message = on_ranks(1, _diverge)
    np.testing.assert_array_equal(before, after)
    assert "no step was taken" in message


def _diverge():
    import torch

    from learner.backend import UpdateError

    adapter = make_adapter()
    with torch.no_grad():
        next(iter(adapter._checkpoint.model.parameters())).fill_(float("nan"))
    before = adapter.flat_weights().nan_to_num().numpy()
    try:
        train(adapter, [0])
    except UpdateError as error:
        return before, adapter.flat_weights().nan_to_num().numpy(), str(error)
    raise AssertionError("an infinite loss went unnoticed")
