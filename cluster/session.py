"""The Ray cluster of a run: join one that runs, or start a private one, and leave only what was there before.

    cluster.address or RAY_ADDRESS given ──► join it         (nothing of it is ever stopped)
    neither                              ──► private cluster (loopback, own token, own folder; ended at close)

A private cluster lives in a temporary folder of its own, listens on loopback, and uses token authentication
with a token made for this process, so that neither ``~/.ray`` nor another cluster on the machine matters. Ray replaces
127.0.0.1 by an address that others can reach, unless its switch for clusters of several nodes is off. Its processes
form a session of their own, out of reach of signals to the driver's process group, as `timeout` sends them: what the
driver saves when it is stopped takes a cluster that still works. They end with the driver, however it ends.
Workers get normal priority, this process's import path, so that the packages need not be installed, and threads that
sleep while they wait for one another: those that spin, as is OpenMP's default, slow each other many times where several
processes share the cores. All this is in the environment of a whole private cluster, since workers with a runtime
environment of their own cannot be started ahead.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.private_folder import PrivateFolder
from tstar_ray.config import ClusterConfig

_REACH_S = 5.0
_TOKEN = secrets.token_hex(32)
"""Of every private cluster of this process: Ray keeps the first token it reads."""
_PACKAGES = ("tstar_ray", "actors", "learner", "reward", "cluster")


class ClusterError(RuntimeError):
    """The cluster cannot do what was asked; the message names what is missing and the remedy."""


@dataclass(slots=True)
class Session:
    """A connection to Ray; use as a context manager."""

    private: bool
    """Started by us, and ended at `close`."""
    dashboard_url: str | None
    """Where the dashboard answers."""
    resources: dict[str, float]
    """What the cluster has in all, e.g. CPU and GPU."""
    temp_dir: Path | None
    """Folder of the private cluster."""
    token: str | None = None
    """What the private cluster's dashboard asks for."""
    _undo: ExitStack = field(default_factory=ExitStack)
    """Takes back what a private cluster changed in this process and on disk."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; a private cluster ends and its folder goes."""
        import ray

        with self._undo:
            ray.shutdown()


def connect(cluster: ClusterConfig, *, namespace: str, logs: Path | None = None) -> Session:
    """Join or start; raises ClusterError.

    ``namespace`` keeps actor names apart from other runs'. ``logs`` takes what a private cluster's processes printed,
    when it ends; None: it goes with the cluster.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS", "")
    on_term = signal.getsignal(signal.SIGTERM)
    session = _join(address, namespace) if address else _start(cluster, namespace, logs)
    if callable(on_term) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)  # Ray has set one that ends the process with a stack trace
    return session


def _common(namespace: str) -> dict[str, Any]:
    return {
        "namespace": namespace,
        "logging_level": logging.ERROR,
        "log_to_driver": True,
    }


def _for_workers() -> dict[str, str]:
    """Environment of workers."""
    return {"PYTHONPATH": _import_path(), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}


def _import_path() -> str:
    """Folders that workers need to import the packages and whatever else this process can."""
    roots = {
        str(Path(spec.origin).parent.parent)
        for spec in map(importlib.util.find_spec, _PACKAGES)
        if spec and spec.origin
    }
    return os.pathsep.join([*sorted(roots), *filter(None, [os.environ.get("PYTHONPATH", "")])])


def _join(address: str, namespace: str) -> Session:
    import ray

    if address not in ("auto", "local"):
        _check_reachable(address)
    try:
        context = ray.init(address=address, runtime_env={"env_vars": _for_workers()}, **_common(namespace))
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"no Ray cluster could be joined at {address!r}: {_first_line(error)}. Start one with "
            "`ray start --head`, or leave cluster.address and RAY_ADDRESS empty for a private one"
        ) from error
    url = f"http://{context.dashboard_url}" if context.dashboard_url else None
    return Session(private=False, dashboard_url=url, resources=ray.cluster_resources(), temp_dir=None)


def _check_reachable(address: str) -> None:
    """Ray itself would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"cluster.address or RAY_ADDRESS is {address!r}; write HOST:PORT, ray://HOST:PORT or auto")
    try:
        with socket.create_connection((host, int(port)), timeout=_REACH_S):
            return
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address!r} ({error}); check cluster.address and RAY_ADDRESS, "
            "or leave both empty for a private one"
        ) from error


def _start(cluster: ClusterConfig, namespace: str, logs: Path | None) -> Session:
    if cluster.dashboard:
        _check_free(cluster.dashboard_port)
    changed = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _TOKEN,
        "RAY_worker_niceness": "0",
        **_for_workers(),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # read by processes of Ray; the constant below by this one
    }
    with ExitStack() as undo:
        undo.callback(_set_environment, {name: os.environ.get(name) for name in changed})
        _set_environment(changed)
        import ray
        from ray._private import ray_constants
        from ray._raylet import Config  # type: ignore[attr-defined]

        Config.initialize("")  # Ray caches these variables when it is first imported
        undo.callback(setattr, ray_constants, "ENABLE_RAY_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER)
        ray_constants.ENABLE_RAY_CLUSTER = False
        folder = PrivateFolder(logs)
        undo.callback(folder.remove)
        try:
            with _processes_in_own_sessions():
                context = ray.init(
                    address="local",
                    include_dashboard=cluster.dashboard,
                    dashboard_host="127.0.0.1",
                    dashboard_port=cluster.dashboard_port if cluster.dashboard else None,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(folder.path),
                    **_common(namespace),
                )
        except Exception as error:
            raise ClusterError(f"the private Ray cluster did not start: {_first_line(error)}") from error
        url = f"http://{context.dashboard_url}" if cluster.dashboard and context.dashboard_url else None
        return Session(True, url, ray.cluster_resources(), folder.path, _TOKEN, _undo=undo.pop_all())


@contextmanager
def _processes_in_own_sessions() -> Iterator[None]:
    """Ray's processes that are started meanwhile lead sessions. Ray calls what is replaced here in each of them before
    it becomes its program, and has no setting for this."""
    from ray._private import utils

    die_with_parent = utils.set_kill_on_parent_death_linux

    def lead_session() -> None:
        os.setsid()
        die_with_parent()

    utils.set_kill_on_parent_death_linux = lead_session
    try:
        yield
    finally:
        utils.set_kill_on_parent_death_linux = die_with_parent


def _set_environment(values: Mapping[str, str | None]) -> None:
    """Set variables, and remove those that are None."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ClusterError(
                f"port {port} is in use; set cluster.dashboard_port to a free one, or cluster.dashboard=false"
            ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
