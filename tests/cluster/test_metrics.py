"""Metrics as an operator's tools see them: a whole run on the endpoint of its Ray, in a Prometheus; Grafana's file."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from contextlib import ExitStack, contextmanager

import pytest
from jobs import SMALL, free_ports, ray_head, read_until, records, start

from cluster import dashboard
from cluster.metrics import GAUGES, OUTCOMES, PHASES, VERDICTS
from tstar_ray.record import DASHBOARD

pytestmark = pytest.mark.cluster
TOTALS = ("phase", "groups", "verdicts", "actor_tokens")
PROMETHEUS = shutil.which("prometheus")
SHOWN = "eval.problems=240"
"""Evaluations last some seconds on any machine: the endpoint shows what lasted longer than its interval of one."""


def queries():
    return [query for row in dashboard.PANELS.values() for panel in row for query in panel.queries.values()]


def test_the_dashboard_file_is_what_the_script_makes():
    assert json.loads(dashboard.FILE.read_text()) == dashboard.make()


def test_every_metric_has_a_panel_and_every_panel_a_metric():
    shown = set(re.findall(r"ray_tstar_(\w+)", " ".join(queries())))
    assert shown == {*GAUGES, *TOTALS}


def scrape(endpoint):
    """What the endpoint says of the run: (metric, value of its other tag or None) -> number."""
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, tags, number in re.findall(r"^ray_tstar_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        tag = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if tag["run"] == "job":
            own = [tag[kind] for kind in ("phase", "outcome", "verdict", "actor") if kind in tag]
            found[name, own[0] if own else None] = float(number)
    return found


def wait_for(endpoint):
    """Ray's agent opens it some seconds after the head has started."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            scrape(endpoint)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("no metrics within 120 s")


@contextmanager
def prometheus(folder, endpoint):
    """A server that scrapes the endpoint every second; gives its address."""
    job = {"job_name": "ray", "static_configs": [{"targets": [endpoint]}]}
    config = folder / "prometheus.yml"
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    server = subprocess.Popen(
        [*command, f"--web.listen-address={address}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run on a Ray of ours, which loses a rollout actor: its folder, what the endpoint said of it from its start to
    its end, and the address of a Prometheus that watched (None: not installed)."""
    folder = tmp_path_factory.mktemp("watched")
    dashboard_port, agent, metrics = free_ports(3)
    ports = (f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent}")
    with ExitStack() as stack:
        head = ray_head(folder, *ports, f"--metrics-export-port={metrics}", RAY_metrics_report_interval_ms="1000")
        environment, address, _ = stack.enter_context(head)
        endpoint = f"127.0.0.1:{metrics}"
        server = stack.enter_context(prometheus(folder, endpoint)) if PROMETHEUS else None
        wait_for(endpoint)
        job = start(folder, *SMALL, SHOWN, **environment, RAY_ADDRESS=address)
        scrapes = []

        def watch():
            while job.poll() is None:
                scrapes.append(scrape(endpoint))
                time.sleep(0.25)

        watcher = threading.Thread(target=watch)
        watcher.start()
        lines = read_until(job, lambda line: line.split()[:1] == ["1/4"])
        actors = json.loads((folder / "job" / "status.json").read_text())["rollout"]["actors"]
        os.kill(actors["rollout-1"]["pid"], signal.SIGKILL)
        output = "".join(lines) + job.communicate(timeout=300)[0]
        watcher.join()
        assert job.returncode == 0, output
        yield folder / "job", [found for found in scrapes if found], server


def test_every_metric_of_a_run_is_on_the_endpoint_and_agrees_with_its_records(watched):
    folder, scrapes, _ = watched
    updates, last = records(folder), {}
    for found in scrapes:
        last |= found
    assert {name for name, _ in last} == {*GAUGES, *TOTALS}
    whole = [len(found) >= len(GAUGES) + len(PHASES) + len(OUTCOMES) + len(VERDICTS) for found in scrapes]
    assert sum(whole) > len(whole) / 2, "and stays there, though most are set once in a while"
    for gauge, name in DASHBOARD.items():
        assert last[gauge, None] == pytest.approx(updates[-1].get(name, 0.0)), gauge
    trained = sum("learner/loss" in r for r in updates)
    shown = {name: number for (name, tag), number in last.items() if tag is None}
    assert shown["weight_version"] == trained
    assert (shown["stage"], shown["rollout_block_size"], shown["train_block_size"]) == (1, 8, 8)
    assert (shown["buffer_depth"], shown["learner_restarts"], shown["reward_actors"]) == (0, 0, 1)
    for outcome in OUTCOMES:
        assert last["groups", outcome] == sum(r.get(f"groups/{outcome}", 0) for r in updates)
    for verdict in VERDICTS:
        assert last["verdicts", verdict] == sum(r.get(f"verdict/{verdict}", 0) for r in updates)
    tokens = sum(number for (name, _), number in last.items() if name == "actor_tokens")
    assert tokens > sum(24 * r["rollout/mean_tokens"] for r in updates), "evaluations are decoded too"
    assert {phase for name, phase in last if name == "phase"} == set(PHASES)
    assert any(found.get(("phase", "evaluate")) == 1 for found in scrapes)


def test_actors_that_start_work_and_are_replaced_are_shown_at_once(watched):
    _, scrapes, _ = watched
    shown = [{name: number for (name, tag), number in found.items() if tag is None} for found in scrapes]

    def seen(**values):
        return any(values.items() <= found.items() for found in shown)

    assert seen(rollout_actors_starting=2, rollout_actors=0), "before they are ready"
    working = {"rollout_actors": 2, "reward_actors": 1, "rollout_actors_starting": 0, "reward_actors_starting": 0}
    assert seen(weight_version=0, accuracy=0, **working), "during the start table"
    assert seen(actor_restarts=1, rollout_actors_starting=1, rollout_actors=1)


def test_a_prometheus_that_watched_a_run_answers_every_query_of_the_dashboard(watched):
    folder, _, server = watched
    if server is None:
        assert not os.environ.get("CI"), "CI installs Debian's prometheus"
        pytest.skip("prometheus is not installed")
    end = (folder / "result.json").stat().st_mtime

    def answer(query, back=0):
        asked = urllib.parse.urlencode({"query": query.replace("$run", "jo.*"), "time": end - back})
        try:
            with urllib.request.urlopen(f"http://{server}/api/v1/query?{asked}", timeout=10) as found:
                return json.load(found)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error

    # A busy machine may scrape late.
    assert [query for query in queries() if not any(answer(query, back) for back in (0, 3, 6))] == []
    tokens = next(query for query in queries() if "actor_tokens" in query)
    actors = {found["metric"]["actor"] for back in (0, 3, 6) for found in answer(tokens, back)}
    assert {"rollout-0", "rollout-1"} <= actors
