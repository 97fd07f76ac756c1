"""The value model in the trainer: split over ranks, learning, and part of the checkpoint."""

import dataclasses

import pytest
from ranks import on_ranks
from trainers import assert_same_training, make_groups, make_spec, make_trainer, train


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_value_model_is_split_over_ranks_and_micro_batches_without_a_difference(kind):
    value = {"kind": kind, "lr": 1e-3, "gamma": 0.95, "lam": 0.95}
    one = on_ranks(1, train, value=value, steps_per_update=2)
    two = on_ranks(2, train, value=value, steps_per_update=2, zero_stage=2, micro_batch_tokens=64, row_tokens=64)
    assert_same_training(two, one, cut=True)
    for a, b in zip(one[2], two[2]):
        for name in ("value_loss", "explained_variance"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert one[2][0]["value_loss"] > 0


def test_trap_45_a_zero_head_gives_the_plain_rewards_first_and_then_learns():
    plain, valued, losses, variance = on_ranks(1, _value_learns)
    assert valued["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert valued["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
    assert losses[-1] < 0.6 * losses[0], f"the value model learns a batch it sees again and again: {losses}"
    assert variance > 0.3


def _value_learns():
    plain = make_trainer().update(make_groups(4), make_spec(), update=0)
    trainer = make_trainer(value={"kind": "separate", "lr": 1e-2, "clip": 10.0}, lr=1e-9)
    reports = [trainer.update(make_groups(4), make_spec(lr=1e-9), update=u) for u in range(40)]
    first, losses = reports[0], [r.value_loss for r in reports]
    return dataclasses.asdict(plain), dataclasses.asdict(first), losses, reports[-1].explained_variance


def test_value_model_is_part_of_the_checkpoint(tmp_path):
    straight, resumed = on_ranks(1, _resume_value, folder=str(tmp_path))
    assert straight == resumed


def _resume_value(folder):
    settings = {"value": {"kind": "separate", "lr": 1e-3}, "loss": {"kl_reference": "stage", "kl_coef": 0.1}}
    trainer = make_trainer(**settings)
    trainer.update(make_groups(3, seed=0), make_spec(), update=0)
    trainer.start_stage(reset_optimizer=False)
    trainer.update(make_groups(3, seed=1), make_spec(), update=1)
    trainer.save(folder)
    trainers = [trainer, make_trainer(**settings)]
    trainers[1].load(folder)
    without = make_trainer(value=settings["value"])
    without.save(f"{folder}/without")
    with pytest.raises(ValueError, match="holds no KL reference"):
        trainers[1].load(f"{folder}/without")
    reports = [t.update(make_groups(3, seed=2), make_spec(), update=2) for t in trainers]
    assert reports[0].kl > 0, "the reference is the policy before the last update"
    return [dataclasses.asdict(dataclasses.replace(r, seconds=0.0)) for r in reports]
