"""The chaos suite in short: every kind of fault once, during a real run, and an audit that can tell."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from jobs import environment

from benchmarks.chaos_audit import audit
from benchmarks.chaos_faults import KINDS, draw_kinds

pytestmark = pytest.mark.cluster
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    """What the suite printed, and the folder of the run that it disturbed."""
    folder = tmp_path_factory.mktemp("chaos")
    command = [sys.executable, "-m", "benchmarks.chaos", "--faults", str(len(KINDS)), "--updates", "8", "14"]
    command += ["--no-baseline", "--folder", str(folder), "--set", "eval.problems=64", "rollout.problems=12"]
    command += ["actors.probe_failures=3"]
    job = subprocess.run(
        command, capture_output=True, text=True, timeout=900, cwd=REPOSITORY, env=environment(), check=False
    )
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-4000:]
    return json.loads(job.stdout[job.stdout.index("{\n") :])["disturbed"], folder / "disturbed"


def test_a_run_survives_every_kind_of_fault(chaos):
    found, _ = chaos
    assert {kind: fault["count"] for kind, fault in found["faults"].items()} == dict.fromkeys(KINDS, 1)
    assert found["drivers"] == 2
    assert found["recovery"]["actors replaced"] >= 3
    assert found["recovery"]["learner rebuilt"] >= 1
    assert found["recovery"]["actors lost with their node"] >= 1


def test_the_books_of_a_disturbed_run_add_up(chaos):
    books = chaos[0]["books"]
    assert books["updates"] == 22
    assert books["groups"]["dispatched"] == sum(n for how, n in books["groups"].items() if how != "dispatched")
    assert books["problems"] == books["groups"]["trained"] + books["groups"]["filtered"]
    assert 0 < max(map(int, books["staleness"])) <= books["bound"] == 2


def lose_a_group(folder):
    path = folder / "traces" / "update-00003.parquet"
    table = pq.read_table(path)
    first = table["group_id"][0].as_py()
    pq.write_table(table.filter([group != first for group in table["group_id"].to_pylist()]), path)


def train_a_batch_twice(folder):
    shutil.copy(folder / "traces" / "update-00003.parquet", folder / "traces" / "update-00004.parquet")


def lose_an_update(folder):
    (folder / "traces" / "update-00003.parquet").unlink()


def age_the_learner(folder):
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["kind"] == "update" and record["update"] == 5:
            record["weights/version"] += 4
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def lose_a_dispatch(folder):
    newest = max((folder / "checkpoints").glob("u*"))
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    manifest["state"]["ledger"]["dispatched"] += 1
    (newest / "MANIFEST.json").write_text(json.dumps(manifest))


def report_other_totals(folder):
    result = json.loads((folder / "result.json").read_text())
    result["groups"]["cancelled"] += 1
    (folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (lose_a_group, "groups in the traces"),
        (train_a_batch_twice, "a group was trained twice"),
        (lose_an_update, "traces of an update are missing"),
        (age_the_learner, "the bound is 2"),
        (lose_a_dispatch, "groups dispatched, ended"),
        (report_other_totals, "books"),
    ],
)
def test_the_audit_can_tell(chaos, tmp_path, tamper, told):
    folder = tmp_path / "copy"
    shutil.copytree(chaos[1], folder)
    audit(folder)
    tamper(folder)
    with pytest.raises(AssertionError, match=told):
        audit(folder)


def test_faults_are_drawn_from_the_seed_and_of_every_kind():
    assert draw_kinds(200, 3) == draw_kinds(200, 3) != draw_kinds(200, 4)
    assert set(draw_kinds(len(KINDS), 0)) == set(KINDS)
    assert len(draw_kinds(5, 0)) == 5
