"""Where the numbers, samples and figures of a run go, besides its own folder: TensorBoard, Weights & Biases.

    Reporter ──numbers, text, figure──► every Tracker of run.trackers

The folder (metrics.jsonl, traces, report.html) is what everything else in tstar_ray reads; trackers are for watching.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch.utils.tensorboard import SummaryWriter

from tstar_ray.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TrackerName = Literal["tensorboard", "wandb"]


class Tracker(Protocol):
    """One place to watch a run at. ``step`` is the update, or the optimizer step of an adaptation."""

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Scalars by name."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown."""

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """A figure of matplotlib."""

    def rewind(self, step: int) -> None:
        """Forget what comes after ``step``: it is made again."""

    def close(self) -> None:
        """Write out what waits."""


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._writer = SummaryWriter(self._folder)
        logging.getLogger("tensorboard").setLevel(logging.ERROR)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.numbers`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """See `Tracker.text`."""
        self._writer.add_text(tag, text, step)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """See `Tracker.figure`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        FigureCanvasAgg(figure)  # TensorBoard draws with the canvas that the figure has
        self._writer.add_figure(tag, figure, step, close=False)

    def rewind(self, step: int) -> None:
        """See `Tracker.rewind`."""
        self._writer.close()
        self._writer = SummaryWriter(self._folder, purge_step=step + 1)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, found again by its folder. Where and whether it uploads is set by W&B's own variables
    (WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY). What is made again after a resume is logged
    again: W&B keeps both."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises ConfigError where W&B is missing or does not start."""
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "run.trackers names wandb, which is not installed; pip install -e '.[wandb]', or leave it out"
            ) from error
        try:
            self._run = wandb.init(
                project=None if wandb.setup().settings.project else "tstar_ray",
                name=folder.name,
                id=hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest(),
                resume="allow",
                dir=folder,
                config=dict(settings),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases did not start: {error}\nset WANDB_MODE=offline to log without it, "
                "or take wandb out of run.trackers"
            ) from error
        self._image = wandb.Image
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.numbers`."""
        self._run.log({**values, "update": step})

    def text(self, tag: str, text: str, step: int) -> None:
        """See `Tracker.text`."""
        self._run.log({tag: text, "update": step})

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """See `Tracker.figure`."""
        self._run.log({tag: self._image(figure), "update": step})

    def rewind(self, step: int) -> None:
        """See `Tracker.rewind`; nothing can be taken back here."""

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()


def open_trackers(names: Sequence[TrackerName], folder: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """Those of ``run.trackers`` for a run folder; ``settings`` are the resolved ones. Raises ConfigError."""
    makers: dict[TrackerName, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard"),
        "wandb": lambda: WeightsAndBiases(folder, settings),
    }
    return [makers[name]() for name in dict.fromkeys(names)]
