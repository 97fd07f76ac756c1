"""Compare ways to train over seeds: every arm and seed is a run of its own, then one table and figures.

    python -m tstar_ray.experiment configs/experiment_embedded.yaml            go on from whatever is done
    python -m tstar_ray.experiment configs/experiment_embedded.yaml --table    tables and figures of what is done
    python -m tstar_ray.experiment configs/experiment_embedded.yaml --arms tstar,direct   train these arms only
    python -m tstar_ray.experiment configs/experiment_embedded.yaml seeds=[1] name=quick
    python -m tstar_ray.experiment configs/experiment_embedded.yaml --join other/experiment.json   the runs it lacks

    file ──► arm x seed ──► python -m tstar_ray.run … run.resume=auto ──► cells/ARM-sSEED/result.json
                                                 │ thresholds
                                                 └──► python -m tstar_ray.evaluate ──► cells/ARM-sSEED/decodings
                                                     experiment.json, table.md, *.png, *.svg, report.html ◄──┘

Runs that ended are skipped, interrupted ones go on from their newest checkpoint, failed ones are named and do not stop
the others. Ctrl-C or SIGTERM lets the runs at work save and ends; the same command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tstar_ray.budget import read_curve
from tstar_ray.config import Config, ConfigError, load_config
from tstar_ray.config_evaluate import EvaluateConfig, held_out_set
from tstar_ray.config_experiment import ArmConfig, ExperimentConfig
from tstar_ray.experiment_frontier import Decoded, frontier, frontier_markdown
from tstar_ray.experiment_join import join
from tstar_ray.experiment_runner import Job, Runner
from tstar_ray.experiment_summary import CellResult, markdown, own_accuracies, rows, summary
from tstar_ray.settings import load_settings, to_yaml


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
    parser.add_argument("--arms", metavar="ARM,ARM", help="train these arms only; tables still show whatever is done")
    parser.add_argument(
        "--join",
        metavar="JSON",
        type=Path,
        action="append",
        default=[],
        help="experiment.json of other runs, from another machine: they are part of tables and figures, and are not "
        "run here (again for more)",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="keys over the file's")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_settings(ExperimentConfig, arguments.file, arguments.settings, example="seeds=[1,2]")
        folder = (config.dir / config.name).resolve()
        cells = plan(config, Path(arguments.file).parent, folder)
        done = [cell for cell in cells if cell.done()]
        arms = _chosen(config, arguments.arms)
        others = join(config, arguments.join, {(cell.arm, cell.seed) for cell in done})
        elsewhere = {(cell.arm, cell.seed) for cell in others[0]}
        cells = [cell for cell in cells if (cell.arm, cell.seed) not in elsewhere]
        print(f"experiment {config.name}: {len(cells)} runs, {len(done)} done; folder {folder}", flush=True)
        failed: list[Job] = []
        runner = Runner(
            parallel=config.parallel, timeout_s=config.cell_timeout_s, say=lambda text: print(text, flush=True)
        )
        if not arguments.table:
            failed += runner.run([cell.job() for cell in cells if cell.arm in arms and cell not in done])
        if not arguments.table and not runner.stopped:
            failed += runner.run([d.job() for d in plan_decodings(config, cells, folder) if not d.done()])
        if runner.stopped:
            print("stopped; the same command continues", flush=True)
            return 130
        report(config, folder, cells, failed, *others)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for job in failed:
        print(f"failed: {job.name}; its output is in {job.log}", file=sys.stderr)
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

    def job(self) -> Job:
        """What runs it, now or again."""

        def command() -> list[str]:
            given = self.log.with_suffix(".yaml")
            given.write_text(self.config.to_yaml())
            return [sys.executable, "-m", "tstar_ray.run", "--config", str(given), "run.resume=auto"]

        return Job(self.name, self.log, command, self._told)

    def _told(self) -> str:
        after = json.loads((self.folder / "result.json").read_text())["after"]
        return ", ".join(f"B={e['decoding']['block_size']} {e['accuracy']:.1%} at TPF {e['tpf']:.2f}" for e in after)


@dataclass(frozen=True, slots=True, eq=False)
class Decodings:
    """A model, trained or not, at the thresholds of the experiment."""

    name: str
    """Of its run, or of the arm that decodes only."""
    arm: str
    """Key of its arm."""
    seeds: tuple[int, ...]
    """Seeds that it stands for: its own, or all for the start model."""
    settings: EvaluateConfig
    """Of its evaluation."""
    log: Path
    """What that printed."""

    def done(self) -> bool:
        """Ended with these settings; with others it is done again, and keeps the cells that both have."""
        results = self.settings.folder / "results.json"
        if not results.is_file():
            return False
        settings = self.settings.model_dump(mode="json")
        saved = json.loads(results.read_text())["settings"]
        return all(saved[name] == settings[name] for name in ("data", "grid"))

    def job(self) -> Job:
        """What evaluates it."""

        def command() -> list[str]:
            given = self.log.with_suffix(".yaml")
            given.write_text(to_yaml(self.settings))
            return [sys.executable, "-m", "tstar_ray.evaluate", "--config", str(given)]

        def told() -> str:
            own = [d for d in self.found() if d.seed == self.seeds[0]]
            top = max(d.block for d in own)
            shown = [f"> {d.threshold:g} {d.accuracy:.1%} at TPF {d.tpf:.2f}" for d in own if d.block == top]
            return f"B={top} " + ", ".join(shown)

        return Job(f"decodings of {self.name}", self.log, command, told)

    def found(self) -> list[Decoded]:
        """Its scores, for each of its seeds."""
        cells = json.loads((self.settings.folder / "results.json").read_text())["cells"]
        return [
            Decoded(
                arm=self.arm,
                seed=seed,
                block=cell["cell"]["decoding"]["block_size"],
                threshold=cell["cell"]["decoding"]["threshold"],
                **{name: cell[name] for name in ("accuracy", "tpf", "tpf_with_commits", "truncated")},
            )
            for seed in self.seeds
            for cell in cells
        ]


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
                if config.thresholds:
                    held_out_set(resolved)
                    if resolved.curriculum.strategy != "dynamic":
                        raise ConfigError(
                            f"thresholds={list(config.thresholds)} mean something to dynamic unmasking only, and "
                            f"curriculum.strategy={resolved.curriculum.strategy}; leave thresholds empty"
                        )
            except ConfigError as error:
                raise ConfigError(f"arms.{arm}: {error}") from error
            cells.append(Cell(arm, seed, resolved, folder / "logs" / f"{name}.log"))
    return cells


def plan_decodings(config: ExperimentConfig, cells: Sequence[Cell], folder: Path) -> list[Decodings]:
    """Every trained model, and the start model, at `thresholds`; none where there are none."""
    if not config.thresholds:
        return []
    done = [cell for cell in cells if cell.done()]
    found = [_decodings(config, cell.config, cell.arm, (cell.seed,), folder, cell) for cell in done]
    starts = [arm for arm, how in config.arms.items() if how.decode_only]
    if starts and done:
        found.insert(0, _decodings(config, done[0].config, starts[0], config.seeds, folder, None))
    return found


def _decodings(
    config: ExperimentConfig, run: Config, arm: str, seeds: tuple[int, ...], folder: Path, cell: Cell | None
) -> Decodings:
    name = cell.name if cell else arm
    settings = EvaluateConfig(
        folder=cell.folder / "decodings" if cell else folder / f"{arm}-decodings",
        model=run.model.model_copy(update={"path": str(cell.folder / "final")}) if cell else run.model,
        data=(held_out_set(run),),
        grid={
            "blocks": run.eval_blocks,
            "thresholds": config.thresholds,
            "max_new_tokens": run.rollout.max_new_tokens,
            "temperature": run.eval.temperature,
            "confidence": run.rollout.confidence,
        },
        actors=run.actors,
        reward=run.reward,
        cluster=run.cluster,
        save_traces=False,
    )
    return Decodings(name, arm, seeds, settings, folder / "logs" / f"{name}-decodings.log")


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


def report(
    config: ExperimentConfig,
    folder: Path,
    cells: Sequence[Cell],
    failed: Sequence[Job],
    others: Sequence[CellResult],
    decoded_others: Sequence[Decoded],
) -> None:
    """experiment.json, table.md and figures of what has ended, here and in ``others``, and the table on the console."""
    order = list(config.arms)
    # The start model may be here and there.
    runs = {(cell.arm, cell.seed): cell for cell in (*others, *results(config, cells))}
    found = sorted(runs.values(), key=lambda cell: (order.index(cell.arm), cell.seed))
    if not found:
        print("no run has ended yet: no table", flush=True)
        return
    labels = {arm: how.label or arm for arm, how in config.arms.items()}
    reference = _reference(config)
    made = summary(found, reference)
    table = markdown(made, labels)
    own = [d for way in plan_decodings(config, cells, folder) if way.done() for d in way.found()]
    ways = {(d.arm, d.seed, d.block, d.threshold): d for d in (*decoded_others, *own)}
    decoded = sorted(ways.values(), key=lambda d: (order.index(d.arm), d.seed))
    starts = [row for row in rows(found) if row.arm == reference]
    if decoded and starts:
        reference_row = asdict(min(starts, key=lambda row: row.block))
        made["frontier"] = frontier(decoded, reference_row, own_accuracies(rows(found)))
        table += "\n" + frontier_markdown(made["frontier"], labels)
    everything = {
        "experiment": config.model_dump(mode="json"),
        "decoding": found[0].evaluations[0]["decoding"] if found[0].evaluations else {},
        "problems": found[0].evaluations[0]["problems"] if found[0].evaluations else 0,
        "unfinished": [cell.name for cell in cells if not cell.done()],
        "failed": [job.name for job in failed],
        **made,
        "cells": [asdict(cell) for cell in found],
        "decoded": [asdict(d) for d in decoded],
    }
    (folder / "experiment.json").write_text(json.dumps(everything, indent=1))
    (folder / "table.md").write_text(table)
    print("\n" + table, flush=True)
    from tstar_ray.experiment_figures import draw, figures

    paths = draw(folder, made, found, labels)
    print(f"written: {folder / 'experiment.json'}, table.md, {', '.join(p.name for p in paths)}", flush=True)
    _add_page(config, folder, cells, table, figures(made, found, labels))


def _add_page(config: ExperimentConfig, folder: Path, cells: Sequence[Cell], table: str, drawn: dict[str, Any]) -> None:
    """report.html. All numbers are written already: whatever goes wrong here is said, and no more."""
    from tstar_ray.report import write_experiment_report

    arms = {
        how.label or arm: [c.folder for c in cells if c.arm == arm and c.done()] for arm, how in config.arms.items()
    }
    drawn = {name: make for name, make in drawn.items() if name != "pareto"}  # the page has one, with every seed
    said = [line.removeprefix("- ") for line in table.splitlines() if line.startswith("- ")]
    try:
        print(f"report: {write_experiment_report(arms, folder, title=config.name, said=said, drawn=drawn)}", flush=True)
    except Exception as error:
        print(f"no report ({type(error).__name__}: {error}); --table tries again", flush=True)


def _chosen(config: ExperimentConfig, arms: str | None) -> list[str]:
    names = list(config.arms) if arms is None else [name.strip() for name in arms.split(",")]
    unknown = [name for name in names if name not in config.arms]
    if unknown:
        raise ConfigError(f"--arms {arms}: no arm {', '.join(unknown)}; the file has {', '.join(config.arms)}")
    return names


def _reference(config: ExperimentConfig) -> str:
    arms: dict[str, ArmConfig] = config.arms
    return config.reference or next((arm for arm, how in arms.items() if how.decode_only), next(iter(arms)))


if __name__ == "__main__":
    sys.exit(main())
