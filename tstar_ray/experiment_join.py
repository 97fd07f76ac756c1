"""Other runs of an experiment, from the ``experiment.json`` that another machine wrote."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tstar_ray.config_base import ConfigError
from tstar_ray.config_experiment import ExperimentConfig
from tstar_ray.experiment_frontier import Decoded
from tstar_ray.experiment_summary import CellResult


def join(
    config: ExperimentConfig, files: Sequence[Path], here: Collection[tuple[str, int]]
) -> tuple[list[CellResult], list[Decoded]]:
    """Their runs, and their models at the thresholds. ``here``: arm and seed of the runs that ended on this machine.

    Raises ConfigError for a file that is no result of this experiment, and for a run that is there twice. The start
    model is the same wherever it was decoded, and may be.
    """
    cells: list[CellResult] = []
    decoded: list[Decoded] = []
    taken = set(here)
    for file in files:
        try:
            saved = json.loads(file.read_text())
            theirs = ExperimentConfig(**saved["experiment"])
            cells_there = [CellResult(**cell) for cell in saved["cells"]]
            decoded += [Decoded(**one) for one in saved["decoded"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--join {file}: not the experiment.json of an experiment ({error!r})") from error
        for arm in dict.fromkeys(cell.arm for cell in cells_there):
            if arm not in config.arms:
                raise ConfigError(f"--join {file}: its arm {arm} is none of this file's: {', '.join(config.arms)}")
            if arm not in theirs.arms:
                raise ConfigError(f"--join {file}: it holds runs of {arm} without the settings of that arm")
            own, other = _settings(config, arm), _settings(theirs, arm)
            if own != other:
                raise ConfigError(f"--join {file}: arm {arm} had other settings: {other}; here they are {own}")
        runs = {(cell.arm, cell.seed) for cell in cells_there if not config.arms[cell.arm].decode_only}
        if twice := sorted(runs & taken):
            raise ConfigError(
                f"--join {file}: {', '.join(f'{arm}-s{seed}' for arm, seed in twice)} ended here or in a file before; "
                "every run counts once"
            )
        taken |= runs
        cells += cells_there
    return cells, decoded


def _settings(config: ExperimentConfig, arm: str) -> dict[str, Any]:
    return {
        "config": config.config and str(config.config),
        "settings": [*config.settings, *config.arms[arm].settings],
        "decode_only": config.arms[arm].decode_only,
        "thresholds": list(config.thresholds),
    }
