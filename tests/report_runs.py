"""Run folders made by hand for tests of the report: two stages, held-out scores, traces of the embedded vocabulary."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from synthetic import make_trajectory

from tstar_ray.config import load_config
from tstar_ray.problems import Problem
from tstar_ray.traces import write_traces
from tstar_ray.trajectory import Group, Sample

NASTY = 'How many </script><b onclick="x">pens</b> & "balls"?'
"""A question that must arrive as text."""


def make_run(
    folder: Path,
    *,
    seed: int = 0,
    updates: tuple[int, int] = (4, 4),
    gain: float = 0.1,
    ended: bool = True,
    settings: Sequence[str] = (),
) -> Path:
    """B=4 then B=8; accuracy rises by ``gain`` in each stage, TPF by a tenth."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    stages = ["curriculum.blocks=[4,8]", f"curriculum.updates=[{updates[0]},{updates[1]}]"]
    config = load_config(None, [*stages, *settings])
    (folder / "config.yaml").write_text(config.to_yaml())
    records = [evaluation(0, 4, 0.6, 2.0), evaluation(0, 8, 0.5, 3.0)]
    for update in range(1, sum(updates) + 1):
        first = update <= updates[0]
        part = (update - 1) / (updates[0] - 1) if first else (update - updates[0] - 1) / (updates[1] - 1)
        block = 4 if first else 8
        records.append(
            {
                "kind": "update",
                "update": update,
                "stage": f"b{block}",
                "rollout/accuracy": 0.5 + gain * part,
                "rollout/tpf": (2.0 if first else 3.0) * (1 + 0.1 * part),
                "rollout/reward": 0.5,
                "rollout/truncated": 0.0,
                "learner/kl": 0.001 * update,
                "learner/entropy": 0.4,
                "learner/grad_norm": 1.0 if update != 2 else 9.0,
                "learner/clip_fraction": 0.01,
                "learner/forwarded_tokens": 1000.0,
                "seconds/update": 30.0,
                "verdict/correct": 4,
                "verdict/wrong": 4,
            }
        )
        write_traces(folder / "traces" / f"update-{update:05d}.parquet", make_groups(rng, block))
    records.append(evaluation(sum(updates), 8, 0.5 + gain, 3.3))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if ended:
        result = {
            "before": [score(4, 0.6, 2.0), score(8, 0.5, 3.0)],
            "after": [score(4, 0.6 + gain, 2.2), score(8, 0.5 + gain, 3.3)],
            "updates": sum(updates),
            "stopped": False,
        }
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def make_groups(rng: np.random.Generator, block: int) -> list[Group]:
    """Three problems of two samples; the second one's are one right and one wrong."""
    groups = []
    for i, verdicts in enumerate((("correct", "correct"), ("wrong", "correct"), ("wrong", "wrong"))):
        samples = tuple(
            Sample(
                make_trajectory(rng, prompt_len=9 + i, blocks=3, block_size=block, group_id=i, sample=k),
                "",
                verdict,
                float(verdict == "correct"),
            )
            for k, verdict in enumerate(verdicts)
        )
        groups.append(Group(i, Problem(f"p{i}", NASTY if i == 1 else f"question {i}", "7"), samples))
    return groups


def evaluation(update, block, accuracy, tpf):
    values = score(block, accuracy, tpf)
    del values["decoding"]
    return {"kind": "evaluation", "update": update, **{f"eval_b{block}/{k}": v for k, v in values.items()}}


def score(block, accuracy, tpf):
    return {
        "decoding": {"block_size": block},
        "accuracy": accuracy,
        "low": accuracy - 0.05,
        "high": accuracy + 0.05,
        "tpf": tpf,
        "tpf_with_commits": tpf / 2,
        "truncated": 0.0,
    }
