"""Fitting actors into clusters: a table, no Ray."""

import pytest

from cluster.placement import plan
from cluster.scale import ask
from cluster.session import ClusterError
from tstar_ray.config import ConfigError, load_config
from tstar_ray.run import _scaled


def test_a_laptop_shares_its_cores():
    placement = plan(load_config(), {"CPU": 2.0})
    total = 2 * placement.rollout["num_cpus"] + placement.reward["num_cpus"] + placement.learner["num_cpus"]
    assert total <= 2.0
    assert (placement.rollout_threads, placement.learner_threads) == (1, 2)
    assert "3.5 CPU cores asked, 2 there" in placement.notes[0]


def test_enough_cores_are_given_as_asked():
    placement = plan(load_config(), {"CPU": 16.0})
    assert placement.rollout == {"num_cpus": 1.0, "num_gpus": 0}
    assert (placement.rollout_threads, placement.learner_threads) == (8, 16)
    assert placement.notes == ()


def test_gpus_are_given_as_asked():
    config = load_config(None, ["actors.gpus=1", "actors.count=6", "learner.gpus=1", "learner.ranks=2"])
    placement = plan(config, {"CPU": 64.0, "GPU": 8.0})
    assert placement.rollout["num_gpus"] == placement.learner["num_gpus"] == 1
    assert placement.reward["num_gpus"] == 0


def test_labels_say_which_nodes():
    config = load_config(None, ["actors.labels={ray.io/accelerator-type: H100}", "learner.labels={role: learner}"])
    placement = plan(config, {"CPU": 64.0})
    assert placement.rollout["label_selector"] == {"ray.io/accelerator-type": "H100"}
    assert placement.learner["label_selector"] == {"role": "learner"}
    assert "label_selector" not in placement.reward


def test_what_nodes_may_join_for_is_asked_for_in_full():
    settings = ["cluster.autoscaling=true", "actors.gpus=1", "actors.count=6", "learner.gpus=1", "learner.ranks=2"]
    placement = plan(load_config(None, settings), {"CPU": 2.0})
    assert placement.rollout == {"num_cpus": 1.0, "num_gpus": 1}
    assert placement.learner == {"num_cpus": 1.0, "num_gpus": 1}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["learner.gpus=2"], r"gpus=2: a rank computes on one GPU; use gpus=1 and more ranks"),
        (["learner.gpus=0.5", "learner.ranks=2"], r"gpus=0\.5 with ranks=2: NCCL refuses ranks that share a GPU"),
    ],
)
def test_gpus_that_ranks_cannot_use_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        load_config(None, settings)
    assert load_config(None, ["learner.gpus=0.5", "actors.gpus=0.5"]).learner.gpus == 0.5, "beside an engine"


def test_a_run_is_placed_with_as_many_actors_as_were_asked_for_last(tmp_path):
    config, told = load_config(None, ["actors.gpus=1", "actors.count=8", "learner.gpus=1"]), []
    assert _scaled(config, tmp_path, told.append) == config
    ask(tmp_path, {"rollout": 4, "reward": 2})
    scaled = _scaled(config, tmp_path, told.append)
    assert (scaled.actors.count, scaled.reward.count) == (4, 2)
    assert told[0].startswith("4 rollout actors instead of actors.count=8, as ")
    plan(scaled, {"CPU": 16.0, "GPU": 5.0})
    (tmp_path / "scale.json").write_text("{")
    assert _scaled(config, tmp_path, told.append) == config
    assert "scale.json is ignored" in told[-1]


@pytest.mark.parametrize(
    ("settings", "resources", "message"),
    [
        (
            ["actors.gpus=1", "actors.count=4", "learner.gpus=1", "learner.ranks=2"],
            {"CPU": 64.0, "GPU": 4.0},
            r"6 GPUs asked \(4 rollout actors x actors.gpus=1 \+ 2 learner ranks x learner.gpus=1\), the cluster has 4",
        ),
        (["actors.gpus=1", "learner.gpus=1"], {"CPU": 2.0, "GPU": 8.0}, "3.5 CPU cores asked, the cluster has 2"),
        ([], {"GPU": 1.0}, "no CPU resource"),
    ],
)
def test_what_cannot_fit_is_said_at_once(settings, resources, message):
    with pytest.raises(ClusterError, match=message):
        plan(load_config(None, settings), resources)
