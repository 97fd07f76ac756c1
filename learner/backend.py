"""DeepSpeed, and nothing else: one module under one engine, and the process group its ranks share.

Micro-batches vary in number, so the accumulation boundary is set by hand. The optimizer is PyTorch's AdamW:
DeepSpeed's own are compiled at start-up, which needs a compiler that a laptop or a container may not have.

Checkpoints are DeepSpeed's. At the rank count that wrote them they continue bit for bit; at another one rank 0
converts them to DeepSpeed's universal format first, in a folder beside the run checkpoint that is removed after
loading: every rank sees it, as it sees the checkpoint, and what is inside a checkpoint never changes (invariant 9).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tstar_ray.checkpoint import MANIFEST
from tstar_ray.config import LearnerConfig
from tstar_ray.weights import whole_numel

_TAG, _UNIVERSAL, _WORLD = "state", "universal", "world.json"
_GATHERED_AT_ONCE = 2**28
"""Values of shards that are put together at a time to publish weights."""


class UpdateError(FloatingPointError):
    """An update that is not finite. The weights are those before the optimizer step it would have taken."""


class BadGradientError(UpdateError):
    """The gradient is not finite though every loss was."""


class Backend:
    """One module and its optimizer; every method is called on all ranks."""

    def __init__(self, module: nn.Module, groups: Sequence[Sequence[nn.Parameter]], config: LearnerConfig) -> None:
        """``groups`` are parameter groups with a learning rate each; together all parameters of ``module``."""
        first = groups[0][0]
        deepspeed = import_deepspeed(first.device)
        self._stage = config.zero_stage
        self.module = module
        optimizer = torch.optim.AdamW(
            [{"params": list(group)} for group in groups],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=config.offload != "none",  # in host memory: several times faster there, and without copies
        )
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # it prints its memory
            self.engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                dist_init_required=False,
                config=_deepspeed_config(config, first.dtype),
            )
        self.engine.train()
        self._gathered = deepspeed.zero.GatheredParameters
        if not self._stage:
            self.reset_optimizer()  # in bf16 DeepSpeed has taken a step with gradients of zero

    def __call__(self, *args: Any) -> Any:
        return self.engine(*args)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of the summed loss over all ranks; ``last``: of this optimizer step."""
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; our losses are shares of one sum.
        self.engine.backward(loss * dist.get_world_size())

    def step(self, rates: Sequence[float]) -> float:
        """One optimizer step with a learning rate for each group; returns the gradient norm before clipping.

        Raises BadGradientError where the gradient is not finite, and then takes no step (DeepSpeed alone would
        skip it with a warning, and ZeRO 0 would take it).
        """
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        skipped = self.engine.skipped_steps
        # ZeRO 0 keeps whole gradients, and DeepSpeed neither looks at them nor knows their norm.
        whole = [p.grad for p in self.module.parameters() if p.grad is not None] if self._stage == 0 else []
        norm = float(nn.utils.get_total_norm(whole)) if whole else None
        finite = norm is None or math.isfinite(norm)
        if finite:
            self.engine.step()
        if not finite or self.engine.skipped_steps > skipped:
            raise BadGradientError("the gradient is not finite though the loss is; no step was taken")
        return float(self.engine.get_global_grad_norm()) if norm is None else norm

    def reset_optimizer(self) -> None:
        """Zero the Adam moments and step counts in place."""
        base = getattr(self._optimizer, "optimizer", self._optimizer)
        for state in base.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    def whole(self, parameters: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
        """Each parameter in turn, whole on every rank while it is out; under ZeRO-3, where they are shards otherwise,
        collective, and no more than `_GATHERED_AT_ONCE` values (or one parameter) are whole at a time."""
        if self._stage < 3:
            yield from parameters
            return
        parts: list[list[nn.Parameter]] = []
        room = 0
        for parameter in parameters:
            if whole_numel(parameter) > room:
                parts.append([])
                room = _GATHERED_AT_ONCE
            parts[-1].append(parameter)
            room -= whole_numel(parameter)
        for part in parts:
            with self._gathered(part, modifier_rank=None):
                yield from part

    @contextlib.contextmanager
    def full_parameters(self) -> Iterator[None]:
        """All parameters whole on every rank at once; they are shards outside under ZeRO-3."""
        if self._stage < 3:
            yield
        else:
            with self._gathered(list(self.module.parameters()), modifier_rank=None):
                yield

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write weights, optimizer and ``state``."""
        self.engine.save_checkpoint(str(folder), tag=_TAG, client_state={"tstar_ray": state})
        if dist.get_rank() == 0:
            (folder / _WORLD).write_text(json.dumps(dist.get_world_size()))

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from `save`; returns its ``state``. Raises ValueError where nothing was saved."""
        file = folder / _WORLD
        if not file.is_file():
            raise ValueError(f"{folder} holds no learner state")
        if not self._stage or json.loads(file.read_text()) == dist.get_world_size():
            return self._load(folder, _TAG)
        with _universal(folder) as converted:
            return self._load(converted, _UNIVERSAL)

    def _load(self, folder: Path, tag: str) -> dict[str, Any]:
        self.engine._config.load_universal_checkpoint = tag == _UNIVERSAL
        path, state = self.engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise ValueError(f"{folder} holds no learner state")
        return state["tstar_ray"]


@contextlib.contextmanager
def _universal(folder: Path) -> Iterator[Path]:
    """A folder that holds the state in DeepSpeed's universal format as long as this is open; collective.

    Its name is that of the state, so that what a killed process left is replaced. Raises ValueError on all ranks where
    the conversion fails.
    """
    checkpoint = next((p for p in (folder, *folder.parents) if (p / MANIFEST).is_file()), folder)
    name = "-".join((checkpoint.name, *folder.relative_to(checkpoint).parts))
    converted = checkpoint.parent / f".{_UNIVERSAL}-{name}"
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        problem = [_convert(folder, converted)]
    dist.broadcast_object_list(problem)
    try:
        if problem[0]:
            raise ValueError(f"{folder} cannot be converted for another rank count: {problem[0]}")
        yield converted
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(converted, ignore_errors=True)


def _convert(folder: Path, converted: Path) -> str | None:
    """Write ``converted``; returns what went wrong."""
    shutil.rmtree(converted, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / _TAG), "--output_folder", str(converted / _UNIVERSAL)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stderr.strip()[-500:] or f"exit code {done.returncode}") if done.returncode else None


def _deepspeed_config(config: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    bf16 = dtype == torch.bfloat16
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # The gradient of a weight is freed once it is added to the sum.
        "bf16": {"enabled": bf16, "immediate_grad_update": True},
    }
    if bf16 and config.fp32_gradients:
        # In bf16 a sum over many micro-batches stops growing: 256 + 1 is 256.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


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
