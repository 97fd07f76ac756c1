"""Training state on the Ray dashboard: gauges of `ray.util.metrics`, tagged by run.

Ray exports them as ``ray_tstar_*`` on every node's metrics port; in Prometheus or Grafana, for instance::

    ray_tstar_phase{run="NAME"} == 1                      what the loop is doing
    ray_tstar_accuracy{run="NAME"}                        rollout accuracy of the last update
    delta(ray_tstar_verdicts{run="NAME"}[5m])             verifier outcomes
    ray_tstar_groups{run="NAME", outcome="failed"}        groups that no sample could be scored for
    deriv(ray_tstar_actor_tokens{run="NAME"}[5m])         tokens a second of each actor

``cluster/grafana`` has a dashboard of all of them. Every series but those of actors is there from the start with 0,
so that no selector meets a missing one; totals are gauges, because Ray's counters cannot start at 0. Ray drops a gauge
from its endpoint that was not set for two of its export intervals, so a thread sets all of them again and again.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
    "kl": "KL to the reference policy (learner.loss.kl_reference) over the last update, in nats",
    "buffer_depth": "groups dispatched and not ended",
    "rollout_actors": "live rollout actors",
    "reward_actors": "live reward actors",
    "rollout_actors_starting": "rollout actors wanted that do not work yet: starting, restarting, proving weights",
    "reward_actors_starting": "reward actors wanted that do not work yet",
    "actor_restarts": "actors replaced so far",
    "learner_restarts": "times the learner group was built anew",
    "staleness": "largest distance in weight versions of the last update's tokens",
    "rollout_idle": "share of the last update that rollout actors were idle",
    "learner_idle": "share of the last update that the learner was idle",
    "publish_seconds": "seconds of the last weight publish",
}
_AGAIN_S = 0.5


class Metrics:
    """One run's metrics, and the seconds spent in each phase; a context manager, which shows them while it is open."""

    def __init__(self, *, run: str) -> None:
        self._gauges = {name: Gauge(f"tstar_{name}", text, ("run",)) for name, text in GAUGES.items()}
        self._phase = Gauge("tstar_phase", "1 for what the loop is doing", ("run", "phase"))
        self._groups = Gauge("tstar_groups", "groups by how they ended", ("run", "outcome"))
        self._verdicts = Gauge("tstar_verdicts", "verifications by outcome", ("run", "verdict"))
        self._tokens = Gauge("tstar_actor_tokens", "completion tokens decoded by each actor", ("run", "actor"))
        for metric in (*self._gauges.values(), self._phase, self._groups, self._verdicts, self._tokens):
            metric.set_default_tags({"run": run})
        self._shown: dict[Any, tuple[Gauge, float, dict[str, str]]] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="metrics", daemon=True)
        for name in GAUGES:
            self.set(name, 0)
        for phase in PHASES:
            self._show(self._phase, 0, phase=phase)
        self.count_groups(dict.fromkeys(OUTCOMES, 0))
        self.verdicts: dict[str, int] = dict.fromkeys(VERDICTS, 0)
        """Verifications of the whole run, by outcome."""
        self.count_verdicts({})
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def __enter__(self) -> Metrics:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _show(self, gauge: Gauge, value: float, **tags: str) -> None:
        with self._lock:
            self._shown[gauge, *tags.items()] = gauge, value, tags
            gauge.set(value, tags)

    def _keep(self) -> None:
        while not self._closed.wait(_AGAIN_S):
            with self._lock:
                for gauge, value, tags in self._shown.values():
                    gauge.set(value, tags)

    def set(self, name: str, value: float) -> None:
        """Set a gauge of `GAUGES`."""
        self._show(self._gauges[name], value)

    def count_groups(self, ended: Mapping[str, int]) -> None:
        """Totals of the ledger."""
        for outcome, count in ended.items():
            self._show(self._groups, count, outcome=outcome)

    def count_verdicts(self, verdicts: Mapping[str, int]) -> None:
        """Add verifications of one collection."""
        for verdict, count in verdicts.items():
            self.verdicts[verdict] = self.verdicts.get(verdict, 0) + count
        for verdict, total in self.verdicts.items():
            self._show(self._verdicts, total, verdict=verdict)

    def count_tokens(self, tokens: Mapping[str, int]) -> None:
        """Completion tokens of each actor so far."""
        for actor, total in tokens.items():
            self._show(self._tokens, total, actor=actor)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a phase while it lasts, and add up its seconds."""
        start = time.monotonic()
        self._show(self._phase, 1, phase=name)
        try:
            yield
        finally:
            self._show(self._phase, 0, phase=name)
            self._seconds[name] += time.monotonic() - start

    def take_seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken
