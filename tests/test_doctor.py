"""`python -m tstar_ray.doctor`: what it finds right, what it finds missing, and its exit code."""

import json
from pathlib import Path

import pytest
import yaml

from tstar_ray.config import load_config
from tstar_ray.doctor import main

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("sdar_*.yaml"))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def found(capsys, *arguments):
    code = main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    return code, report, {f["what"]: f for f in report["findings"]}


def test_the_embedded_run_misses_nothing(capsys, tmp_path):
    code, report, by = found(capsys, f"run.dir={tmp_path}")
    missing = [f for f in report["findings"] if f["verdict"] == "missing"]
    assert code == 0, missing
    assert by["model embedded"]["found"].startswith("402,592 parameters")
    assert "installed within their bounds" in by["packages"]["found"]
    assert report["machine"]["cpus"] >= 1
    assert main([f"run.dir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "One learner rank needs" in text
    assert "nothing is missing" in text


MISTAKES = [
    (["model.path=/nowhere"], "model /nowhere", "no such folder"),
    (["data.train=/nowhere.jsonl"], "data.train", "no such file"),
    (["actors.gpus=1", "learner.gpus=1", "learner.ranks=500"], "placement", "502 GPUs asked"),
    (["run.keep_checkpoints=100000000"], "disk", "lower run.keep_checkpoints"),
    (["cluster.address=127.0.0.1:1"], "cluster", "no Ray cluster answers"),
    (["actors.cache_gb=0.000001"], "keys and values", "raise it"),
]


@pytest.mark.parametrize(("settings", "what", "message"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_what_is_missing_is_named_and_the_exit_code_is_1(capsys, tmp_path, settings, what, message):
    code, _, by = found(capsys, f"run.dir={tmp_path}", *settings)
    assert code == 1
    assert by[what]["verdict"] == "missing"
    assert message in by[what]["found"]


def test_a_model_without_weights_or_mask_token_is_not_enough(capsys, tmp_path):
    from tstar_ray.model_files import EMBEDDED_FOLDER

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((EMBEDDED_FOLDER / name).read_bytes())
    code, _, by = found(capsys, f"run.dir={tmp_path}", f"model.path={tmp_path}")
    assert (code, by[f"model {tmp_path}"]["verdict"]) == (1, "missing")
    assert "holds no weights" in by[f"model {tmp_path}"]["found"]
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    assert "holds no weights" in found(capsys, f"model.path={tmp_path}")[2][f"model {tmp_path}"]["found"]
    (tmp_path / "config.json").write_text("{}")
    assert "config.json has no" in found(capsys, f"model.path={tmp_path}")[2][f"model {tmp_path}"]["found"]


def test_a_mistake_in_the_settings_is_exit_code_2(capsys):
    assert main(["actors.cont=1"]) == 2
    assert "did you mean count?" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_fits_the_gpus_it_is_for(capsys, recipe, tmp_path):
    """The number of GPUs in its name, 80 GB (79 GiB) each, by the doctor's arithmetic."""
    settings = load_config(recipe)
    count = {"1gpu": 1, "4gpu": 4, "8gpu": 8, "2nodes": 16}[recipe.stem.rsplit("_", 1)[1]]
    asked = settings.actors.count * settings.actors.gpus + settings.learner.ranks * settings.learner.gpus
    assert asked == count, "all GPUs are used"
    _, report, by = found(capsys, "--config", str(recipe), "--gpus", str(count), "--gpu-gib", "79")
    memory = next(f for what, f in by.items() if what.startswith("memory of the fullest GPU"))
    assert memory["verdict"] == "ok"
    assert by["placement"]["verdict"] == "ok"
    assert {"weights", "optimizer", "activations"} <= {part["name"] for part in report["needs"]["learner rank"]}
    smaller = found(capsys, "--config", str(recipe), "--gpus", str(count), "--gpu-gib", "24")[2]
    assert any(f["verdict"] == "missing" and "24.0 GiB there" in f["found"] for f in smaller.values())


def test_memory_beside_the_gpus_is_missing_wherever_it_is_short(capsys):
    """The optimizer of SDAR-8B takes 122 GiB of the host."""
    supposed = ["--config", str(CONFIGS / "sdar_8b_1gpu.yaml"), "--gpus", "1", "--gpu-gib", "80"]
    for host, verdict in ((64, "missing"), (256, "ok")):
        by = found(capsys, *supposed, "--host-gib", str(host))[2]
        assert by["memory beside the GPUs"]["verdict"] == verdict
        assert f"{host:.1f} GiB there" in by["memory beside the GPUs"]["found"]
    assert found(capsys, *supposed)[2]["memory beside the GPUs"]["verdict"] == "note", "not known"
    growing = found(capsys, *supposed, "--host-gib", "64", "cluster.autoscaling=true")[2]
    assert growing["memory beside the GPUs"]["verdict"] == "note"


def test_recipes_say_why():
    assert len(RECIPES) == 10
    for recipe in RECIPES:
        text = recipe.read_text()
        values = yaml.safe_load(text)
        assert f"SDAR-{recipe.stem.split('_')[1].upper()}-Chat" == values["model"]["path"].split("/")[1]
        assert sum("#" in line for line in text.splitlines()) > 20
