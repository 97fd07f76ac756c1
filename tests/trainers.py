"""Trainers of a tiny model, groups for them, and what makes two trainings the same."""

import dataclasses

import numpy as np
import pytest
import torch
from synthetic import VOCABULARY, make_model, make_trajectory

from tstar_ray.config import LearnerConfig
from tstar_ray.problems import Problem
from tstar_ray.trajectory import Group, Sample


def make_groups(count, *, size=4, seed=0):
    """Groups with mixed rewards and prompts and answers of very different lengths."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(count):
        prompt = int(rng.integers(1, 14))
        samples = []
        for s in range(size):
            trajectory = make_trajectory(
                rng, prompt_len=prompt, blocks=int(rng.integers(1, 5)), block_size=4, group_id=g, sample=s
            )
            samples.append(Sample(trajectory, "", "correct" if s % 2 else "wrong", float(s % 2)))
        groups.append(Group(g, Problem(str(g), "", ""), tuple(samples)))
    return groups


def make_trainer(*, dtype=torch.float32, **settings):
    from learner.trainer import Trainer
    from tstar_ray.model import Checkpoint

    config = LearnerConfig(**{"lr": 1e-3, "warmup_updates": 0, "micro_batch_tokens": 512, "row_tokens": 256} | settings)
    return Trainer(Checkpoint(make_model().to(dtype), tokenizer=None, stop_ids=(0,)), config, seed=1)


def make_spec(**changes):
    from learner.report import UpdateSpec

    return UpdateSpec(
        **{"block_size": 4, "shrink": 1, "lr": 1e-3, "length_norm": 32, "compare_recorded": True} | changes
    )


def train(updates=2, groups=5, **settings):
    """Weights and reports after some updates."""
    trainer = make_trainer(**settings)
    start = trainer.flat_weights()
    reports = [trainer.update(make_groups(groups, seed=u), make_spec(), update=u) for u in range(updates)]
    return start.numpy(), trainer.flat_weights().numpy(), [dataclasses.asdict(r) for r in reports]


def assert_same_training(result, expected, *, cut=False):
    moved = np.linalg.norm(expected[1] - expected[0])
    assert moved > 1e-2, "training must move the weights for the comparison to mean anything"
    # Adam divides by the square root of tiny second moments, which amplifies rounding where gradients vanish.
    assert np.linalg.norm(result[1] - expected[1]) < 1e-3 * moved
    for got, want in zip(result[2], expected[2]):
        for name in ("loss", "kl", "entropy", "grad_norm", "replay_error"):
            assert got[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6), name
        for name in ("samples", "targets", "steps"):
            assert got[name] == want[name], name
    # Samples that are cut repeat what each piece sees.
    forwarded, expected_tokens = (sum(r["forwarded_tokens"] for r in reports) for reports in (result[2], expected[2]))
    assert (forwarded > expected_tokens) == cut
    assert cut or forwarded == expected_tokens


def make_trainer_weights():
    """The start weights."""
    from tstar_ray.weights import flatten

    return flatten(make_model()).numpy()


def shard_everything(monkeypatch):
    """As with a real model: ZeRO-3 really partitions every parameter, and the LM head takes several chunks."""
    from learner import backend
    from tstar_ray import model

    plain = backend._deepspeed_config

    def config(*arguments):
        found = plain(*arguments)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    monkeypatch.setattr(backend, "_deepspeed_config", config)
    monkeypatch.setattr(model, "_LOGITS_IN_CHUNK", {False: 16 * VOCABULARY})
