"""Sampling and unmasking against plain Python loops and exact distributions."""

import numpy as np
import pytest
import torch
from reference import choose as plain_choose
from reference import kept_by_truncation
from torch.utils._python_dispatch import TorchDispatchMode

from tstar_ray.decoding import Decoding
from tstar_ray.unmask import choose, draw, invert, lottery, truncate, uniforms


def decoding(**settings):
    return Decoding(**{"block_size": 8, "max_new_tokens": 8, "stop_ids": (0,)} | settings)


def chosen(masked, confidence, entropy, quota, settings, lottery=None):
    found = choose(
        torch.tensor([masked]),
        torch.tensor([confidence]),
        torch.tensor([entropy]),
        torch.tensor([quota]),
        settings,
        None if lottery is None else torch.tensor([lottery]),
    )
    return found[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("order", ["learned", "left_to_right", "random", "sub_blocks"])
@pytest.mark.parametrize("strategy", ["static", "dynamic", "sequential", "entropy"])
def test_choose_equals_a_plain_loop(strategy, order):
    rng = np.random.default_rng(0)
    settings = decoding(strategy=strategy, threshold=0.6, entropy_bound=1.0, order=order, sub_block=3)
    for _ in range(500):
        masked = rng.random(8) < 0.6
        masked[rng.integers(8)] = True
        confidence = np.round(rng.random(8), 1).astype(np.float32)  # rounded, so that ties occur
        entropy = np.round(rng.random(8), 1).astype(np.float32)
        quota = int(rng.integers(0 if strategy == "dynamic" else 1, 9))
        lottery = np.round(rng.random(8), 1).astype(np.float32)
        expected = plain_choose(
            {p: (confidence[p], float(entropy[p])) for p in np.flatnonzero(masked)}, quota, settings, lottery
        )
        thirds = (slice(0, 3), slice(3, 6), slice(6, 8))  # the last sub-block is smaller
        parts = (entropy[masked], *(entropy[third][masked[third]] for third in thirds))
        if strategy == "entropy" and any(np.isclose(np.cumsum(np.sort(p)), 1.0, atol=1e-6).any() for p in parts):
            continue  # the bound itself is met within rounding
        assert chosen(masked, confidence, entropy, quota, settings, lottery) == sorted(expected)


@pytest.mark.parametrize(
    ("confidence", "quota", "threshold", "expected"),
    [
        ([0.9, 0.91, 0.2, 0.95], 1, 0.9, [1, 3]),  # strictly above
        ([0.5, 0.5, 0.5, 0.5], 2, 0.9, [0, 1]),  # ties to the lowest position
        ([0.1, 0.2, 0.3, 0.2], 1, 0.9, [2]),  # at least the quota
        ([1.0, 1.0, 1.0, 1.0], 1, 1.0, [0]),  # nothing is above 1
        ([0.1, 0.1, 0.1, 0.1], 9, 0.9, [0, 1, 2, 3]),  # a quota past the masked ones (trap 16)
    ],
)
def test_trap_21_dynamic_table(confidence, quota, threshold, expected):
    assert chosen([True] * 4, confidence, [0.0] * 4, quota, decoding(threshold=threshold)) == expected


@pytest.mark.parametrize(
    ("order", "expected"),
    [("learned", [2, 5, 7]), ("left_to_right", [1, 2, 4]), ("random", [1, 4, 6]), ("sub_blocks", [2])],
)
def test_a_forced_order_reveals_as_many_as_the_strategy_says(order, expected):
    """Positions 0 and 3 are there already; three confidences exceed 0.9, one of them in the leftmost sub-block."""
    masked = [False, True, True, False, True, True, True, True]
    confidence = [1.0, 0.1, 0.95, 1.0, 0.2, 0.99, 0.3, 0.92]
    lottery = [0.99, 0.8, 0.1, 0.98, 0.9, 0.3, 0.7, 0.6]
    settings = decoding(order=order, sub_block=4)
    assert chosen(masked, confidence, [0.0] * 8, 1, settings, lottery) == expected


def test_a_random_order_does_not_depend_on_what_is_drawn():
    seed, position = torch.arange(2000) * 7 + 3, torch.arange(2000) % 16
    orders = lottery(seed, position)
    assert abs(float(orders.mean()) - 0.5) < 0.02
    for step in range(1, 17):
        other = uniforms(seed, position, torch.full_like(position, step))
        assert abs(np.corrcoef(orders, other)[0, 1]) < 0.08


def test_trap_16_revealed_positions_are_never_chosen():
    for strategy in ("static", "dynamic", "sequential", "entropy"):
        settings = decoding(strategy=strategy, threshold=0.0)
        assert chosen([False, True, False, True], [1.0] * 4, [0.0] * 4, 4, settings) == [1, 3]


def test_sequential_reveals_the_leftmost_masked():
    assert chosen([False, True, False, True, True], [0.0] * 5, [0.0] * 5, 2, decoding(strategy="sequential")) == [1, 3]


def test_entropy_reveals_the_most_certain_within_the_bound_and_at_least_one():
    settings = decoding(strategy="entropy", entropy_bound=0.5)
    assert chosen([True] * 4, [0.0] * 4, [0.3, 0.1, 0.05, 0.9], 1, settings) == [0, 1, 2]
    assert chosen([True] * 4, [0.0] * 4, [0.9, 0.8, 2.0, 0.9], 1, settings) == [1]


@pytest.mark.parametrize(("steps", "quotas"), [(8, [1] * 8), (4, [2] * 4), (3, [3, 3, 2]), (1, [8])])
def test_static_quotas_sum_to_the_block(steps, quotas):
    settings = decoding(denoising_steps=steps)
    assert [settings.quota(s) for s in range(steps)] == quotas


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "random"}, "strategy='random'; choose one of dynamic, static, sequential, entropy"),
        ({"denoising_steps": 9}, "denoising_steps=9; must lie in 1..block_size=8"),
        ({"block_size": 0}, "block_size=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"order": "right"}, "order='right'; choose one of learned, left_to_right, random, sub_blocks"),
        ({"order": "sub_blocks", "sub_block": 0}, "sub_block=0; must be at least 1"),
        ({"confidence": "logit"}, "confidence='logit'; choose one of raw, sampled"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError) as error:
        decoding(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8}], ids=str
)
def test_draws_follow_the_distribution(settings):
    """Frequencies of 40,000 draws within five standard deviations of the exact probabilities."""
    count, temperature = 40_000, settings.get("temperature", 1.0)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    logits[5] = -torch.inf
    numbers = uniforms(torch.arange(count), torch.zeros(count).long(), torch.ones(count).long())
    found = draw(logits.repeat(count, 1), numbers, decoding(**settings))
    density = torch.log_softmax(logits / temperature, -1).double().numpy()
    kept = kept_by_truncation(density, settings.get("top_k", 0), settings.get("top_p", 1.0))
    exact = np.where(kept, np.exp(density), 0)
    exact /= exact.sum()
    seen = np.bincount(found.token, minlength=12) / count
    assert (seen[exact == 0] == 0).all()
    assert (np.abs(seen - exact) < 5 * np.sqrt(exact * (1 - exact) / count) + 1e-9).all()
    np.testing.assert_allclose(found.logprob, density[found.token], atol=1e-5, err_msg="untruncated (trap 23)")


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 300, 1024, 1025])
def test_inversion_equals_a_plain_loop_and_never_takes_what_has_no_weight(size):
    generator = torch.Generator().manual_seed(size)
    weights = torch.randint(1, 9, (200, size), generator=generator).float()
    weights[torch.rand(200, size, generator=generator) < 0.4] = 0
    weights[torch.arange(200), torch.randint(size, (200,), generator=generator)] = 3
    largest = np.nextafter(np.float32(1), np.float32(0))
    numbers = torch.rand(200, generator=generator)
    numbers[:20], numbers[20:40] = 0.0, float(largest)
    index, total = invert(weights, numbers)
    assert (weights.gather(-1, index[:, None]) > 0).all()
    assert total.tolist() == weights.sum(-1).tolist()
    for row, number, found in zip(weights.tolist(), numbers.tolist(), index.tolist()):
        # Small whole weights add up exactly; a number that rounds to a border may fall on either side of it.
        aims = (number * sum(row) * (1 - 1e-6), number * sum(row), min(number * sum(row) * (1 + 1e-6), sum(row) - 0.5))
        expected = {next(i for i, mass in enumerate(np.cumsum(row)) if mass > aim) for aim in aims}
        assert found in expected


@pytest.mark.parametrize("size", [7, 128, 1000])
def test_weights_that_are_not_numbers_lead_to_an_id_of_the_vocabulary(size):
    """A damaged model must not read outside of its logits, which on a GPU ends the process."""
    weights = torch.ones(3, size)
    weights[1] = torch.nan
    weights[2] = 0
    token, total = invert(weights, torch.tensor([0.5, 0.5, 0.999999]))
    assert ((token >= 0) & (token < size)).all()
    assert total[1].isnan()


def test_trap_22_temperature_changes_the_log_prob_and_not_the_raw_confidence():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    cold = draw(logits.clone(), torch.tensor([0.0]), decoding(temperature=0.25))
    plain = draw(logits.clone(), torch.tensor([0.0]), decoding())
    assert cold.token == plain.token == 0
    assert cold.confidence.item() == pytest.approx(plain.confidence.item())
    assert plain.confidence.item() == pytest.approx(torch.softmax(logits, -1)[0, 0].item())
    assert cold.logprob.item() == pytest.approx(torch.log_softmax(logits * 4, -1)[0, 0].item(), abs=1e-6)


def test_trap_20_top_k_one_does_not_make_everything_certain():
    logits = torch.tensor([[1.0, 0.9, 0.8, 0.0]])
    found = draw(logits.clone(), torch.tensor([0.3]), decoding(top_k=1))
    assert found.token == 0
    assert found.confidence < 0.4
    sampled = draw(logits.clone(), torch.tensor([0.3]), decoding(top_k=1, confidence="sampled"))
    assert sampled.confidence == 1.0


def test_greedy_takes_the_likeliest_and_records_its_log_prob_at_temperature_one():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    found = draw(logits.clone(), torch.tensor([0.999]), decoding(temperature=0.0))
    assert found.token == 1
    assert found.logprob.item() == pytest.approx(torch.log_softmax(logits, -1)[0, 1].item())


def test_truncate_equals_a_plain_loop_and_sorts_nothing_for_top_k_alone(monkeypatch):
    rng, sort = np.random.default_rng(1), torch.Tensor.sort
    for top_k, top_p in [(0, 0.5), (3, 1.0), (5, 0.7), (50, 0.999), (9, 1.0)]:
        logits = rng.normal(size=(20, 30))
        density = torch.log_softmax(torch.tensor(logits if top_p < 1 else logits.round(1)), -1)  # ties at the last one
        monkeypatch.setattr(torch.Tensor, "sort", sort if top_p < 1 else None)
        found = truncate(density, top_k=top_k, top_p=top_p)
        for row, expected in zip(found, density):
            kept = kept_by_truncation(expected.numpy(), top_k, top_p)
            np.testing.assert_array_equal(np.isfinite(row), kept)
            assert row.exp().sum().item() == pytest.approx(1.0)


def test_uniform_numbers_are_uniform_and_do_not_depend_on_one_another():
    n = 200_000
    for axis in range(3):
        arguments = [torch.full((n,), 12345)] * 3
        arguments[axis] = torch.arange(n)
        numbers = uniforms(*arguments).double().numpy()
        assert 0 <= numbers.min() < numbers.max() < 1
        histogram = np.histogram(numbers, bins=100, range=(0, 1))[0]
        assert ((histogram - n / 100) ** 2 / (n / 100)).sum() < 99 + 6 * np.sqrt(2 * 99)
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / np.sqrt(n)
    grid = uniforms(*torch.meshgrid(*[torch.arange(50)] * 3, indexing="ij")).flatten()
    # 125,000 draws of 24 bits repeat about 465 times by chance
    assert len(grid) - len(grid.unique()) < 700


@pytest.mark.parametrize("vocabulary", [100, 2**14 + 5])
def test_greedy_log_probs_of_half_precision_are_those_of_fp32(vocabulary):
    """The sum is taken piece by piece, so that nothing vocabulary-sized is turned to fp32."""
    torch.manual_seed(0)
    logits = (torch.randn(7, vocabulary) * 4).bfloat16()
    logits[:, 3] = -torch.inf
    exact = draw(logits.float(), torch.zeros(7), decoding(temperature=0.0))
    found = draw(logits, torch.zeros(7), decoding(temperature=0.0))
    assert found.token.tolist() == exact.token.tolist()
    assert found.logprob.dtype == torch.float32
    torch.testing.assert_close(found.logprob, exact.logprob, atol=1e-5, rtol=0)


class Largest(TorchDispatchMode):
    """Elements of the largest fp32 tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.elements = max(self.elements, made.numel())
        return made


def test_the_entropy_of_many_rows_is_exact_and_never_takes_all_of_them_in_fp32():
    torch.manual_seed(0)
    logits = (torch.randn(100, 2**16 + 5) * 4).bfloat16()
    logits[:, 3] = -torch.inf
    exact = torch.distributions.Categorical(logits=logits.double().masked_fill(logits == -torch.inf, -1e9)).entropy()
    with Largest() as largest:
        found = draw(logits, torch.zeros(100), decoding(temperature=0.0, strategy="entropy"))
    torch.testing.assert_close(found.entropy, exact.float(), atol=1e-5, rtol=1e-5)
    assert largest.elements < 0.7 * logits.numel()
