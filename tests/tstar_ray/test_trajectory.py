"""Records: what is refused, and that Parquet gives back exactly what was written."""

from dataclasses import fields, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from synthetic import make_trajectory

from tstar_ray.problems import Problem
from tstar_ray.traces import Origin, read_origin, read_traces, write_traces
from tstar_ray.trajectory import Group, Sample, Trajectory, tokens_per_forward


def trajectory(seed=0, **settings):
    return make_trajectory(np.random.default_rng(seed), **{"prompt_len": 6, "blocks": 3, "block_size": 4} | settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"token_ids": t.token_ids[:-1]}, "15 tokens do not end on the grid of block size 4"),
        (lambda t: {"completion_len": 0}, "completion of 0 tokens, 10 decoded"),
        (lambda t: {"completion_len": 11}, "completion of 11 tokens, 10 decoded"),
        (lambda t: {"step_map": t.step_map[1:]}, "step_map has 9 entries for 10 tokens"),
        (lambda t: {"logprobs": t.logprobs[1:]}, "logprobs has 9 entries for 10 tokens"),
        (lambda t: {"weight_versions": t.weight_versions[1:]}, "2 weight versions for 3 blocks"),
        (lambda t: {"logprobs": t.logprobs * np.nan}, "a log-prob is not finite"),
        (lambda t: {"step_map": t.step_map[::-1]}, "step map runs backwards"),
        (lambda t: {"step_map": t.step_map * 0}, "steps are counted from 1"),
    ],
)
def test_trap_29_a_broken_record_is_refused_by_what_is_broken(change, message):
    good = trajectory().validate()
    with pytest.raises(ValueError, match=message):
        replace(good, **change(good)).validate()


def make_groups():
    rng, groups = np.random.default_rng(3), []
    for g in range(4):
        samples = tuple(
            Sample(
                make_trajectory(rng, prompt_len=5 + g, blocks=1 + s, block_size=4, group_id=g, sample=s, version=7),
                f"text {g} {s} \\boxed{{3}}",
                "wrong",
                0.0,
            )
            for s in range(3)
        )
        groups.append(Group(g, Problem(f"p{g}", f"What is {g}?", str(g)), samples))
    return groups


def test_parquet_gives_back_every_bit(tmp_path):
    groups = make_groups()
    write_traces(tmp_path / "deep" / "t.parquet", groups)
    found = read_traces(tmp_path / "deep" / "t.parquet")
    for a, b in zip(groups, found, strict=True):
        assert (a.group_id, a.problem) == (b.group_id, b.problem)
        for s, t in zip(a.samples, b.samples, strict=True):
            assert (s.text, s.verdict, s.reward) == (t.text, t.verdict, t.reward)
            for field in fields(Trajectory):
                x, y = getattr(s.trajectory, field.name), getattr(t.trajectory, field.name)
                if isinstance(x, np.ndarray):
                    assert x.dtype == y.dtype
                    np.testing.assert_array_equal(x, y)
                else:
                    assert x == y


def test_parquet_tells_where_in_a_run_the_groups_come_from(tmp_path):
    for origin in (None, Origin("b4-8", 7)):
        write_traces(tmp_path / "t.parquet", make_groups(), origin)
        assert read_origin(tmp_path / "t.parquet") == origin
    assert len(read_traces(tmp_path / "t.parquet")) == len(make_groups())


def test_files_of_another_schema_are_refused(tmp_path):
    write_traces(tmp_path / "t.parquet", make_groups())
    table = pq.read_table(tmp_path / "t.parquet")
    pq.write_table(table.replace_schema_metadata({"tstar_ray.schema": "99"}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="trajectories of schema 99; this version reads schema 2"):
        read_traces(tmp_path / "t.parquet")


def test_tokens_per_forward_golden():
    t = replace(
        trajectory(blocks=2),
        completion_len=5,
        step_map=np.array([1, 2, 3, 4, 4, 4], dtype=np.int32),
    )
    assert (t.denoising_steps, t.blocks) == (4, 2)
    assert tokens_per_forward([t], commits=False) == 5 / 4
    assert tokens_per_forward([t, t], commits=True) == 10 / 12
    assert tokens_per_forward([], commits=True) == 0.0
