"""Metrics as an operator's tools see them: the endpoint of a real Ray, a real Prometheus, the Grafana file."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request

import pytest
import ray

from cluster import dashboard
from cluster.metrics import GAUGES, OUTCOMES, PHASES, VERDICTS, Metrics
from cluster.session import connect
from tstar_ray.config import ClusterConfig

pytestmark = pytest.mark.cluster
TOTALS = ("phase", "groups", "verdicts", "actor_tokens")


@pytest.fixture(scope="module")
def endpoint():
    """host:port of the metrics of a private Ray."""
    with connect(ClusterConfig(), namespace="test"):
        node = ray.nodes()[0]
        yield f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def queries():
    return [query for row in dashboard.PANELS.values() for panel in row for query in panel.queries.values()]


def test_the_dashboard_file_is_what_the_script_makes():
    assert json.loads(dashboard.FILE.read_text()) == dashboard.make()


def test_every_metric_has_a_panel_and_every_panel_a_metric():
    shown = set(re.findall(r"ray_tstar_(\w+)", " ".join(queries())))
    assert shown == {*GAUGES, *TOTALS}


def test_a_prometheus_that_scrapes_a_run_answers_every_query_of_the_dashboard(endpoint, tmp_path):
    program = shutil.which("prometheus")
    if program is None:
        assert not os.environ.get("CI"), "CI installs Debian's prometheus"
        pytest.skip("prometheus is not installed")
    metrics = Metrics(run="a-run.1")
    config = tmp_path / "prometheus.yml"
    job = {"job_name": "ray", "static_configs": [{"targets": [endpoint]}]}
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    server = subprocess.Popen(
        [*command, f"--web.listen-address={address}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def answer(query):
        text = query.replace("$run", "a-run.*")
        url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
        try:
            with urllib.request.urlopen(url, timeout=10) as found:
                return json.load(found)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{text}: {error.read().decode()}") from error
        except OSError:
            return []

    try:
        missing, deadline = queries(), time.monotonic() + 90
        while missing and time.monotonic() < deadline:
            metrics.count_tokens({"rollout-0": int(time.monotonic() * 100)})
            time.sleep(1)
            missing = [query for query in missing if not answer(query)]
        assert missing == []
        [found] = answer(next(q for q in queries() if "actor_tokens" in q))
        assert found["metric"]["actor"] == "rollout-0"
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_every_metric_is_on_the_endpoint_from_the_start(endpoint):
    metrics = Metrics(run="scrape")
    with metrics.phase("train"):
        metrics.set("accuracy", 0.25)
    metrics.count_groups({"trained": 3})
    metrics.count_verdicts({"correct": 5})
    series = [f"ray_tstar_{name}" for name in GAUGES]
    deadline = time.monotonic() + 40
    text = ""
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        if "ray_tstar_verdicts" in text and re.search(r'ray_tstar_accuracy\{[^}]*run="scrape"[^}]*\} 0.25', text):
            break
        time.sleep(1)

    def value(name, **tags):
        for line in text.splitlines():
            if (
                line.startswith(name + "{")
                and 'run="scrape"' in line
                and all(f'{k}="{v}"' in line for k, v in tags.items())
            ):
                return float(line.rsplit(" ", 1)[1])
        return None

    assert [s for s in series if value(s) is None] == []
    assert {p: value("ray_tstar_phase", phase=p) for p in PHASES} == dict.fromkeys(PHASES, 0.0)
    assert {o: value("ray_tstar_groups", outcome=o) for o in OUTCOMES} == dict.fromkeys(OUTCOMES, 0.0) | {
        "trained": 3.0
    }
    assert {v: value("ray_tstar_verdicts", verdict=v) for v in VERDICTS} == dict.fromkeys(VERDICTS, 0.0) | {
        "correct": 5.0
    }
    assert metrics.take_seconds()["train"] >= 0
    assert metrics.take_seconds() == {}
