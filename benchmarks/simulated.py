"""A run of the real controller over simulated rollout actors and a simulated learner (`benchmarks.simulated_actors`).

    real: Ray, controller, collector, supervised pools, weight transport, verifier processes, accounting, checkpoints
    simulated: the model

What scaling studies measure with it is the system around the model.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.simulated_actors import SimulatedRank, SimulatedRollout, Times
from cluster.metrics import Metrics
from cluster.session import connect
from cluster.weights import ObjectStoreTransport
from learner.group import LearnerGroup
from reward.actor import remote_class as reward_class
from reward.grading import Verdict
from tstar_ray.config import Config
from tstar_ray.controller import Controller
from tstar_ray.data import ProblemSets, PromptedProblem
from tstar_ray.problems import Problem
from tstar_ray.record import Result
from tstar_ray.reporter import Reporter
from tstar_ray.run import start_rollouts


def grade(text: str, answer: str) -> Verdict:
    """A grader that costs nothing; the verifier's processes and pipes are real."""
    return Verdict.correct if text == answer else Verdict.wrong


def simulate(
    config: Config, times: Times, folder: Path, *, name: str, rank_class: type[SimulatedRank] = SimulatedRank
) -> Result:
    """One run of the real controller; its records are in ``folder``/metrics.jsonl."""
    import ray

    problem = Problem("0", "", "right")
    problems = tuple(PromptedProblem(problem, tuple(range(1, 1 + 16))) for _ in range(1024))
    folder.mkdir(parents=True)
    for method in ("ready", "progress"):
        ray.method(concurrency_group="health")(getattr(SimulatedRollout, method))
    options: Any = {"max_concurrency": 64, "concurrency_groups": {"health": 1, "weights": 1}}
    for method in ("load_weights", "cancel"):
        ray.method(concurrency_group="weights")(getattr(SimulatedRollout, method))
    rollout, reward = ray.remote(**options)(SimulatedRollout), reward_class()
    with ExitStack() as stack:
        stack.enter_context(connect(config.cluster, namespace=name))
        reporter = stack.enter_context(Reporter(folder, total=config.curriculum.updates[0]))
        learner = LearnerGroup(
            times,  # type: ignore[arg-type]  # in the place of a model: what SimulatedRank needs to know
            config.learner,
            options={"num_cpus": 0},
            threads=1,
            seed=0,
            weights=ObjectStoreTransport(),
            rank_class=rank_class,
        )
        stack.callback(learner.stop)
        collector = start_rollouts(
            config,
            folder,
            learner,
            lambda index, name: rollout.options(name=name, num_cpus=0).remote(index, times),
            lambda index, name: reward.options(name=name, num_cpus=0).remote(
                index, workers=1, deadline_s=10.0, grader="benchmarks.simulated:grade"
            ),
            stack,
            reporter,
        )
        controller = Controller(
            config,
            folder,
            learner=learner,
            collector=collector,
            problems=ProblemSets(problems, problems[:1], left_out=0, shared=0),
            stop_ids=(0,),
            reporter=reporter,
            metrics=Metrics(run=name),
        )
        return controller.run()
