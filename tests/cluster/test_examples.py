"""Examples for clusters: they parse, their settings exist and use what they reserve, every cluster asks for a token."""

import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from tstar_ray.config import load_config
from tstar_ray.doctor import needed
from tstar_ray.memory import known_shape

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "examples"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WITH_RUNS = ("ray_cluster.yaml", "rayjob.yaml", "slurm.sh")


def loaded(name):
    return yaml.safe_load((FOLDER / name).read_text())


def configs(name):
    """The configuration of every run command in an example."""
    text = re.sub(r"\\\n#?", " ", (FOLDER / name).read_text())
    text = re.sub(r"(entrypoint: >-)\s+([^\n]+)\n\s+([^\n]+)", r"\1 \2 \3", text)
    found = []
    for command in re.findall(r"python -m tstar_ray\.run ([^\n#]+)", text):
        words = [word for word in shlex.split(command, comments=True) if word not in ("&", "$@")]
        file = words[words.index("--config") + 1].removeprefix("/app/")
        settings = [re.sub(r"=\$.*", "=/runs", word) for word in words if re.match(r"[a-z]+\.[a-z_.]+=", word)]
        found.append(load_config(ROOT / file, settings))
    return found


def gpus(config):
    return config.learner.ranks * config.learner.gpus, config.actors.count * config.actors.gpus


@pytest.mark.parametrize("name", WITH_RUNS)
def test_every_run_command_in_an_example_is_accepted(name):
    [config] = configs(name)
    assert config.run.dir.is_absolute()
    assert str(config.run.resume) == "auto", "submitted again, it continues"
    # Where nodes come on demand, those that are not there yet must not be an error.
    assert config.cluster.autoscaling == (name != "slurm.sh")


def test_labels_and_gpus_in_the_cluster_file_are_those_that_the_run_asks_for():
    cluster = loaded("ray_cluster.yaml")
    jsonschema.validate(cluster, json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text()))
    nodes = cluster["available_node_types"]
    [config] = configs("ray_cluster.yaml")
    assert [config.learner.labels, config.actors.labels] == [nodes[kind]["labels"] for kind in ("learner", "rollout")]
    assert gpus(config) == (8, 8), "a p5.48xlarge has eight GPUs, two g6e.12xlarge have four each"
    needs = needed(config, known_shape(config.model.path))["rollout actor"]
    assert sum(part.gib for part in needs) < 44, "an L40S has 48 GB"


def test_the_job_asks_for_the_gpus_of_its_first_worker():
    [group] = loaded("rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    [config] = configs("rayjob.yaml")
    assert sum(gpus(config)) == group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])


def test_every_cluster_asks_for_a_token():
    assert loaded("rayjob.yaml")["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    cluster = loaded("ray_cluster.yaml")
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "/root/.ray/auth_token" in cluster["file_mounts"]


def test_the_image_has_what_the_examples_use():
    text = (FOLDER / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    packages = [name.removesuffix("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    assert {*packages, "configs", "pyproject.toml"} <= set(copied)
    assert re.search(r"torch==\S+", text)[0] in PROJECT["project"]["dependencies"]
    assert "--editable '.[hub]'" in text
    image = f"REGISTRY/tstar-ray:{PROJECT['project']['version']}"
    for name in ("ray_cluster.yaml", "rayjob.yaml", "Dockerfile"):
        assert set(re.findall(r"\S+/tstar-ray:\S+", (FOLDER / name).read_text())) == {image}


def test_the_slurm_script_uses_all_it_reserves_in_the_given_environment(tmp_path):
    """Run with stand-ins for SLURM's commands, Ray and Python, which write down how they were called."""
    script = FOLDER / "slurm.sh"
    reserved = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\d+)$", script.read_text(), re.MULTILINE))
    [config] = configs("slurm.sh")
    assert sum(gpus(config)) == int(reserved["nodes"]) * int(reserved["gpus-per-node"])
    bin = tmp_path / "venv" / "bin"
    bin.mkdir(parents=True)
    (bin / "activate").write_text(f"PATH={bin}:$PATH\n")
    for name, body in {
        "scontrol": "printf 'n1\\nn2\\n'",
        "srun": 'echo "srun cores=$SRUN_CPUS_PER_TASK $*" >> "$CALLS"; case "$*" in *hostname*) echo 10.0.0.1;; esac',
        "sleep": "exit 0",
        "python": 'echo "python address=$RAY_ADDRESS mode=$RAY_AUTH_MODE $*" >> "$CALLS"; echo secret',
    }.items():
        (bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64", "CALLS": str(tmp_path / "calls")}
    given = {"TSTAR_VENV": str(bin.parent), "TSTAR_RUNS": str(tmp_path / "runs"), "HOME": str(tmp_path)}
    environment = {"PATH": f"{bin}:{os.environ['PATH']}"} | slurm | given
    subprocess.run(["bash", str(script), "run.seed=3"], env=environment, cwd=tmp_path, check=True, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    started = [line for line in calls if " ray start " in line]
    assert [line.startswith("srun cores=64 ") for line in started] == [True, True], "the head and the other node"
    assert sum("--head" in line for line in started) == 1
    [run] = [line for line in calls if "tstar_ray.run" in line]
    assert run.startswith(
        "python address=10.0.0.1:20007 mode=token -m tstar_ray.run --config configs/sdar_8b_2nodes.yaml"
    )
    assert run.endswith(f"run.dir={tmp_path / 'runs'} run.name=sdar-8b run.resume=auto run.seed=3")
