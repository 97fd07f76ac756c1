"""What there is to run on: this machine, a Ray cluster that runs, or a machine that is supposed. Starts nothing."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

from tstar_ray.config import Config

_CONNECT_S = 60.0


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to run on."""

    where: str
    """This machine, the cluster, or the supposed machine."""
    cpus: float
    """Cores, of all nodes together."""
    gpus: float
    """GPUs, of all nodes together."""
    gpu_gib: float | None
    """Memory of the smallest GPU; None: not known."""
    host_gib: float | None
    """Memory beside the GPUs, of all nodes together; None: not known."""


def look(
    config: Config, *, gpus: float | None, gpu_gib: float | None, host_gib: float | None
) -> tuple[Machine, str | None]:
    """The cluster of RAY_ADDRESS or cluster.address, else this machine, and what is wrong with it; ``gpus`` supposes
    another machine, the others its memory in GiB."""
    local = _gpu_gib()
    smallest = gpu_gib or min(local, default=None)
    if gpus is not None:
        cpus = max(float(os.cpu_count() or 1), _cpus_asked(config))
        return Machine(f"a machine with {gpus:g} GPUs", cpus, gpus, smallest, host_gib), None
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        where = f"the cluster at {address}"
        resources, trouble = _cluster_resources(config, where)
        # Ray takes a part of a node's memory for its object store, and offers the rest.
        memory = resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0)
        cpus, gpus, host = resources.get("CPU", 0.0), resources.get("GPU", 0.0), memory / 2**30 or None
        return Machine(where, cpus, gpus, smallest, host_gib or host), trouble
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine("this machine", float(os.cpu_count() or 1), len(local), smallest, host_gib or host), None


def _cluster_resources(config: Config, where: str) -> tuple[dict[str, float], str | None]:
    """What a running cluster has, or nothing and why."""
    from cluster.session import ClusterError, connect

    found: list[Any] = []

    def ask() -> None:
        try:
            with connect(config.cluster, namespace=f"tstar-doctor-{os.getpid()}") as session:
                found.append(session.resources)
        except Exception as error:
            found.append(error)

    # Ray itself may wait for ever for a cluster that is there and does not answer, or wants another token.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_CONNECT_S)
    if not found:
        return {}, f"{where} gives no answer in {_CONNECT_S:g} s"
    if isinstance(found[0], ClusterError):
        return {}, str(found[0])
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0], None


def _cpus_asked(config: Config) -> float:
    actors, reward, learner = config.actors, config.reward, config.learner
    return actors.count * actors.cpus + reward.count * reward.cpus + learner.ranks * learner.cpus


def _gpu_gib() -> list[float]:
    """Memory of every GPU that PyTorch sees."""
    try:
        import torch
    except ImportError:
        return []
    count = torch.cuda.device_count()
    return [torch.cuda.get_device_properties(i).total_memory / 2**30 for i in range(count)]
