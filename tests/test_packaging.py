"""The wheel, as somebody gets it who has no checkout: complete, and it trains from any folder."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a source distribution, as an index would have it."""
    folder = tmp_path_factory.mktemp("dist")
    script = "import sys; from setuptools import build_meta as b; print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, cwd=ROOT, capture_output=True)
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    [source] = (folder / "source").iterdir()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    [found] = folder.glob("*.whl")
    return found


def test_the_wheel_holds_every_module_and_what_they_read(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packages = ("tstar_ray", "actors", "learner", "reward", "cluster")
    tracked = subprocess.run(
        ["git", "ls-files", *packages], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    # What only a checkout needs: examples, and a package of its own that `./tstar vllm-env` installs.
    apart = ("cluster/examples/", "actors/vllm_plugin/cpu_shim/")
    wanted = {name for name in tracked if not name.startswith(apart)}
    assert wanted - names == set()
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_every_dependency_has_an_upper_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    assert [line for line in listed if not re.search(r"==|<", line)] == []


@pytest.mark.cluster
def test_the_wheel_trains_from_any_folder(wheel, tmp_path):
    """In an environment of its own, which sees what the wheel depends on, but neither the checkout nor its install."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    environment = tmp_path / "venv"
    python = environment / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    [site] = environment.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, env=clean)
    # A path in a .pth file is looked at after the folder of that file, and .pth files in it are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    def go(*command):
        job = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=300, check=False)
        assert job.returncode == 0, job.stdout + job.stderr
        return job.stdout

    where = (
        "import actors, learner, reward, cluster, tstar_ray as t; print(*(m.__file__ for m in (actors, learner, t)))"
    )
    assert all(path.startswith(str(site)) for path in go(python, "-c", where).split())
    settings = ["curriculum.blocks=[4]", "curriculum.updates=[1]", "rollout.problems=4", "eval.problems=8"]
    go(environment / "bin" / "tstar-ray", "run.name=job", *settings)
    assert json.loads((tmp_path / "runs" / "job" / "result.json").read_text())["updates"] == 1
