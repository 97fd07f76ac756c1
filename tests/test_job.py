"""`ray job submit` against a cluster that somebody else started, which the job must leave running."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import RAY, SMALL, free_ports, ray_head, records

pytestmark = pytest.mark.cluster
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def head(tmp_path):
    """A Ray head node; yields (environment, dashboard address, ray address, process)."""
    dashboard, agent = free_ports(2)
    with ray_head(tmp_path, f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}") as started:
        environment, ray_address, process = started
        address = f"http://127.0.0.1:{dashboard}"
        wait_for_agent(address, environment)
        yield environment, address, ray_address, process


def ray_job(address, environment, *arguments, timeout=300):
    return subprocess.run(
        [RAY, "job", "submit", "--address", address, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=REPOSITORY,
    )


def wait_for_agent(address, environment):
    """The dashboard agent answers some seconds after `ray start`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if ray_job(address, environment, "--", "true", timeout=120).returncode == 0:
            return
        time.sleep(1)
    raise AssertionError("the Ray head did not take a job within 120 s")


def test_a_submitted_job_trains_where_the_user_asked_and_leaves_the_cluster_running(head, tmp_path):
    environment, address, ray_address, process = head
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tstar_ray.run", f"run.dir={out}", "run.name=job", "actors.count=3", *SMALL]
    known = ["--submission-id", "first", "--metadata-json", '{"team": "t"}']
    job = ray_job(address, environment, "--working-dir", ".", *known, "--", *command)
    output = job.stdout + job.stderr
    assert job.returncode == 0, output
    assert "private Ray cluster" not in output
    assert "trained accuracy" in output
    assert [r["stage"] for r in records(out / "job")] == ["b4", "b4", "b8", "b8"]
    assert (out / "job" / "final" / "model.safetensors").is_file()
    told = json.loads((out / "job" / "status.json").read_text())["job"]
    assert (told["job_submission_id"], told["team"]) == ("first", "t")
    assert process.poll() is None, "the cluster still runs"
    joined = subprocess.run(
        [sys.executable, "-m", "tstar_ray.run", f"run.dir={out}", "run.name=joined", *SMALL],
        env=environment | {"RAY_ADDRESS": ray_address},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert joined.returncode == 0, joined.stdout + joined.stderr
    assert "private Ray cluster" not in joined.stdout
    assert len(records(out / "joined")) == 4
    doctor = subprocess.run(
        [sys.executable, "-m", "tstar_ray.doctor", "--json", "actors.cache_gb=1e6"],
        env=environment | {"RAY_ADDRESS": ray_address},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = {f["what"]: f for f in json.loads(doctor.stdout)["findings"]}
    assert json.loads(doctor.stdout)["machine"]["where"] == f"the cluster at {ray_address}"
    assert found["memory"]["verdict"] == "missing", "every node's memory counts, and is not enough"
    assert process.poll() is None
    failing = ray_job(address, environment, "--working-dir", ".", "--", *command[:3], "actors.count=0")
    assert failing.returncode != 0
    assert "actors.count=0: input should be greater than or equal to 1" in failing.stdout + failing.stderr
