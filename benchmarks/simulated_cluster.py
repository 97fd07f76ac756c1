"""A Ray cluster of several nodes on this machine, whose nodes can be killed as a power cut would.

    Nodes(head_cpus=1) ── add(cpus=2) ──► a raylet with workers of its own ── kill(node) ──► gone with all of them

Everything it starts listens on loopback, uses a token and a temporary folder of its own, carries `MARK` in its
environment, and is ended at close. The calling process itself does not join.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

import psutil

MARK = f"TSTAR_CHAOS_{os.getpid()}_{secrets.token_hex(4)}"
"""Name of an environment variable that every process of the cluster, and nothing else, has."""


class Nodes:
    """The cluster; use as a context manager."""

    def __init__(self, *, head_cpus: float) -> None:
        self._folder = tempfile.mkdtemp(prefix="chaos-", dir="/tmp")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": self._folder,  # also where Ray notes the newest cluster, for `auto`
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback is not replaced by this host's address
            MARK: "1",
        }
        """For processes that join."""
        os.environ.update(self.environment)
        from ray._raylet import Config  # type: ignore[attr-defined]
        from ray.cluster_utils import Cluster

        Config.initialize("")  # Ray caches these variables when it is first imported

        (Path(self._folder) / "ray").mkdir()
        quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
        self._cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": head_cpus,
                "include_dashboard": False,
                "node_ip_address": "127.0.0.1",
                "_system_config": quick,
            },
        )

    @property
    def address(self) -> str:
        """What `cluster.address` takes."""
        return self._cluster.address

    @property
    def killable(self) -> list[Any]:
        """Nodes but the head, whose loss ends a cluster."""
        return list(self._cluster.worker_nodes)

    def add(self, *, cpus: float) -> Any:
        """One more node."""
        return self._cluster.add_node(num_cpus=cpus, node_ip_address="127.0.0.1")

    def workers(self, node: Any) -> set[int]:
        """Processes that a node's raylet started."""
        return {child.pid for child in psutil.Process(self._raylet(node)).children(recursive=True)}

    @staticmethod
    def _raylet(node: Any) -> int:
        return node.all_processes["raylet"][0].process.pid

    def kill(self, node: Any) -> int:
        """SIGKILL to all processes of a node; its workers end as their raylet is gone. Returns the raylet's pid."""
        pid = self._raylet(node)
        self._cluster.remove_node(node, allow_graceful=False)
        return pid

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
