"""Settings of rollout actors and of the engines they decode with (``actors.*``)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tstar_ray.config_base import Section


class VllmConfig(Section):
    """The vLLM engine (`actors.engine=vllm`); docs/engines.md."""

    tensor_parallel: int = Field(1, ge=1)
    """Ranks that share a model; on GPUs `actors.gpus` must be as many."""
    memory_share: float | None = Field(None, gt=0, le=1)
    """Share of a GPU's memory that weights and cache may take; None: `actors.cache_gb` for the cache."""
    max_block: int = Field(0, ge=0)
    """Largest block size it decodes; 0: the largest of the curriculum and of evaluations."""
    max_tokens: int = Field(0, ge=0)
    """Longest sequence, prompt and completion; 0: data.max_prompt_tokens + rollout.max_new_tokens."""
    prefix_caching: bool = True
    """Keep the cache of prompts for later requests that begin alike, of the same block size and weights."""
    async_scheduling: bool = False
    """Schedule a step while the one before runs."""


class ActorsConfig(Section):
    """Rollout actors."""

    count: int = Field(2, ge=1)
    """Rollout actors; each has its own copy of the model."""
    engine: Literal["torch", "vllm"] = "torch"
    """Which engine decodes; docs/engines.md says what differs."""
    max_batch: int = Field(128, ge=1)
    """Sequences an actor decodes at once."""
    cache_gb: float = Field(4.0, gt=0)
    """GiB of keys and values an actor may hold."""
    cache_update: Literal["recompute", "keep"] = "recompute"
    """What new weights in mid-sequence do to keys and values of the older ones: recompute keeps every recorded
    log-prob exact; keep costs nothing and marks the trajectory."""
    cuda_graphs: bool = False
    """Record denoising passes of the torch engine as CUDA graphs, which spares the host their launches. Has not
    run on a GPU yet."""
    triton_kernels: bool = False
    """Compute what stands between the matrix products of recorded passes with Triton kernels, about half as many
    launches. Has not run on a GPU yet."""
    gpus: float = Field(0, ge=0)
    """GPUs an actor takes."""
    cpus: float = Field(1, gt=0)
    """CPU cores an actor takes; scaled down where the cluster has fewer and no GPUs are used."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that an actor's node must have, e.g. {ray.io/accelerator-type: H100}; see `ray start --labels`."""
    timeout_s: float = Field(600, gt=0)
    """An actor that takes longer for one batch counts as failed."""
    max_restarts: int = Field(3, ge=0)
    """Replacements of lost actors within an hour, for each wanted one, before the run gives up; of reward actors too.
    """
    backoff_s: float = Field(1.0, ge=0)
    """Seconds before the second replacement in a row of one actor; doubled for each further one, up to a minute."""
    probe_s: float = Field(10, gt=0)
    """Seconds between health probes, and within which one has to be answered; of reward actors too."""
    probe_failures: int = Field(6, ge=1)
    """Probes in a row that an actor may leave unanswered before it is replaced."""
    stall_s: float = Field(300, gt=0)
    """An actor that holds work and makes no progress for so long is replaced."""
    vllm: VllmConfig = VllmConfig()
    """Settings of that engine."""

    @model_validator(mode="after")
    def _graphs(self) -> Self:
        if self.cuda_graphs and self.engine != "torch":
            raise ValueError(
                f"actors.cuda_graphs=true is a setting of actors.engine=torch, and the engine is {self.engine}, "
                "which decides by itself; leave it out"
            )
        if self.cuda_graphs and not self.gpus:
            raise ValueError(
                "actors.cuda_graphs=true needs a GPU, but actors.gpus=0; set actors.gpus=1 or leave it out"
            )
        if self.triton_kernels and not self.cuda_graphs:
            raise ValueError(
                "actors.triton_kernels=true is for recorded passes, and actors.cuda_graphs=false; set "
                "actors.cuda_graphs=true or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _ranks(self) -> Self:
        if self.engine == "vllm":
            ranks = self.vllm.tensor_parallel
            if self.gpus and self.gpus != ranks:
                raise ValueError(
                    f"actors.gpus={self.gpus:g} and actors.vllm.tensor_parallel={ranks}: each rank takes one GPU; "
                    "make them equal"
                )
            if not self.gpus and self.vllm.memory_share is not None:
                raise ValueError(
                    f"actors.vllm.memory_share={self.vllm.memory_share:g} is a share of a GPU's memory, but "
                    "actors.gpus=0; set actors.cache_gb instead"
                )
        return self
