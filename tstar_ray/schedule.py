"""The decoding schedule: in which order a policy reveals the tokens of a block, measured on recorded step maps.

    step maps ──view──► Reveals [K blocks, B positions] ──► measure ──► Schedule (rates, heat-map, distances)
                           │
                           ├── left_to_right   the same tokens per step, leftmost first
                           └── sub_blocks      the same tokens, one sub-block of 4 after the other

Pure NumPy. Only completion tokens count: what the terminal block holds after the stop was revealed as well, but says
nothing about the answer. A block's steps are counted from 0 at its own first step.

The measures are those of algorithm reference 1.5; the paper's own definition of its schedule S-hat is not public.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer]
FloatArray = NDArray[np.float64]

ABSENT = -1
"""Step of a position that holds no completion token."""
_PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True)
class Reveals:
    """Blocks and when each of their completion tokens was revealed."""

    step_KB: IntArray
    """[K, B] step inside the block, from 0, or `ABSENT`."""
    steps_K: IntArray
    """[K] denoising steps the block took, those that revealed no completion token included."""

    @property
    def block_size(self) -> int:
        """B."""
        return self.step_KB.shape[1]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Measures of one set of blocks."""

    block_size: int
    """B."""
    blocks: int
    """K."""
    tokens: int
    """Completion tokens in them."""
    tokens_per_step: float
    """Completion tokens a denoising step (TPF without commits)."""
    tokens_per_forward: float
    """The same with one more pass a block for its commit."""
    steps_histogram: tuple[int, ...]
    """[B] blocks that took 1, 2, … B steps."""
    nonmono_rate: float
    """Share of tokens revealed while an earlier position of their block stayed masked; 0 for left to right."""
    kendall_tau: float
    """Mean over blocks with two steps or more of Kendall's tau-b between step and position; 1 for left to right. NaN
    without such blocks."""
    inversion_rate: float
    """Share of pairs revealed at different steps whose right token came first. NaN without such pairs."""
    anchor_rate: float
    """Share of blocks with two tokens or more whose first step left the leftmost one masked. NaN without any."""
    js_left_to_right: float
    """Jensen-Shannon distance (0 to 1) of the heat-map to that of the left-to-right schedule with the same tokens per
    step."""
    js_sub_blocks: float
    """The same to that of one sub-block after the other, each in the order it was revealed in."""
    js_stage_start: float | None
    """The same to the heat-map that was given as the stage's start; None if none was."""
    heat_map: tuple[tuple[float, ...], ...]
    """[B, B] joint distribution of step and position over the tokens."""
    first_reveal: tuple[float, ...]
    """[B] distribution of the positions revealed by first steps."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: NaN becomes None."""
        return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in asdict(self).items()}


def view(
    step_maps: Iterable[IntArray], prompt_lens: Sequence[int], completion_lens: Sequence[int], block_size: int
) -> Reveals:
    """Cut step maps ([T - P] global steps each, as in `trajectory.Trajectory`) into blocks of the absolute grid.

    ``block_size`` may be a multiple of the one they were decoded with: a block then holds the steps of several smaller
    ones after one another, as in a bridge. Blocks without completion tokens are left out.
    """
    step_rows, count_rows = [], []
    for step_map, prompt, length in zip(step_maps, prompt_lens, completion_lens, strict=True):
        steps = np.asarray(step_map, dtype=np.int64)
        before = prompt % block_size
        decoded = before + len(steps)
        blocks = -(-decoded // block_size)
        flat = np.zeros(blocks * block_size, dtype=np.int64)
        flat[before:decoded] = steps
        padded = flat.reshape(blocks, block_size)
        # Every step reveals something, so the steps of a block are consecutive numbers.
        first = np.where(padded > 0, padded, np.iinfo(np.int64).max).min(axis=1)
        local = padded - first[:, None]
        counts = padded.max(axis=1) - first + 1
        place = np.arange(blocks * block_size).reshape(blocks, block_size)
        local[(place < before) | (place >= before + length)] = ABSENT
        kept = (local != ABSENT).any(axis=1)
        step_rows.append(local[kept])
        count_rows.append(counts[kept])
    if not step_rows:
        return Reveals(np.zeros((0, block_size), dtype=np.int64), np.zeros(0, dtype=np.int64))
    return Reveals(np.concatenate(step_rows), np.concatenate(count_rows))


def left_to_right(reveals: Reveals) -> Reveals:
    """The same number of tokens at every step, leftmost first."""
    step_KB = reveals.step_KB
    present = step_KB != ABSENT
    ordered = np.sort(np.where(present, step_KB, np.iinfo(np.int64).max), axis=1)
    rank = np.maximum(present.cumsum(axis=1) - 1, 0)
    return Reveals(np.where(present, np.take_along_axis(ordered, rank, axis=1), ABSENT), reveals.steps_K)


def sub_blocks(reveals: Reveals, size: int = 4) -> Reveals:
    """One sub-block of ``size`` positions after the other, the tokens of each in the order they were revealed in.

    That is the order of a decoder with blocks of ``size`` on the same text, as far as these step maps tell: tokens of
    one sub-block that came together come together. Blocks no larger than ``size`` stay as they are.
    """
    if reveals.block_size <= size:
        return reveals
    step_KB = reveals.step_KB
    moved = np.full_like(step_KB, ABSENT)
    done_K = np.zeros(len(step_KB), dtype=np.int64)
    for start in range(0, reveals.block_size, size):
        rank_KS, count_K = _dense_ranks(step_KB[:, start : start + size])
        present = rank_KS != ABSENT
        moved[:, start : start + size] = np.where(present, rank_KS + done_K[:, None], ABSENT)
        done_K += count_K
    return Reveals(moved, done_K)


def _dense_ranks(step_KS: IntArray) -> tuple[IntArray, IntArray]:
    """Ranks of the distinct steps of each row from 0 (`ABSENT` stays), and how many distinct ones there are."""
    order = np.argsort(step_KS, axis=1, kind="stable")
    ordered = np.take_along_axis(step_KS, order, axis=1)
    new = (np.diff(ordered, axis=1, prepend=ABSENT) != 0) & (ordered != ABSENT)
    rank = np.empty_like(step_KS)
    np.put_along_axis(rank, order, np.where(ordered == ABSENT, ABSENT, new.cumsum(axis=1) - 1), axis=1)
    return rank, new.sum(axis=1)


def measure(reveals: Reveals, *, sub_block: int = 4, stage_start: FloatArray | None = None) -> Schedule:
    """All measures of one set of blocks; ``stage_start`` is the `heat_map` to compare with."""
    step_KB, steps_K = reveals.step_KB, reveals.steps_K
    present = step_KB != ABSENT
    tokens, steps, blocks = int(present.sum()), int(steps_K.sum()), len(step_KB)
    if not tokens:
        raise ValueError("no completion token in any step map: nothing to measure")
    heat = heat_map(reveals)
    tau, inversion_rate = order_statistics(reveals)
    first = (step_KB == 0).sum(axis=0)
    several = present.sum(axis=1) >= 2
    leftmost = np.take_along_axis(step_KB, present.argmax(axis=1)[:, None], axis=1)[:, 0]
    return Schedule(
        block_size=reveals.block_size,
        blocks=blocks,
        tokens=tokens,
        tokens_per_step=tokens / steps,
        tokens_per_forward=tokens / (steps + blocks),
        steps_histogram=tuple(np.bincount(steps_K, minlength=reveals.block_size + 1)[1:].tolist()),
        nonmono_rate=nonmono_rate(reveals),
        kendall_tau=tau,
        inversion_rate=inversion_rate,
        anchor_rate=float((leftmost[several] > 0).mean()) if several.any() else float("nan"),
        js_left_to_right=js_distance(heat, heat_map(left_to_right(reveals))),
        js_sub_blocks=js_distance(heat, heat_map(sub_blocks(reveals, sub_block))),
        js_stage_start=None if stage_start is None else js_distance(heat, stage_start),
        heat_map=tuple(map(tuple, heat.tolist())),
        first_reveal=tuple((first / max(1, first.sum())).tolist()),
    )


def nonmono_rate(reveals: Reveals) -> float:
    """Share of tokens such that some earlier position of the block was still masked after their step."""
    step_KB = reveals.step_KB
    latest = np.maximum.accumulate(step_KB, axis=1)
    earlier = np.concatenate([np.full((len(step_KB), 1), ABSENT), latest[:, :-1]], axis=1)
    present = step_KB != ABSENT
    return float((earlier > step_KB)[present].mean())


def order_statistics(reveals: Reveals) -> tuple[float, float]:
    """Kendall's tau-b between step and position, averaged over blocks with two steps or more; and the share of
    inverted pairs among all pairs of different steps. NaN where there is none."""
    taus: list[FloatArray] = []
    concordant = discordant = 0
    b = reveals.block_size
    size = max(1, _PAIRS_AT_ONCE // (b * b))
    upper = np.triu(np.ones((b, b), dtype=bool), 1)
    for start in range(0, len(reveals.step_KB), size):
        step = reveals.step_KB[start : start + size]
        present = step != ABSENT
        pair = present[:, :, None] & present[:, None, :] & upper
        later = step[:, None, :] - step[:, :, None]
        up, down = ((later > 0) & pair).sum(axis=(1, 2)), ((later < 0) & pair).sum(axis=(1, 2))
        every = pair.sum(axis=(1, 2))
        comparable = up + down > 0
        taus.append((up - down)[comparable] / np.sqrt(every[comparable] * (up + down)[comparable]))
        concordant, discordant = concordant + int(up.sum()), discordant + int(down.sum())
    tau = np.concatenate(taus) if taus else np.empty(0)
    total = concordant + discordant
    return float(tau.mean()) if len(tau) else float("nan"), discordant / total if total else float("nan")


def heat_map(reveals: Reveals) -> FloatArray:
    """[B steps, B positions] joint distribution over the tokens; sums to 1.

    A step beyond B - 1 (blocks decoded at another size, seen at a larger one, never have any) would be a broken map.
    """
    b = reveals.block_size
    present = reveals.step_KB != ABSENT
    place = np.nonzero(present)[1]
    counts = np.bincount(reveals.step_KB[present] * b + place, minlength=b * b)
    return counts.reshape(b, b) / max(1, counts.sum())


def js_distance(p: FloatArray, q: FloatArray) -> float:
    """Jensen-Shannon distance of two distributions of one shape: the root of the divergence in bits; 0 to 1."""
    if p.shape != q.shape:
        raise ValueError(f"heat-maps of shapes {p.shape} and {q.shape} cannot be compared")
    middle = (p + q) / 2

    def divergence(a: FloatArray) -> float:
        held = a > 0
        return float((a[held] * np.log2(a[held] / middle[held])).sum())

    return float(np.sqrt(max(0.0, (divergence(p) + divergence(q)) / 2)))
