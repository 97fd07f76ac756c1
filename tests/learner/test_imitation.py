"""Bridges by imitation: right answers of smaller blocks, masked at random within larger ones."""

import dataclasses

import numpy as np
from ranks import on_ranks
from reference import log_softmax, plain_twin, staircase_logits
from trainers import make_groups, make_spec, make_trainer


def test_imitation_learns_right_answers_of_smaller_blocks_and_looks_at_no_wrong_one():
    """Rollouts at B=4, random masks at B=8, three optimizer steps an update; wrong answers may say anything."""
    before, after, scrambled = on_ranks(1, _imitate)
    assert after > before + 0.5, "mean log-prob of right answers, masked at random at B=8"
    assert scrambled == 0.0


def _imitate():
    spec = make_spec(block_size=8, compare_recorded=False, objective="imitation", steps=3, lr=5e-3)
    groups = [dataclasses.replace(g, samples=g.samples[:2]) for g in make_groups(6)]
    nonsense = []
    for group in groups:
        wrong, right = group.samples
        ids = wrong.trajectory.token_ids.copy()
        ids[wrong.trajectory.prompt_len :] = ids[wrong.trajectory.prompt_len :][::-1]
        told = dataclasses.replace(wrong, trajectory=dataclasses.replace(wrong.trajectory, token_ids=ids))
        nonsense.append(dataclasses.replace(group, samples=(told, right)))
    weights, scores = [], []
    for data in (groups, nonsense):
        trainer = make_trainer(loss={"kl_coef": 0.0})  # which would hold the policy where it is on all samples
        scores.append(_likelihood(trainer, groups))
        for u in range(5):
            report = trainer.update(data, spec, update=u)
            assert report.steps == 3
        scores.append(_likelihood(trainer, groups))
        weights.append(trainer.flat_weights())
    return scores[0], scores[1], float((weights[0] - weights[1]).abs().max())


def _likelihood(trainer, groups):
    """Mean log-prob of right answers' tokens, each block of 8 masked as a whole after clean ones: plain forwards."""
    mask_id, found = trainer._model.mask_id, []
    twin = plain_twin(trainer._model)
    for group in groups:
        trajectory = group.samples[1].trajectory
        prompt, ids = trajectory.prompt_len, trajectory.token_ids.tolist()
        for start in range(prompt // 8 * 8, len(ids), 8):
            masked = range(max(start, prompt), min(start + 8, len(ids)))
            logits = staircase_logits(twin, ids[: masked.start] + [mask_id] * len(masked), 8)
            found += [log_softmax(logits[p], 1.0, [mask_id])[ids[p]] for p in masked]
    return float(np.mean(found))
