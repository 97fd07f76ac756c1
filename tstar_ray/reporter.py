"""What a user sees of a run: console, metrics.jsonl, and the trackers of `tstar_ray.tracking`.

Every update prints one row. On a terminal a status line below the rows shows stage, phase and time left; in a
job's log there are rows only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tstar_ray.config import Stage
from tstar_ray.evaluate import Evaluation
from tstar_ray.samples import Decode, sample_page
from tstar_ray.tracking import Tracker
from tstar_ray.trajectory import Group

_COLUMNS = (
    ("update", 8),
    ("stage", 7),
    ("B", 5),
    ("accuracy", 9),
    ("TPF", 6),
    ("reward", 7),
    ("KL", 9),
    ("entropy", 8),
    ("cut", 6),
    ("groups", 7),
    ("rollout", 8),
    ("verify", 7),
    ("train", 6),
    ("publish", 8),
)


_SAMPLES = 4
"""Held-out problems whose answers are shown, always the same."""


class Reporter:
    """Writes one run's progress."""

    def __init__(
        self, folder: Path, *, total: int, trackers: Sequence[Tracker] = (), console: Console | None = None
    ) -> None:
        """``total``: updates to be made. Closes the trackers at the end."""
        self.console = console or Console()
        self._folder, self._trackers = folder, trackers
        self.decode: Decode | None = None
        """Token ids -> text, once the tokenizer is loaded; without it no samples are shown."""
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=total)
        self._rows = 0
        self._recent: list[Any] = []

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for tracker in self._trackers:
            tracker.close()
        self._metrics.close()

    def rewind(self, update: int) -> None:
        """Forget what was reported of later updates: they are made again."""
        self._metrics.close()
        path = self._folder / "metrics.jsonl"
        # A kill may have cut the last line short.
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["update"] <= update]
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        unfinished.replace(path)
        self._metrics = path.open("a", encoding="utf-8")
        for tracker in self._trackers:
            tracker.rewind(update)
        for file in (self._folder / "traces").glob("update-*.parquet"):
            if int(file.stem.removeprefix("update-")) > update:
                file.unlink()

    def say(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def phase(self, stage: Stage | None, name: str) -> None:
        """Show what the loop is doing."""
        where = f"{stage.name} B={stage.rollout_block}->{stage.train_block} " if stage else ""
        self._progress.update(self._task, description=f"{where}{name}")

    def settings(self, text: str) -> None:
        """The resolved configuration, as YAML."""
        for tracker in self._trackers:
            tracker.text("settings", f"```yaml\n{text}```", 0)

    def samples(self, update: int, groups: Sequence[Group]) -> None:
        """Some held-out answers with the order in which their tokens were revealed, for the trackers."""
        if self.decode and groups:
            block = groups[0].samples[0].trajectory.block_size
            page = sample_page(groups[:_SAMPLES], self.decode)
            for tracker in self._trackers:
                tracker.text(f"samples/b{block}", page, update)

    def stage_ended(self, update: int, stage: Stage) -> None:
        """Figures for the trackers: the curves so far, and when the stage revealed each position of a block. The run
        goes on whatever becomes of them."""
        if not self._trackers:
            return
        try:
            from tstar_ray.report.stage import stage_figures

            for name, figure in stage_figures(self._folder, stage.name).items():
                for tracker in self._trackers:
                    tracker.figure(f"stage/{name}", figure, update)
        except Exception as error:
            self.say(f"no figures of stage {stage.name}: {type(error).__name__}: {error}")

    def update(self, update: int, total: int, stage: Stage, record: Mapping[str, Any]) -> None:
        """One update's numbers everywhere."""
        self._log("update", update, {"stage": stage.name, **record})
        if self._rows % 20 == 0:
            self.say("".join(f"{name:>{width}}" for name, width in _COLUMNS))
        self._rows += 1
        block = str(stage.train_block) if not stage.is_bridge else f"{stage.rollout_block}>{stage.train_block}"
        cells = (
            f"{update}/{total}",
            stage.name,
            block,
            f"{record['rollout/accuracy']:.3f}",
            f"{record['rollout/tpf']:.2f}",
            f"{record['rollout/reward']:.3f}",
            _cell(record.get("learner/kl"), ".5f"),
            _cell(record.get("learner/entropy"), ".3f"),
            f"{record['rollout/truncated']:.2f}",
            f"{record['groups/trained']}",
            f"{record['seconds/rollout']:.1f}s",
            f"{record['seconds/reward']:.1f}s",
            f"{record['seconds/train']:.1f}s",
            f"{record['seconds/publish']:.1f}s",
        )
        self.say("".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS)))
        self._progress.update(self._task, completed=update, total=total)

    def collapsed(self, update: int, stage: Stage, record: Mapping[str, Any]) -> None:
        """A batch that was decoded and not trained on: for metrics.jsonl only, where budgets count it."""
        self._write("collapsed", update, {"stage": stage.name, **record})

    def evaluation(self, update: int, label: str, evaluation: Evaluation) -> None:
        """One held-out score with its decoding settings."""
        block = evaluation.decoding.block_size
        values = {
            f"eval_b{block}/{k}": v
            for k, v in evaluation.to_dict().items()
            if k not in ("decoding", "problems", "unscored")
        }
        self._log("evaluation", update, values)
        self.say(
            f"  {label}: accuracy {evaluation.accuracy:.3f} [{evaluation.low:.3f}, {evaluation.high:.3f}], "
            f"TPF {evaluation.tpf:.2f} ({evaluation.problems} held-out problems; {evaluation.decoding.describe()})"
        )

    def numbers(self, kind: str, update: int, values: Mapping[str, Any]) -> None:
        """Numbers for metrics.jsonl and the trackers only."""
        self._log(kind, update, values)

    def steps(self, step: int, total: int, report: Any, *, every: int) -> None:
        """Progress of a supervised training; a row with the means of every so many steps (`learner.adapter`)."""
        self._recent.append(report)
        self._progress.update(self._task, completed=step, total=total, description=f"B={report.block_size}")
        if step % every and step < total:
            return
        count = len(self._recent)
        loss, entropy, norm, seconds = (
            sum(getattr(r, name) for r in self._recent) / count
            for name in ("loss", "cross_entropy", "grad_norm", "seconds")
        )
        blocks = ",".join(map(str, sorted({r.block_size for r in self._recent})))
        self.say(
            f"step {step}/{total}  B {blocks}  loss {loss:.4f}  masked CE {entropy:.4f}  grad {norm:.2f}  "
            f"lr {report.lr:.2e}  {report.answer_tokens / max(seconds, 1e-9):.0f} answer tokens/s"
        )
        self._recent.clear()

    def _write(self, kind: str, update: int, values: Mapping[str, Any]) -> None:
        self._metrics.write(json.dumps({"kind": kind, "update": update, "time": time.time(), **values}) + "\n")
        self._metrics.flush()

    def _log(self, kind: str, update: int, values: Mapping[str, Any]) -> None:
        self._write(kind, update, values)
        scalars = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for tracker in self._trackers:
            tracker.numbers(scalars, update)

    def table(self, before: Sequence[Evaluation], after: Sequence[Evaluation]) -> None:
        """Start model against trained model at each block size."""
        table = Table(title="Held-out problems: accuracy [95 % interval], tokens per forward (TPF)")
        for column in ("B", "start accuracy", "TPF", "trained accuracy", "TPF", "TPF with commits"):
            table.add_column(column, justify="right")
        for old, new in zip(before, after):
            table.add_row(
                str(old.decoding.block_size),
                _accuracy(old),
                f"{old.tpf:.2f}",
                _accuracy(new),
                f"{new.tpf:.2f}",
                f"{new.tpf_with_commits:.2f}",
            )
        self.console.print(table)
        if before:
            self.say(f"{before[0].problems} problems; {before[0].decoding.describe().partition(', ')[2]}")


def _accuracy(evaluation: Evaluation) -> str:
    return f"{evaluation.accuracy:.1%} [{evaluation.low:.0%}, {evaluation.high:.0%}]"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
