"""One rank of the learner: the TraceRL update, its baselines, and the value model.

    groups ──► credit ──► mini-batches (one optimizer step each)
                             └─► slices ──► token weights ──► share of this rank ──► micro-batches
                                    forward ──► terms ──► sum(weight x term) ──► backward … ──► step

Every rank gets the same groups and derives the same shares, so nothing but gradients and a handful of sums is
exchanged. Ranks run equally many micro-batches (short ones pad with an empty one), so uneven data cannot
deadlock a collective. The loss of a mini-batch is one sum over ranks and micro-batches, whatever the split
(invariant 3). What is defined over a whole sample (credit of its tokens, sequence weights) is computed before the
loss, over all micro-batches that hold pieces of it.

**Old policy.** With one optimizer step a batch the ratio is 1 and no pass is spent on it. With several, the
old log-probs of the first mini-batch are its own (ratio exactly 1) and those of the others come from one pass
before the first step, at the training geometry.

**Value model.** Values before the update turn each sample's advantage, earned at its last denoising step, into
advantages and returns of tokens (`learner.credit.gae`); then policy and value model take their steps on the
same mini-batches.

An update that is not finite raises `UpdateError` before the step is taken and names the trajectory.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from learner.backend import Backend, BadGradientError, UpdateError
from learner.credit import credit, token_credit
from learner.layout import WIDTH_MULTIPLE, forward_inputs
from learner.modules import Policy, ValueModel
from learner.objective import importance, kl_terms, token_terms, value_terms
from learner.packing import MicroBatch, SlicedSample, balance, pack, slice_sample, token_weights
from learner.report import TAIL, Sums, UpdateReport, UpdateSpec
from tstar_ray.config import LearnerConfig
from tstar_ray.model import BlockDiffusionLM, Checkpoint, Layout
from tstar_ray.trajectory import Group, Trajectory
from tstar_ray.weights import flatten, load_flat

_REFERENCE = "reference-{}.safetensors"
"""Named after its kind: a run may resume with another."""
_NAMED = 8
"""Trajectories that an error names at most."""


@dataclass(frozen=True, slots=True)
class _Share:
    """This rank's part of a mini-batch."""

    batches: list[MicroBatch | None]
    """None pads to the count of the rank that has most."""
    samples: list[SlicedSample]
    """What `MicroBatch.sample` counts."""
    values: list[torch.Tensor]
    """[M] of each micro-batch, before the update; empty without a value model, as ``returns``."""
    returns: list[torch.Tensor]
    """[M] what values are trained to."""
    weights: list[torch.Tensor]
    """[M] of each micro-batch, importance of sequences; empty where none is cut: the loss then computes it."""

    @property
    def sizes(self) -> list[int]:
        """Targets of each micro-batch that is no padding."""
        return [len(batch.targets) for batch in self.batches if batch is not None]

    def joined(self, column: str) -> torch.Tensor:
        """A column of all micro-batches, one after the other."""
        return torch.cat([getattr(batch, column) for batch in self.batches if batch is not None])


class Trainer:
    """The policy under DeepSpeed, on one rank of a group that `join_process_group` already joined."""

    def __init__(self, checkpoint: Checkpoint, config: LearnerConfig, *, seed: int) -> None:
        """The checkpoint's model is taken over and must be in its final dtype and on this rank's device."""
        self._checkpoint, self._config, self._seed = checkpoint, config, seed
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        model, loss = checkpoint.model, config.loss
        if config.gradient_checkpointing:
            model.checkpoint_activations()
        self._reference: BlockDiffusionLM | None = None
        if loss.kl_coef and loss.kl_reference != "old":
            self._reference = copy.deepcopy(model).eval().requires_grad_(False)
        value_model = ValueModel(model) if config.value.kind == "separate" else None
        policy = Policy(model, value_head=config.value.kind == "shared")
        groups = [list(model.parameters())] + ([] if policy.head is None else [list(policy.head.parameters())])
        self._policy = Backend(policy, groups, config)
        self._value: Backend | None = None
        if value_model is not None:
            self._value = Backend(value_model, [list(value_model.parameters())], config)
        self.optimizer_steps = 0

    @property
    def _model(self) -> BlockDiffusionLM:
        return self._checkpoint.model

    @property
    def _reference_file(self) -> str:
        return _REFERENCE.format(self._config.loss.kl_reference)

    def update(self, groups: Sequence[Group], spec: UpdateSpec, *, update: int) -> UpdateReport:
        """Train on complete groups of one block size; every rank is called with the same arguments."""
        start = time.perf_counter()
        temperature = _common_temperature([s.trajectory for g in groups for s in g.samples])
        samples = [
            self._slice(sample.trajectory, advantage, spec, update)
            for group in groups
            for sample, advantage in zip(group.samples, credit(group, self._config.loss, spec.objective))
        ]
        order = np.random.default_rng([self._seed, update]).permutation(len(samples))
        # Filtering may leave fewer samples than steps.
        steps = spec.steps or self._config.steps_per_update
        parts = [part for part in np.array_split(order, steps) if len(part)]
        has_value = self._config.value.kind != "none"
        # In a batch's only step the policy is its own reference: what has no advantage has no gradient.
        skip = len(parts) == 1 and self._reference is None and not has_value
        shares = [self._share([samples[i] for i in part], spec, skip_idle=skip) for part in parts]
        sums, norms, rate = Sums(), [], 0.0
        if has_value:
            shares = [self._assign_credit(share, temperature, sums) for share in shares]
        old = [None, *(self._logprobs(share, temperature) for share in shares[1:])]
        if spec.correction == "sequence" and any(len(s.ids) > self._config.micro_batch_tokens for s in samples):
            shares = [self._weigh_sequences(share, before, temperature) for share, before in zip(shares, old)]
        for share, part, old_logprobs in zip(shares, parts, old):
            try:
                norm, rate = self._optimizer_step(share, old_logprobs, temperature, spec, sums)
            except BadGradientError as error:
                named = ", ".join(samples[i].label for i in part[:_NAMED])
                more = f" and {len(part) - _NAMED} more" if len(part) > _NAMED else ""
                raise UpdateError(f"{error}; in optimizer step {self.optimizer_steps}: {named}{more}") from error
            norms.append(norm)
        sums.reduce(self._model.device)
        return sums.report(
            lr=rate,
            grad_norm=float(np.max(norms)),
            steps=len(shares),
            samples=len(samples),
            seconds=time.perf_counter() - start,
            comparable=spec.compare_recorded,
            has_value=has_value,
        )

    def replay_error(self, trajectories: Sequence[Trajectory]) -> float:
        """Largest |learner log-prob - recorded| over all targets of trajectories of one block size (invariant 1)."""
        spec = UpdateSpec(trajectories[0].block_size, 1, 0.0, 1, True)
        samples = [
            slice_sample(t, 0.0, block_size=t.block_size, mask_id=self._model.mask_id, shrink=1) for t in trajectories
        ]
        share = self._share(samples, spec)
        sums = Sums()
        for batch, logprobs in zip(share.batches, self._logprobs(share, _common_temperature(trajectories))):
            if batch is not None:
                sums.top(replay_error=(logprobs.cpu() - batch.recorded).abs().max())
        sums.reduce(self._model.device)
        return sums.maxima["replay_error"]

    def _slice(self, trajectory: Trajectory, advantage: float, spec: UpdateSpec, update: int) -> SlicedSample:
        return slice_sample(
            trajectory,
            advantage,
            block_size=spec.block_size,
            mask_id=self._model.mask_id,
            shrink=spec.shrink,
            trace="random" if spec.objective == "imitation" else self._config.loss.trace,
            rng=np.random.default_rng([self._seed, update, trajectory.group_id, trajectory.sample]),
        )

    def _share(self, samples: Sequence[SlicedSample], spec: UpdateSpec, *, skip_idle: bool = False) -> _Share:
        """``skip_idle``: samples without advantage count in the normaliser and are not forwarded."""
        weights = token_weights(samples, self._config.loss.normaliser, length_norm=spec.length_norm)
        forwarded = [i for i, s in enumerate(samples) if s.advantage.any() or not skip_idle]
        mine = [forwarded[k] for k in balance([len(samples[i].ids) for i in forwarded], self.world)[self.rank]]
        cuda, config = self._model.device.type == "cuda", self._config
        batches: list[MicroBatch | None] = [
            *pack(
                [samples[i] for i in mine],
                [weights[i] for i in mine],
                row_tokens=config.row_tokens or (config.micro_batch_tokens if cuda else 0),
                micro_batch_tokens=config.micro_batch_tokens,
                width_multiple=WIDTH_MULTIPLE if cuda else 1,
            )
        ]
        most = torch.tensor(max(1, len(batches)), device=self._model.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return _Share(batches + [None] * (int(most) - len(batches)), [samples[i] for i in mine], [], [], [])

    def _inputs(
        self, batch: MicroBatch | None
    ) -> tuple[torch.Tensor, torch.Tensor, Layout, torch.Tensor, torch.Tensor]:
        return forward_inputs(batch, dtype=self._model.dtype, device=self._model.device)

    def _on_device(self, batch: MicroBatch | None) -> MicroBatch | None:
        return batch and batch.to(self._model.device)

    @torch.no_grad()
    def _logprobs(self, share: _Share, temperature: float) -> list[torch.Tensor]:
        return [self._policy(*self._inputs(self._on_device(b)), temperature)[0] for b in share.batches]

    @torch.no_grad()
    def _assign_credit(self, share: _Share, temperature: float, sums: Sums) -> _Share:
        """Values before the update, and with them advantages and returns of every token."""
        config = self._config.value
        values = []
        for batch in share.batches:
            inputs = self._inputs(self._on_device(batch))
            values.append(self._policy(*inputs, temperature)[2] if self._value is None else self._value(*inputs[:4]))
        sizes = share.sizes
        if not sizes:
            return replace(share, values=values, returns=values)
        before = torch.cat(values[: len(sizes)])
        columns = (share.joined(column).numpy() for column in ("sample", "step", "advantage"))
        pair = token_credit(before.double().cpu().numpy(), *columns, gamma=config.gamma, lam=config.lam)
        advantage, target = (torch.from_numpy(found).float() for found in pair)
        target = target.to(before)
        residual = target - before
        sums.add(returns=target.sum(), returns2=target.square().sum())
        sums.add(residual=residual.sum(), residual2=residual.square().sum())
        parts = iter(advantage.split(sizes))
        batches = [batch and replace(batch, advantage=next(parts)) for batch in share.batches]
        return replace(share, batches=batches, values=values, returns=[*target.split(sizes), *values[len(sizes) :]])

    def _weigh_sequences(self, share: _Share, old: Sequence[torch.Tensor] | None, temperature: float) -> _Share:
        """Importance weights of whole sequences; collective where ``old`` log-probs are not known yet."""
        logprobs, sizes = self._logprobs(share, temperature) if old is None else old, share.sizes
        if not sizes:
            return share
        known = torch.cat([*logprobs[: len(sizes)]])
        columns = [share.joined(column).to(known.device) for column in ("recorded", "sample", "step")]
        return replace(share, weights=[*self._importance(known, *columns, level="sequence").split(sizes)])

    def _importance(
        self,
        old: torch.Tensor,
        recorded: torch.Tensor,
        sample: torch.Tensor,
        step: torch.Tensor,
        *,
        level: Literal["token", "step", "sequence"],
    ) -> torch.Tensor:
        correction = self._config.loss.correction
        return importance(old, recorded, sample, step, level=level, mode=correction.mode, bound=correction.bound)

    def _optimizer_step(
        self, share: _Share, old: Sequence[torch.Tensor] | None, temperature: float, spec: UpdateSpec, sums: Sums
    ) -> tuple[float, float]:
        """Policy and value model take one step; returns gradient norm and policy learning rate."""
        for i, micro in enumerate(share.batches):
            last = i == len(share.batches) - 1
            batch = self._on_device(micro)
            inputs = self._inputs(batch)
            new, entropy, values = self._policy(*inputs, temperature)
            if self._value is not None:
                values = self._value(*inputs[:4])
            if batch is None:
                loss = new.sum() * 0.0
                value_loss = values.sum() * 0.0
            else:
                before = new.detach() if old is None else old[i]
                weight = share.weights[i] if share.weights else None
                loss = self._policy_loss(new, before, weight, batch, inputs, temperature, spec, share, sums)
                value_loss = values.new_zeros(())
                sums.add(entropy=entropy.sum(), targets=len(new), forwarded=batch.tokens)
                if share.values:
                    terms = value_terms(values, share.values[i], share.returns[i], self._config.value.clip)
                    self._require_finite(terms, batch, share, "value loss")
                    value_loss = (batch.weight * terms).sum()
                    sums.add(value_loss=terms.detach().sum())
            if self._config.value.kind == "shared":
                loss = loss + self._config.value.coef * value_loss
            self._policy.backward(loss, last=last)
            if self._value is not None:
                self._value.backward(value_loss, last=last)
        warm = min(1.0, (self.optimizer_steps + 1) / (self._config.warmup_updates + 1))
        rates = [spec.lr * warm, self._config.value.lr * warm]
        norm = self._policy.step(rates if self._config.value.kind == "shared" else rates[:1])
        if self._value is not None:
            self._value.step(rates[1:])
        self.optimizer_steps += 1
        return norm, rates[0]

    def _policy_loss(
        self,
        new: torch.Tensor,
        old: torch.Tensor,
        weight: torch.Tensor | None,
        batch: MicroBatch,
        inputs: tuple[torch.Tensor, torch.Tensor, Layout, torch.Tensor, torch.Tensor],
        temperature: float,
        spec: UpdateSpec,
        share: _Share,
        sums: Sums,
    ) -> torch.Tensor:
        config = self._config.loss
        reference = None
        if self._reference is not None:
            with torch.no_grad():
                reference = self._reference(*inputs, temperature)[0]
        if spec.correction != "none" and weight is None:
            weight = self._importance(old, batch.recorded, batch.sample, batch.step, level=spec.correction)
        terms = token_terms(
            new,
            old,
            batch.advantage,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kl_coef=config.kl_coef,
            kl_estimator=config.kl_estimator,
            reference=reference,
            importance=weight,
        )
        self._require_finite(terms.loss, batch, share, "policy loss")
        loss = (batch.weight * terms.loss).sum()
        sums.add(loss=loss.detach(), kl=terms.kl.sum(), clipped=terms.clipped.sum())
        sums.add(importance=len(new) if weight is None else weight.sum())
        sums.top(ratio=terms.ratio.max())
        if spec.compare_recorded:
            gap = (old - batch.recorded).abs()
            sums.add(mismatch=kl_terms(batch.recorded, old).sum(), tails=(gap > np.log(TAIL)).sum())
            sums.top(replay_error=gap.max())
        return loss

    def _require_finite(self, terms: torch.Tensor, batch: MicroBatch, share: _Share, what: str) -> None:
        bad = (~torch.isfinite(terms)).nonzero()
        if len(bad):
            token = int(bad[0])
            sample = share.samples[int(batch.sample[token])]
            raise UpdateError(
                f"{what} is {float(terms[token])} at {sample.label}, denoising slice {int(batch.step[token])}, "
                f"optimizer step {self.optimizer_steps}"
            )

    def start_stage(self, *, reset_optimizer: bool) -> None:
        """Begin a stage of the curriculum: fresh Adam moments if asked, and the stage's KL reference."""
        if reset_optimizer:
            self._policy.reset_optimizer()
            if self._value is not None:
                self._value.reset_optimizer()
        if self._reference is not None and self._config.loss.kl_reference == "stage":
            whole = self._policy.whole(self._model.parameters())
            for kept, now in zip(self._reference.parameters(), whole, strict=True):
                kept.data.copy_(now.detach())

    def flat_weights(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The whole policy as one CPU buffer (`tstar_ray.weights.flatten`); collective under ZeRO-3, where a rank that
        needs no buffer may call `gather_weights` instead."""
        return flatten(self._model, out, self._policy.whole(self._model.parameters()))

    def gather_weights(self) -> None:
        """Take part in another rank's `flat_weights`."""
        for _ in self._policy.whole(self._model.parameters()):
            pass

    def save(self, folder: str | Path) -> None:
        """Write policy, value model, optimizers, step count and the stage's reference for `load`; collective."""
        folder = Path(folder)
        self._policy.save(folder / "policy", {"optimizer_steps": self.optimizer_steps})
        if self._value is not None:
            self._value.save(folder / "value", {})
        if self._reference is not None and self.rank == 0:
            save_file({"flat": flatten(self._reference)}, folder / self._reference_file)

    def load(self, folder: str | Path) -> None:
        """Continue from `save`, bit for bit at the same rank count; collective. Raises ValueError where nothing was
        saved, or not the reference that a KL to the start of the stage needs."""
        folder = Path(folder)
        reference = folder / self._reference_file
        if self._reference is not None and self._config.loss.kl_reference == "stage" and not reference.is_file():
            raise ValueError(
                f"{folder} holds no KL reference, since it was saved without learner.loss.kl_reference=stage; "
                "set learner.loss.kl_reference=old or initial"
            )
        self.optimizer_steps = self._policy.load(folder / "policy")["optimizer_steps"]
        if self._value is not None:
            self._value.load(folder / "value")
        if self._reference is not None and reference.is_file():
            load_flat(self._reference, load_file(reference)["flat"])

    def export(self, folder: Path) -> None:
        """Write a Hugging Face checkpoint (rank 0 writes; collective under ZeRO-3)."""
        with self._policy.full_parameters():
            if self.rank == 0:
                self._checkpoint.save(folder)


def _common_temperature(trajectories: Sequence[Trajectory]) -> float:
    """The temperature of the recorded density: greedy decoding records the one at 1."""
    found = {t.temperature or 1.0 for t in trajectories}
    if len(found) != 1:
        raise ValueError(f"trajectories of several temperatures cannot share an update: {sorted(found)}")
    return found.pop()
