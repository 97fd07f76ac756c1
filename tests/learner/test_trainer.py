"""The DeepSpeed trainer in real processes over gloo: rank count, micro-batches, uneven data, resume."""

import dataclasses

import numpy as np
import pytest
import torch
from ranks import on_ranks
from synthetic import make_model
from trainers import (
    assert_same_training,
    make_groups,
    make_spec,
    make_trainer,
    make_trainer_weights,
    shard_everything,
    train,
)

from tstar_ray.checkpoint import link_tree, read_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def one_rank():
    return on_ranks(1, train)


def _all_correct(**loss):
    """One update of groups in which every sample is right: only speed tells them apart."""
    groups = [
        dataclasses.replace(g, samples=tuple(dataclasses.replace(s, reward=1.0, verdict="correct") for s in g.samples))
        for g in make_groups(5)
    ]
    trainer = make_trainer(loss={"speed_coef": 0.5} | loss)
    report = trainer.update(groups, make_spec(), update=0)
    return report.loss, report.grad_norm, report.forwarded_tokens, trainer.flat_weights().numpy()


@pytest.mark.parametrize("ranks", [1, 2])
def test_samples_without_advantage_are_not_forwarded_and_nothing_else_changes(ranks):
    skipped = on_ranks(ranks, _all_correct)
    # A frozen reference makes a KL of every sample, here of no weight to speak of.
    whole = on_ranks(1, _all_correct, kl_reference="initial", kl_coef=1e-12)
    assert skipped[:2] == pytest.approx(whole[:2], rel=1e-5)
    assert skipped[2] < 0.8 * whole[2]
    assert np.linalg.norm(skipped[3] - whole[3]) < 1e-3 * np.linalg.norm(whole[3] - make_trainer_weights())


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_invariant_3_rank_count_does_not_change_training(one_rank, zero_stage):
    assert_same_training(on_ranks(2, train, zero_stage=zero_stage), one_rank)


def test_invariant_3_zero_3_with_partitioned_weights_and_chunks_of_unlike_number(one_rank):
    found = on_ranks(2, _train_sharded)
    np.testing.assert_array_equal(found[0], one_rank[0])
    assert_same_training(found, one_rank)


def _train_sharded():
    with pytest.MonkeyPatch.context() as patch:
        shard_everything(patch)
        trainer = make_trainer(zero_stage=3, micro_batch_tokens=128, row_tokens=128, gradient_checkpointing=True)
        start = trainer.flat_weights().numpy()
        held = sum(p.numel() for p in trainer._model.parameters())
        assert held == 0, "weights rest in shards"
        reports = [trainer.update(make_groups(5, seed=u), make_spec(), update=u) for u in range(2)]
        return start, trainer.flat_weights().numpy(), [dataclasses.asdict(r) for r in reports]


GRID = [(n, s) for n in ("token_mean", "const_len", "per_step_mean", "seq_mean", "paper_sum") for s in (1, 2)]


def _gradients():
    """The gradient of one update of each kind: with so large an epsilon, Adam's first step is almost the gradient."""
    found = []
    for normaliser, shrink in GRID:
        trainer = make_trainer(loss={"normaliser": normaliser}, eps=100.0, grad_clip=1e9)
        spec = make_spec(shrink=shrink, compare_recorded=False, lr=1e5)
        report = trainer.update(make_groups(3, seed=4), spec, update=0)
        moved = trainer.flat_weights().numpy() - make_trainer_weights()
        found.append((report.loss, report.grad_norm, report.kl, report.targets, moved / 1e3))
    return found


def test_invariant_3_rank_count_does_not_change_the_gradient_of_any_normaliser_at_any_shrink():
    alone, two = on_ranks(1, _gradients), on_ranks(2, _gradients)
    assert len({round(float(found[1]), 6) for found in alone}) == len(GRID), "they are different losses"
    for case, one, other in zip(GRID, alone, two, strict=True):
        assert other[:4] == pytest.approx(one[:4], rel=1e-6, abs=1e-6), case
        norm = np.linalg.norm(one[4])
        assert norm == pytest.approx(one[1], rel=0.05), "this is the gradient"
        assert np.linalg.norm(one[4] - other[4]) < 1e-6 * norm, case


def test_invariant_3_trap_40_micro_batches_do_not_change_training(one_rank):
    assert_same_training(on_ranks(1, train, micro_batch_tokens=64, row_tokens=64), one_rank, cut=True)


def test_trap_42_a_rank_without_data_does_not_deadlock_and_steps_without_samples_are_not_taken():
    single, steps = on_ranks(1, _two_samples)
    assert steps == 2
    np.testing.assert_allclose(on_ranks(2, _two_samples)[0], single, atol=1e-4)


def _two_samples():
    """Three optimizer steps on one group of two short samples: with two ranks, one has nothing to do."""
    trainer = make_trainer(steps_per_update=3)
    report = trainer.update(make_groups(1, size=2), make_spec(), update=0)
    return trainer.flat_weights().numpy(), report.steps


def test_trap_41_resume_is_bit_exact_and_optimizer_state_survives(tmp_path):
    straight, resumed, reset = on_ranks(1, _resume, folder=str(tmp_path))
    np.testing.assert_array_equal(straight, resumed)
    assert np.abs(straight - reset).max() > 0, "the optimizer state must matter for this test to mean anything"


def _resume(folder):
    trainer = make_trainer(steps_per_update=2)
    for u in range(2):
        trainer.update(make_groups(3, seed=u), make_spec(), update=u)
    trainer.save(folder)
    trainer.update(make_groups(3, seed=2), make_spec(), update=2)
    straight = trainer.flat_weights().numpy()
    trainer.load(folder)
    assert trainer.optimizer_steps == 4
    trainer.update(make_groups(3, seed=2), make_spec(), update=2)
    resumed = trainer.flat_weights().numpy()
    trainer.load(folder)
    trainer.start_stage(reset_optimizer=True)
    trainer.update(make_groups(3, seed=2), make_spec(), update=2)
    return straight, resumed, trainer.flat_weights().numpy()


def test_trap_32_first_ratio_is_exactly_one_and_costs_no_pass():
    (one, passes), (several, more) = on_ranks(1, _ratios)
    assert one["ratio_max"] == 1.0
    assert one["kl"] == 0.0
    assert passes == 1
    assert several["ratio_max"] > 1.0
    assert several["kl"] > 0.0
    assert several["steps"] == 3
    assert more == 3 + 2, "log-probs before the update are of the second and third mini-batch"


def _ratios():
    """Reports and forward passes, where a mini-batch is one micro-batch."""
    found = []
    for steps in (1, 3):
        trainer, passes = make_trainer(steps_per_update=steps, micro_batch_tokens=10**5, row_tokens=10**4), []
        trainer._model.hf.model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        found.append((dataclasses.asdict(trainer.update(make_groups(4), make_spec(), update=0)), len(passes)))
    return found


def test_bridge_trains_at_the_larger_block_without_recorded_log_probs():
    report = on_ranks(1, _bridge)
    assert np.isnan(report["replay_error"])
    assert report["targets"] == sum(s.trajectory.completion_len for g in make_groups(4) for s in g.samples), (
        "every completion token is a target exactly once (invariant 2)"
    )


def _bridge():
    spec = make_spec(block_size=8, compare_recorded=False)
    return dataclasses.asdict(make_trainer().update(make_groups(4), spec, update=0))


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "near"), [(1, torch.float32, 1e-4), (3, torch.float32, 1e-4), (1, torch.bfloat16, 0.1)]
)
def test_resume_at_another_rank_count_through_the_universal_format(tmp_path, zero_stage, dtype, near):
    """Two ranks train and save; one rank goes on; the result is that of two ranks going on."""
    saved, root, settings = tmp_path / "saved", tmp_path / "checkpoints", {"zero_stage": zero_stage, "dtype": dtype}
    straight = on_ranks(2, _train_and_save, folder=str(saved), settings=settings)
    checkpoint = write_checkpoint(root, 2, {}, lambda folder: link_tree(saved, folder / "learner"), keep=1)
    resumed = on_ranks(1, _load_and_train, folder=str(checkpoint / "learner"), settings=settings)
    read_checkpoint(checkpoint)
    assert list(root.iterdir()) == [checkpoint], "it is as it was, and nothing is left beside it"
    again = on_ranks(2, _load_and_train, folder=str(checkpoint / "learner"), settings=settings)
    np.testing.assert_array_equal(again, straight)
    assert np.abs(straight).max() > 0
    assert np.linalg.norm(resumed - straight) < near * np.linalg.norm(straight - _start_weights())


def _start_weights():
    return torch.cat([p.detach().reshape(-1) for p in make_model().parameters()]).numpy()


def _train_and_save(folder, settings):
    trainer = make_trainer(**settings)
    for u in range(2):
        trainer.update(make_groups(3, seed=u), make_spec(), update=u)
    trainer.save(folder)
    trainer.update(make_groups(3, seed=2), make_spec(), update=2)
    return trainer.flat_weights().float().numpy()


def _load_and_train(folder, settings):
    trainer = make_trainer(**settings)
    trainer.load(folder)
    assert trainer.optimizer_steps == 2
    trainer.update(make_groups(3, seed=2), make_spec(), update=2)
    return trainer.flat_weights().float().numpy()


@pytest.mark.parametrize(("zero_stage", "offload"), [(2, "optimizer"), (3, "all")])
def test_offload_does_not_change_training(one_rank, zero_stage, offload):
    assert_same_training(on_ranks(1, train, zero_stage=zero_stage, offload=offload), one_rank)


def test_gradient_checkpointing_does_not_change_training(one_rank):
    assert_same_training(on_ranks(1, train, gradient_checkpointing=True), one_rank)


def test_kl_references_are_what_they_say():
    initial, stage, kept = on_ranks(1, _references)
    assert initial[0] == 0.0
    assert initial[1] > 0.0
    assert initial[2] > initial[1] / 2, "the initial model stays the reference after a stage change"
    assert stage[1] > 0.0
    assert stage[2] == 0.0, "a new stage starts at its own reference"
    assert kept < initial[2], "a strong KL keeps the policy near its reference"


def _references():
    found = []
    for reference, coef in (("initial", 1e-3), ("stage", 1e-3), ("initial", 30.0)):
        trainer = make_trainer(loss={"kl_reference": reference, "kl_coef": coef})
        kls = [trainer.update(make_groups(4, seed=u), make_spec(), update=u).kl for u in range(3)]
        trainer.start_stage(reset_optimizer=False)
        found.append([*kls[:2], trainer.update(make_groups(4, seed=3), make_spec(), update=3).kl])
    return found[0], found[1], found[2][2]


def test_importance_correction_in_the_trainer():
    """Recorded log-probs here are random, far from the policy's: the clip and the mask must bite."""
    found = on_ranks(1, _corrections)
    assert found["none"]["importance"] == 1.0
    assert found["none"]["ratio_tails"] > 0.1
    assert found["none"]["mismatch_kl"] > 0.0
    for name in ("token-clip", "step-clip", "sequence-clip", "token-mask", "step-mask", "sequence-mask"):
        assert 0 <= found[name]["importance"] < 2, name
        assert found[name]["loss"] != found["none"]["loss"], name
    assert found["sequence-mask"]["importance"] < found["token-mask"]["importance"] < 1


def _corrections():
    found = {}
    for level in ("none", "token", "step", "sequence"):
        for mode in ("clip", "mask"):
            trainer = make_trainer(loss={"correction": {"mode": mode}})
            report = trainer.update(make_groups(4), make_spec(correction=level), update=0)
            found["none" if level == "none" else f"{level}-{mode}"] = dataclasses.asdict(report)
    return found


@pytest.mark.parametrize("trace", ["random", "coupled"])
def test_masking_baselines_train_through_the_same_trainer(trace):
    one = on_ranks(1, train, loss={"trace": trace})
    two = on_ranks(2, train, loss={"trace": trace}, zero_stage=2)
    assert_same_training(two, one)
    everything = sum(s.trajectory.completion_len for g in make_groups(5, seed=0) for s in g.samples)
    if trace == "coupled":
        assert one[2][0]["targets"] == everything
    else:
        assert 0.2 * everything < one[2][0]["targets"] < 0.8 * everything


def test_a_loss_that_is_not_finite_names_the_trajectory_and_keeps_the_weights():
    message, moved = on_ranks(1, _not_finite)
    assert "policy loss is nan at sample 1 of group 2, denoising slice" in message
    assert moved == 0.0


def _not_finite():
    from learner.backend import UpdateError

    groups = make_groups(3)
    bad = groups[2].samples[1]
    logprobs = np.full_like(bad.trajectory.logprobs, np.nan)
    bad = dataclasses.replace(bad, trajectory=dataclasses.replace(bad.trajectory, logprobs=logprobs))
    groups[2] = dataclasses.replace(groups[2], samples=(groups[2].samples[0], bad, *groups[2].samples[2:]))
    trainer = make_trainer()
    before = trainer.flat_weights()
    with pytest.raises(UpdateError) as caught:
        trainer.update(groups, make_spec(correction="token"), update=0)
    return str(caught.value), float((trainer.flat_weights() - before).abs().max())


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_gradient_that_is_not_finite_stops_the_update_before_the_step(zero_stage):
    message, moved = on_ranks(1, _bad_gradient, zero_stage=zero_stage)
    assert "gradient is not finite" in message
    assert moved == 0.0
    first = np.random.default_rng([1, 7]).permutation(12)[:4]  # the mini-batch is a seeded draw from all samples
    assert message.endswith(": " + ", ".join(f"sample {i % 4} of group {i // 4}" for i in first))


def _bad_gradient(zero_stage):
    from learner.backend import UpdateError

    trainer = make_trainer(zero_stage=zero_stage, steps_per_update=3)
    before = trainer.flat_weights()
    parameter = trainer._model.hf.model.layers[0].mlp.up_proj.weight
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UpdateError) as caught:
        trainer.update(make_groups(3), make_spec(), update=7)
    return str(caught.value), float((trainer.flat_weights() - before).abs().max())


def test_a_maximum_does_not_hide_nan():
    from learner.report import Sums

    sums = Sums()
    for value in (1.0, float("nan"), 2.0):
        sums.top(ratio=torch.tensor(value))
    assert np.isnan(sums.maxima["ratio"])
    sums.top(replay_error=torch.tensor(0.5))
    sums.top(replay_error=torch.tensor(0.25))
    assert sums.maxima["replay_error"] == 0.5


def test_export_opens_with_plain_transformers_under_zero_3(tmp_path):
    flat = on_ranks(2, _export, folder=str(tmp_path))
    from transformers import AutoModelForCausalLM

    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = torch.cat([p.detach().reshape(-1) for p in reopened.parameters()])
    np.testing.assert_array_equal(found.numpy(), flat)


def _export(folder):
    """As the learner's ranks publish and export."""
    from pathlib import Path

    from learner.group import LearnerRank

    trainer = make_trainer(zero_stage=3)
    trainer._checkpoint = dataclasses.replace(trainer._checkpoint, tokenizer=_NoTokenizer())
    trainer.update(make_groups(2), make_spec(), update=0)
    trainer.export(Path(folder))
    rank = LearnerRank(trainer.rank, None, None, threads=1, seed=1, weights=_Sink())
    rank._trainer = trainer
    flat = rank.publish(3)
    if trainer.rank == 0:
        return flat.numpy()
    assert flat is rank._flat is None, "rank 0 alone holds the weights"


class _Sink:
    def publish(self, flat, version):
        """What was published."""
        return flat


class _NoTokenizer:
    def save_pretrained(self, folder):
        """The model alone is under test."""
