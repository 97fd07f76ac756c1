"""More or fewer actors while a run goes on.

    python -m cluster.scale runs/NAME                           who runs where
    python -m cluster.scale runs/NAME --rollout 8 --reward 2    change it, and wait until it is so
    ray job submit -- python -m cluster.scale --job NAME --run-dir /data/runs --rollout 8

The command writes ``scale.json`` into the run folder, and the driver answers in ``status.json``; both are replaced
as a whole. What was asked for last also holds for a run that resumes, from its start on. Actors the cluster has no
room for stay pending: Ray's autoscaler sees them, and they start when nodes join. A file that holds no such request is
named and ignored. Where nothing works in the folder the command says so instead of waiting, and a run that has ended
takes no request.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.pool import ActorPool
from tstar_ray.claim import held_by
from tstar_ray.place import Place, here

REQUEST, STATUS = "scale.json", "status.json"
_ROLES = ("rollout", "reward")
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray tells the driver of a submitted job: its submission id, and what `--metadata-json` gave."""


def read_request(folder: Path) -> dict[str, int]:
    """Actors that were asked for, by role; empty where nothing was. Raises ValueError with the file and the remedy."""
    path = folder / REQUEST
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is ignored: {error}; ask again by python -m cluster.scale, or delete the file"
        ) from error


def _parse(request: bytes) -> dict[str, int]:
    counts = json.loads(request)
    if not isinstance(counts, dict):
        raise ValueError(f"it holds {counts!r} instead of a number of actors by role")
    for role, count in counts.items():
        if role not in _ROLES:
            raise ValueError(f"{role!r} is none of {', '.join(_ROLES)}")
        if type(count) is not int or count < 1:
            raise ValueError(f"{role} = {count!r}, but it takes a whole number of actors, at least 1")
    return counts


class Desk:
    """The driver's side: call `tick` now and then."""

    def __init__(
        self,
        folder: Path,
        pools: Mapping[str, ActorPool],
        learner: Callable[[], Mapping[str, Place]],
        on_event: Callable[[str], None],
    ) -> None:
        """``pools`` by role; ``learner`` tells where its ranks run."""
        self._folder, self._pools, self._learner, self._on_event = folder, pools, learner, on_event
        self._refused = ""
        self._written = ""
        self._driver, self._job = here("driver"), json.loads(os.environ.get(_JOB, "{}")).get("metadata", {})

    def tick(self) -> None:
        """Take a request if there is a new one, and say how things stand."""
        for role, count in self._request().items():
            pool = self._pools[role]
            if count != pool.count:
                self._on_event(f"{pool.count} {role} actors wanted so far, now {count}")
                pool.resize(count)
        status = json.dumps(self._status(), indent=1)
        if status != self._written:
            _replace(self._folder / STATUS, status)
            self._written = status

    def _request(self) -> dict[str, int]:
        try:
            return read_request(self._folder)
        except ValueError as error:
            if str(error) != self._refused:
                self._refused = str(error)
                self._on_event(self._refused)
            return {}

    def _status(self) -> dict[str, Any]:
        def places(found: Mapping[str, Place]) -> dict[str, Any]:
            return {name: asdict(place) for name, place in found.items()}

        status: dict[str, Any] = {"driver": asdict(self._driver), "job": self._job}
        status["learner"] = {"actors": places(self._learner())}
        for role, pool in self._pools.items():
            status[role] = {
                "wanted": pool.count,
                "live": sorted(pool.handles),
                "lost": pool.restarts,
                "actors": places(pool.places),
            }
        return status


def read_status(folder: Path) -> dict[str, Any]:
    """What the driver said last; raises FileNotFoundError where none did."""
    return json.loads((folder / STATUS).read_text())


def ask(folder: Path, counts: Mapping[str, int]) -> None:
    """Ask for this many actors of each role; roles that are not named stay as they are."""
    try:
        before = read_request(folder)
    except ValueError:
        before = {}
    _replace(folder / REQUEST, json.dumps(before | dict(counts)))


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 as asked, 1 not in time (it stays asked for), 2 a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, help="run folder")
    parser.add_argument("--job", metavar="NAME", help="run name, instead of the folder")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="parent of run folders (runs)")
    for role in _ROLES:
        parser.add_argument(f"--{role}", type=int, metavar="N", help=f"{role} actors")
    parser.add_argument("--wait", type=float, default=60.0, metavar="S", help="seconds to wait until it is so (60)")
    arguments = parser.parse_args(argv)
    if (arguments.folder is None) == (arguments.job is None):
        parser.error("give a run folder, or --job NAME")
    folder: Path = arguments.folder or arguments.run_dir / arguments.job
    counts = {role: count for role in _ROLES if (count := getattr(arguments, role)) is not None}
    for role, count in counts.items():
        if count < 1:
            parser.error(f"--{role} {count}: at least 1; stop the run with Ctrl-C or SIGTERM")
    try:
        roles = [role for role in _ROLES if role in read_status(folder)]
    except OSError as error:
        print(f"error: {folder} is no folder of a run that has started ({error})", file=sys.stderr)
        return 2
    if counts.keys() - set(roles):
        print(f"error: {folder} has no actors to add: only its learner works there", file=sys.stderr)
        return 2
    works = held_by(folder) != ""
    if counts and not works and (folder / "result.json").is_file():
        print(f"error: {folder} has ended: no actors are needed any more", file=sys.stderr)
        return 2
    if counts:
        ask(folder, counts)
    deadline = time.monotonic() + (arguments.wait if works else 0.0)
    while True:
        status = read_status(folder)
        there = all(status[role]["wanted"] == n == len(status[role]["live"]) for role, n in counts.items())
        if there or time.monotonic() >= deadline:
            break
        time.sleep(0.2)
    if not works:
        print(f"nothing works in {folder} now; what follows was so when it ended or was lost")
    for role in roles:
        print(f"{role}: {status[role]['wanted']} wanted, {len(status[role]['live'])} work, {status[role]['lost']} lost")
    for role in (*roles, "learner"):
        for name, place in status[role]["actors"].items():
            print(f"  {name} on {place['node']}, process {place['pid']}, log {place['log'] or 'on its terminal'}")
    if not there:
        when = "stays asked for" if works else f"holds from its next start on (run.resume={folder})"
        print(f"not all of them work yet; what was asked for {when}", file=sys.stderr)
    return 0 if there else 1


if __name__ == "__main__":
    sys.exit(main())
