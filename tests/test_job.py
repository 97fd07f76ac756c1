"""`ray job submit` against a cluster that somebody else started, which the job must leave running."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from jobs import SMALL, records

pytestmark = pytest.mark.cluster
REPOSITORY = Path(__file__).parents[1]
RAY = str(Path(sys.executable).parent / "ray")


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def head(tmp_path):
    """A Ray head node with ports, folder and token of its own; yields (environment, dashboard address, ray address)."""
    ray_port, dashboard, agent = free_ports(3)
    temp = tempfile.mkdtemp(prefix="head-", dir="/tmp")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = kept | {
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
        "COLUMNS": "200",
    }
    options = ["--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    process = subprocess.Popen(
        [
            RAY,
            "start",
            *options,
            f"--port={ray_port}",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
            f"--temp-dir={temp}",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_agent(address, environment)
        yield environment, address, f"127.0.0.1:{ray_port}", process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run(["rm", "-rf", temp], check=False)


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
    job = ray_job(address, environment, "--working-dir", ".", "--", *command)
    output = job.stdout + job.stderr
    assert job.returncode == 0, output
    assert "private Ray cluster" not in output
    assert "trained accuracy" in output
    assert [r["stage"] for r in records(out / "job")] == ["b4", "b4", "b8", "b8"]
    assert (out / "job" / "final" / "model.safetensors").is_file()
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
    assert process.poll() is None
    failing = ray_job(address, environment, "--working-dir", ".", "--", *command[:3], "actors.count=0")
    assert failing.returncode != 0
    assert "actors.count=0: input should be greater than or equal to 1" in failing.stdout + failing.stderr
