"""A batch, and an evaluation, of which nothing could be scored."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from tstar_ray.collection import Collection
from tstar_ray.config import load_config
from tstar_ray.config_base import WorkError
from tstar_ray.data import PromptedProblem
from tstar_ray.held_out import HeldOut
from tstar_ray.problems import Problem
from tstar_ray.window import Window

CONFIG = load_config(None, ["curriculum.blocks=[4]", "curriculum.updates=[1]", "rollout.problems=2"])
PROBLEMS = [PromptedProblem(Problem(str(i), "", ""), (1, 2)) for i in range(3)]


class Failing:
    """A collector none of whose samples gets a verdict."""

    def dispatch(self, problems, decoding, **how):
        return Collection(failed=list(problems), verdicts=Counter(crashed=len(problems)))

    def finish(self, batch):
        return batch


def test_a_batch_without_any_score_is_told_with_its_verdicts():
    window = Window(CONFIG, Failing(), PROBLEMS, stop_ids=(0,), on_depth=lambda depth: None)
    (stage,) = CONFIG.curriculum.resolve()
    window.fill(stage, 1)
    with pytest.raises(WorkError, match=r"all 2 groups of an update failed: .* verdicts \{'crashed': 2\}"):
        window.consume(stage, 0)


def test_an_evaluation_without_any_score_is_told_with_its_verdicts(tmp_path):
    held_out = HeldOut(
        CONFIG,
        tmp_path,
        PROBLEMS,
        collector=Failing(),
        learner=None,
        stop_ids=(0,),
        reporter=MagicMock(),
        metrics=SimpleNamespace(phase=lambda name: nullcontext()),
    )
    with pytest.raises(WorkError, match=r"B=4: no problem could be scored; verdicts \{'crashed': 3\}"):
        held_out.table(0, "start model")
