"""What is defined over whole samples in the trainer, however they are cut and whichever rank has them."""

import dataclasses

import numpy as np
import pytest
from ranks import on_ranks
from reference import log_softmax, plain_twin, staircase_logits
from synthetic import MASK_ID, make_model
from trainers import make_groups, make_spec, make_trainer


def test_sequence_weights_are_those_of_whole_samples_however_they_are_cut():
    whole, *cut = on_ranks(1, _sequence_weights)
    assert 0.2 < whole["importance"] < 1.8
    for report in cut:
        assert report["forwarded_tokens"] > whole["forwarded_tokens"]
        for name in ("importance", "loss", "grad_norm"):
            assert report[name] == pytest.approx(whole[name], rel=1e-5), name


def _sequence_weights():
    """Recorded log-probs about as large as the policy's, so that products over sequences are neither 0 nor clipped."""
    groups = make_groups(4)
    for g, group in enumerate(groups):
        near = [
            dataclasses.replace(s.trajectory, logprobs=(s.trajectory.logprobs + 3) / 2 - 4.35) for s in group.samples
        ]
        samples = tuple(dataclasses.replace(s, trajectory=t) for s, t in zip(group.samples, near))
        groups[g] = dataclasses.replace(group, samples=samples)
    found = []
    for tokens in (512, 32, 16):
        trainer = make_trainer(micro_batch_tokens=tokens, row_tokens=tokens)
        report = trainer.update(groups, make_spec(correction="sequence"), update=0)
        found.append(dataclasses.asdict(report))
    return found


def test_invariant_1_replay_error_is_the_largest_over_all_ranks():
    exact, *shifted = on_ranks(2, _replay_errors)
    assert exact < 1e-5
    assert shifted == pytest.approx([0.25] * 4, abs=1e-5)


def _replay_errors():
    """Of trajectories whose log-probs a plain model recorded, and with one token of each in turn moved away."""
    trainer, twin = make_trainer(micro_batch_tokens=64), plain_twin(make_model())
    exact = [_recorded(twin, s.trajectory) for s in make_groups(1)[0].samples]
    found = [trainer.replay_error(exact)]
    for i, trajectory in enumerate(exact):
        moved = trajectory.logprobs.copy()
        moved[0] += 0.25
        found.append(
            trainer.replay_error([*exact[:i], dataclasses.replace(trajectory, logprobs=moved), *exact[i + 1 :]])
        )
    return found


def _recorded(twin, trajectory):
    """The trajectory with the log-prob of each token in the state that it was revealed in, one forward a step."""
    t, found = trajectory, []
    for offset, step in enumerate(t.step_map):
        at = t.prompt_len + offset
        end = (at // t.block_size + 1) * t.block_size
        later = np.flatnonzero(t.step_map[: end - t.prompt_len] >= step) + t.prompt_len
        state = t.token_ids[:end].copy()
        state[later] = MASK_ID
        logits = staircase_logits(twin, state.tolist(), t.block_size)[at]
        found.append(log_softmax(logits, 1.0, [62, MASK_ID])[t.token_ids[at]])
    return dataclasses.replace(t, logprobs=np.array(found, dtype=np.float32))
