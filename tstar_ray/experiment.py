"""Compare ways to train over seeds: every arm and seed is a run of its own, then one table and figures.

    python -m tstar_ray.experiment configs/experiment_embedded.yaml            go on from whatever is done
    python -m tstar_ray.experiment configs/experiment_embedded.yaml --table    tables and figures of what is done
    python -m tstar_ray.experiment configs/experiment_embedded.yaml seeds=[1] name=quick

    file ──► arm x seed ──► python -m tstar_ray.run … run.resume=auto ──► cells/ARM-sSEED/result.json
                                                                     └──► experiment.json, table.md, *.png, *.svg

Runs that ended are skipped, interrupted ones go on from their newest checkpoint, failed ones are named and do not stop
the others. Ctrl-C or SIGTERM lets the runs at work save and ends; the same command continues.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tstar_ray.budget import read_curve
from tstar_ray.config import Config, ConfigError, load_config
from tstar_ray.config_experiment import ArmConfig, ExperimentConfig
from tstar_ray.experiment_summary import CellResult, markdown, summary
from tstar_ray.settings import load_settings

_POLL_S = 0.2
_KILL_S = 120.0
"""Seconds that a run which was told to stop may take to save."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 all cells done, 1 some failed, 2 a mistake in the settings, 130 stopped by a signal."""
    parser = argparse.ArgumentParser(
        prog="python -m tstar_ray.experiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The file's keys: docs/experiments.md.",
    )
    parser.add_argument("file", metavar="FILE", help="YAML file that describes the experiment")
    parser.add_argument("--table", action="store_true", help="run nothing; tables and figures of what is done")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="keys over the file's")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_settings(ExperimentConfig, arguments.file, arguments.settings, example="seeds=[1,2]")
        folder = (config.dir / config.name).resolve()
        cells = plan(config, Path(arguments.file).parent, folder)
        done = [cell for cell in cells if cell.done()]
        print(f"experiment {config.name}: {len(cells)} runs, {len(done)} done; folder {folder}", flush=True)
        runner = Runner(config, folder, say=lambda text: print(text, flush=True))
        failed = [] if arguments.table else runner.run([cell for cell in cells if cell not in done])
        if runner.stopped:
            print("stopped; the same command continues", flush=True)
            return 130
        report(config, folder, cells, failed)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for cell in failed:
        print(f"failed: {cell.name}; its output is in {cell.log}", file=sys.stderr)
    return 1 if failed else 0


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One arm with one seed."""

    arm: str
    """Key of the arm."""
    seed: int
    """run.seed."""
    config: Config
    """Resolved settings of its run."""
    log: Path
    """What the run printed, all attempts."""

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return self.config.run.name

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.config.run.dir / self.name

    def done(self) -> bool:
        """Ended with these settings; raises ConfigError where it was begun with others."""
        started = self.folder / "config.yaml"
        if started.is_file() and _comparable(load_config(started)) != _comparable(self.config):
            raise ConfigError(
                f"{self.folder} was begun with other settings than the experiment's file gives {self.arm} now; choose "
                "another name for the experiment, or delete that folder"
            )
        return (self.folder / "result.json").is_file()

    def command(self) -> list[str]:
        """What runs it, now or again."""
        given = self.log.with_suffix(".yaml")
        given.write_text(self.config.to_yaml())
        return [sys.executable, "-m", "tstar_ray.run", "--config", str(given), "run.resume=auto"]


def _comparable(config: Config) -> dict[str, Any]:
    """All but how to continue and where the folder is: an experiment may be moved."""
    values = config.model_dump(mode="json")
    return values | {"run": values["run"] | {"resume": None, "dir": None}}


def plan(config: ExperimentConfig, beside: Path, folder: Path) -> list[Cell]:
    """Every arm that trains, with every seed; seeds outermost, so that a part of them is a comparison already."""
    base = None if config.config is None else beside / config.config
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    cells = []
    for seed in config.seeds:
        for arm, how in config.arms.items():
            if how.decode_only:
                continue
            name = f"{arm}-s{seed}"
            own = [f"run.dir={folder / 'cells'}", f"run.name={name}", f"run.seed={seed}", "run.resume=null"]
            try:
                resolved = load_config(base, [*config.settings, *how.settings, *own])
            except ConfigError as error:
                raise ConfigError(f"arms.{arm}: {error}") from error
            cells.append(Cell(arm, seed, resolved, folder / "logs" / f"{name}.log"))
    return cells


class Runner:
    """Runs cells in processes of their own."""

    def __init__(self, config: ExperimentConfig, folder: Path, *, say: Callable[[str], None]) -> None:
        self._parallel, self._timeout_s = config.parallel, config.cell_timeout_s
        self._say = say
        self._active: dict[Cell, tuple[subprocess.Popen[bytes], IO[bytes], float]] = {}
        self.stopped = False
        """A signal came."""

    def run(self, cells: Sequence[Cell]) -> list[Cell]:
        """To the end of all, or to a signal; returns those that failed."""
        waiting, failed, total = list(cells), [], len(cells)
        previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self._active or (waiting and not self.stopped):
                while waiting and not self.stopped and len(self._active) < self._parallel:
                    self._start(waiting.pop(0))
                time.sleep(_POLL_S)
                for cell, code, seconds in self._ended():
                    left = total - len(waiting) - len(self._active)
                    if code == 0:
                        self._say(f"[{left}/{total}] {cell.name} done in {seconds:.0f} s: {_scores(cell)}")
                    elif not (self.stopped and code == 130):
                        failed.append(cell)
                        self._say(f"[{left}/{total}] {cell.name} FAILED (exit code {code}): {_last_line(cell.log)}")
        finally:
            for process, log, _ in self._active.values():
                _kill(process)
                log.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return failed

    def _start(self, cell: Cell) -> None:
        # A session of its own: Ctrl-C on the terminal reaches the run through `_handle`, once.
        log = cell.log.open("ab")
        process = subprocess.Popen(cell.command(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self._active[cell] = (process, log, time.monotonic())
        self._say(f"{cell.name} started, output in {cell.log}")

    def _ended(self) -> list[tuple[Cell, int, float]]:
        found = []
        for cell, (process, log, start) in list(self._active.items()):
            code, seconds = process.poll(), time.monotonic() - start
            if code is None and seconds > self._timeout_s:
                self._say(f"{cell.name} takes longer than cell_timeout_s={self._timeout_s:g}: stopping it")
                process.terminate()
                try:
                    code = process.wait(timeout=_KILL_S)
                except subprocess.TimeoutExpired:
                    _kill(process)
                code = -signal.SIGTERM
            if code is not None:
                log.close()
                del self._active[cell]
                found.append((cell, code, seconds))
        return found

    def _handle(self, number: int, _: Any) -> None:
        if not self.stopped:
            self._say(f"{signal.Signals(number).name}: the runs at work finish their update and save")
        self.stopped = True
        for process, _log, _start in self._active.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a run of ours with the private cluster it started, which lives in its session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _scores(cell: Cell) -> str:
    after = json.loads((cell.folder / "result.json").read_text())["after"]
    return ", ".join(f"B={e['decoding']['block_size']} {e['accuracy']:.1%} at TPF {e['tpf']:.2f}" for e in after)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error:")]
    return (told or lines or ["it printed nothing"])[-1][:300]


def results(config: ExperimentConfig, cells: Sequence[Cell]) -> list[CellResult]:
    """What has ended, in the order of arms; the start model from the start tables of the first arm that has one."""
    ended: dict[tuple[str, int], CellResult] = {}
    start: dict[int, CellResult] = {}
    for cell in cells:
        if not cell.done():
            continue
        result = json.loads((cell.folder / "result.json").read_text())
        ended[cell.arm, cell.seed] = CellResult(
            cell.arm,
            cell.seed,
            result["after"],
            result["budget"],
            read_curve(cell.folder / "metrics.jsonl"),
            result["updates"],
        )
        start.setdefault(cell.seed, CellResult("", cell.seed, result["before"]))
    found = []
    for arm, how in config.arms.items():
        for seed in config.seeds:
            if how.decode_only and seed in start:
                found.append(CellResult(arm, seed, start[seed].evaluations))
            elif (arm, seed) in ended:
                found.append(ended[arm, seed])
    return found


def report(config: ExperimentConfig, folder: Path, cells: Sequence[Cell], failed: Sequence[Cell]) -> None:
    """experiment.json, table.md and figures of what has ended, and the table on the console."""
    found = results(config, cells)
    if not found:
        print("no run has ended yet: no table", flush=True)
        return
    labels = {arm: how.label or arm for arm, how in config.arms.items()}
    made = summary(found, _reference(config))
    table = markdown(made, labels)
    everything = {
        "experiment": config.model_dump(mode="json"),
        "decoding": found[0].evaluations[0]["decoding"] if found[0].evaluations else {},
        "problems": found[0].evaluations[0]["problems"] if found[0].evaluations else 0,
        "unfinished": [cell.name for cell in cells if not cell.done()],
        "failed": [cell.name for cell in failed],
        **made,
        "cells": [asdict(cell) for cell in found],
    }
    (folder / "experiment.json").write_text(json.dumps(everything, indent=1))
    (folder / "table.md").write_text(table)
    print("\n" + table, flush=True)
    from tstar_ray.experiment_figures import draw

    paths = draw(folder, made, found, labels)
    print(f"written: {folder / 'experiment.json'}, table.md, {', '.join(p.name for p in paths)}", flush=True)


def _reference(config: ExperimentConfig) -> str:
    arms: dict[str, ArmConfig] = config.arms
    return config.reference or next((arm for arm, how in arms.items() if how.decode_only), next(iter(arms)))


if __name__ == "__main__":
    sys.exit(main())
