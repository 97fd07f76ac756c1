"""The masking baselines: what is masked, what is scored, and that it is reproducible."""

import numpy as np
import pytest
from synthetic import make_trajectory

from learner.masking import mask_slices
from learner.packing import slice_sample

MASK = 63


def trajectories():
    rng = np.random.default_rng(0)
    return [make_trajectory(rng, prompt_len=int(rng.integers(1, 9)), blocks=3, block_size=4) for _ in range(40)]


def masked(trajectory, kind, block_size, seed=0):
    rng = np.random.default_rng(seed)
    return mask_slices(trajectory, block_size=block_size, mask_id=MASK, kind=kind, rng=rng)


def scored(slices, block_size):
    """Absolute positions of all targets."""
    where, inside = np.nonzero(slices.target)
    return slices.block[where] * block_size + inside


@pytest.mark.parametrize("kind", ["random", "coupled"])
@pytest.mark.parametrize("block_size", [4, 8])
def test_targets_are_masked_answer_tokens_and_the_rest_stays(kind, block_size):
    for trajectory in trajectories():
        slices, ids = masked(trajectory, kind, block_size), trajectory.token_ids
        end = trajectory.prompt_len + trajectory.completion_len
        assert (slices.noisy[slices.target] == MASK).all()
        for k, noisy in zip(slices.block, slices.noisy):
            for position, token in enumerate(noisy, start=k * block_size):
                if position < trajectory.prompt_len:
                    assert token == ids[position], "the prompt is never masked"
                elif position < len(ids):
                    assert token in (ids[position], MASK)
                else:
                    assert token == MASK, "nothing was ever decoded there"
        found = scored(slices, block_size)
        assert ((found >= trajectory.prompt_len) & (found < end)).all()


@pytest.mark.parametrize("block_size", [4, 8])
def test_coupled_masks_are_complements_and_score_every_token_once(block_size):
    for trajectory in trajectories():
        found = sorted(scored(masked(trajectory, "coupled", block_size), block_size))
        first = trajectory.prompt_len
        assert found == list(range(first, first + trajectory.completion_len))


def test_random_masks_score_a_part_at_a_rate_that_varies_between_samples():
    shares = []
    for i, trajectory in enumerate(trajectories()):
        found = scored(masked(trajectory, "random", 4, seed=i), 4)
        assert len(set(found)) == len(found)
        shares.append(len(found) / trajectory.completion_len)
    assert 0.35 < np.mean(shares) < 0.65
    assert min(shares) < 0.25
    assert max(shares) > 0.75


def test_masks_follow_their_generator_and_lay_out_like_traces():
    trajectory = trajectories()[0]
    layouts = [
        slice_sample(
            trajectory, 1.0, block_size=4, mask_id=MASK, shrink=1, trace="coupled", rng=np.random.default_rng(seed)
        )
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(layouts[0].ids, layouts[1].ids)
    assert not np.array_equal(layouts[0].ids, layouts[2].ids)
    np.testing.assert_array_equal(layouts[0].target_id, trajectory.completion_ids[layouts[0].target_offset])
