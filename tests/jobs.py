"""Runs as a user starts them: small settings, whole processes, what they leave."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.vllm_serving import installed_vllm

needs_vllm = pytest.mark.skipif(
    installed_vllm() is None and "TSTAR_VLLM" not in os.environ,  # set by ./tstar vllm: there it has to be
    reason="vLLM is not installed here; ./tstar vllm test ... has an environment with it",
)
RAY = str(Path(sys.executable).parent / "ray")
SMALL = [
    "curriculum.blocks=[4,8]",
    "curriculum.updates=[2,2]",
    "rollout.problems=6",
    "rollout.group_size=4",
    "eval.problems=12",
    "eval.every=0",
    "run.checkpoint_every=1",
    "run.report=false",
]


def command(folder, *settings):
    return [sys.executable, "-m", "tstar_ray.run", f"run.dir={folder}", "run.name=job", *settings]


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"COLUMNS": "200"} | more


def run(folder, *settings, timeout=300, expect=0, **more):
    """Run to the end; returns the run folder and everything printed."""
    job = subprocess.run(
        command(folder, *settings),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=folder,
        env=environment(**more),
        check=False,
    )
    output = job.stdout + job.stderr
    assert job.returncode == expect, output
    return Path(folder) / "job", output


def records(folder, kind="update"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def start(folder, *settings, **more):
    """A run in the background, with its output on a pipe."""
    return subprocess.Popen(
        command(folder, *settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=folder,
        env=environment(**more),
    )


def read_until(job, reached):
    """Lines up to the first one that ``reached`` accepts; fails if the run ends before."""
    lines = []
    for line in job.stdout:
        lines.append(line)
        if reached(line):
            return lines
    raise AssertionError("".join(lines))


def row(update):
    return lambda line: line.split()[:1] == [f"{update}/7"]


SEVEN = [*SMALL, "curriculum.updates=[4,3]", "run.checkpoint_every=2"]


def no_process_left(mark):
    deadline = time.monotonic() + 120
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not marked(mark)


def marked(mark):
    """Processes whose environment carries the mark of a test."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TSTAR_TEST_MARK={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def ray_head(home, *options, **more):
    """A Ray head node with port, folder and token of its own; gives (environment that joins it, address, process)."""
    [port] = free_ports(1)
    temp = tempfile.mkdtemp(prefix="head-", dir="/tmp")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    joined = environment(HOME=str(home), RAY_worker_niceness="0", **token, **more)
    fixed = ["--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    process = subprocess.Popen(
        [RAY, "start", *fixed, f"--port={port}", f"--temp-dir={temp}", *options],
        env=joined,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield joined, f"127.0.0.1:{port}", process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run(["rm", "-rf", temp], check=False)
