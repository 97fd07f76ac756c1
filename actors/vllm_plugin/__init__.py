"""Block diffusion on an unmodified vLLM 0.32.0, as an out-of-tree plugin.

vLLM's own diffusion path keeps a *canvas* for every request, and runs all of it in every pass::

    scheduler ──canvas of B positions──► runner ──► model ──► hidden states ──► sampler
        ▲   stops on whole blocks          attention: state            which rows? LM head, draw, reveal
        │                                                                          │
        └── denoising step: no token, the cursor stays ◄──────────────────────────┤
        └── commit: the block's tokens with step map, log-probs, weight version ◄──┘

- **One grid.** A prompt is submitted whole, also where it ends inside a block (or is shorter than one). After it was
  read, the sampler moves the runner's cursor back to the grid; the canvas then holds the tail and masks.
- **Whole terminal blocks.** The scheduler stops a request after the block with a stop token, or at its last grid line.
- **The trace** travels where log-probs do: rank = denoising step, a second column of ids = weight version.
- **The rules are shared.** Drawing, unmasking and random numbers are tstar_ray.unmask, as in the PyTorch engine, so
  that both decode the same tokens from the same seeds.

Everything here is loaded by vLLM in all of its processes; importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

import logging
import os

VERSION = "0.32.0"
"""The only vLLM this plugin knows: it builds on parts that vLLM does not declare public."""
ARCHITECTURE = "TStarBlockDiffusionForCausalLM"
"""What the checkpoint's architecture is overridden with."""
MODEL_TYPES = ("qwen3", "sdar")
"""Checkpoints that can be served."""


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; may be called more than once in a process.

    Every vLLM process of the environment comes here: beside another version nothing is touched, and a warning says so.
    """
    import vllm

    if vllm.__version__.split("+")[0] != VERSION:
        logging.getLogger(__name__).warning(
            "tstar_ray's plugin is for vLLM %s and stays out of %s", VERSION, vllm.__version__
        )
        return
    from transformers import AutoConfig, Qwen3Config
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer.factory import (
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )
    from vllm.platforms import current_platform

    class SDARConfig(Qwen3Config):
        model_type = "sdar"

    AutoConfig.register("sdar", SDARConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "actors.vllm_plugin.model:BlockDiffusionForCausalLM")
    for factory, name in (
        (WeightTransferEngineFactory, "GlooReceiver"),
        (WeightTransferTrainerFactory, "GlooSender"),
    ):
        if "gloo" not in factory._registry:
            factory.register_engine("gloo", "actors.vllm_plugin.gloo", name)
    if current_platform.is_cpu() and not os.environ.get("TRITON_INTERPRET"):
        from actors.vllm_plugin.cpu_kernels import install

        install()
