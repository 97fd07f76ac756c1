"""The curriculum: which stage runs, when it ends, and when it fell over. Pure state, no Ray, no torch.

    rollouts ──observe(accuracy)──► fine | best | collapsed        before the update
    update ────step(held-out)─────► stage ends?                    after it

A stage ends by its gate (`config.Gate`), at the latest after ``gate.updates``. The mean rollout accuracy over a
window is watched: a new best asks the controller to keep the weights that produced it, a fall below
(1 - drop) x best asks it to go back to them. A stage that collapsed more often than the limit ends there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tstar_ray.config_curriculum import RollbackConfig, Stage

Health = Literal["fine", "best", "collapsed"]


@dataclass(slots=True)
class CurriculumState:
    """What a checkpoint keeps."""

    stage: int = 0
    """Index of the running stage; the number of stages when all are done."""
    step: int = 0
    """Updates made in it."""
    accuracies: list[float] = field(default_factory=list)
    """Rollout accuracy of its updates since it began or was rolled back."""
    best: float = -1.0
    """Best window mean of the stage; negative: none yet."""
    rollbacks: int = 0
    """Collapses of the stage."""
    reference: float | None = None
    """Held-out accuracy of the start model at the first block."""
    history: list[str] = field(default_factory=list)
    """One line for each stage that ended: why."""


class Curriculum:
    """Walks through the stages."""

    def __init__(self, stages: Sequence[Stage], rollback: RollbackConfig) -> None:
        self._stages, self._rollback = tuple(stages), rollback
        self.state = CurriculumState()

    @property
    def done(self) -> bool:
        """All stages have ended."""
        return self.state.stage >= len(self._stages)

    @property
    def stage(self) -> Stage:
        """The running stage."""
        return self._stages[self.state.stage]

    @property
    def total_updates(self) -> int:
        """Most updates that all stages can take."""
        return sum(stage.gate.updates for stage in self._stages)

    @property
    def wants_evaluation(self) -> bool:
        """The gate can only decide on a held-out accuracy."""
        gate = self.stage.gate
        return gate.kind == "accuracy_ratio" and self.state.step + 1 >= gate.min_updates

    def observe(self, accuracy: float) -> Health:
        """Take the accuracy of fresh rollouts, before they are trained on."""
        state, window = self.state, self._rollback.window
        state.accuracies.append(accuracy)
        if self._rollback.limit == 0 or len(state.accuracies) < window:
            return "fine"
        mean = sum(state.accuracies[-window:]) / window
        if mean > state.best:
            state.best = mean
            return "best"
        if mean < (1 - self._rollback.drop) * state.best:
            state.rollbacks += 1
            state.accuracies.clear()
            if state.rollbacks > self._rollback.limit:
                self._end(f"collapsed {state.rollbacks} times; kept its best weights")
            return "collapsed"
        return "fine"

    def step(self, evaluated: float | None = None) -> bool:
        """Count one update, with the held-out accuracy where it was measured; True when the stage ends."""
        state, gate = self.state, self.stage.gate
        state.step += 1
        reason = None
        if state.step >= gate.updates:
            reason = f"{state.step} updates"
        elif state.step >= gate.min_updates:
            reason = self._gate_opens(evaluated)
        if reason:
            self._end(reason)
        return reason is not None

    def _gate_opens(self, evaluated: float | None) -> str | None:
        state, gate = self.state, self.stage.gate
        if gate.kind == "plateau" and len(state.accuracies) >= 2 * gate.window:
            last = sum(state.accuracies[-gate.window :]) / gate.window
            before = sum(state.accuracies[-2 * gate.window : -gate.window]) / gate.window
            if last - before < gate.min_gain:
                return f"plateau: {before:.3f} -> {last:.3f} over {gate.window} updates"
        if gate.kind == "accuracy_ratio" and evaluated is not None:
            if state.reference is None:
                raise ValueError("an accuracy_ratio gate needs the start model's accuracy as reference")
            if evaluated >= gate.ratio * state.reference:
                return f"held-out {evaluated:.3f} >= {gate.ratio:g} x {state.reference:.3f}"
        return None

    def _end(self, reason: str) -> None:
        state = self.state
        line = f"{self.stage.name} ended after {state.step} updates: {reason}"
        self.state = CurriculumState(stage=state.stage + 1, reference=state.reference, history=[*state.history, line])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self.state) | {"stages": [stage.model_dump(mode="json") for stage in self._stages]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue; raises ValueError when the stages already walked through differ from today's."""
        saved = dict(saved)
        stages = saved.pop("stages")
        walked = min(saved["stage"] + 1, len(stages))
        for index, stage in enumerate(stages[:walked]):
            now = self._stages[index].model_dump(mode="json") if index < len(self._stages) else None
            if now != stage:
                raise ValueError(
                    f"the checkpoint's stage {index} ({stage['name']}) is not the configured one; resume with "
                    "the curriculum it was made with, or change later stages only"
                )
        self.state = CurriculumState(**saved)
