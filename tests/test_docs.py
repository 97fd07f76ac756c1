"""Every command in README.md and docs/ is run: as it stands, with less work, as far as its settings, or elsewhere.

A command that is in none of the tables below fails, and so does an entry that no page has any more.
"""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import SMALL, environment

from learner.adapter import StepReport

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

_LESS = "data=[{source: arithmetic, limit: 8}]"
RUN_FIRST = "python -m tstar_ray.run curriculum.mode=direct actors.count=4"
"""Makes runs/NAME, which the others look at."""
RUN = {
    "python -m tstar_ray.run --help": [],
    "python -m tstar_ray.run --print-config": [],
    "python -m tstar_ray.evaluate model.path=runs/NAME": [_LESS, "grid.blocks=[4]", "folder=evaluations/NAME"],
    "python -m tstar_ray.analyze runs/NAME": [],
    "python -m tstar_ray.analyze evaluations/NAME": [],
    "python -m tstar_ray.report runs/NAME": [],
    "python -m tstar_ray.report --experiment OUT tstar=runs/t1,runs/t2 direct=runs/d1,runs/d2": [],
    "python -m tstar_ray.experiment configs/experiment_embedded.yaml --table": [],
    "python -m cluster.scale runs/NAME": [],
    "python -m benchmarks.chaos --faults 200 --out chaos.json": ["--help"],
    "python -m tstar_ray.doctor --config configs/sdar_8b_2nodes.yaml --gpus 16 --gpu-gib 80": [],
}
"""In this order, with further arguments that make them short."""

SETTINGS = (
    "python -m tstar_ray.run --config configs/sdar_4b_8gpu.yaml run.dir=/data/runs",
    "python -m tstar_ray.run --config configs/sdar_4b_8gpu.yaml run.dir=/data/runs run.name=NAME run.resume=auto",
    "python -m tstar_ray.run run.resume=runs/NAME",
    "python -m tstar_ray.run",
    "python -m tstar_ray.adapt model.path=Qwen/Qwen3-1.7B-Base data.train=openai/gsm8k data.subset=main train.ranks=4 "
    "train.gpus=1 train.gradient_checkpointing=true run.dir=/data/runs run.name=qwen-b4 run.resume=auto",
    "python -m tstar_ray.evaluate model.path=/data/runs/NAME data=[gsm8k,math500] grid.blocks=[4,8,16] "
    "grid.max_new_tokens=2048 actors.count=8 actors.gpus=1 actors.cache_gb=48",
    "python -m tstar_ray.evaluate model.path=JetLM/SDAR-4B-Chat data=[gsm8k,math500,aime24] grid.max_new_tokens=2048 "
    "actors.gpus=1",
    "python -m tstar_ray.evaluate model.path=runs/NAME grid.strategies=[dynamic,static] grid.thresholds=[0.8,0.9,0.95]",
    "python -m tstar_ray.evaluate model.path=runs/NAME grid.temperature=1 grid.samples=8",
)
"""Need GPUs, the hub, or time: with ``--print-config``, which answers every mistake in them."""

ELSEWHERE = {
    "ray job submit --working-dir . -- python -m tstar_ray.run run.dir=/data/runs actors.count=8": (
        "test_job.py",
        "test_a_submitted_job_trains",
    ),
    "ray job submit --working-dir . -- python -m tstar_ray.run run.dir=/abs/path": (
        "test_job.py",
        "test_a_submitted_job_trains",
    ),
    'ray job submit --submission-id NAME --metadata-json \'{"team": "math"}\' ...': (
        "test_job.py",
        "test_a_submitted_job_trains",
    ),
    "python -m tstar_ray.run model.path=/data/runs/qwen-b4/final ...": (
        "test_adapt.py",
        "test_an_adaptation_is_stopped_resumed_and_used_as_a_policy",
    ),
    "python -m cluster.scale runs/NAME --rollout 8": ("test_faults.py", "test_invariant_5_fresh"),
    "python -m cluster.scale runs/NAME --rollout 8 --reward 2": ("test_faults.py", "test_invariant_5_fresh"),
    "python -m cluster.scale RUN_FOLDER": ("test_faults.py", "test_invariant_5_fresh"),
    "python -m tstar_ray.experiment configs/experiment_embedded.yaml": ("test_experiment.py", "test_a_stopped"),
    "python -m tstar_ray.experiment configs/experiment_embedded.yaml seeds=[1] name=one": (
        "test_experiment.py",
        "test_a_stopped",
    ),
    "python -m tstar_ray.experiment configs/experiment_embedded.yaml --arms tstar,direct": (
        "test_experiment.py",
        "test_a_stopped",
    ),
    "python -m tstar_ray.experiment": ("test_experiment.py", "test_a_stopped"),
    "python -m tstar_ray.adapt": ("test_adapt.py", "test_an_adaptation_is_stopped"),
    "python -m tstar_ray.doctor": ("test_doctor.py", "test_the_embedded_run_misses_nothing"),
    "python -m tstar_ray.doctor --config configs/sdar_4b_8gpu.yaml": ("test_doctor.py", "test_every_recipe"),
    "python -m tstar_ray.report": ("tstar_ray/report/test_report.py", "test_the_command"),
    "python -m benchmarks.chaos": ("test_chaos.py", "def chaos"),
    "prometheus --config.file=/tmp/ray/session_latest/metrics/prometheus/prometheus.yml": (
        "cluster/test_metrics.py",
        "test_a_prometheus_that_watched_a_run",
    ),
    "pip install torch==2.13.0": ("test_packaging.py", "test_the_wheel_trains_from_any_folder"),
    "pip install -e '.[wandb]'": ("tstar_ray/test_tracking.py", "test_weights_and_biases_gets_the_same"),
    "pip install -e '.[hub]'": ("test_packaging.py", "test_the_wheel_trains_from_any_folder"),
    "pip install -e '.[vllm]'": ("actors/test_vllm_engine.py", "def test"),
}
"""File under tests/ and what it holds, where the command, or the same with other numbers, is run."""

OPEN = (
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "export HF_HOME=/data/huggingface",
    "export HF_HUB_OFFLINE=1",
    "hf download JetLM/SDAR-4B-Chat",
    "python -c \"import datasets; datasets.load_dataset('openai/gsm8k', 'main')\"",
    "kubectl get secrets",
    "export RAY_AUTH_MODE=token",
    "export RAY_AUTH_TOKEN=$(kubectl get secret NAME --template '{{.data.auth_token | base64decode}}')",
    "ray get-auth-token --generate",
    "ray job list",
    "cp cluster/grafana/tstar_ray.json /tmp/ray/session_latest/metrics/grafana/dashboards/",
    "grafana-server --config /tmp/ray/session_latest/metrics/grafana/grafana.ini --homepath /usr/share/grafana web",
    ".venv/bin/tensorboard --logdir runs",
    "ray start",
    "ray start --labels",
    "ray job submit",
    "ray job",
    "ray stop",
)
"""Other people's programs, or no whole commands."""


def commands():
    """Commands of all pages: lines of ``bash`` fences, and in the text what begins like one."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        for fence in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in fence.replace("\\\n", " ").splitlines():
                command = " ".join(line.partition(" #")[0].split())
                if command:
                    found.setdefault(command, page.name)
        rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for command in re.findall(r"`((?:\./tstar|\.venv/|python -m|ray |pip )[^`]*)`", rest):
            found.setdefault(" ".join(command.split()), page.name)
    return found


COMMANDS = commands()


def test_every_command_is_in_a_table_and_every_entry_on_a_page():
    known = {RUN_FIRST, *RUN, *SETTINGS, *ELSEWHERE, *OPEN}
    asked = {command for command in COMMANDS if not command.startswith("./tstar")}
    assert asked - known == set()
    assert known - asked == set()


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_is_run_elsewhere_is_there(command):
    file, part = ELSEWHERE[command]
    assert part in (REPOSITORY / "tests" / file).read_text()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("./tstar")])
def test_the_script_knows_the_command_and_the_tests_are_there(command):
    words = command.split()[1:]
    listed = subprocess.run(["./tstar", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert f"./tstar {words[0]} " in listed
    for word in words[1:]:
        if "/" in word:
            assert (REPOSITORY / word).exists(), word


@pytest.mark.parametrize("command", SETTINGS)
def test_its_settings_are_accepted(command, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    module = re.match(r"python -m (\S+)", command)[1]
    main = pytest.importorskip(module).main
    assert main([*command.split()[3:], "--print-config"]) == 0
    assert "model:" in capsys.readouterr().out


def test_the_configuration_page_has_every_command_and_every_default():
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    for module in ("run", "evaluate", "adapt", "experiment"):
        assert f"## python -m tstar_ray.{module}\n" in page
    required = re.findall(r"^\| `(\S+)` \| \(required\)", page, re.MULTILINE)
    stage = [f"curriculum.stages[].{name}" for name in ("name", "rollout_block", "train_block")]
    assert required == [*stage, "data[].source", "name", "arms"]
    for row in ("| `run.dir` | `runs` |", "| `actors.labels` | `{}` |", "| `stages[].mixture` | `{4: 1.0}` |"):
        assert row in page


def test_the_numbers_of_an_adaptation_are_on_the_metrics_page():
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"`train/(\w+)`", page)) == {field.name for field in dataclasses.fields(StepReport)}


@pytest.mark.cluster
def test_the_commands_of_a_first_hour_do_what_the_pages_say(tmp_path):
    """One after the other in one folder, as a reader would."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")

    def go(command, *more):
        job = subprocess.run(
            [sys.executable, *command.split()[1:], *more],
            cwd=tmp_path,
            env=environment(PYTHONPATH=str(REPOSITORY)),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert job.returncode in ((0, 1) if "doctor" in command else (0,)), f"{command}\n{job.stdout}{job.stderr}"
        return job.stdout

    go(RUN_FIRST, *SMALL, "run.name=NAME", "actors.count=2", "curriculum.updates=[1,1]")
    for twin in ("t1", "t2", "d1", "d2"):
        shutil.copytree(tmp_path / "runs" / "NAME", tmp_path / "runs" / twin)
    said = {command: go(command, *more) for command, more in RUN.items()}
    assert "section.key=value" in said["python -m tstar_ray.run --help"]
    assert "rollout: " in said["python -m cluster.scale runs/NAME"]
    for file in (
        "runs/NAME/analysis.json",
        "runs/NAME/report.html",
        "evaluations/NAME/analysis.json",
        "OUT/report.html",
    ):
        assert (tmp_path / file).is_file(), file
