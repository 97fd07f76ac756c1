"""Training state on the Ray dashboard: gauges of `ray.util.metrics`, tagged by run.

Ray exports them as ``ray_tstar_*`` on every node's metrics port; in Prometheus or Grafana, for instance::

    ray_tstar_phase{run="NAME"} == 1                      what the loop is doing
    ray_tstar_accuracy{run="NAME"}                        rollout accuracy of the last update
    delta(ray_tstar_verdicts{run="NAME"}[5m])             verifier outcomes
    ray_tstar_groups{run="NAME", outcome="failed"}        groups that no sample could be scored for
    deriv(ray_tstar_actor_tokens{run="NAME"}[5m])         tokens a second of each actor

``cluster/grafana`` has a dashboard of all of them. Every series but those of actors is there from the start with 0,
so that no selector meets a missing one; totals are gauges, because Ray's counters cannot start at 0.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray.util.metrics import Gauge

PHASES = ("rollout", "train", "publish", "evaluate", "checkpoint")
VERDICTS = ("correct", "wrong", "unparsable", "timeout", "crashed", "rejected")
OUTCOMES = ("trained", "filtered", "failed", "cancelled")
GAUGES = {
    "stage": "index of the curriculum stage",
    "rollout_block_size": "block size of rollouts",
    "train_block_size": "block size of training",
    "weight_version": "version of the weights that actors serve",
    "accuracy": "rollout accuracy of the last update",
    "tokens_per_forward": "TPF of the last rollouts, without commits",
    "reward": "mean reward of the last rollouts",
    "kl": "k3 to the policy before the update, in nats",
    "buffer_depth": "groups dispatched and not ended",
    "rollout_actors": "live rollout actors",
    "reward_actors": "live reward actors",
    "actor_restarts": "actors replaced so far",
    "learner_restarts": "times the learner group was built anew",
    "staleness": "largest distance in weight versions of the last update's tokens",
    "rollout_idle": "share of the last update that rollout actors were idle",
    "learner_idle": "share of the last update that the learner was idle",
    "publish_seconds": "seconds of the last weight publish",
}


class Metrics:
    """One run's metrics, and the seconds spent in each phase."""

    def __init__(self, *, run: str) -> None:
        tags = {"run": run}
        self._gauges = {name: Gauge(f"tstar_{name}", text, ("run",)) for name, text in GAUGES.items()}
        self._phase = Gauge("tstar_phase", "1 for what the loop is doing", ("run", "phase"))
        self._groups = Gauge("tstar_groups", "groups by how they ended", ("run", "outcome"))
        self._verdicts = Gauge("tstar_verdicts", "verifications by outcome", ("run", "verdict"))
        self._tokens = Gauge("tstar_actor_tokens", "completion tokens decoded by each actor", ("run", "actor"))
        for metric in (*self._gauges.values(), self._phase, self._groups, self._verdicts, self._tokens):
            metric.set_default_tags(tags)
        for name in GAUGES:
            self.set(name, 0)
        for phase in PHASES:
            self._phase.set(0, {"phase": phase})
        self.count_groups(dict.fromkeys(OUTCOMES, 0))
        self.verdicts: dict[str, int] = dict.fromkeys(VERDICTS, 0)
        """Verifications of the whole run, by outcome."""
        self.count_verdicts({})
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def set(self, name: str, value: float) -> None:
        """Set a gauge of `GAUGES`."""
        self._gauges[name].set(value)

    def count_groups(self, ended: Mapping[str, int]) -> None:
        """Totals of the ledger."""
        for outcome, count in ended.items():
            self._groups.set(count, {"outcome": outcome})

    def count_verdicts(self, verdicts: Mapping[str, int]) -> None:
        """Add verifications of one collection."""
        for verdict, count in verdicts.items():
            self.verdicts[verdict] = self.verdicts.get(verdict, 0) + count
        for verdict, total in self.verdicts.items():
            self._verdicts.set(total, {"verdict": verdict})

    def count_tokens(self, tokens: Mapping[str, int]) -> None:
        """Completion tokens of each actor so far."""
        for actor, total in tokens.items():
            self._tokens.set(total, {"actor": actor})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a phase while it lasts, and add up its seconds."""
        start = time.monotonic()
        self._phase.set(1, {"phase": name})
        try:
            yield
        finally:
            self._phase.set(0, {"phase": name})
            self._seconds[name] += time.monotonic() - start

    def take_seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken
