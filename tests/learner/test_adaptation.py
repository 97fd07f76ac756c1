"""Block-diffusion SFT against plain references: masks, weights, the loss, its two limits, schedules."""

import math

import numpy as np
import pytest
import torch
from reference import plain_twin, staircase_logits
from synthetic import MASK_ID, make_model

from learner.adaptation import (
    Example,
    batch_indices,
    draw_mask,
    fill,
    make_schedule,
    mask_rate,
    mask_weight,
    noisy_sample,
)
from learner.layout import forward_inputs
from learner.packing import pack
from tstar_ray.config_adapt import BlockStage, NoiseConfig

FILL = 7


def make_examples(count=5, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [(int(rng.integers(0, 11)), int(rng.integers(1, 22))) for _ in range(count)]
    return [Example(rng.integers(0, 60, p + a).astype(np.int32), p) for p, a in lengths]


def drawn(examples, block, noise, seed=0):
    """[(filled ids, mask, weight)] of each example."""
    found = []
    for i, e in enumerate(examples):
        masked, weight = draw_mask(e, block_size=block, noise=noise, rng=np.random.default_rng([seed, i]))
        found.append((fill(e, block, FILL), masked, weight))
    return found


def our_loss(model, examples, draws, block, *, row_tokens=0, micro_batch_tokens=4096):
    """The loss as `learner.adapter` computes it, without DeepSpeed."""
    answers = sum(e.answer_tokens(block) for e in examples)
    laid_out = [
        noisy_sample(ids, masked, weight / answers, prompt_len=e.prompt_len, block_size=block, mask_id=MASK_ID)
        for e, (ids, masked, weight) in zip(examples, draws)
    ]
    samples, weights = zip(*[x for x in laid_out if x is not None])
    loss = 0.0
    for batch in pack(samples, weights, row_tokens=row_tokens, micro_batch_tokens=micro_batch_tokens):
        logprobs, _ = model(*forward_inputs(batch, dtype=torch.float32, device=torch.device("cpu")))
        loss = loss - (batch.weight * logprobs).sum()
    return loss


def cross_entropy(logits_V, token, model):
    """In plain numbers, without the ids that are never predicted."""
    logits = np.array(logits_V.tolist())
    logits[model.suppressed_V.numpy()] = -np.inf
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token])


def dense_two_pass_loss(model, examples, draws, block):
    """Block after block: [clean blocks before | this noisy block] through an unmodified transformers model."""
    twin, total, answers = plain_twin(model), 0.0, 0
    for e, (ids, masked, weight) in zip(examples, draws):
        answers += len(ids) - e.prompt_len
        for k in range(len(ids) // block):
            span = range(k * block, (k + 1) * block)
            noisy = [MASK_ID if masked[i] else int(ids[i]) for i in span]
            logits = staircase_logits(twin, [int(x) for x in ids[: k * block]] + noisy, block)
            total += sum(weight[i] * cross_entropy(logits[i], ids[i], model) for i in span if masked[i])
    return total / answers


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("per", ["sample", "block"])
def test_the_loss_is_that_of_a_dense_two_pass_reference(block, per):
    model, examples = make_model(), make_examples()
    draws = drawn(examples, block, NoiseConfig(per=per, low=0.05))
    ours = our_loss(model, examples, draws, block)
    assert ours.item() == pytest.approx(dense_two_pass_loss(model, examples, draws, block), rel=1e-5)


@pytest.mark.parametrize("block", [4, 8])
def test_invariant_3_packing_samples_into_one_row_and_cutting_them_changes_nothing(block):
    model, examples = make_model(), make_examples(8)
    draws = drawn(examples, block, NoiseConfig())
    found = []
    for settings in (
        {},
        {"row_tokens": 200},
        {"micro_batch_tokens": 48},
        {"row_tokens": 90, "micro_batch_tokens": 300},
    ):
        model.zero_grad()
        loss = our_loss(model, examples, draws, block, **settings)
        loss.backward()
        found.append((float(loss.detach()), model.hf.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-6)


def everything_masked(examples, block):
    """p = 1."""
    draws = []
    for e in examples:
        ids = fill(e, block, FILL)
        draws.append((ids, np.arange(len(ids)) >= e.prompt_len, np.ones(len(ids))))
    return draws


def test_trap_9_one_token_blocks_are_autoregressive_scoring():
    """Fully masked at b = 1 the loss is the mean of -log p(token i | tokens before i), in plain causal forwards."""
    model, examples = make_model(), make_examples()
    twin, total, count = plain_twin(model), 0.0, 0
    for e in examples:
        ids = [int(x) for x in e.ids]
        for i in range(e.prompt_len, len(ids)):
            row = torch.tensor([[*ids[:i], MASK_ID]])
            causal = torch.ones(i + 1, i + 1, dtype=torch.bool).tril()[None, None]
            with torch.no_grad():
                total += cross_entropy(twin(row, attention_mask=causal).logits[0, -1].double(), ids[i], model)
            count += 1
    ours = our_loss(model, examples, everything_masked(examples, 1), 1)
    assert ours.item() == pytest.approx(total / count, rel=1e-5)


def test_trap_9_one_token_blocks_see_exactly_what_is_before_them():
    model, example = make_model(), Example(np.arange(1, 13, dtype=np.int32), 3)

    def scores(ids):
        sample, weight = noisy_sample(ids, np.arange(12) >= 3, np.ones(12), prompt_len=3, block_size=1, mask_id=MASK_ID)
        (batch,) = pack([sample], [weight], row_tokens=0, micro_batch_tokens=4096)
        batch = batch.to("cpu")
        inputs = list(forward_inputs(batch, dtype=torch.float32, device=torch.device("cpu")))
        inputs[4] = torch.zeros_like(inputs[4])  # always the same token, whatever the text
        return model(*inputs)[0].detach().numpy()

    ids = fill(example, 1, FILL)
    before = scores(ids)
    for changed in range(12):
        other = ids.copy()
        other[changed] = 40
        moved = np.abs(scores(other) - before) > 1e-7
        np.testing.assert_array_equal(moved, np.arange(3, 12) > changed)


def test_trap_9_a_block_as_long_as_the_text_is_full_sequence_masked_diffusion():
    """One block: every token sees all others, and the loss is LLaDA's, from one bidirectional forward."""
    model = make_model()
    examples = [e for e in make_examples(8) if len(e.ids) <= 32]
    draws = drawn(examples, 32, NoiseConfig(low=0.1))
    twin, total = plain_twin(model), 0.0
    for ids, masked, weight in draws:
        noisy = torch.tensor([[MASK_ID if m else int(x) for x, m in zip(ids, masked)]])
        with torch.no_grad():
            logits = twin(noisy, attention_mask=torch.ones(1, 1, 32, 32, dtype=torch.bool)).logits[0].double()
        total += sum(weight[i] * cross_entropy(logits[i], ids[i], model) for i in np.flatnonzero(masked))
    answers = sum(32 - e.prompt_len for e in examples)
    assert our_loss(model, examples, draws, 32).item() == pytest.approx(total / answers, rel=1e-5)


def test_the_prompt_is_never_masked_and_the_fill_is_trained():
    examples = make_examples(40)
    for block in (4, 16):
        for e, (ids, masked, _) in zip(examples, drawn(examples, block, NoiseConfig(low=0.9))):
            assert not masked[: e.prompt_len].any()
            assert (ids[len(e.ids) :] == FILL).all()
            assert len(ids) % block == 0
            assert len(ids) - e.prompt_len == e.answer_tokens(block)
    ends = [masked[len(e.ids) :] for e, (_, masked, _) in zip(examples, drawn(examples, 16, NoiseConfig(low=0.9)))]
    assert np.concatenate(ends).any()


def test_masks_are_drawn_at_the_rate_and_weigh_one_over_it():
    example = Example(np.zeros(4000, dtype=np.int32), 0)
    for t in (0.1, 0.5, 0.9):
        for schedule, p in (("linear", t), ("cosine", 1 - math.cos(math.pi * t / 2)), ("square", 1 - (1 - t) ** 2)):
            noise = NoiseConfig(schedule=schedule)
            masked, weight = draw_mask(example, block_size=4, noise=noise, rng=np.random.default_rng(0), t=t)
            rate = 1e-3 + (1 - 1e-3) * p
            assert masked.mean() == pytest.approx(rate, abs=0.03)
            np.testing.assert_allclose(weight, 1 / rate)


def test_one_rate_for_a_sample_or_one_for_each_block():
    example = Example(np.zeros(4096, dtype=np.int32), 0)

    def rates(per):
        masked, _ = draw_mask(example, block_size=64, noise=NoiseConfig(per=per), rng=np.random.default_rng(3), t=None)
        return masked.reshape(-1, 64).mean(1)

    assert rates("sample").std() < 0.1 < 0.2 < rates("block").std()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "square"])
def test_the_elbo_weight_gives_the_same_bound_under_every_schedule(schedule):
    """E_t[weight x f(masks at rate p(t))] = integral of f(p) / p dp, here with f(p) = p^2, a hand-made integral."""
    t = (np.arange(200_000) + 0.5) / 200_000
    noise = NoiseConfig(schedule=schedule, low=1e-6, weighting="elbo")
    p = mask_rate(t, noise)
    assert np.mean(mask_weight(t, noise) * p**2) == pytest.approx(0.5, abs=1e-3)
    if schedule == "linear":
        np.testing.assert_allclose(mask_weight(t, noise), mask_weight(t, NoiseConfig(low=1e-6)), rtol=1e-4)


def test_a_sample_without_masks_adds_nothing_but_counts():
    ids = np.arange(8)
    nothing = noisy_sample(ids, np.zeros(8, dtype=bool), np.ones(8), prompt_len=2, block_size=4, mask_id=MASK_ID)
    assert nothing is None


def schedule(**settings):
    values = {"samples": 100, "batch": 10, "lr": 1.0, "warmup": 0.0, "final_lr": 1.0, "seed": 0} | settings
    stages = values.pop("stages", [BlockStage(steps=50, mixture={4: 1}), BlockStage(epochs=2, mixture={4: 1, 8: 3})])
    return make_schedule(stages, **values)


def test_block_sizes_grow_by_stage_and_are_mixed_by_share():
    made = schedule(stages=[BlockStage(steps=50, mixture={4: 1}), BlockStage(steps=2000, mixture={4: 1, 8: 3})])
    assert made.steps == 2050
    blocks = [made.plan(step).block_size for step in range(2050)]
    assert set(blocks[:50]) == {4}
    assert np.mean(np.array(blocks[50:]) == 8) == pytest.approx(0.75, abs=0.03)
    assert blocks == [made.plan(step).block_size for step in range(2050)], "a function of the step alone"
    assert schedule().ends == (50, 70), "two epochs of 100 samples in batches of 10 are 20 steps"


def test_the_learning_rate_warms_up_and_falls():
    constant = schedule(warmup=0.1)
    rates = [constant.plan(step).lr for step in range(70)]
    assert rates[0] == pytest.approx(1 / 8)
    assert rates[7:] == [1.0] * 63
    falling = [schedule(final_lr=0.1).plan(step).lr for step in range(70)]
    assert falling[0] == 1.0
    assert falling[35] == pytest.approx(0.1 + 0.9 * 0.5)
    assert falling[-1] == pytest.approx(0.1, abs=0.01)


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own():
    epochs = [
        [i for step in range(e * 4, e * 4 + 4) for i in batch_indices(step, batch=5, samples=20, seed=1)]
        for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert len(batch_indices(0, batch=50, samples=20, seed=1)) == 50, "a batch may span epochs"
