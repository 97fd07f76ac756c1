"""Turn an autoregressive checkpoint into a block-diffusion model, by supervised fine-tuning.

    python -m tstar_ray.adapt model.path=Qwen/Qwen3-1.7B-Base data.train=gsm8k.jsonl train.gpus=1 train.ranks=4
    python -m tstar_ray.adapt --config configs/adapt_qwen3.yaml run.name=NAME run.resume=auto
    python -m tstar_ray.adapt stages='[{epochs: 1, mixture: {4: 1}}, {epochs: 1, mixture: {8: 0.5, 16: 0.5}}]' ...

    samples ──► prompts and answers ──► noise, slices ──► DeepSpeed ranks ──► final/, which model.path takes
                     order, block size and masks: functions of the seed and the step alone

Ctrl-C or SIGTERM finishes the step, saves and ends; the same command with run.resume=auto continues bit for bit.
Joins the cluster in RAY_ADDRESS or cluster.address, and starts a private one otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tstar_ray.claim import claim_folder
from tstar_ray.command import run_command
from tstar_ray.config_adapt import AdaptConfig
from tstar_ray.config_base import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake in settings or surroundings, 130 stopped by a signal."""
    return run_command(
        AdaptConfig,
        launch,
        argv,
        module="tstar_ray.adapt",
        description=__doc__,
        settings="docs/configuration.md",
        interrupted="stopped at once; the newest checkpoint is in the run folder",
        example="train.lr=1e-5",
    )


def launch(config: AdaptConfig) -> int:
    """Run one adaptation to its end."""
    # Imported late, so that a mistake in the settings is answered at once.
    from cluster.session import ClusterError
    from learner.group import LearnerError
    from tstar_ray.checkpoint import CheckpointError
    from tstar_ray.reporter import Reporter
    from tstar_ray.tracking import open_trackers

    if not config.model.path:
        raise ConfigError("model.path is empty: give the checkpoint to adapt, a local folder or hub name")
    auto = config.run.resume == Path("auto")
    name = config.run.name or ("" if auto else f"{time.strftime('%Y%m%d-%H%M%S')}-adapt")
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    with claim_folder(config) as (folder, config):
        if config is None:
            print(f"{folder} has ended already; its model is in {folder / 'final'}")
            return 0
        trackers = open_trackers(config.run.trackers, folder, config.model_dump(mode="json"))
        with Reporter(folder, total=1, trackers=trackers) as reporter:
            reporter.say(f"run folder {folder}")
            reporter.settings(config.to_yaml())
            try:
                stopped = _run(config, folder, reporter)
            except (ClusterError, LearnerError, CheckpointError) as error:
                again = f"\ncontinue with run.resume={folder}" if any(folder.glob("checkpoints/u*")) else ""
                print(f"error: {error}{again}", file=sys.stderr)
                return 2
            if stopped:
                reporter.say(f"stopped; continue with run.resume={folder}")
                return 130
            reporter.say(f"block-diffusion model: {folder / 'final'}")
            return 0


def _run(config: AdaptConfig, folder: Path, reporter: Any) -> bool:
    """Look at model and data, then cluster, ranks, loop; True when stopped by a signal."""
    from cluster.placement import wait_ready
    from cluster.scale import Desk
    from cluster.session import connect
    from cluster.weights import ObjectStoreTransport
    from learner.adapter import AdapterGroup, adapter_rank
    from tstar_ray.adapt_data import load_example_sets
    from tstar_ray.model_files import inspect_checkpoint
    from tstar_ray.signals import StopSignals

    model, train = config.model, config.train
    try:
        tokenizer, stop_ids = inspect_checkpoint(
            model.path, mask_token_id=model.mask_token_id, new_mask_token=model.mask_token
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    examples = load_example_sets(config.data, tokenizer, stop_ids, largest_block=max(config.blocks))
    reporter.say(
        f"model {model.path}; {len(examples.train)} samples to train on, {len(examples.held_out)} held out"
        + (f"; {examples.left_out} left out as too long" if examples.left_out else "")
    )
    with ExitStack() as stack:
        logs = folder / "logs" / time.strftime("%Y%m%d-%H%M%S")
        namespace = f"tstar-adapt-{folder.name}-{os.getpid()}"
        session = stack.enter_context(connect(config.cluster, namespace=namespace, logs=logs))
        options, threads = _place(config, session.resources)
        group = AdapterGroup(
            model,
            train.learner(),
            options=options,
            threads=threads,
            seed=config.run.seed,
            weights=ObjectStoreTransport(),
            rank_class=adapter_rank(config.noise),
        )
        stack.callback(group.stop)
        start_s = config.cluster.start_timeout_s
        # Only ranks that have a place are asked for signs of life.
        group.places = wait_ready(group.start(start_s), start_s, "ranks")
        Desk(folder, {}, lambda: group.places, reporter.say).tick()
        loop = Adaptation(config, folder, group=group, examples=examples, reporter=reporter)
        stack.enter_context(StopSignals(loop, reporter.say))
        return loop.run()


def _place(config: AdaptConfig, resources: dict[str, float]) -> tuple[dict[str, float], int]:
    """Ray's options and the compute threads of one rank; CPU shares give way, GPUs are exact, unless nodes may join."""
    from cluster.session import ClusterError

    train, fixed = config.train, not config.cluster.autoscaling
    if fixed and train.ranks * train.gpus > resources.get("GPU", 0.0):
        raise ClusterError(
            f"{train.ranks * train.gpus:g} GPUs asked ({train.ranks} ranks x train.gpus={train.gpus:g}), the cluster "
            f"has {resources.get('GPU', 0.0):g}; lower one of them, join a larger cluster with cluster.address, or set "
            "cluster.autoscaling=true if nodes join on demand"
        )
    cores = resources.get("CPU", 1.0)
    share = min(train.cpus, 0.95 * cores / train.ranks) if fixed else train.cpus
    options = {"num_cpus": int(share * 1e4) / 1e4, "num_gpus": train.gpus}
    return options, train.threads or max(1, int(cores) // train.ranks)


class Adaptation:
    """The loop: one optimizer step after another, with losses on held-out samples and checkpoints between."""

    def __init__(self, config: AdaptConfig, folder: Path, *, group: Any, examples: Any, reporter: Any) -> None:
        from learner.adaptation import make_schedule

        self._config, self._folder, self._group, self._reporter = config, folder, group, reporter
        self._train, self._held_out = examples.train, examples.held_out
        self._schedule = make_schedule(
            config.stages,
            samples=len(self._train),
            batch=config.train.batch,
            lr=config.train.lr,
            warmup=config.train.warmup,
            final_lr=config.train.final_lr,
            seed=config.run.seed,
        )
        order = {
            "stages": [stage.model_dump() for stage in config.stages],
            "train.batch": config.train.batch,
            "run.seed": config.run.seed,
            "training samples": len(self._train),
        }
        self._order: dict[str, Any] = json.loads(json.dumps(order))
        """What says which samples a step trains on, and at which block size."""
        self._step, self._before = 0, dict[int, float]()
        self._tokens = {"answer": 0, "forwarded": 0}
        self.stop_requested = False
        """Set by a signal handler: stop at the next step."""

    def run(self) -> bool:
        """To the end, or to a stop; True when stopped."""
        config, total = self._config, self._schedule.steps
        if config.run.resume:
            self._resume(config.run.resume)
        else:
            self._before = self._evaluate("start model")
        while self._step < total and not self.stop_requested:
            self._advance(total)
            if config.eval_every and self._step % config.eval_every == 0 and self._step < total:
                self._evaluate(f"after step {self._step}")
            if self._step % config.run.checkpoint_every == 0 or self._step == total:
                self._checkpoint()
        if self._step < total:
            self._checkpoint()
            return True
        after = self._evaluate("adapted model")
        self._group.finish(self._folder / "final", self._schedule_block())
        result = {
            "steps": self._step,
            "samples": self._step * config.train.batch,
            "tokens": self._tokens,
            "loss_before": self._before,
            "loss_after": after,
        }
        (self._folder / "result.json").write_text(json.dumps(result, indent=1))
        return False

    def _schedule_block(self) -> int:
        """The block size the checkpoint is meant for: the likeliest of the last stage."""
        mixture = self._schedule.mixtures[-1]
        return max(mixture, key=lambda block: mixture[block])

    def _advance(self, total: int) -> None:
        from learner.adaptation import batch_indices

        config, step = self._config, self._step
        plan = self._schedule.plan(step)
        indices = batch_indices(step, batch=config.train.batch, samples=len(self._train), seed=config.run.seed)
        report = self._group.update([self._train[i] for i in indices], plan, update=step)
        self._step += 1
        self._tokens["answer"] += report.answer_tokens
        self._tokens["forwarded"] += report.forwarded_tokens
        self._reporter.numbers("step", self._step, {f"train/{k}": v for k, v in dataclasses.asdict(report).items()})
        self._reporter.steps(self._step, total, report, every=config.run.log_every)

    def _evaluate(self, label: str) -> dict[int, float]:
        """Held-out loss for each answer token at every block size."""
        if not self._held_out:
            return {}
        self._reporter.phase(None, f"held-out loss, {label}")
        losses = self._group.losses(self._held_out, self._config.blocks)
        self._reporter.numbers("evaluation", self._step, {f"eval/loss_b{b}": loss for b, loss in losses.items()})
        shown = ", ".join(f"B={b} {loss:.4f}" for b, loss in losses.items())
        self._reporter.say(f"  {label}: held-out loss in nats a token: {shown} ({len(self._held_out)} samples)")
        return losses

    def _checkpoint(self) -> None:
        from tstar_ray.checkpoint import write_checkpoint

        state = {"step": self._step, "before": self._before, "tokens": self._tokens, "order": self._order}
        write_checkpoint(
            self._folder / "checkpoints",
            self._step,
            json.loads(json.dumps(state)),
            lambda folder: self._group.save(folder / "learner"),
            keep=self._config.run.keep_checkpoints,
        )

    def _resume(self, folder: Path) -> None:
        from tstar_ray.checkpoint import newest_checkpoint

        checkpoint = newest_checkpoint(folder / "checkpoints", refused=self._reporter.say)
        state = checkpoint.state
        for name, value in self._order.items():
            if state["order"][name] != value:
                raise ConfigError(
                    f"{checkpoint.folder} was made with {name}={state['order'][name]}, this command has {value}: "
                    "samples would be repeated or left out; give the same, or another run.name for a new one"
                )
        self._group.load(checkpoint.folder / "learner")
        self._step, self._tokens = state["step"], state["tokens"]
        self._before = {int(block): loss for block, loss in state["before"].items()}
        self._reporter.rewind(self._step)
        self._reporter.say(f"resumed {checkpoint.folder} after step {self._step}")


if __name__ == "__main__":
    sys.exit(main())
