"""Packed slices against one dense row per slice, and every way of packing against every other."""

import numpy as np
import pytest
import torch
from synthetic import MASK_ID, make_model, make_trajectory

from learner.layout import FlexLayout, SplitLayout, make_layout
from learner.objective import token_terms
from learner.packing import balance, cut, pack, slice_sample, token_weights
from tstar_ray.blocks import build_slices, ceil_to_block, train_visibility
from tstar_ray.model import TrainLayout

NORMALISERS = ["token_mean", "const_len", "per_step_mean", "seq_mean", "paper_sum"]


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def model(request):
    return make_model(seed=1).to(request.param)


def assert_same(model, loss, gradient, expected_loss, expected_gradient):
    """Loss and gradient agree to 1e-6 of their size (transformers' RMSNorm rounds to fp32 even in fp64)."""
    tolerance = 1e-6 if model.dtype == torch.float32 else 1e-7
    assert loss == pytest.approx(expected_loss, rel=tolerance, abs=tolerance)
    assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()


def trajectories(block_size, count=6, seed=0):
    rng = np.random.default_rng(seed)
    return [
        make_trajectory(rng, prompt_len=int(rng.integers(1, 2 * block_size + 6)), blocks=3, block_size=block_size)
        for _ in range(count)
    ]


def sliced(trajs, *, train_block, shrink=1, seed=3):
    rng = np.random.default_rng(seed)
    return [slice_sample(t, float(rng.normal()), block_size=train_block, mask_id=63, shrink=shrink) for t in trajs]


def batch_loss(model, batches, old=None):
    """Sum of weight x term over micro-batches, the way the trainer computes it."""
    total = torch.zeros((), dtype=model.dtype)
    for batch in batches:
        visible = train_visibility(batch.document, batch.block, batch.slice_id)
        layout = TrainLayout(visible, model.dtype)
        new, _ = model(batch.ids, batch.positions, layout, batch.index, batch.targets)
        terms = token_terms(new, batch.recorded, batch.advantage, clip_low=0.2, clip_high=0.2, kl_coef=0.05)
        total = total + (batch.weight * terms.loss).sum()
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def dense_loss(model, trajs, samples, *, train_block, shrink, weights):
    """The published scheme: each slice as a dense row of its own, [clean prefix | noisy block]."""
    total = torch.zeros((), dtype=model.dtype)
    for trajectory, sample, weight in zip(trajs, samples, weights):
        slices = build_slices(
            token_ids=trajectory.token_ids,
            step_map=trajectory.step_map,
            prompt_len=trajectory.prompt_len,
            completion_len=trajectory.completion_len,
            block_size=train_block,
            mask_id=63,
            shrink=shrink,
        )
        done = 0
        for block, noisy, target in zip(slices.block, slices.noisy, slices.target):
            start = int(block) * train_block
            ids = torch.tensor(np.concatenate([trajectory.token_ids[:start], noisy]))[None]
            position = torch.arange(start + train_block)
            visible = position[None, :] // train_block <= position[:, None] // train_block
            layout = TrainLayout(visible[None], model.dtype)
            where = torch.tensor(start + np.flatnonzero(target))
            ids_there = torch.tensor(trajectory.token_ids[where.numpy()].astype(np.int64))
            new, _ = model(ids, position[None], layout, where, ids_there)
            span = slice(done, done + len(where))
            done += len(where)
            terms = token_terms(
                new,
                torch.tensor(sample.recorded[span]),
                torch.tensor(sample.advantage[span]),
                clip_low=0.2,
                clip_high=0.2,
                kl_coef=0.05,
            )
            total = total + (torch.tensor(weight[span]) * terms.loss).sum()
        assert done == len(sample.target_id)
    return total


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize(("rollout_block", "train_block", "shrink"), [(4, 4, 1), (4, 8, 1), (8, 8, 3), (1, 1, 1)])
@pytest.mark.parametrize("micro_batch_tokens", [20, 512])
def test_trap_10_packed_equals_one_dense_row_per_slice(
    model, normaliser, rollout_block, train_block, shrink, micro_batch_tokens
):
    trajs = trajectories(rollout_block)
    samples = sliced(trajs, train_block=train_block, shrink=shrink)
    weights = token_weights(samples, normaliser, length_norm=32)
    batches = pack(samples, weights, row_tokens=256, micro_batch_tokens=micro_batch_tokens)
    cut_up = max(b.ids.shape[1] for b in batches) < max(len(s.ids) for s in samples)
    assert cut_up == (micro_batch_tokens == 20 and train_block > 1), "at B=1 no sample has more noisy than clean tokens"
    packed = batch_loss(model, batches)
    packed_grad = gradients(model, packed)
    dense = dense_loss(model, trajs, samples, train_block=train_block, shrink=shrink, weights=weights)
    dense_grad = gradients(model, dense)
    assert_same(model, packed.item(), packed_grad, dense.item(), dense_grad)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_trap_35_invariant_3_packing_and_micro_batches_do_not_change_loss_or_gradient(model, normaliser):
    samples = sliced(trajectories(4, count=9), train_block=4)
    weights = token_weights(samples, normaliser, length_norm=32)
    layouts = [(64, 64), (200, 200), (200, 800), (10_000, 10_000)]
    results, counts = [], []
    for row_tokens, micro_batch_tokens in layouts:
        batches = pack(samples, weights, row_tokens=row_tokens, micro_batch_tokens=micro_batch_tokens)
        loss = batch_loss(model, batches)
        results.append((loss.item(), gradients(model, loss)))
        counts.append(len(batches))
    assert len(set(counts)) > 1, "the layouts must differ for this test to mean anything"
    for loss, grad in results[1:]:
        assert_same(model, loss, grad, *results[0])


def test_invariant_3_order_of_samples_does_not_matter(model):
    samples = sliced(trajectories(4), train_block=4)
    forward = batch_loss(
        model, pack(samples, token_weights(samples, "seq_mean", length_norm=1), row_tokens=300, micro_batch_tokens=600)
    )
    turned = samples[::-1]
    backward = batch_loss(
        model, pack(turned, token_weights(turned, "seq_mean", length_norm=1), row_tokens=300, micro_batch_tokens=600)
    )
    assert forward.item() == pytest.approx(backward.item(), rel=1e-6)


@pytest.mark.parametrize("train_block", [4, 8, 16])
@pytest.mark.parametrize("shrink", [1, 2, 5])
def test_traps_7_and_11_invariant_2_packed_targets_are_exactly_the_completion(train_block, shrink):
    for trajectory in trajectories(4, count=20, seed=7):
        sample = slice_sample(trajectory, 1.0, block_size=train_block, mask_id=63, shrink=shrink)
        assert sorted(sample.target_offset) == list(range(trajectory.completion_len))
        np.testing.assert_array_equal(
            sample.target_id, trajectory.completion_ids[sample.target_offset], "targets carry the revealed tokens"
        )
        assert (sample.ids[sample.target_index] == 63).all(), "a target is masked where it is predicted"
        np.testing.assert_array_equal(
            sample.position[sample.target_index], trajectory.prompt_len + sample.target_offset
        )


def test_invariant_4_token_ids_reach_the_learner_unchanged():
    """Ids that no tokenizer would produce in this order survive: nothing is decoded on the way."""
    trajectory = trajectories(4, count=1, seed=11)[0]
    sample = slice_sample(trajectory, 1.0, block_size=4, mask_id=63, shrink=1)
    clean = sample.slice_id < 0
    np.testing.assert_array_equal(sample.ids[clean], trajectory.token_ids[: clean.sum()])


def test_rows_hold_no_more_than_asked_and_nothing_is_lost():
    samples = sliced(trajectories(4, count=30), train_block=4)
    weights = token_weights(samples, "token_mean", length_norm=1)
    longest = max(len(s.ids) for s in samples)
    batches = pack(samples, weights, row_tokens=longest + 10, micro_batch_tokens=4 * longest)
    assert all(b.ids.shape[1] <= longest + 10 for b in batches)
    assert all(b.ids.numel() <= 4 * longest for b in batches)
    assert sum(b.tokens for b in batches) == sum(len(s.ids) for s in samples)
    seen = torch.cat([b.sample for b in batches]).bincount()
    np.testing.assert_array_equal(seen, [len(s.target_id) for s in samples])
    assert sum(float(b.weight.sum()) for b in batches) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("limit", [8, 60, 150, 10_000])
def test_long_samples_are_cut_within_the_limit_and_every_target_is_kept(limit):
    (sample,) = sliced(
        [make_trajectory(np.random.default_rng(5), prompt_len=7, blocks=12, block_size=8)], train_block=8
    )
    (weight,) = token_weights([sample], "per_step_mean", length_norm=1)
    pieces = cut(sample, weight, limit)
    assert (len(pieces) == 1) == (len(sample.ids) <= limit)
    for piece, _ in pieces:
        clean, noisy = int((piece.slice_id < 0).sum()), int((piece.slice_id >= 0).sum())
        assert clean == piece.block[-1] * 8
        assert len(piece.ids) <= limit or noisy <= max(8, clean)
        assert piece.slice_id[clean] == 0
        np.testing.assert_array_equal(piece.position[:clean], np.arange(clean))
        # A target stands in the slice it belongs to, at its own position.
        np.testing.assert_array_equal(piece.position[piece.target_index], 7 + piece.target_offset)
        assert (piece.ids[piece.target_index] == MASK_ID).all()
    for name in ("target_id", "target_slice", "target_offset", "recorded", "advantage"):
        whole = np.concatenate([getattr(piece, name) for piece, _ in pieces])
        np.testing.assert_array_equal(whole, getattr(sample, name))
    np.testing.assert_array_equal(np.concatenate([w for _, w in pieces]), weight)
    noisy = np.concatenate([piece.ids[piece.slice_id >= 0] for piece, _ in pieces])
    np.testing.assert_array_equal(noisy, sample.ids[sample.slice_id >= 0])


def test_trap_43_micro_batches_mix_responses():
    samples = sliced(trajectories(4, count=30), train_block=4)
    batches = pack(
        samples, token_weights(samples, "token_mean", length_norm=1), row_tokens=400, micro_batch_tokens=1600
    )
    assert all(len(b.sample.unique()) > 1 for b in batches)


def test_balance_gives_every_index_once_and_evens_the_load():
    costs = list(np.random.default_rng(0).integers(10, 1000, 101))
    shares = balance(costs, 4)
    assert sorted(i for share in shares for i in share) == list(range(101))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)
    assert balance([5], 3) == [[0], [], []]


def test_padding_of_a_trajectory_in_a_bridge_is_masked():
    trajectory = make_trajectory(np.random.default_rng(5), prompt_len=5, blocks=2, block_size=4)
    assert len(trajectory.token_ids) % 8
    sample = slice_sample(trajectory, 1.0, block_size=8, mask_id=63, shrink=1)
    rest = sample.position >= len(trajectory.token_ids)
    assert rest.any()
    assert (sample.ids[rest] == 63).all()
    assert len(sample.ids) == sample.block[-1] * 8 + 8 * (sample.slice_id.max() + 1)
    assert ceil_to_block(len(trajectory.token_ids), 8) == sample.position.max() + 1


def test_flex_attention_follows_the_same_rule_as_the_dense_bias():
    """Uncompiled, on CPU, forward only: the kernel itself needs a GPU, the rule it is given does not."""
    model = make_model(seed=1)
    samples = sliced(trajectories(4, count=6), train_block=8, shrink=2)
    weights = token_weights(samples, "token_mean", length_norm=1)
    batches = pack(samples, weights, row_tokens=200, micro_batch_tokens=800, width_multiple=128)
    assert any((b.document < 0).any() for b in batches), "padding must be covered"
    for batch in batches:
        dense = make_layout(batch, torch.float32)
        flex = FlexLayout(batch.document, batch.block, batch.slice_id, compiled=False)
        with torch.no_grad():
            expected, found = (
                model(batch.ids, batch.positions, layout, batch.index, batch.targets)[0] for layout in (dense, flex)
            )
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("rollout_block", "train_block", "shrink"), [(4, 4, 1), (4, 8, 2), (8, 8, 3), (1, 1, 1)])
def test_split_attention_equals_the_dense_bias(model, rollout_block, train_block, shrink):
    """Rows of very different lengths, some prompts shorter than a block, so that some rows have no clean token."""
    rng = np.random.default_rng(7)
    trajs = [
        make_trajectory(rng, prompt_len=p, blocks=blocks, block_size=rollout_block)
        for p, blocks in ((1, 1), (2, 1), (3, 4), (13, 2), (20, 3), (1, 5))
    ]
    samples = sliced(trajs, train_block=train_block, shrink=shrink)
    weights = token_weights(samples, "seq_mean", length_norm=1)
    for micro_batch_tokens in (10_000, 1):
        batches = pack(samples, weights, row_tokens=0, micro_batch_tokens=micro_batch_tokens)
        assert all(isinstance(make_layout(b, model.dtype), SplitLayout) for b in batches)
        results = []
        for make in (
            lambda b: TrainLayout(train_visibility(b.document, b.block, b.slice_id), model.dtype),
            lambda b: make_layout(b, model.dtype),
        ):
            loss = sum((b.weight * model(b.ids, b.positions, make(b), b.index, b.targets)[0]).sum() for b in batches)
            results.append((loss.item(), gradients(model, loss)))
        assert_same(model, *results[1], *results[0])


def test_row_widths_are_rounded_up_without_a_difference():
    model = make_model(seed=1)
    samples = sliced(trajectories(4, count=9), train_block=4)
    weights = token_weights(samples, "token_mean", length_norm=1)
    tight = pack(samples, weights, row_tokens=200, micro_batch_tokens=800)
    wide = pack(samples, weights, row_tokens=200, micro_batch_tokens=800, width_multiple=128)
    assert {b.ids.shape[1] % 128 for b in wide} == {0}
    assert {b.ids.shape[1] % 128 for b in tight} != {0}
    losses = [batch_loss(model, batches).item() for batches in (tight, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
