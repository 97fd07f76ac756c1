"""Grid, slices and visibility by hand-made examples and random ones."""

import numpy as np
import pytest
import torch
from synthetic import MASK_ID, make_model, make_trajectory

from tstar_ray.blocks import (
    NEVER,
    build_slices,
    check_step_map,
    decode_limit,
    merge_steps,
    train_visibility,
)
from tstar_ray.model import TrainLayout


@pytest.mark.parametrize(
    ("prompt", "cap", "block", "limit"),
    [(0, 8, 4, 8), (3, 8, 4, 8), (5, 8, 4, 12), (5, 3, 4, 8), (7, 1, 8, 8), (7, 1, 1, 8), (30, 64, 32, 64)],
)
def test_trap_14_the_cap_is_aligned_down_to_the_grid(prompt, cap, block, limit):
    assert decode_limit(prompt, cap, block) == limit


def test_a_cap_below_one_block_names_the_remedy():
    with pytest.raises(ValueError, match="max_new_tokens=2 does not complete one block of 4 .* use at least 3"):
        decode_limit(5, 2, 4)


def slices_of(ids, steps, prompt, completion, block, shrink=1):
    return build_slices(
        token_ids=np.array(ids),
        step_map=np.array(steps),
        prompt_len=prompt,
        completion_len=completion,
        block_size=block,
        mask_id=99,
        shrink=shrink,
    )


def test_slices_golden_with_prompt_tail_and_stop_in_mid_block():
    """Prompt 1 2 3 4 5, answer 6 7 8 | 9 [stop at 9] 10 11 12 with B=4: the tail is never masked, what follows the
    stop is visible once revealed and never a target (traps 3, 7, 13)."""
    found = slices_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [2, 1, 2, 4, 3, 5, 4], 5, 4, 4)
    assert found.block.tolist() == [1, 1, 2]
    assert found.step.tolist() == [1, 2, 4]
    assert found.noisy.tolist() == [[5, 99, 99, 99], [5, 99, 7, 99], [99, 10, 99, 99]]
    assert found.target.tolist() == [
        [False, False, True, False],
        [False, True, False, True],
        [True, False, False, False],
    ]


def test_trap_12_shrink_golden():
    assert merge_steps(np.array([1, 3, 2, 4, 4]), 2).tolist() == [2, 4, 2, 4, 4]
    assert merge_steps(np.array([0, 0, 5, 9, 7]), 2).tolist() == [0, 0, 7, 9, 7]
    assert merge_steps(np.array([3, NEVER, 4]), 9).tolist() == [4, NEVER, 4]


def test_trap_12_a_merged_slice_masks_the_whole_of_its_group():
    found = slices_of([1, 2, 3, 4, 5], [1, 3, 2, 4, 4], 0, 5, 5, shrink=2)
    assert found.step.tolist() == [2, 4]
    assert found.noisy.tolist() == [[99, 99, 99, 99, 99], [1, 99, 3, 99, 99]]
    assert found.target.tolist() == [[True, False, True, False, False], [False, True, False, True, True]]


@pytest.mark.parametrize("shrink", [1, 2, 3, 7])
@pytest.mark.parametrize(("rollout", "train"), [(1, 1), (4, 4), (4, 8), (4, 16), (8, 8), (2, 16)])
def test_trap_11_invariant_2_each_token_is_a_target_exactly_once(rollout, train, shrink):
    rng = np.random.default_rng(rollout * 100 + train + shrink)
    for _ in range(50):
        t = make_trajectory(
            rng, prompt_len=int(rng.integers(0, 20)), blocks=int(rng.integers(1, 6)), block_size=rollout
        )
        found = build_slices(
            token_ids=t.token_ids,
            step_map=t.step_map,
            prompt_len=t.prompt_len,
            completion_len=t.completion_len,
            block_size=train,
            mask_id=MASK_ID,
            shrink=shrink,
        )
        position = found.block[:, None] * train + np.arange(train)
        assert sorted(position[found.target]) == list(range(t.prompt_len, t.prompt_len + t.completion_len))
        assert (found.noisy[found.target] == MASK_ID).all()
        prompt = position < t.prompt_len
        assert (found.noisy[prompt] == t.token_ids[position[prompt]]).all(), "the prompt is never masked (trap 7)"


@pytest.mark.parametrize(
    ("steps", "prompt", "block", "message"),
    [
        ([1, 2, 2, 3], 0, 2, "block 1 has a step no later than the block before it"),
        ([2, 1, 1, 2], 0, 2, "block 1"),
        ([0, 1], 0, 2, "step map holds 0"),
    ],
)
def test_trap_29_broken_step_maps_are_refused(steps, prompt, block, message):
    with pytest.raises(ValueError, match=message):
        check_step_map(np.array(steps), prompt, block)


def test_trap_29_good_step_maps_pass():
    check_step_map(np.array([2, 1, 3, 3]), 0, 2)
    check_step_map(np.array([1, 3, 2, 4]), 3, 4)  # one token ends the first block


def plain_visible(query, key):
    """Who sees whom, from the algorithm reference, section 7; (document, block, slice) triples."""
    if query[0] != key[0]:
        return False
    if query[2] >= 0:
        return key[2] == query[2] or (key[2] < 0 and key[1] < query[1])
    return key[2] < 0 and key[1] <= query[1]


def test_visibility_equals_the_rules_one_pair_at_a_time():
    rng = np.random.default_rng(0)
    tokens = [
        (int(d), int(b), int(s))
        for d, b, s in zip(rng.integers(0, 2, 40), rng.integers(0, 4, 40), rng.integers(-1, 3, 40))
    ]
    found = train_visibility(*(torch.tensor(column) for column in zip(*tokens)))
    for q, query in enumerate(tokens):
        for k, key in enumerate(tokens):
            assert bool(found[q, k]) == plain_visible(query, key), (query, key)


def packed_row():
    """Clean blocks 0, 1, 2 of size 4, then two slices of block 1 and one of block 2."""
    block = torch.tensor([0] * 4 + [1] * 4 + [2] * 4 + [1] * 8 + [2] * 4)
    slice_id = torch.tensor([-1] * 12 + [0] * 4 + [1] * 4 + [2] * 4)
    position = torch.cat([torch.arange(12), torch.arange(4, 8).repeat(2), torch.arange(8, 12)])
    visible = train_visibility(torch.zeros_like(block), block, slice_id)
    return position, block, slice_id, visible


@torch.no_grad()
def test_trap_4_perturbing_one_token_moves_only_what_may_see_it():
    model, (position, block, slice_id, visible) = make_model(), packed_row()
    ids = torch.randint(0, 60, (1, 24), generator=torch.Generator().manual_seed(0))

    def hidden(row):
        return model.hidden(row, position[None], TrainLayout(visible[None], torch.float32))[0]

    before = hidden(ids)
    for i in range(24):
        changed = ids.clone()
        changed[0, i] = (changed[0, i] + 1) % 60
        moved = (hidden(changed) - before).abs().amax(-1) > 1e-6
        clean = int(slice_id[i]) < 0
        for q in range(24):
            if clean:
                direct = visible[q, i]
            else:
                direct = slice_id[q] == slice_id[i]
            assert bool(moved[q]) == bool(direct), (i, q)
    assert not visible[slice_id == 0][:, slice_id == 1].any(), "slices do not see one another"
    own_clean = visible[slice_id == 0][:, (slice_id < 0) & (block == 1)]
    assert not own_clean.any(), "nor their own clean copy"


@torch.no_grad()
def test_trap_9_block_one_is_autoregressive_scoring_and_a_block_over_all_is_masked_diffusion():
    """Unshifted: the target is scored at its own, masked position."""
    from reference import plain_twin

    model = make_model()
    twin = plain_twin(model)
    rng = np.random.default_rng(3)
    t = make_trajectory(rng, prompt_len=0, blocks=12, block_size=1)
    found = slices_of(t.token_ids, t.step_map, 0, t.completion_len, 1)
    assert len(found.block) == t.completion_len
    for k in range(t.completion_len):
        ids = [*t.token_ids[:k].tolist(), MASK_ID]
        causal = torch.tril(torch.ones(k + 1, k + 1, dtype=torch.bool))[None, None]
        expected = twin(torch.tensor([ids]), attention_mask=causal).logits[0, -1]
        layout = TrainLayout(causal[0], torch.float32)
        got = model.hf.lm_head(model.hidden(torch.tensor([ids]), torch.arange(k + 1)[None], layout))[0, -1]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    full = make_trajectory(rng, prompt_len=5, blocks=1, block_size=32)
    whole = build_slices(
        token_ids=full.token_ids,
        step_map=full.step_map,
        prompt_len=5,
        completion_len=full.completion_len,
        block_size=32,
        mask_id=MASK_ID,
    )
    assert (whole.block == 0).all()
    everything = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    for noisy in whole.noisy:
        ids = torch.tensor(noisy)[None]
        expected = twin(ids, attention_mask=everything).logits[0]
        zeros = torch.zeros(1, 32, dtype=torch.long)
        layout = TrainLayout(train_visibility(zeros, zeros, zeros), torch.float32)
        got = model.hf.lm_head(model.hidden(ids, torch.arange(32)[None], layout))[0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
