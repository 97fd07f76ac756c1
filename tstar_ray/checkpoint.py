"""Run checkpoints that are whole or absent (invariant 9).

    <root>/.tmp-u00040/ ──fill, fsync──► MANIFEST.json (sizes, SHA-256, state) ──rename──► <root>/u00040/

A folder is used only if its manifest lists exactly its files with their sizes and hashes. Older checkpoints are
deleted after the rename, never before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
FORMAT = 3


@dataclass(frozen=True, slots=True)
class RunCheckpoint:
    """A checkpoint whose every file was verified."""

    folder: Path
    """Where it is."""
    state: dict[str, Any]
    """Counters, curriculum and data frontier, as given to `write_checkpoint`."""


class CheckpointError(ValueError):
    """A checkpoint folder that must not be used, with the reason."""


def write_checkpoint(
    root: Path, update: int, state: dict[str, Any], fill: Callable[[Path], None], *, keep: int
) -> Path:
    """Make ``root/uNNNNN``: ``fill`` writes the files, ``state`` (JSON) goes into the manifest."""
    final = root / f"u{update:05d}"
    temporary = root / f".tmp-{final.name}"
    for unfinished in root.glob(".tmp-*"):  # of writers that were killed
        shutil.rmtree(unfinished)
    temporary.mkdir(parents=True)
    fill(temporary)
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        files[str(path.relative_to(temporary))] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        _sync(path)
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": files, "state": state}, indent=1))
    _sync(manifest)
    for folder in (temporary, *(p for p in temporary.rglob("*") if p.is_dir())):
        _sync(folder)
    if final.exists():  # a checkpoint still, by its other name, should the writer die before the next rename
        replaced = root / f"{final.name}-replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    _sync(root)
    # Later ones belong to a history that was given up when an earlier one was resumed.
    earlier = [folder for folder in sorted(root.glob("u*")) if folder.name <= final.name]
    for folder in set(root.glob("u*")) - set(earlier[-keep:]):
        shutil.rmtree(folder)
    return final


def link_tree(source: Path, target: Path) -> None:
    """A second name for a folder whose files are never written again: no bytes are copied where the file system
    has hard links. An older ``target`` is replaced."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=link)


def read_checkpoint(folder: Path) -> RunCheckpoint:
    """Verify every file of one checkpoint; raises CheckpointError naming what is wrong."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}; it was never finished") from None
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: not a checkpoint of this version (format {FORMAT})")
    listed = manifest["files"]
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    for name in sorted(set(listed) ^ present):
        raise CheckpointError(f"{folder}: {name} is {'missing' if name in listed else 'not in the manifest'}")
    for name, entry in listed.items():
        path = folder / name
        if path.stat().st_size != entry["size"] or _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{folder}: {name} is damaged (size or hash differs)")
    return RunCheckpoint(folder, manifest["state"])


def newest_checkpoint(root: Path, *, refused: Callable[[str], None], latest: int | None = None) -> RunCheckpoint:
    """The newest checkpoint that verifies, of update ``latest`` or before; those passed over are reported to
    ``refused``."""
    for folder in sorted(root.glob("u*"), reverse=True):
        if latest is not None and folder.name > f"u{latest:05d}":
            continue
        try:
            return read_checkpoint(folder)
        except CheckpointError as error:
            refused(str(error))
    which = "" if latest is None else f" of update {latest} or before"
    raise CheckpointError(f"{root}: no valid checkpoint{which} to resume from")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
