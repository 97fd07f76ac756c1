"""What the window asserts on every batch, the correction that stale batches get, and batches without any score."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from synthetic import make_trajectory

from tstar_ray.collection import Collection
from tstar_ray.config import load_config
from tstar_ray.config_base import WorkError
from tstar_ray.data import PromptedProblem
from tstar_ray.held_out import HeldOut
from tstar_ray.problems import Problem
from tstar_ray.stage_settings import update_spec
from tstar_ray.trajectory import Group, Sample
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


class Delivers:
    """A collector that brings back what it is given."""

    def __init__(self, collection):
        self.collection = collection

    def dispatch(self, problems, decoding, **more):
        return object()

    def finish(self, batch):
        return self.collection


@pytest.mark.parametrize(
    ("version", "block", "refused"),
    [(9, 4, ""), (10, 4, "staleness 3 to 3, the bound is 2"), (6, 4, "staleness -1 to -1"), (8, 8, r"blocks \{8\}")],
)
def test_invariant_5_a_batch_that_is_too_old_or_of_another_block_size_is_refused(version, block, refused):
    config = load_config(None, ["rollout.max_staleness=2", "curriculum.blocks=[4,8]", "curriculum.updates=[3,3]"])
    trajectory = make_trajectory(np.random.default_rng(0), prompt_len=5, blocks=3, block_size=block, version=7)
    group = Group(0, Problem("0", "", "1"), (Sample(trajectory, "1", "correct", 1.0),))
    window = Window(config, Delivers(Collection([group])), [None] * 64, stop_ids=(0,), on_depth=lambda depth: None)
    stage = config.curriculum.resolve()[0]
    window.fill(stage, 1)
    if refused:
        with pytest.raises(AssertionError, match=refused):
            window.consume(stage, version)
    else:
        assert window.consume(stage, version).groups == [group]


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        (["rollout.max_staleness=0"], "none"),
        (["rollout.max_staleness=1"], "token"),
        (["rollout.max_staleness=1", "learner.loss.trace=random"], "none"),
        (["rollout.max_staleness=1", "learner.loss.correction.level=sequence"], "sequence"),
    ],
)
def test_the_importance_correction_is_on_where_rollouts_may_be_stale_and_comparable(settings, level):
    config = load_config(None, settings)
    assert update_spec(config, config.curriculum.resolve()[0]).correction == level
