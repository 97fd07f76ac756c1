"""What a user sees of an evaluation: a progress line, a line a cell, the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tstar_ray.grid import Cell, CellResult, curves

if TYPE_CHECKING:
    from tstar_ray.collection import Batch


class EvaluationView:
    """Console output; a context manager around the progress line."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._all = self._progress.add_task("starting actors", total=None)
        self._one = self._progress.add_task("", total=None, visible=False)
        self._batch: Batch | None = None
        self._count = self._done = 0

    def __enter__(self) -> EvaluationView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, cells: Sequence[Cell]) -> None:
        """The actors are ready for these."""
        self._count = len(cells)
        self._progress.update(self._all, description="cells", total=len(cells))

    def began(self, cell: Cell) -> None:
        """A cell is being measured."""
        self._progress.update(self._one, description=cell.label, completed=0, total=None, visible=True)

    def watch(self, batch: Batch) -> None:
        """What `tick` reads progress from."""
        self._batch = batch
        self.tick()

    def tick(self) -> None:
        """Show how many problems are done; called about twice a second."""
        if self._batch:
            total = len(self._batch.order)
            self._progress.update(self._one, completed=total - self._batch.left, total=total)

    def ended(self, result: CellResult, kept: bool) -> None:
        """A cell has its score."""
        self._batch, self._done = None, self._done + 1
        self._progress.update(self._one, visible=False)
        self._progress.update(self._all, completed=self._done)
        speed = "kept from before" if kept else f"{result.tokens_per_s:.0f} tokens/s"
        self.say(
            f"  [{self._done}/{self._count}] {result.cell.label}: accuracy {result.accuracy:.3f} "
            f"[{result.low:.3f}, {result.high:.3f}], TPF {result.tpf:.2f} ({result.problems} problems; {speed})"
        )

    def table(self, results: Sequence[CellResult]) -> None:
        """One row a cell, its settings included, a table a data set."""
        areas = {(c.data, c.block_size, c.strategy, c.order): c for c in curves(results)}
        for data in dict.fromkeys(r.cell.data for r in results):
            own = [r for r in results if r.cell.data == data]
            samples, first = own[0].cell.samples, own[0]
            # The last two parts are common to the grid: sampling and the length cap.
            common = ", ".join(first.cell.decoding.describe().split(", ")[-2:])
            table = Table(
                box=SIMPLE_HEAD,
                padding=(0, 1, 0, 0),
                title=f"{data}: {first.problems} problems" + (f" x {samples} samples" if samples > 1 else ""),
                caption=f"{first.model}, weights {first.checksum}; {common}; 95 % intervals; "
                "TPF: tokens per denoising forward",
            )
            table.add_column("decoding", min_width=20)
            names = ["accuracy", "TPF", "with\ncommits", "AUP", "tokens/s", "cut"]
            best = max(max(r.pass_at) for r in own)
            if best > 1:
                names.insert(1, f"pass@{best}")
            for name in names:
                table.add_column(name, justify="right", no_wrap=True)
            for r in own:
                curve = areas[r.cell.curve]
                cells = [
                    f"{r.accuracy:.1%} [{r.low:.0%}, {r.high:.0%}]",
                    f"{r.tpf:.2f}",
                    f"{r.tpf_with_commits:.2f}",
                    f"{curve.aup:.1f}" if (r.tpf, 100 * r.accuracy) == curve.points[-1] else "",
                    f"{r.tokens_per_s:.0f}",
                    f"{r.truncated:.1%}",
                ]
                if best > 1:
                    cells.insert(1, f"{r.pass_at[best]:.1%}")
                table.add_row(", ".join(r.cell.decoding.describe().split(", ")[:-2]), *cells)
            self.console.print(table)
            unscored = sum(r.unscored for r in own)
            if unscored:
                self.say(f"{unscored} problems could not be scored and are in no average")
