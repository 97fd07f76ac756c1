"""Settings: where they come from, what they resolve to, and what a user is told about a mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from tstar_ray.config import Config, ConfigError, load_config
from tstar_ray.config_adapt import AdaptConfig
from tstar_ray.config_experiment import ExperimentConfig
from tstar_ray.experiment import plan
from tstar_ray.settings import load_settings


def test_importing_the_configuration_loads_nothing_heavy():
    code = (
        "import sys, tstar_ray.config; print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("actors: {count: 5, max_batch: 7}\nlearner: {loss: {kl_coef: 0.5}}\n")
    config = load_config(file, ["actors.count=6", "learner.loss.clip_low=0.1"])
    assert (config.actors.count, config.actors.max_batch) == (6, 7)
    assert (config.learner.loss.kl_coef, config.learner.loss.clip_low) == (0.5, 0.1)
    assert config.reward == Config().reward


def test_a_value_that_is_no_yaml_is_named():
    with pytest.raises(ConfigError, match="curriculum.blocks=.* is not readable as YAML"):
        load_config(None, ["actors.count=2", "curriculum.blocks=[4,8"])


def test_nothing_behind_the_sign_is_empty_text():
    assert load_config(None, ["data.eval=", "run.name="]).data.eval == ""


def test_the_resolved_configuration_loads_back_to_the_same(tmp_path):
    config = load_config(None, ["curriculum.bridge_updates=3", "run.name=x", "model.mask_token_id=5"])
    file = tmp_path / "resolved.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ([], [("b4", 4, 4, 2), ("b8", 8, 8, 3), ("b16", 16, 16, 4)]),
        (
            ["curriculum.bridge_updates=5"],
            [("b4", 4, 4, 2), ("b4-8", 4, 8, 5), ("b8", 8, 8, 3), ("b8-16", 8, 16, 5), ("b16", 16, 16, 4)],
        ),
        (["curriculum.mode=direct"], [("b16", 16, 16, 9)]),
        (["curriculum.mode=fixed"], [("b4", 4, 4, 9)]),
        (["curriculum.updates=[0,3,4]"], [("b8", 8, 8, 3), ("b16", 16, 16, 4)]),
        (["curriculum.updates=[7]"], [("b4", 4, 4, 7), ("b8", 8, 8, 7), ("b16", 16, 16, 7)]),
    ],
)
def test_modes_resolve_to_stages(settings, stages):
    config = load_config(None, ["curriculum.updates=[2,3,4]", *settings])
    found = [(s.name, s.rollout_block, s.train_block, s.gate.updates) for s in config.curriculum.resolve()]
    assert found == stages


def test_denoising_steps_scale_with_the_block():
    """Trap 24: a step count is never carried to a larger block."""
    assert all(s.denoising_steps is None for s in load_config().curriculum.resolve())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("actors.cont=3", "actors.cont: unknown setting; did you mean count?"),
        ("flux.x=3", "flux: unknown setting; known there: run, model, data"),
        ("actors.count=x", "actors.count='x': input should be a valid integer"),
        ("actors.count=0", "actors.count=0: input should be greater than or equal to 1"),
        ("rollout.group_size=1", "rollout.group_size=1: input should be greater than or equal to 2"),
        ("rollout.temperature=0", "rollout.temperature=0: input should be greater than 0"),
        ("actors.engine=sglang", "actors.engine='sglang': input should be 'torch' or 'vllm'"),
        ("curriculum.mode=foo", "curriculum.mode='foo': input should be 'tstar', 'direct' or 'fixed'"),
        ("curriculum.blocks=[8,4]", "4 after 8 does not grow"),
        ("curriculum.blocks=[]", "name at least one block size"),
        ("curriculum.updates=[1,2]", "give one number or one for each of the 3 blocks"),
        ("curriculum.updates=[0,0,0]", "one must be positive"),
        (
            "curriculum.stages=[{name: a, rollout_block: 4, train_block: 6}]",
            "train_block=6 is no multiple of rollout_block=4",
        ),
        (
            "curriculum.stages=[{name: a, rollout_block: 8, train_block: 4}]",
            "train_block=4 is no multiple of rollout_block=8",
        ),
        (
            "curriculum.stages=[{name: a, rollout_block: 8, train_block: 8},"
            "{name: b, rollout_block: 4, train_block: 4}]",
            "stage b has smaller blocks than a; blocks only grow",
        ),
        (
            "curriculum.stages=[{name: a, rollout_block: 4, train_block: 4, denoising_steps: 5}]",
            "denoising_steps=5 exceed rollout_block=4",
        ),
        ("curriculum.stages=[{name: a, rollout_blck: 4, train_block: 4}]", "did you mean rollout_block?"),
        ("learner.loss.accuracy_band=[0.8,0.2]", "give two numbers low < high in [0, 1]"),
        ("learner.zero_stage=4", "learner.zero_stage=4"),
        ("learner.steps_per_update=1000", "exceeds the 512 samples of an update"),
        ("rollout.max_new_tokens=8", "cannot hold a block of 16"),
        ("model.dtype=bfloat16", "slower than float32 on CPU"),
        ("actors.gpus=1", "would differ in dtype"),
        ("data.prompt=hello", "needs the placeholder {question}"),
        ("run.name=a/b", "use letters, digits, dot, dash and underscore only"),
        ("actors", "'actors' is no setting; write section.key=value"),
        ("actors=3", "actors=3"),
    ],
)
def test_a_mistake_is_answered_with_value_and_remedy(setting, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, [setting])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["learner.loss.correction.level=step", "curriculum.bridge_updates=3"],
            "in stage b4-8 (rollout block 4, train block 8, shrink 1, objective policy) recorded log-probs are",
        ),
        (
            ["curriculum.blocks=[4,6]", "curriculum.bridge_updates=2"],
            "curriculum.blocks=[4, 6]: 6 is no multiple of 4, as bridge_updates=2 needs",
        ),
        (
            ["rollout.variants=[{threshold: 0.8}]", "curriculum.strategy=static"],
            "threshold=0.8 means something to dynamic unmasking only, and stage b4 uses static",
        ),
        (
            ["rollout.variants=[{}, {}, {}]", "rollout.group_size=2"],
            "rollout.variants has 3 entries for groups of 2 samples",
        ),
        (
            ["curriculum.bridge_updates=2", "curriculum.bridge_objective=imitation", "learner.value.kind=shared"],
            "stage b4-8 has objective=imitation, which has no use for a value model; set learner.value.kind=none",
        ),
        (
            ["curriculum.bridge_updates=2", "curriculum.bridge_steps_per_update=4096"],
            "stage b4-8: steps_per_update=4096 exceeds the 512 samples of an update",
        ),
        (
            ["learner.loss.correction.level=token", "curriculum.shrink=2"],
            "shrink 2, objective policy) recorded log-prob",
        ),
        (["learner.loss.correction.level=token", "learner.loss.trace=coupled"], "needs loss.trace=trace"),
        (["learner.value.kind=shared", "learner.loss.trace=random"], "value.kind=shared needs loss.trace=trace"),
        (["learner.offload=optimizer", "learner.zero_stage=0"], "offload=optimizer needs zero_stage 1, 2 or 3"),
        (["actors.cuda_graphs=true"], "actors.cuda_graphs=true needs a GPU, but actors.gpus=0; set actors.gpus=1"),
        (
            ["actors.cuda_graphs=true", "actors.engine=vllm", "actors.gpus=1"],
            "is a setting of actors.engine=torch, and the engine is vllm",
        ),
        (
            ["actors.triton_kernels=true", "actors.gpus=1"],
            "actors.triton_kernels=true is for recorded passes, and actors.cuda_graphs=false; set actors.cuda_graphs",
        ),
        (["learner.offload=all", "learner.zero_stage=2"], "offload=all needs zero_stage=3, not 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, settings)
    assert message in str(error.value)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(broken)
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="expected sections"):
        load_config(broken)


def test_the_configuration_page_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "make_configuration.py"
    found = subprocess.run([sys.executable, str(page), "--check"], timeout=60, check=False)
    assert found.returncode == 0, "run ./tstar python docs/make_configuration.py"


PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_every_preset_is_valid(preset, tmp_path):
    """By its first word a preset is for the adapt or the experiment command, else for a run."""
    if preset.name.startswith("experiment"):
        config = load_settings(ExperimentConfig, preset, [f"dir={tmp_path}"])
        assert plan(config, preset.parent, tmp_path / config.name)
    elif preset.name.startswith("adapt"):
        assert load_settings(AdaptConfig, preset).blocks
    else:
        assert load_config(preset).curriculum.resolve()
