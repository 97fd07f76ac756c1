"""Break a real run on purpose, and see that it loses nothing and learns all the same; prints JSON.

    python -m benchmarks.chaos [--faults 200] [--updates 30 40] [--seed 0] [--staleness 2] [--out FILE]

    undisturbed run ──► accuracy that there is to gain
    same run, on a Ray cluster of three (simulated) nodes ◄── faults: SIGKILL, SIGSTOP to rollout and reward actors,
      │                                                       verifiers, learner ranks, the driver, whole nodes
      ▼
    faults happened? recovery ran? no group lost or trained twice? staleness within its bound? as much learned?

Fault number i of n becomes due when i/n of the updates are made, so that there is progress whatever happens, and
strikes after a further moment drawn from the seed: whatever the loop does just then, and whether or not earlier ones
are mended. A run that ends with an error, does not move on, whose books do not add up, or that ends while a fault of
more than a minute ago is not mended is a failure: exit code 1, with what happened. ``--no-baseline`` leaves out the
undisturbed run, and learning is not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.chaos_audit import audit
from benchmarks.chaos_faults import KINDS, STOP, Fault, draw_kinds, is_whole, ours, send, victims
from benchmarks.simulated_cluster import Nodes
from cluster.scale import read_status

NODE_CPUS, NODES = 2, 2
RANKS, VERIFIERS = 2, 2
_GAP_S, _STUCK_S, _MENDED_S = 2.0, 240.0, 60.0
_GAIN = 0.5
"""Share of the undisturbed run's gain in held-out accuracy that the disturbed one has to reach as well; the two
differ by chance, since faults change which samples are drawn."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--updates", type=int, nargs="+", default=[30, 40], help="of stages B=4 and B=8")
    parser.add_argument("--staleness", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="more settings of the run")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep run folders and output there")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-runs-"))
    folder.mkdir(parents=True, exist_ok=True)
    with Nodes(head_cpus=NODE_CPUS) as nodes:
        for _ in range(NODES):
            nodes.add(cpus=NODE_CPUS)
        found: dict[str, Any] = {"benchmark": "chaos", "machine": platform.node(), "cores": os.cpu_count()}
        found |= {"faults": arguments.faults, "seed": arguments.seed}
        if not arguments.no_baseline:
            found["undisturbed"] = Chaos(nodes, folder, "undisturbed", arguments, faults=0).run()
        found["disturbed"] = Chaos(nodes, folder, "disturbed", arguments, faults=arguments.faults).run()
    if not arguments.no_baseline:
        found["learning"] = _compare(found["undisturbed"], found["disturbed"])
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 0 if arguments.no_baseline or found["learning"]["reached"] else 1


class Chaos:
    """One run, the faults that it is to survive, and what became of both."""

    def __init__(self, nodes: Nodes, folder: Path, name: str, arguments: argparse.Namespace, *, faults: int) -> None:
        self._nodes, self._folder, self._log = nodes, folder / name, folder / f"{name}.log"
        self._updates = sum(arguments.updates)
        self._kinds = draw_kinds(faults, arguments.seed)
        self._chance = random.Random(arguments.seed + 1)
        self._command = [sys.executable, "-m", "tstar_ray.run", f"run.dir={folder}", f"run.name={name}"]
        self._command += [*_settings(arguments), f"cluster.address={nodes.address}", *arguments.set]
        self._driver: subprocess.Popen[bytes] | None = None
        self._faults: list[Fault] = []
        self._made = self._drivers = 0
        self._earliest = 0.0
        self._moved = time.monotonic()

    def run(self) -> dict[str, Any]:
        """To the end of the run; raises AssertionError with the end of its output where it does not recover."""
        began = time.monotonic()
        try:
            self._start_driver()
            while not self._ended():
                self._look()
                if self._is_due():
                    self._strike(self._kinds[len(self._faults)])
                time.sleep(0.05)
            assert len(self._faults) == len(self._kinds), f"the run ended after {len(self._faults)} faults"
            late = time.monotonic() - _MENDED_S
            unmended = [f.kind for f in self._faults if f.recovered_s is None and f.began < late]
            assert not unmended, f"the run was not seen whole again in {_MENDED_S:g} s and more after {unmended}"
            assert self._drivers == 1 + self._kinds.count("driver killed")
            return self._summary(time.monotonic() - began)
        except AssertionError as error:
            tail = self._log.read_text(errors="replace")[-3000:]
            raise AssertionError(f"{error}\n... the end of {self._log}:\n{tail}") from error
        finally:
            if self._driver and self._driver.poll() is None:
                self._driver.kill()
                self._driver.wait()

    def _start_driver(self) -> None:
        with self._log.open("ab") as log:
            self._driver = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._nodes.environment | {"COLUMNS": "200"}
            )
        self._drivers += 1

    def _ended(self) -> bool:
        assert self._driver is not None
        code = self._driver.poll()
        assert code in (None, 0), f"the driver ended with code {code}"
        assert time.monotonic() - self._moved < _STUCK_S, f"no progress for {_STUCK_S:g} s"
        return code == 0

    def _look(self) -> None:
        """Note progress, and which faults are mended."""
        assert self._driver is not None
        with suppress(OSError):
            rows = (self._folder / "metrics.jsonl").read_bytes().count(b'"kind": "update"')
            if rows > self._made:
                self._made, self._moved = rows, time.monotonic()
        open_faults = [fault for fault in self._faults if fault.recovered_s is None]
        if not open_faults:
            return
        serving = is_whole(self._folder, self._driver.pid, VERIFIERS, RANKS)
        for fault in open_faults:
            gone = all(ours(pid) is None for pid in fault.pids)
            if serving is not None and gone and serving.isdisjoint(fault.pids):
                self._moved = time.monotonic()
                fault.recovered_s = self._moved - fault.began

    def _is_due(self) -> bool:
        number = len(self._faults)
        if number == len(self._kinds) or time.monotonic() < self._earliest:
            return False
        # The last ones come early enough to be mended before the run ends.
        span = self._updates - max(8, self._updates // 7)
        return self._made >= 1 + span * number / len(self._kinds)

    def _strike(self, kind: str) -> None:
        """One fault; none if there is nobody to hit at this moment, and it is tried again."""
        role, what, _ = KINDS[kind]
        began = time.monotonic()
        if role == "node":
            pids = self._lose_node()
        else:
            pids = self._hit(role, what)
        if pids is None:
            return
        self._faults.append(Fault(kind, pids, began))
        self._earliest = time.monotonic() + self._chance.uniform(0, _GAP_S)
        with self._log.open("a") as log:
            log.write(f"## fault {len(self._faults)}: {kind}, processes {pids}\n")

    def _hit(self, role: str, what: signal.Signals) -> tuple[int, ...] | None:
        try:
            found = victims(role, read_status(self._folder))
        except OSError:
            return None
        assert self._driver is not None
        if role == "driver":  # not one that has just started and is not known to serve
            found = [self._driver.pid] if self._driver.pid in found else []
        if not found:
            return None
        pid = self._chance.choice(found)
        try:
            send(pid, what)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return None
        if role != "driver":
            return (pid,)
        if what == STOP:
            time.sleep(self._chance.uniform(2, 10))
            os.kill(pid, signal.SIGCONT)
            return ()
        self._driver.wait()
        self._start_driver()
        return (pid,)

    def _lose_node(self) -> tuple[int, ...] | None:
        """Kill a node that actors live on, and after a moment have another join; the node's raylet and those actors."""
        try:
            status = read_status(self._folder)
        except OSError:
            return None
        actors = {pid for role in ("rollout", "reward", "learner") for pid in victims(role, status)}
        inhabited = [(node, found) for node in self._nodes.killable if (found := self._nodes.workers(node) & actors)]
        if not inhabited:
            return None
        node, lost = self._chance.choice(inhabited)
        pid = self._nodes.kill(node)
        time.sleep(self._chance.uniform(0, 5))
        self._nodes.add(cpus=NODE_CPUS)
        return (pid, *sorted(lost))

    def _summary(self, seconds: float) -> dict[str, Any]:
        result = json.loads((self._folder / "result.json").read_text())
        text = self._log.read_text(errors="replace")
        summary: dict[str, Any] = {
            "seconds": seconds,
            "drivers": self._drivers,
            "held_out_accuracy": {
                when: {f"b{e['decoding']['block_size']}": e["accuracy"] for e in result[when]}
                for when in ("before", "after")
            },
            "books": asdict(audit(self._folder)),
        }
        if self._kinds:
            summary["recovery"] = {
                "actors replaced": text.count(" takes its place"),
                "learner rebuilt": text.count("building the learner anew"),
                "checkpoints resumed": text.count("\nresumed "),
            }
            lost = [fault.pids[1:] for fault in self._faults if fault.role == "node"]
            assert all(lost), f"a node was lost that no actor lived on: {lost}"
            summary["recovery"]["actors lost with their node"] = sum(map(len, lost))
            summary["faults"] = {kind: _times([f for f in self._faults if f.kind == kind]) for kind in KINDS}
        return summary


def _times(faults: Sequence[Fault]) -> dict[str, Any]:
    """Faults whose run ended before it was seen whole again count, without a time."""
    seconds = [fault.recovered_s for fault in faults if fault.recovered_s is not None]
    if not seconds:
        return {"count": len(faults)}
    median, high = np.percentile(seconds, [50, 95])
    return {"count": len(faults), "whole_again_s": {"median": round(median, 2), "p95": round(high, 2)}}


def _compare(undisturbed: dict[str, Any], disturbed: dict[str, Any]) -> dict[str, Any]:
    """At the last block size."""
    before, after = undisturbed["held_out_accuracy"]["before"]["b8"], undisturbed["held_out_accuracy"]["after"]["b8"]
    threshold = before + _GAIN * (after - before)
    reached = disturbed["held_out_accuracy"]["after"]["b8"]
    return {
        "block": 8,
        "start": before,
        "undisturbed": after,
        "disturbed": reached,
        "threshold": threshold,
        "reached": bool(after > before and reached >= threshold),
    }


def _settings(arguments: argparse.Namespace) -> list[str]:
    """The embedded run with impatient supervision and a checkpoint at every update."""
    return [
        "run.resume=auto",
        "run.checkpoint_every=1",
        "curriculum.blocks=[4,8]",
        f"curriculum.updates=[{','.join(map(str, arguments.updates))}]",
        f"rollout.max_staleness={arguments.staleness}",
        "eval.every=0",
        "actors.count=2",
        "actors.probe_s=1",
        "actors.probe_failures=6",
        "actors.stall_s=30",
        "actors.max_restarts=1000",
        "actors.backoff_s=0.05",
        f"reward.workers={VERIFIERS}",
        "reward.deadline_s=5",
        "reward.cpus=0.5",
        f"learner.ranks={RANKS}",
        "learner.silent_s=8",
        "learner.max_restarts=1000",
        "cluster.start_timeout_s=120",
    ]


if __name__ == "__main__":
    sys.exit(main())
