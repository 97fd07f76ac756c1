"""What each actor gets of the cluster, decided before any of them is asked for.

GPUs are exact: asking for more than there are is an error at once, where Ray would wait for ever, unless nodes may
join for them (``cluster.autoscaling``). CPU shares give way: on a laptop with two cores, two rollout actors, a
verifier and a learner share them, because in the synchronous loop they work one after the other. Node labels
(``actors.labels`` and so on) say which kind of node an actor goes to, e.g. its type of GPU.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.session import ClusterError
from tstar_ray.config import Config


@dataclass(frozen=True, slots=True)
class Placement:
    """Ray options and thread counts."""

    rollout: dict[str, Any]
    """Of one rollout actor."""
    reward: dict[str, Any]
    """Of one reward actor."""
    learner: dict[str, Any]
    """Of one learner rank."""
    rollout_threads: int
    """Compute threads of a rollout actor on CPU."""
    learner_threads: int
    """Compute threads of a learner rank on CPU."""
    notes: tuple[str, ...]
    """What a user should know."""


def plan(config: Config, resources: Mapping[str, float], *, with_learner: bool = True) -> Placement:
    """Fit the actors of a run into a cluster's resources; raises ClusterError."""
    actors, reward, learner = config.actors, config.reward, config.learner
    ranks = learner.ranks if with_learner else 0
    gpus = actors.count * actors.gpus + ranks * learner.gpus
    have_gpus = resources.get("GPU", 0.0)
    if gpus > have_gpus and not config.cluster.autoscaling:
        raise ClusterError(
            f"{gpus:g} GPUs asked ({actors.count} rollout actors x actors.gpus={actors.gpus:g} + {ranks} "
            f"learner ranks x learner.gpus={learner.gpus:g}), the cluster has {have_gpus:g}; lower one of them, "
            "join a larger cluster with cluster.address, or set cluster.autoscaling=true if nodes join on demand"
        )
    cpus = actors.count * actors.cpus + reward.count * reward.cpus + ranks * learner.cpus
    have_cpus = resources.get("CPU", 0.0)
    if have_cpus <= 0:
        raise ClusterError("the cluster has no CPU resource to place actors on")
    share, notes = 1.0, []
    if cpus > have_cpus and not config.cluster.autoscaling:
        if gpus:
            raise ClusterError(
                f"{cpus:g} CPU cores asked, the cluster has {have_cpus:g}; lower actors.cpus, reward.cpus or "
                "learner.cpus"
            )
        # A little is left for what else runs in the cluster, and Ray counts in steps of 0.0001.
        share = 0.95 * have_cpus / cpus
        notes.append(f"{cpus:g} CPU cores asked, {have_cpus:g} there: every actor gets {share:.0%} of its share")
    cores = int(max(1, have_cpus))

    def options(cpus: float, gpus: float, labels: Mapping[str, str]) -> dict[str, Any]:
        fitted: dict[str, Any] = {"num_cpus": int(cpus * share * 1e4) / 1e4, "num_gpus": gpus}
        return fitted | ({"label_selector": dict(labels)} if labels else {})

    return Placement(
        rollout=options(actors.cpus, actors.gpus, actors.labels),
        reward=options(reward.cpus, 0, reward.labels),
        learner=options(learner.cpus, learner.gpus, learner.labels),
        rollout_threads=max(1, cores // actors.count),
        learner_threads=learner.threads or max(1, cores // learner.ranks),
        notes=tuple(notes),
    )


class Together:
    """Room for several actors at once, on one node where they fit and on few where not: for ranks that exchange
    gradients. Ray alone would spread them once half of a node is taken."""

    def __init__(self, count: int, options: Mapping[str, Any]) -> None:
        """``options`` of one actor. Returns at once, with or without the room."""
        self._options, self._group = dict(options), None
        if count > 1:
            from ray.util import placement_group

            labels = self._options.pop("label_selector", None)
            asked = {"CPU": options.get("num_cpus", 0), "GPU": options.get("num_gpus", 0)}
            bundle = {name: amount for name, amount in asked.items() if amount} or {"CPU": 0.0001}
            self._group = placement_group(
                [bundle] * count, strategy="PACK", bundle_label_selector=[labels] * count if labels else None
            )

    def options(self, index: int) -> dict[str, Any]:
        """Ray's for actor number ``index``."""
        if self._group is None:
            return self._options
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return self._options | {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, index)}

    def free(self) -> None:
        """Give the room back, from actors that have ended."""
        if self._group is not None:
            from ray.util import remove_placement_group

            remove_placement_group(self._group)
            self._group = None


class ActorLostError(ClusterError):
    """An actor died before it was ready, with or without its node."""


def wait_ready(refs: Mapping[str, Any], timeout_s: float, what: str, *, supervised: bool = False) -> dict[str, Any]:
    """Results of all actors' first calls. Raises ClusterError with an actor's own message where it failed, and
    with the names of those not ready and what the cluster has left where time ran out; ActorLostError for one that
    died, unless they are ``supervised`` and whoever does that replaces it."""
    import ray

    # A process that the kernel or Ray ended for want of memory has died like any other.
    died = ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError
    names = {ref: name for name, ref in refs.items()}
    pending, results = list(names), {}
    deadline = time.monotonic() + timeout_s
    while pending:
        done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            late = ", ".join(sorted(names[ref] for ref in pending))
            raise ClusterError(
                f"{what} not ready after {timeout_s:g} s: {late}. The cluster has {amounts(ray.cluster_resources())}, "
                f"free {amounts(ray.available_resources())}; lower what the actors ask for, or raise "
                "cluster.start_timeout_s"
            )
        for ref in done:
            try:
                results[names[ref]] = ray.get(ref)
            except died as error:
                if not supervised:
                    raise ActorLostError(f"{names[ref]} did not start: {_cause(error)}") from error
            except ray.exceptions.RayError as error:
                raise ClusterError(f"{names[ref]} did not start: {_cause(error)}") from error
    return results


def amounts(resources: Mapping[str, float]) -> str:
    """CPU and GPU of a resource mapping, to read."""
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _cause(error: Any) -> str:
    """The actor's own message; an error in a constructor arrives as text with its traceback."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a message."""
    text = str(getattr(error, "cause", None) or error).strip()
    return (text.splitlines() or [type(error).__name__])[0][:200]
