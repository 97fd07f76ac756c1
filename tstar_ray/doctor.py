"""Say what a configuration needs, what this machine or cluster has, and what is missing; start nothing of the run.

    python -m tstar_ray.doctor --config configs/sdar_4b_1gpu.yaml
    python -m tstar_ray.doctor --config configs/sdar_8b_8gpu.yaml --gpus 8 --gpu-gib 80     for another machine

Memory comes from the model's configuration alone (`tstar_ray.memory`); no weights are read and no hub is asked. A model
that is not on this machine is looked up among the known SDAR sizes. With RAY_ADDRESS or cluster.address the resources
are those of that cluster, else those of this machine.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from tstar_ray.config import ARITHMETIC, EMBEDDED, Config, ConfigError, load_config
from tstar_ray.machine import Machine, look
from tstar_ray.memory import (
    PUBLISHED,
    ModelShape,
    Part,
    checkpoint_gib,
    fullest_device,
    known_shape,
    learner_parts,
    rollout_parts,
    sequences_that_fit,
)

Verdict = Literal["ok", "note", "missing"]
_IGNORED_EXTRAS = re.compile(r"extra\s*==")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    verdict: Verdict
    """`missing` makes the exit code 1."""
    what: str
    """What was looked at."""
    found: str
    """What is there, and the remedy where it is not enough."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 nothing is missing, 1 something is, 2 a mistake in the settings."""
    parser = argparse.ArgumentParser(
        prog="python -m tstar_ray.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings of tstar_ray.run")
    parser.add_argument("--gpus", type=float, help="suppose so many GPUs instead of looking")
    parser.add_argument("--gpu-gib", type=float, help="suppose so much memory on each")
    parser.add_argument("--host-gib", type=float, help="suppose so much memory beside them, on all nodes together")
    parser.add_argument("--json", action="store_true", help="print findings and needs as JSON")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings, over the file's")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.settings)
        machine, trouble = look(config, gpus=arguments.gpus, gpu_gib=arguments.gpu_gib, host_gib=arguments.host_gib)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shape, findings = find_model(config)
    found = [Finding("missing", "cluster", trouble)] if trouble else []
    findings = [*packages(), *found, *findings, *data_files(config), *placement(config, machine)]
    needs: dict[str, list[Part]] = {}
    if shape is not None:
        needs = needed(config, shape)
        findings += [*memory(config, needs, machine), *cache(config, shape), *disk(config, shape)]
    if arguments.json:
        print(
            json.dumps(
                {
                    "machine": asdict(machine),
                    "needs": {role: [asdict(part) for part in parts] for role, parts in needs.items()},
                    "findings": [asdict(finding) for finding in findings],
                },
                indent=1,
            )
        )
    else:
        show(needs, findings, machine)
    return int(any(finding.verdict == "missing" for finding in findings))


def packages() -> list[Finding]:
    """Installed versions against the bounds that this package was installed with."""
    from packaging.requirements import Requirement

    try:
        required = metadata.requires("tstar-ray") or []
    except metadata.PackageNotFoundError:
        return [Finding("note", "packages", "tstar-ray is not installed, only on the path: versions are not checked")]
    wrong, count = [], 0
    for requirement in (Requirement(line) for line in required if not _IGNORED_EXTRAS.search(line)):
        count += 1
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed (needs {requirement.specifier})")
            continue
        if not requirement.specifier.contains(version.split("+")[0], prereleases=True):
            wrong.append(f"{requirement.name} {version} is installed, {requirement.specifier} is needed")
    if wrong:
        return [Finding("missing", "packages", f"{text}; run pip install -e .") for text in wrong]
    return [Finding("ok", "packages", f"all {count} are installed within their bounds")]


def find_model(config: Config) -> tuple[ModelShape | None, list[Finding]]:
    """Sizes of the model, and whether it can be opened."""
    path = config.model.path
    folder = Path(__file__).parent / EMBEDDED if path == EMBEDDED else Path(path)
    what = f"model {path}"
    if not folder.is_dir():
        shape = known_shape(path)
        if Path(path).is_absolute() or path.startswith("."):
            return shape, [Finding("missing", what, "no such folder; set model.path")]
        if shape is None:
            note = "not a local folder, and none of the known sizes: memory is not estimated; give a downloaded folder"
            return None, [Finding("note", what, note)]
        note = f"not a local folder: sizes of a known model, {shape.parameters:,} parameters; will be downloaded"
        return shape, [Finding("note", what, note)]
    try:
        shape = ModelShape.from_config(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        return None, [Finding("missing", what, f"config.json cannot be used: {error}")]
    from tstar_ray.model_files import inspect_checkpoint

    try:
        inspect_checkpoint(path, mask_token_id=config.model.mask_token_id)
    except ValueError as error:
        return shape, [Finding("missing", what, str(error))]
    if not [*folder.glob("*.safetensors")]:
        return shape, [Finding("missing", what, f"{folder} holds no weights as safetensors, which alone are read")]
    return shape, [Finding("ok", what, f"{shape.parameters:,} parameters, with tokenizer and mask token")]


def data_files(config: Config) -> list[Finding]:
    """Whether every source can be read."""
    from tstar_ray.data import load_problems

    found = []
    for setting, source, split in (
        ("data.train", config.data.train, config.data.train_split),
        ("data.eval", config.data.eval, config.data.eval_split),
    ):
        if not source or source == ARITHMETIC:
            continue
        if Path(source).suffix in (".jsonl", ".parquet") or Path(source).exists():
            try:
                count = len(load_problems(config.data, source, split, setting))
                found.append(Finding("ok", setting, f"{source}: {count} problems"))
            except ConfigError as error:
                found.append(Finding("missing", setting, str(error)))
        elif _installed("datasets"):
            found.append(Finding("note", setting, f"{source}: a hub data set; will be downloaded"))
        else:
            found.append(Finding("missing", setting, f"{source}: a hub data set needs pip install -e '.[hub]'"))
    return found


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def placement(config: Config, machine: Machine) -> list[Finding]:
    """Whether the actors find room, by the run's own rule."""
    from cluster.placement import plan
    from cluster.session import ClusterError

    try:
        planned = plan(config, {"CPU": machine.cpus, "GPU": machine.gpus})
    except ClusterError as error:
        return [Finding("missing", "placement", f"{machine.where}: {error}")]
    have = f"{machine.where}: {machine.cpus:g} CPUs, {machine.gpus:g} GPUs"
    return [Finding("ok", "placement", have), *(Finding("note", "placement", note) for note in planned.notes)]


def needed(config: Config, shape: ModelShape) -> dict[str, list[Part]]:
    """Items of one learner rank and of one rollout actor."""
    rank_gpu, actor_gpu = config.learner.gpus > 0, config.actors.gpus > 0
    return {
        "learner rank": learner_parts(shape, config.learner, gpu=rank_gpu, itemsize=_itemsize(config, gpu=rank_gpu)),
        "rollout actor": rollout_parts(
            shape, cache_gb=config.actors.cache_gb, gpu=actor_gpu, itemsize=_itemsize(config, gpu=actor_gpu)
        ),
    }


def _itemsize(config: Config, *, gpu: bool) -> int:
    dtype = config.model.dtype
    return 2 if dtype == "bfloat16" or (dtype == "auto" and gpu) else 4


def _sums(parts: Sequence[Part]) -> tuple[float, float]:
    return sum(p.gib for p in parts), sum(p.host_gib for p in parts)


def memory(config: Config, needs: dict[str, list[Part]], machine: Machine) -> list[Finding]:
    """What the fullest GPU and the machine have to hold."""
    learner, actors = config.learner, config.actors
    (rank, rank_host), (actor, actor_host) = _sums(needs["learner rank"]), _sums(needs["rollout actor"])
    full, ranks, held = fullest_device(
        rank, actor, ranks=learner.ranks, rank_gpus=learner.gpus, actors=actors.count, actor_gpus=actors.gpus
    )
    found = []
    if full:
        what = f"memory of the fullest GPU ({ranks} learner ranks, {held} rollout actors)"
        if machine.gpu_gib is None:
            found.append(Finding("note", what, f"{full:.1f} GiB needed; no GPU here to compare with (--gpu-gib)"))
        elif full > machine.gpu_gib:
            remedy = (
                "lower actors.cache_gb or learner.micro_batch_tokens, set learner.gradient_checkpointing=true, raise "
                "learner.zero_stage, or set learner.offload=optimizer"
            )
            found.append(Finding("missing", what, f"{full:.1f} GiB needed, {machine.gpu_gib:.1f} GiB there; {remedy}"))
        else:
            found.append(Finding("ok", what, f"{full:.1f} GiB needed, {machine.gpu_gib:.1f} GiB there"))
    once = sum(p.host_gib for p in needs["learner rank"] if p.name == PUBLISHED) + actor_host
    host = once + learner.ranks * (rank_host - once + actor_host + (0 if learner.gpus else rank))
    host += 0 if actors.gpus else actors.count * actor
    what = "memory beside the GPUs" if full else "memory"
    if machine.host_gib is None:
        found.append(Finding("note", what, f"{host:.1f} GiB needed over all nodes"))
    elif host <= machine.host_gib:
        found.append(Finding("ok", what, f"{host:.1f} GiB needed, {machine.host_gib:.1f} GiB there"))
    else:
        text = f"{host:.1f} GiB needed over all nodes, {machine.host_gib:.1f} GiB there"
        if config.cluster.autoscaling:
            found.append(Finding("note", what, f"{text}; nodes have to join"))
        else:
            remedy = "use more or larger nodes, learner.offload=none with more learner.ranks, or fewer actors.count"
            found.append(Finding("missing", what, f"{text}; {remedy}"))
    return found


def cache(config: Config, shape: ModelShape) -> list[Finding]:
    """Whether an actor's keys and values hold the batch it may decode."""
    actors, itemsize = config.actors, _itemsize(config, gpu=config.actors.gpus > 0)
    tokens = config.rollout.max_new_tokens + min(config.data.max_prompt_tokens, 512)
    fit = sequences_that_fit(shape, cache_gb=actors.cache_gb, itemsize=itemsize, tokens=tokens)
    text = f"actors.cache_gb={actors.cache_gb:g} holds {fit} sequences of {tokens} tokens"
    if fit < 1:
        return [Finding("missing", "keys and values", f"{text}; raise it")]
    if fit < actors.max_batch:
        return [Finding("note", "keys and values", f"{text}, actors.max_batch={actors.max_batch} may wait for room")]
    return [Finding("ok", "keys and values", text)]


def disk(config: Config, shape: ModelShape) -> list[Finding]:
    """Room for checkpoints and the trained model where runs are written."""
    itemsize = _itemsize(config, gpu=config.learner.gpus > 0)
    one = checkpoint_gib(shape, itemsize=itemsize, value_model=config.learner.value.kind == "separate")
    # One more while it is written, the stage's best weights, and the exported model.
    need = (config.run.keep_checkpoints + 2) * one + shape.parameters * itemsize / 2**30
    place = config.run.dir.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    text = f"{need:.1f} GiB for checkpoints and the trained model in {config.run.dir}, {free:.1f} GiB free"
    if need > free:
        return [Finding("missing", "disk", f"{text}; set run.dir, or lower run.keep_checkpoints")]
    return [Finding("ok", "disk", text)]


def show(needs: dict[str, list[Part]], findings: Sequence[Finding], machine: Machine) -> None:
    """Tables for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for role, parts in needs.items():
        table = Table(title=f"One {role} needs", title_justify="left")
        for column in ("item", "GiB", "host GiB", "how"):
            table.add_column(column, justify="right" if "GiB" in column else "left")
        for part in parts:
            table.add_row(part.name, _number(part.gib), _number(part.host_gib), part.how)
        device, host = _sums(parts)
        table.add_row("sum", _number(device), _number(host), "", style="bold")
        console.print(table)
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    table = Table(title=f"Looked at for {machine.where}", title_justify="left")
    for column in ("", "what", "found"):
        table.add_column(column)
    for finding in findings:
        table.add_row(marks[finding.verdict], finding.what, finding.found.replace("[", r"\["))
    console.print(table)
    missing = [f for f in findings if f.verdict == "missing"]
    console.print(f"{len(missing)} missing" if missing else "nothing is missing")


def _number(gib: float) -> str:
    return "" if gib == 0 else f"{gib:.2f}"


if __name__ == "__main__":
    sys.exit(main())
