"""One rank of the learner: a DeepSpeed engine around the policy, and the TraceRL update.

    groups ──► advantages ──► mini-batches (one optimizer step each)
                                 └─► slices ──► token weights ──► share of this rank ──► micro-batches
                                        forward ──► terms ──► sum(weight x term) ──► backward … ──► step

Every rank gets the same groups and derives the same shares, so nothing but gradients and a handful of sums is
exchanged. Ranks run equally many micro-batches (short ones pad with an empty one), so uneven data cannot
deadlock a collective. DeepSpeed averages gradients over ranks; the loss is multiplied by the rank count, so
that the gradient is that of the whole mini-batch whatever the split (invariant 3).

**Old policy.** With one optimizer step a batch the ratio is 1 and no pass is spent on it. With several, the
old log-probs of the first mini-batch are its own (ratio exactly 1) and those of the others come from one pass
before the first step, at the training geometry.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from learner.objective import group_advantages, token_terms
from learner.packing import MicroBatch, SlicedSample, balance, pack, slice_sample, token_weights
from tstar_ray.blocks import train_visibility
from tstar_ray.config import LearnerConfig
from tstar_ray.model import BlockDiffusionLM, Checkpoint, TrainLayout
from tstar_ray.trajectory import Group, Trajectory
from tstar_ray.weights import flatten

_TAG = "state"


@dataclass(frozen=True, slots=True)
class UpdateSpec:
    """What of the stage an update needs."""

    block_size: int
    """Training block."""
    shrink: int
    """Denoising steps merged into one slice."""
    lr: float
    """Learning rate after the warm-up."""
    length_norm: int
    """Tokens `const_len` divides by."""
    compare_recorded: bool
    """Report the distance to the engine's log-probs; meaningless in a bridge."""


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Means over the target tokens of an update, unless said otherwise."""

    loss: float
    """Mean over optimizer steps of the minimised loss."""
    kl: float
    """k3 to the policy before the update (nats)."""
    clip_fraction: float
    """Share of tokens whose gradient the clip took away."""
    ratio_max: float
    """Largest pi_theta / pi_old."""
    entropy: float
    """Of the policy at the targets (nats)."""
    grad_norm: float
    """Largest over optimizer steps, before clipping."""
    replay_error: float
    """Largest |log-prob in the learner - recorded by the engine| of the first step; NaN in a bridge."""
    lr: float
    """Of the last optimizer step."""
    steps: int
    """Optimizer steps taken."""
    samples: int
    """Trajectories trained on."""
    targets: int
    """Target tokens."""
    forwarded_tokens: int
    """Tokens of the packed rows, padding left out, each once."""
    seconds: float
    """Wall time of the update."""


class _Sums:
    """Sums over micro-batches, then over ranks."""

    NAMES = ("loss", "kl", "clipped", "entropy", "targets", "forwarded")
    MAXIMA = ("ratio", "replay_error")

    def __init__(self) -> None:
        self.sums = dict.fromkeys(self.NAMES, 0.0)
        self.maxima = dict.fromkeys(self.MAXIMA, 0.0)

    def reduce(self, device: torch.device) -> None:
        for values, operation in ((self.sums, dist.ReduceOp.SUM), (self.maxima, dist.ReduceOp.MAX)):
            packed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
            dist.all_reduce(packed, op=operation)
            values.update(zip(values, packed.tolist()))


class Trainer:
    """The policy under DeepSpeed, on one rank of a group that `init_process_group` already joined."""

    def __init__(self, checkpoint: Checkpoint, config: LearnerConfig, *, seed: int) -> None:
        """The checkpoint's model is taken over and must be in its final dtype and on this rank's device."""
        deepspeed = import_deepspeed(checkpoint.model.device)
        self._checkpoint, self._config, self._seed = checkpoint, config, seed
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        model = checkpoint.model
        if config.gradient_checkpointing:
            model.hf.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, dist_init_required=False, config=self._deepspeed_config(model)
        )
        self._engine.train()
        self._gathered = deepspeed.zero.GatheredParameters
        self.optimizer_steps = 0

    def _deepspeed_config(self, model: BlockDiffusionLM) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the boundary is set by hand: micro-batches vary in number
            "gradient_clipping": self._config.grad_clip,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": self._config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": model.dtype == torch.bfloat16},
        }

    @property
    def _model(self) -> BlockDiffusionLM:
        return self._checkpoint.model

    def update(self, groups: Sequence[Group], spec: UpdateSpec, *, update: int) -> UpdateReport:
        """Train on complete groups of one block size; every rank is called with the same arguments."""
        start = time.perf_counter()
        samples = [
            self._slice(sample.trajectory, float(advantage), spec)
            for group in groups
            for sample, advantage in zip(group.samples, group_advantages(group.rewards, self._config.loss.advantage))
        ]
        temperature = _common_temperature([s.trajectory for g in groups for s in g.samples])
        order = np.random.default_rng([self._seed, update]).permutation(len(samples))
        mini_batches = [
            self._micro_batches([samples[i] for i in part], spec)
            for part in np.array_split(order, self._config.steps_per_update)
        ]
        old = [None, *(self._logprobs(batches, temperature) for batches in mini_batches[1:])]
        sums, grad_norm, lr = _Sums(), 0.0, 0.0
        for step, batches in enumerate(mini_batches):
            lr = self._set_lr(spec.lr)
            compare = spec.compare_recorded and step == 0
            norm = self._optimizer_step(batches, old[step], temperature, sums, compare=compare)
            grad_norm = max(grad_norm, norm)
        sums.reduce(self._model.device)
        targets = max(sums.sums["targets"], 1.0)
        return UpdateReport(
            loss=sums.sums["loss"] / len(mini_batches),
            kl=sums.sums["kl"] / targets,
            clip_fraction=sums.sums["clipped"] / targets,
            ratio_max=sums.maxima["ratio"],
            entropy=sums.sums["entropy"] / targets,
            grad_norm=grad_norm,
            replay_error=sums.maxima["replay_error"] if spec.compare_recorded else float("nan"),
            lr=lr,
            steps=len(mini_batches),
            samples=len(samples),
            targets=int(targets),
            forwarded_tokens=int(sums.sums["forwarded"]),
            seconds=time.perf_counter() - start,
        )

    def replay_error(self, trajectories: Sequence[Trajectory]) -> float:
        """Largest |learner log-prob - recorded| over all targets of trajectories of one block size (invariant 1)."""
        spec = UpdateSpec(trajectories[0].block_size, 1, 0.0, 1, True)
        batches = self._micro_batches([self._slice(t, 0.0, spec) for t in trajectories], spec)
        logprobs = self._logprobs(batches, _common_temperature(trajectories))
        sums = _Sums()
        for batch, values in zip(batches, logprobs):
            if batch is not None:
                worst = (values - batch.recorded.to(values)).abs().max()
                sums.maxima["replay_error"] = max(sums.maxima["replay_error"], float(worst))
        sums.reduce(self._model.device)
        return sums.maxima["replay_error"]

    def _slice(self, trajectory: Trajectory, advantage: float, spec: UpdateSpec) -> SlicedSample:
        return slice_sample(
            trajectory,
            advantage,
            block_size=spec.block_size,
            mask_id=self._model.mask_id,
            shrink=spec.shrink,
        )

    def _micro_batches(self, samples: Sequence[SlicedSample], spec: UpdateSpec) -> list[MicroBatch | None]:
        """This rank's share, padded with None to the count of the rank that has most."""
        weights = token_weights(samples, self._config.loss.normaliser, length_norm=spec.length_norm)
        share = balance([len(s.ids) for s in samples], self.world)[self.rank]
        batches: list[MicroBatch | None] = [
            *pack(
                [samples[i] for i in share],
                [weights[i] for i in share],
                row_tokens=self._config.row_tokens,
                micro_batch_tokens=self._config.micro_batch_tokens,
            )
        ]
        most = torch.tensor(len(batches), device=self._model.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return batches + [None] * (int(most) - len(batches))

    def _forward(self, batch: MicroBatch | None, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [M]; an empty batch still runs one token, for ZeRO-3's collectives."""
        device = self._model.device
        if batch is None:
            zero = torch.zeros((1, 1), dtype=torch.long, device=device)
            layout = TrainLayout(torch.ones((1, 1, 1), dtype=torch.bool, device=device), self._model.dtype)
            return self._engine(zero, zero, layout, zero[0], zero[0], temperature)
        visible = train_visibility(batch.document, batch.block, batch.slice_id)
        layout = TrainLayout(visible, self._model.dtype)
        return self._engine(batch.ids, batch.positions, layout, batch.index, batch.targets, temperature)

    @torch.no_grad()
    def _logprobs(self, batches: Sequence[MicroBatch | None], temperature: float) -> list[torch.Tensor]:
        return [self._forward(batch and batch.to(self._model.device), temperature)[0].detach() for batch in batches]

    def _optimizer_step(
        self,
        batches: Sequence[MicroBatch | None],
        old: Sequence[torch.Tensor] | None,
        temperature: float,
        sums: _Sums,
        *,
        compare: bool,
    ) -> float:
        loss_config = self._config.loss
        for i, micro in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            batch = micro and micro.to(self._model.device)
            new, entropy = self._forward(batch, temperature)
            if batch is None:
                loss = new.sum() * 0.0
            else:
                terms = token_terms(
                    new,
                    new.detach() if old is None else old[i],
                    batch.advantage,
                    clip_low=loss_config.clip_low,
                    clip_high=loss_config.clip_high,
                    kl_coef=loss_config.kl_coef,
                )
                loss = (batch.weight * terms.loss).sum()
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"loss is {loss.item()} at optimizer step {self.optimizer_steps}; lower learner.lr"
                    )
                values = sums.sums
                values["loss"] += float(loss.detach())
                values["kl"] += float(terms.kl.sum())
                values["clipped"] += float(terms.clipped.sum())
                values["entropy"] += float(entropy.sum())
                values["targets"] += len(new)
                values["forwarded"] += batch.tokens
                sums.maxima["ratio"] = max(sums.maxima["ratio"], float(terms.ratio.max()))
                if compare:
                    worst = float((new.detach() - batch.recorded).abs().max())
                    sums.maxima["replay_error"] = max(sums.maxima["replay_error"], worst)
            self._engine.backward(loss * self.world)
        self._engine.step()
        self.optimizer_steps += 1
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def _set_lr(self, lr: float) -> float:
        warm = min(1.0, (self.optimizer_steps + 1) / (self._config.warmup_updates + 1))
        for group in self._optimizer.param_groups:
            group["lr"] = lr * warm
        return lr * warm

    def reset_optimizer(self) -> None:
        """Zero the Adam moments and step counts in place."""
        base = getattr(self._optimizer, "optimizer", self._optimizer)
        for state in base.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    @contextlib.contextmanager
    def _full_parameters(self) -> Iterator[None]:
        if self._config.zero_stage < 3:
            yield
        else:
            with self._gathered(list(self._model.parameters()), modifier_rank=None):
                yield

    def flat_weights(self) -> torch.Tensor:
        """The whole policy as one CPU buffer (`tstar_ray.weights`); collective under ZeRO-3."""
        with self._full_parameters():
            return flatten(self._model)

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and step count for `load` at the same rank count; collective."""
        self._engine.save_checkpoint(
            str(folder), tag=_TAG, client_state={"tstar_ray": {"optimizer_steps": self.optimizer_steps}}
        )

    def load(self, folder: Path) -> None:
        """Continue exactly from `save`; collective."""
        path, state = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise ValueError(f"{folder} holds no learner state")
        self.optimizer_steps = state["tstar_ray"]["optimizer_steps"]

    def export(self, folder: Path) -> None:
        """Write a Hugging Face checkpoint (rank 0 writes; collective under ZeRO-3)."""
        with self._full_parameters():
            if self.rank == 0:
                self._checkpoint.save(folder)


def _common_temperature(trajectories: Sequence[Trajectory]) -> float:
    """The temperature of the recorded density: greedy decoding records the one at 1."""
    found = {t.temperature or 1.0 for t in trajectories}
    if len(found) != 1:
        raise ValueError(f"trajectories of several temperatures cannot share an update: {sorted(found)}")
    return found.pop()


def report_dict(report: UpdateReport) -> dict[str, float]:
    """For logs."""
    return {name: float(value) for name, value in asdict(report).items()}


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed such that no compiler is needed on CPU and it keeps quiet."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # An inference-only operator that would be compiled at start-up, and fail without g++ and ninja.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def join_process_group(*, rank: int, world: int, host: str, port: int, device: torch.device, timeout_s: float) -> None:
    """Rendezvous of the learner's ranks under DeepSpeed; gloo on CPU, NCCL on GPU."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR=host, MASTER_PORT=str(port))
    deepspeed = import_deepspeed(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        verbose=False,
    )
