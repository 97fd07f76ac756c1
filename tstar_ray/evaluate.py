"""Held-out accuracy and tokens per forward, with the decoding settings they were measured with.

    python -m tstar_ray.evaluate model.path=runs/NAME data=[gsm8k,math500] grid.blocks=[4,8,16]
    python -m tstar_ray.evaluate model.path=CHECKPOINT grid.strategies=[dynamic,static] grid.thresholds=[0.8,0.9,0.95]
    python -m tstar_ray.evaluate model.path=runs/NAME grid.orders=[learned,left_to_right,random,sub_blocks]
    python -m tstar_ray.evaluate --config FILE grid.temperature=1 grid.samples=8

Every combination is a cell; finished cells are kept in the folder, so that the same command goes on after any stop, and
a wider grid measures only what is new. Runs on rollout and reward actors as training does, without a learner: the
driver publishes the checkpoint's weights, and every actor proves them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from tstar_ray.command import run_command
from tstar_ray.config import ConfigError, ModelConfig
from tstar_ray.config_evaluate import EvaluateConfig
from tstar_ray.decoding import Decoding
from tstar_ray.scores import wilson_interval
from tstar_ray.settings import to_yaml
from tstar_ray.trajectory import Group, tokens_per_forward

if TYPE_CHECKING:
    import torch

    from tstar_ray.collection import Collection
    from tstar_ray.collector import Collector
    from tstar_ray.data import PromptedProblem
    from tstar_ray.grid import CellResult, Collect


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model decoded one way on n held-out problems."""

    decoding: Decoding
    """How."""
    problems: int
    """n: problems with a verdict."""
    unscored: int
    """Problems without one (verifier failed on every attempt); in no average."""
    accuracy: float
    """Share of correct answers."""
    low: float
    """Lower end of the 95 % Wilson interval of the accuracy."""
    high: float
    """Upper end."""
    tpf: float
    """Tokens per forward, without commits."""
    tpf_with_commits: float
    """Tokens per forward of a decoder that commits every block in a pass of its own."""
    truncated: float
    """Share of completions that hit the length cap."""
    mean_tokens: float
    """Mean completion length."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Of `to_dict`."""
        return cls(**{**values, "decoding": Decoding.from_dict(values["decoding"])})


def summarise(groups: Sequence[Group], decoding: Decoding, *, unscored: int) -> Evaluation:
    """Score collected groups; every sample counts."""
    samples = [sample for group in groups for sample in group.samples]
    trajectories = [sample.trajectory for sample in samples]
    count = len(samples)
    correct = sum(sample.verdict == "correct" for sample in samples)
    low, high = wilson_interval(correct, count)
    return Evaluation(
        decoding=decoding,
        problems=count,
        unscored=unscored,
        accuracy=correct / max(count, 1),
        low=low,
        high=high,
        tpf=tokens_per_forward(trajectories, commits=False),
        tpf_with_commits=tokens_per_forward(trajectories, commits=True),
        truncated=sum(t.stop_reason == "length" for t in trajectories) / max(count, 1),
        mean_tokens=sum(t.completion_len for t in trajectories) / max(count, 1),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 nothing could be scored, 2 a mistake in settings or surroundings, 130 stopped; finished
    cells are kept."""
    return run_command(
        EvaluateConfig,
        launch,
        argv,
        module="tstar_ray.evaluate",
        description=__doc__,
        settings="docs/configuration.md",
        interrupted="stopped; the same command goes on with the cells that are left",
        example="grid.blocks=[4,8]",
    )


def launch(config: EvaluateConfig) -> int:
    """Score everything; a cluster that fails is a mistake in the surroundings."""
    from cluster.session import ClusterError

    try:
        evaluate(config)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(config: EvaluateConfig) -> list[CellResult]:
    """Score every cell of a grid, print the table, write results.json and results.parquet; returns the results.

    Raises ConfigError, ClusterError, and WorkError where a cell has no score.
    """
    from actors.rollout import check_engine
    from cluster.placement import plan
    from cluster.session import connect
    from cluster.weights import ObjectStoreTransport
    from tstar_ray.eval_view import EvaluationView
    from tstar_ray.grid import Store, cell_key, grid_cells, load_data_set, run_cells, write_results
    from tstar_ray.model_files import inspect_checkpoint
    from tstar_ray.run import actor_makers, start_rollouts
    from tstar_ray.weights import checksum

    run, folder = config.as_run(), config.resolve_folder()
    try:
        tokenizer, stop_ids = inspect_checkpoint(run.model.path, mask_token_id=run.model.mask_token_id)
        check_engine(run.model, run.served_actors)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    view = EvaluationView()
    problems: dict[str, list[PromptedProblem]] = {}
    for data in config.data:
        problems[data.label], left_out = load_data_set(data, tokenizer)
        view.say(
            f"{data.label}: {len(problems[data.label])} problems"
            + (f"; {left_out} left out as too long" if left_out else "")
        )
    cells = grid_cells(config.grid, list(problems), stop_ids)
    store = Store(folder, save_traces=config.save_traces)
    (folder / "config.yaml").write_text(to_yaml(config))
    view.say(f"model {run.model.path}; {len(cells)} cells; results in {folder}")
    flat = _weights(run.model)
    digest = checksum(flat)

    def measure(collect: Collect) -> list[CellResult]:
        view.start(cells)
        return run_cells(config, cells, problems, collect, store, checksum=digest, began=view.began, ended=view.ended)

    if all(store.get(cell_key(cell, config, problems[cell.data], digest)) for cell in cells):
        results = measure(_nothing_left)
    else:
        with ExitStack() as stack:
            logs = folder / "logs" / time.strftime("%Y%m%d-%H%M%S")
            session = stack.enter_context(
                connect(config.cluster, namespace=f"tstar-eval-{folder.name}-{os.getpid()}", logs=logs)
            )
            placement = plan(run, session.resources, with_learner=False)
            published = ObjectStoreTransport().publish(flat, 0)
            del flat
            stack.enter_context(view)
            makers = actor_makers(run, placement)
            collector = start_rollouts(run, folder, None, *makers, stack, view, on_tick=view.tick)
            collector.serve(published)
            results = measure(partial(_collect, collector, view=view))
    write_results(folder, config, results)
    view.table(results)
    return results


def _weights(model: ModelConfig) -> torch.Tensor:
    """The checkpoint's flat weights in the dtype that actors use. Raises ConfigError."""
    import torch

    from tstar_ray.model import load_checkpoint
    from tstar_ray.weights import flatten

    try:
        dtype = getattr(torch, model.dtype)
        return flatten(load_checkpoint(model.path, mask_token_id=model.mask_token_id, dtype=dtype).model)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _nothing_left(*_: Any) -> Collection:
    raise AssertionError("every cell is kept")


def _collect(
    collector: Collector, asked: Mapping[int, PromptedProblem], decoding: Decoding, samples: int, *, view: Any
) -> Collection:
    """One cell on the actors."""
    batch = collector.dispatch(asked, decoding, group_size=samples)
    view.watch(batch)
    return collector.finish(batch)


if __name__ == "__main__":
    sys.exit(main())
