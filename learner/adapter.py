"""One rank of an adaptation: noise, layout, DeepSpeed.

    examples of a step ──► mine ──► masks ──► slices ──► micro-batches ──► sum(weight x cross-entropy) ──► step

Every rank is called with the same examples and takes its share; the masks of an example depend on the seed, the step
and its place in the step only. So neither rank count nor micro-batches change the loss or its gradient (invariant 3),
and a resumed run continues bit for bit. Speaks `learner.group.LearnerGroup`'s language: update, save, load, export.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from learner.adaptation import Example, StepPlan, draw_mask, fill, noisy_sample
from learner.backend import Backend, UpdateError
from learner.group import LearnerGroup, LearnerRank
from learner.layout import WIDTH_MULTIPLE, forward_inputs
from learner.packing import MicroBatch, SlicedSample, balance, pack
from tstar_ray.config_adapt import NoiseConfig
from tstar_ray.config_learner import LearnerConfig
from tstar_ray.model import Checkpoint
from tstar_ray.weights import flatten

_EVALUATION = 2**31


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step."""

    loss: float
    """Weighted cross-entropy for each answer token (nats)."""
    cross_entropy: float
    """Mean cross-entropy of masked tokens, unweighted (nats)."""
    masked: int
    """Masked tokens."""
    answer_tokens: int
    """Answer tokens, masked or not."""
    forwarded_tokens: int
    """Tokens of the packed rows, padding left out."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """Learning rate."""
    block_size: int
    """B of the step."""
    seconds: float
    """Wall time."""


class Adapter:
    """A model under DeepSpeed, on one rank of a group that `join_process_group` already joined."""

    def __init__(
        self, checkpoint: Checkpoint, config: LearnerConfig, noise: NoiseConfig, *, fill_id: int, seed: int
    ) -> None:
        self._checkpoint, self._config, self._noise = checkpoint, config, noise
        self._fill_id, self._seed = fill_id, seed
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        model = checkpoint.model
        if config.gradient_checkpointing:
            model.checkpoint_activations()
        self._backend = Backend(model, [list(model.parameters())], config)

    def update(self, examples: Sequence[Example], plan: StepPlan, *, update: int) -> StepReport:
        """One optimizer step; raises UpdateError, before it is taken, where it is not finite."""
        start = time.perf_counter()
        self._checkpoint.model.train()
        answers = sum(example.answer_tokens(plan.block_size) for example in examples)
        batches = self._share(examples, plan.block_size, answers, key=(self._seed, update))
        sums = torch.zeros(4, dtype=torch.float64)
        for i, micro in enumerate(batches):
            loss, found = self._loss(micro)
            if not torch.isfinite(loss.detach()):
                raise UpdateError(f"the loss of step {update} is {float(loss.detach())}; no step was taken")
            sums += found
            self._backend.backward(loss, last=i == len(batches) - 1)
        norm = self._backend.step([plan.lr])
        self._checkpoint.model.eval()
        total, entropy, masked, tokens = self._reduced(sums)
        return StepReport(
            loss=total,
            cross_entropy=entropy / max(1.0, masked),
            masked=int(masked),
            answer_tokens=answers,
            forwarded_tokens=int(tokens),
            grad_norm=norm,
            lr=plan.lr,
            block_size=plan.block_size,
            seconds=time.perf_counter() - start,
        )

    @torch.no_grad()
    def losses(self, examples: Sequence[Example], blocks: Sequence[int]) -> dict[int, float]:
        """Loss for each answer token at each block size, with the same masks at every call; t is spread evenly."""
        found = {}
        for block in blocks:
            answers = sum(example.answer_tokens(block) for example in examples)
            batches = self._share(examples, block, answers, key=(_EVALUATION,), even=True)
            sums = torch.zeros(4, dtype=torch.float64)
            for micro in batches:
                sums += self._loss(micro)[1]
            found[block] = self._reduced(sums)[0]
        return found

    def _share(
        self, examples: Sequence[Example], block_size: int, answers: int, *, key: tuple[int, ...], even: bool = False
    ) -> list[MicroBatch | None]:
        """This rank's micro-batches; None pads to the count of the rank that has most."""
        mine = balance([2 * len(example.ids) for example in examples], self.world)[self.rank]
        samples: list[SlicedSample] = []
        weights: list[NDArray[np.float32]] = []
        for i in sorted(mine):
            example, rng = examples[i], np.random.default_rng([*key, i])
            t = (i + 0.5) / len(examples) if even else None
            masked, weight = draw_mask(example, block_size=block_size, noise=self._noise, rng=rng, t=t)
            laid_out = noisy_sample(
                fill(example, block_size, self._fill_id),
                masked,
                weight / answers,
                prompt_len=example.prompt_len,
                block_size=block_size,
                mask_id=self._checkpoint.model.mask_id,
            )
            if laid_out is not None:
                samples.append(laid_out[0])
                weights.append(laid_out[1])
        cuda, config = self._checkpoint.model.device.type == "cuda", self._config
        batches: list[MicroBatch | None] = [
            *pack(
                samples,
                weights,
                row_tokens=config.row_tokens or (config.micro_batch_tokens if cuda else 0),
                micro_batch_tokens=config.micro_batch_tokens,
                width_multiple=WIDTH_MULTIPLE if cuda else 1,
            )
        ]
        most = torch.tensor(max(1, len(batches)), device=self._checkpoint.model.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return batches + [None] * (int(most) - len(batches))

    def _loss(self, micro: MicroBatch | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What is minimised, and (it, summed cross-entropy, masked tokens, forwarded tokens)."""
        model = self._checkpoint.model
        batch = micro and micro.to(model.device)
        logprobs, _ = self._backend(*forward_inputs(batch, dtype=model.dtype, device=model.device))
        if batch is None:
            return logprobs.sum() * 0.0, torch.zeros(4, dtype=torch.float64)
        loss = -(batch.weight * logprobs).sum()
        values = (float(loss.detach()), -float(logprobs.detach().sum()), len(logprobs), batch.tokens)
        return loss, torch.tensor(values, dtype=torch.float64)

    def _reduced(self, sums: torch.Tensor) -> list[float]:
        found = sums.to(self._checkpoint.model.device)
        dist.all_reduce(found)
        return found.tolist()

    def flat_weights(self) -> torch.Tensor:
        """All weights as one CPU buffer; collective under ZeRO-3."""
        model = self._checkpoint.model
        return flatten(model, whole=self._backend.whole(model.parameters()))

    def save(self, folder: str | Path) -> None:
        """Write what `load` continues from; collective."""
        self._backend.save(Path(folder), {})

    def load(self, folder: str | Path) -> None:
        """Continue from `save`, bit for bit at the same rank count; collective."""
        self._backend.load(Path(folder))

    def export(self, folder: Path, block_size: int) -> None:
        """Write a Hugging Face checkpoint that `model.path` takes (rank 0 writes; collective under ZeRO-3)."""
        with self._backend.full_parameters():
            if self.rank == 0:
                self._checkpoint.model.hf.config.block_size = block_size
                self._checkpoint.save(folder)


class AdapterRank(LearnerRank):
    """An `Adapter` in a Ray actor; ``model`` is an `AdaptModelConfig`."""

    noise: NoiseConfig
    """Set by `adapter_rank`."""

    def _load(self, *, dtype: Any, device: Any) -> Checkpoint:
        from tstar_ray.model import load_checkpoint

        return load_checkpoint(
            self._model.path,
            mask_token_id=self._model.mask_token_id,
            new_mask_token=getattr(self._model, "mask_token", None),
            dtype=dtype,
            device=device,
        )

    def _make_trainer(self, checkpoint: Checkpoint) -> Adapter:
        fill_id = fill_token(checkpoint.tokenizer, checkpoint.stop_ids)
        return Adapter(checkpoint, self._learner, self.noise, fill_id=fill_id, seed=self._seed)


def adapter_rank(noise: NoiseConfig) -> type[AdapterRank]:
    """A rank class with these noise settings, as `LearnerGroup` takes one."""
    return type("AdapterRank", (AdapterRank,), {"noise": noise})


def fill_token(tokenizer: Any, stop_ids: Sequence[int]) -> int:
    """End-of-text for the fill of last blocks: the tokenizer's own, else the first stop token."""
    return int(stop_ids[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id)


class AdapterGroup(LearnerGroup):
    """Driver-side handle of all ranks."""

    room_settings = "train.cpus, train.gpus"

    def losses(self, examples: Sequence[Example], blocks: Sequence[int]) -> dict[int, float]:
        """See `Adapter.losses`."""
        return self._call("losses", examples, blocks)

    def finish(self, folder: Path, block_size: int) -> None:
        """See `Adapter.export`."""
        self._call("export", folder, block_size)
