"""Stages, gates and the guard against collapse, by hand-made accuracy curves."""

import json

import pytest

from tstar_ray.config_curriculum import Gate, RollbackConfig, Stage
from tstar_ray.curriculum import Curriculum

NO_ROLLBACK = RollbackConfig(limit=0)


def stages(*gates):
    return [Stage(name=f"b{4 << i}", rollout_block=4 << i, train_block=4 << i, gate=g) for i, g in enumerate(gates)]


def walk(curriculum, accuracies, evaluations=None):
    """Feed accuracies until they run out; returns the update numbers at which stages ended."""
    ended = []
    for number, accuracy in enumerate(accuracies, start=1):
        assert curriculum.observe(accuracy) != "collapsed"
        if curriculum.step(evaluations[number - 1] if evaluations else None):
            ended.append(number)
        if curriculum.done:
            break
    return ended


def test_fixed_steps():
    curriculum = Curriculum(stages(Gate(updates=3), Gate(updates=2)), NO_ROLLBACK)
    assert walk(curriculum, [0.5] * 9) == [3, 5]
    assert curriculum.done
    assert [line.split(" ended")[0] for line in curriculum.state.history] == ["b4", "b8"]


def test_plateau_ends_when_the_last_window_gains_too_little():
    gate = Gate(kind="plateau", updates=100, min_updates=0, window=3, min_gain=0.01)
    curriculum = Curriculum(stages(gate), NO_ROLLBACK)
    rising = [0.1 * i for i in range(8)]
    # windows of three: the first pair that gains less than 0.01 is [.7 .7 .7] after [.7 .7 .7]
    assert walk(curriculum, rising + [0.7] * 20) == [13]


def test_plateau_waits_for_the_fewest_updates():
    gate = Gate(kind="plateau", updates=100, min_updates=12, window=2, min_gain=0.01)
    assert walk(Curriculum(stages(gate), NO_ROLLBACK), [0.5] * 30) == [12]


def test_accuracy_ratio_compares_with_the_start_models_reference():
    gate = Gate(kind="accuracy_ratio", updates=100, min_updates=2, ratio=0.9)
    curriculum = Curriculum(stages(gate), NO_ROLLBACK)
    curriculum.state.reference = 0.8
    assert walk(curriculum, [0.5] * 9, [0.9, 0.71, None, 0.73, 0.9, 0.9, 0.9, 0.9, 0.9]) == [4]


def test_accuracy_ratio_asks_for_evaluations_only_when_they_can_decide():
    curriculum = Curriculum(stages(Gate(kind="accuracy_ratio", updates=9, min_updates=3)), NO_ROLLBACK)
    curriculum.state.reference = 1.0
    wanted = []
    for _ in range(4):
        curriculum.observe(0.5)
        wanted.append(curriculum.wants_evaluation)
        curriculum.step(0.0 if wanted[-1] else None)
    assert wanted == [False, False, True, True]


@pytest.mark.parametrize("kind", ["plateau", "accuracy_ratio"])
def test_every_gate_ends_at_the_most_updates(kind):
    curriculum = Curriculum(stages(Gate(kind=kind, updates=7, min_gain=0.0, window=2)), NO_ROLLBACK)
    curriculum.state.reference = 1.0
    assert walk(curriculum, [0.1 * i for i in range(9)], [0.0] * 9) == [7]


def test_a_collapse_rolls_back_and_the_limit_ends_the_stage():
    guard = RollbackConfig(window=2, drop=0.5, limit=1)
    curriculum = Curriculum(stages(Gate(updates=100), Gate(updates=5)), guard)
    assert [curriculum.observe(a) for a in (0.6, 0.8)] == ["fine", "best"]  # window mean 0.7
    assert curriculum.observe(0.5) == "fine"  # 0.65
    assert curriculum.observe(0.1) == "collapsed"  # 0.3 < 0.35
    assert curriculum.stage.name == "b4"
    assert [curriculum.observe(a) for a in (0.1, 0.1)] == ["fine", "collapsed"]
    assert curriculum.stage.name == "b8", "past the limit the stage ends"
    assert "collapsed 2 times" in curriculum.state.history[0]
    assert curriculum.state.best < 0, "the next stage measures its own best"


def test_rollback_can_be_turned_off():
    curriculum = Curriculum(stages(Gate(updates=100)), NO_ROLLBACK)
    assert {curriculum.observe(a) for a in [0.9] * 9 + [0.0] * 9} == {"fine"}


def test_state_survives_json_and_continues():
    made = [Gate(kind="plateau", updates=20, window=3, min_updates=0), Gate(updates=4)]
    curve = [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5]
    straight = Curriculum(stages(*made), NO_ROLLBACK)
    expected = walk(straight, curve)
    first = Curriculum(stages(*made), NO_ROLLBACK)
    walk(first, curve[:5])
    second = Curriculum(stages(*made), NO_ROLLBACK)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [5 + n for n in walk(second, curve[5:])] == expected
    assert second.state == straight.state


def test_a_checkpoint_of_other_stages_is_refused():
    saved = Curriculum(stages(Gate(updates=3), Gate(updates=2)), NO_ROLLBACK).state_dict()
    with pytest.raises(ValueError, match=r"stage 0 \(b4\) is not the configured one"):
        Curriculum(stages(Gate(updates=4)), NO_ROLLBACK).load_state_dict(saved)
    later = Curriculum(stages(Gate(updates=3), Gate(updates=9)), NO_ROLLBACK)
    later.load_state_dict(saved)  # a stage not yet begun may change
