"""Train a block-diffusion language model by T*: larger blocks, stage by stage, with TraceRL at each.

    python -m tstar_ray.run                                  the embedded run: B=4 to 16 on two CPU cores
    python -m tstar_ray.run --config configs/sdar_4b_8gpu.yaml run.dir=/data/runs
    python -m tstar_ray.run run.name=NAME run.resume=auto    again after any kill: the same command continues
    python -m tstar_ray.run curriculum.mode=direct actors.count=4 --print-config
    ray job submit --working-dir . -- python -m tstar_ray.run run.dir=/abs/path

Joins the cluster in RAY_ADDRESS (as in a Ray job) or cluster.address, and starts a private one otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tstar_ray.budget import read_budget
from tstar_ray.claim import claim_folder
from tstar_ray.command import run_command
from tstar_ray.config import Config, ConfigError
from tstar_ray.signals import StopSignals


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 nothing could be scored or the engine failed its check, 2 a mistake in settings or
    surroundings, 130 stopped by a signal."""
    return run_command(
        Config,
        launch,
        argv,
        module="tstar_ray.run",
        description=__doc__,
        settings="docs/configuration.md",
        interrupted="stopped at once; the newest checkpoint is in the run folder",
        example="actors.count=4",
    )


def launch(config: Config) -> int:
    """Run one configuration to its end."""
    # Imported late, so that a mistake in the settings is answered at once.
    from cluster.session import ClusterError
    from learner.group import LearnerError
    from tstar_ray.checkpoint import CheckpointError
    from tstar_ray.reporter import Reporter
    from tstar_ray.tracking import open_trackers

    if config.learner.replay:
        return replay_update(config, config.learner.replay)
    with claim_folder(config) as (folder, config):
        if config is None:
            print(f"{folder} has ended already; its trained model is in {folder / 'final'}")
            return 0
        total = sum(stage.gate.updates for stage in config.curriculum.resolve())
        trackers = open_trackers(config.run.trackers, folder, config.model_dump(mode="json"))
        with Reporter(folder, total=total, trackers=trackers) as reporter:
            reporter.say(f"run folder {folder}")
            reporter.settings(config.to_yaml())
            try:
                result = _run(config, folder, reporter)
            except (ConfigError, ClusterError, LearnerError, CheckpointError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            if result.stopped:
                reporter.say(f"stopped after update {result.updates}; continue with run.resume={folder}")
                return 130
            reporter.table(result.before, result.after)
            reporter.say(f"trained model: {folder / 'final'}")
            if config.run.report:
                add_report(folder, reporter.say)
            return 0


def add_report(folder: Path, say: Callable[[str], None]) -> None:
    """Write the run's HTML report. The run has ended well: whatever goes wrong here is said, and no more."""
    try:
        from tstar_ray.report import write_run_report

        say(f"report: {write_run_report(folder)}")
    except Exception as error:
        say(f"no report ({type(error).__name__}: {error}); try python -m tstar_ray.report {folder}")


def replay_update(config: Config, traces: Path) -> int:
    """`learner.replay`: one update on saved trajectories, its report printed as JSON; what makes it differ from the
    update in its run is said on stderr."""
    from cluster.placement import plan, wait_ready
    from cluster.session import ClusterError, connect
    from learner.credit import is_trainable
    from learner.group import LearnerError
    from learner.report import report_dict
    from tstar_ray.checkpoint import CheckpointError, newest_checkpoint
    from tstar_ray.stage_settings import update_spec
    from tstar_ray.traces import read_origin, read_traces

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    if not traces.is_file():
        raise ConfigError(f"learner.replay={traces}: no such file")
    try:
        groups, origin = read_traces(traces), read_origin(traces)
    except (OSError, ValueError) as error:
        raise ConfigError(f"learner.replay={traces}: not readable as trajectories: {error}") from error
    if not groups:
        raise ConfigError(f"learner.replay={traces}: holds no trajectories")
    block = groups[0].samples[0].trajectory.block_size
    stages = [stage for stage in config.curriculum.resolve() if stage.rollout_block == block]
    if not stages:
        raise ConfigError(
            f"learner.replay={traces}: block size {block} is in no stage; set curriculum.blocks=[{block}]"
        )
    named = [stage for stage in stages if origin and stage.name == origin.stage]
    stage = (named or sorted(stages, key=lambda stage: stage.is_bridge))[0]
    if not named:
        why = f"no stage is called {origin.stage}" if origin else "the file names none"
        say(f"trained as stage {stage.name}: {why}")
    groups = [group for group in groups if is_trainable(group, config.learner.loss, stage.objective)]
    if not groups:
        raise ConfigError(
            f"learner.replay={traces}: stage {stage.name} learns from none of its groups (no contrast, or outside "
            "learner.loss.accuracy_band)"
        )
    resume, update, before = config.run.resume, origin.update if origin else None, 0
    if resume == Path("auto"):
        if not config.run.name:
            raise ConfigError("run.resume=auto needs run.name: the folder to look into is run.dir/run.name")
        resume = config.run.dir / config.run.name
    try:
        with ExitStack() as stack:
            checkpoint = newest_checkpoint(resume / "checkpoints", refused=say, latest=update) if resume else None
            before = checkpoint.state["update"] if checkpoint else 0
            update = before if update is None else update
            if before != update:
                say(f"approximate: from the weights after update {before}; its run had those after update {update}")
            session = stack.enter_context(connect(config.cluster, namespace=f"tstar-replay-{os.getpid()}"))
            placement = plan(config, session.resources)
            learner = _start_learner(config, placement, stack)
            limit = config.cluster.start_timeout_s
            learner.places = wait_ready(learner.start(limit), limit, "learner")
            if checkpoint:
                learner.load(checkpoint.folder / "learner")
            report = learner.update(groups, update_spec(config, stage), update=update)
    except (ClusterError, LearnerError, CheckpointError) as error:
        say(f"error: {error}")
        return 2
    print(json.dumps(report_dict(report), indent=1))
    return 0


def _run(config: Config, folder: Path, reporter: Any) -> Any:
    """Look at model and data, then cluster, actors, controller."""
    from actors.rollout import check_engine
    from cluster.metrics import Metrics
    from cluster.placement import plan
    from cluster.session import connect
    from tstar_ray.controller import Controller
    from tstar_ray.data import load_problem_sets
    from tstar_ray.model_files import inspect_checkpoint
    from tstar_ray.samples import decoder

    try:
        tokenizer, stop_ids = inspect_checkpoint(config.model.path, mask_token_id=config.model.mask_token_id)
        check_engine(config.model, config.served_actors)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    reporter.decode = decoder(tokenizer)
    problems = load_problem_sets(config.data, tokenizer, held_out=config.eval.problems)
    reporter.say(
        f"model {config.model.path}; {len(problems.train)} problems to train on, {len(problems.held_out)} held out"
        + (f"; {problems.left_out} left out as too long" if problems.left_out else "")
        + (f"; {problems.shared} not trained on, as they are held out" if problems.shared else "")
    )
    config = _scaled(config, folder, reporter.say)
    with ExitStack() as stack:
        logs = folder / "logs" / time.strftime("%Y%m%d-%H%M%S")
        session = stack.enter_context(
            connect(config.cluster, namespace=f"tstar-{folder.name}-{os.getpid()}", logs=logs)
        )
        placement = plan(config, session.resources)
        for note in placement.notes:
            reporter.say(note)
        reporter.say(f"{'private Ray cluster' if session.private else 'Ray cluster'}{_dashboard(session, folder)}")
        metrics = stack.enter_context(Metrics(run=folder.name))
        metrics.set("rollout_actors_starting", config.actors.count)
        metrics.set("reward_actors_starting", config.reward.count)
        learner, collector = _start_actors(config, folder, placement, stack, reporter)
        controller = Controller(
            config,
            folder,
            learner=learner,
            collector=collector,
            problems=problems,
            stop_ids=stop_ids,
            reporter=reporter,
            metrics=metrics,
        )
        stack.enter_context(StopSignals(controller, reporter.say))
        result = controller.run()
    if not result.stopped:
        spent = {"budget": read_budget(folder / "metrics.jsonl")}
        unfinished = folder / ".result.json"  # the file itself says that the run has ended
        unfinished.write_text(json.dumps(dataclasses.asdict(result) | spent, indent=1))
        unfinished.rename(folder / "result.json")
    return result


def _scaled(config: Config, folder: Path, say: Callable[[str], None]) -> Config:
    """With as many actors as were asked for last while the run went on."""
    from cluster.scale import REQUEST, read_request

    try:
        counts = read_request(folder)
    except ValueError as error:
        say(str(error))
        return config
    for role, section in (("rollout", "actors"), ("reward", "reward")):
        settings = getattr(config, section)
        count = counts.get(role, settings.count)
        if count != settings.count:
            say(f"{count} {role} actors instead of {section}.count={settings.count}, as {folder / REQUEST} asks")
            config = config.model_copy(update={section: settings.model_copy(update={"count": count})})
    return config


def _dashboard(session: Any, folder: Path) -> str:
    """Where the dashboard is, and the file with the token that a private cluster's asks for."""
    if not session.dashboard_url:
        return ""
    if not session.token:
        return f", dashboard {session.dashboard_url}"
    file = folder / "dashboard-token"
    file.unlink(missing_ok=True)
    file.touch(mode=0o600)
    file.write_text(session.token)
    return f", dashboard {session.dashboard_url}; the token it asks for is in {file}"


def _start_actors(config: Config, folder: Path, placement: Any, stack: ExitStack, reporter: Any) -> tuple[Any, Any]:
    """Learner ranks, rollout actors and reward actors, all ready within the start limit."""
    make_rollout, make_reward = actor_makers(config, placement)
    reporter.phase(None, "starting actors")
    learner = _start_learner(config, placement, stack)
    return learner, start_rollouts(config, folder, learner, make_rollout, make_reward, stack, reporter)


def actor_makers(config: Config, placement: Any) -> tuple[Callable[[int, str], Any], Callable[[int, str], Any]]:
    """What makes rollout actor and reward actor number ``index`` under a name."""
    from actors.rollout import remote_class as rollout_class
    from cluster.weights import ObjectStoreTransport
    from reward.actor import remote_class as reward_class

    transport, rollout_actor, reward_actor = ObjectStoreTransport(), rollout_class(), reward_class()

    def make_rollout(index: int, name: str) -> Any:
        return rollout_actor.options(name=name, **placement.rollout).remote(
            index, config.model, config.served_actors, threads=placement.rollout_threads, weights=transport
        )

    def make_reward(index: int, name: str) -> Any:
        return reward_actor.options(name=name, **placement.reward).remote(
            index,
            workers=config.reward.workers,
            deadline_s=config.reward.deadline_s,
            grader=config.reward.grader,
        )

    return make_rollout, make_reward


def start_rollouts(
    config: Config,
    folder: Path,
    learner: Any,
    make_rollout: Callable[[int, str], Any],
    make_reward: Callable[[int, str], Any],
    stack: ExitStack,
    reporter: Any,
    on_tick: Callable[[], None] = lambda: None,
) -> Any:
    """Supervised pools of both kinds of actors, and the collector that drives them, once all and the learner (None: an
    evaluation has none) are ready; raises ClusterError past the start limit. Under ``cluster.autoscaling`` the pools
    wait for theirs."""
    from cluster.placement import ActorLostError, wait_ready
    from cluster.pool import ActorPool, Supervision
    from cluster.scale import Desk
    from learner.group import LearnerLostError
    from tstar_ray.collection import Limits
    from tstar_ray.collector import Collector

    actors, start_s = config.actors, config.cluster.start_timeout_s
    supervision = Supervision(
        start_s=start_s,
        probe_s=actors.probe_s,
        probe_failures=actors.probe_failures,
        stall_s=actors.stall_s,
        max_restarts=actors.max_restarts,
        backoff_s=actors.backoff_s,
    )

    def pool(role: str, make: Callable[[int, str], Any], count: int, *, serves_weights: bool) -> ActorPool:
        made = ActorPool(
            role,
            make,
            count=count,
            supervision=supervision,
            serves_weights=serves_weights,
            on_event=reporter.say,
        )
        stack.callback(made.stop)
        return made

    rollouts = pool("rollout", make_rollout, actors.count, serves_weights=True)
    rewards = pool("reward", make_reward, config.reward.count, serves_weights=False)
    if not config.cluster.autoscaling:
        wait_ready(rollouts.starting | rewards.starting, start_s, "actors", supervised=True)
    if learner:
        learner.on_event = reporter.say
        try:
            learner.places = wait_ready(learner.start(start_s), start_s, "learner")
        except (ActorLostError, LearnerLostError) as error:
            reporter.say(f"{error}; building the learner anew")
            learner.restart(start_s)
    ahead = config.rollout.max_staleness > 0
    limits = Limits(
        rollout_s=actors.timeout_s,
        reward_s=config.reward.deadline_s,
        start_s=start_s,
        max_attempts=config.rollout.max_attempts,
        # In turns: a unit for each actor. Ahead: small ones, and as many as keep an engine's slots filled while units
        # wait for the longest of their samples; what finds no slot waits in the engine.
        in_flight=2 * actors.max_batch if ahead else 1,
        unit=max(1, actors.max_batch // 4) if ahead else 0,
        scoring=max(64, 4 * config.reward.workers),
    )
    desk = Desk(
        folder, {"rollout": rollouts, "reward": rewards}, lambda: learner.places if learner else {}, reporter.say
    )

    def tick() -> None:
        desk.tick()
        if learner:
            learner.check()  # the owner of the weights that actors wait for
        on_tick()

    return Collector(
        rollouts,
        rewards,
        limits,
        seed=config.run.seed,
        score_truncated=config.reward.score_truncated,
        on_event=reporter.say,
        on_tick=tick,
    )


def _start_learner(config: Config, placement: Any, stack: ExitStack) -> Any:
    from cluster.weights import ObjectStoreTransport
    from learner.group import LearnerGroup

    learner = LearnerGroup(
        config.model,
        config.learner,
        options=placement.learner,
        threads=placement.learner_threads,
        seed=config.run.seed,
        weights=ObjectStoreTransport(),
    )
    stack.callback(learner.stop)
    return learner


if __name__ == "__main__":
    sys.exit(main())
