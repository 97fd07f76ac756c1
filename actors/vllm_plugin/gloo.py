"""The CPU twin of vLLM's NCCL weight transfer: the trainer's rank 0 broadcasts every parameter to all workers.

    trainer: GlooSender.send_weights ──gloo──► GlooReceiver in every worker ──► the model's own loader (fused, sharded)
             └──start / update / finish──► client ──► engine (see `actors.vllm_engine.VllmEngine`)

Registered as backend ``gloo`` with both of vLLM's factories. Trainer and engine belong into different processes.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)


@dataclass
class GlooInit(WeightTransferInitInfo):
    """Where the group meets."""

    master_address: str
    """Of the trainer."""
    master_port: int
    """Free there."""
    rank_offset: int
    """Rank of the engine's first worker."""
    world_size: int
    """The trainer and all workers."""


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """What will be sent, in order."""

    names: list[str] = field(default_factory=list)
    """As in the checkpoint."""
    dtype_names: list[str] = field(default_factory=list)
    """torch names."""
    shapes: list[list[int]] = field(default_factory=list)
    """Unsharded."""


def _join(info: GlooInit, rank: int) -> Any:
    return stateless_init_torch_distributed_process_group(
        info.master_address, info.master_port, rank, info.world_size, "gloo"
    )


def _broadcast(group: Any, tensor: torch.Tensor) -> None:
    options = torch.distributed.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([tensor], options).wait()


class GlooReceiver(WeightTransferEngine[GlooInit, GlooUpdate]):
    """In every worker."""

    init_info_cls, update_info_cls = GlooInit, GlooUpdate
    group: Any = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Meet the trainer."""
        parallel = self.parallel_config
        self.group = _join(
            init_info, init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        )

    def start_weight_update(self) -> None:
        """Nothing: parameters are written in place (see `actors.vllm_plugin.model`)."""

    def finish_weight_update(self) -> None:
        """Nothing."""

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """One parameter after the other."""
        if self.group is None:
            raise RuntimeError("no trainer yet; call init_weight_transfer_engine first")
        model: Any = self.model
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            _broadcast(self.group, weight)
            model.load_weights([(name, weight.to(self.device))])

    def shutdown(self) -> None:
        """Leave the group."""
        self.group = None


@dataclass
class GlooSenderInit(TrainerInitInfo):
    """Of the trainer."""

    backend: ClassVar[str] = "gloo"
    master_address: str
    """Its own."""
    master_port: int
    """Free."""
    world_size: int
    """The trainer and all workers."""


class GlooSender(TrainerWeightTransferEngine[GlooSenderInit]):
    """In the trainer."""

    init_info_cls = GlooSenderInit
    group: Any = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooSenderInit, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        """Both sides meet inside this call."""
        made = cls(client=client, source=source, is_sender=init_info.is_sender)
        if made.is_sender:
            info = GlooInit(init_info.master_address, init_info.master_port, 1, init_info.world_size)
            with ThreadPoolExecutor(1) as pool:
                joined = pool.submit(client.init_weight_transfer_engine, dataclasses.asdict(info))
                made.group = _join(info, 0)
                joined.result()
        return made

    def send_weights(self) -> None:
        """A whole round: start, broadcast while the engine receives, finish."""
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:  # other ranks take part in gathering
                pass
            return
        metadata = self.source.metadata()
        update = GlooUpdate(
            names=[m.name for m in metadata],
            dtype_names=[str(m.dtype).removeprefix("torch.") for m in metadata],
            shapes=[list(m.shape) for m in metadata],
        )
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as pool:
            received = pool.submit(self.client.update_weights, dataclasses.asdict(update))
            for _, weight in self.source:
                _broadcast(self.group, weight.detach().cpu().contiguous())
            received.result()
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        """Leave the group."""
        self.group = None
