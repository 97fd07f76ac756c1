"""Run checkpoints are whole or absent."""

import json
import shutil
from pathlib import Path

import pytest

from tstar_ray.checkpoint import (
    MANIFEST,
    CheckpointError,
    link_tree,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)


def fill(folder):
    (folder / "learner").mkdir()
    (folder / "learner" / "weights.bin").write_bytes(b"weights" * 1000)
    (folder / "optimizer.bin").write_bytes(b"moments")


def write(root, update, keep=2):
    return write_checkpoint(root, update, {"update": update}, fill, keep=keep)


def test_round_trip_and_only_the_newest_are_kept(tmp_path):
    for update in (1, 2, 3):
        write(tmp_path, update)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["u00002", "u00003"]
    found = newest_checkpoint(tmp_path, refused=pytest.fail)
    assert (found.folder.name, found.state) == ("u00003", {"update": 3})
    assert (found.folder / "learner" / "weights.bin").read_bytes() == b"weights" * 1000


def test_a_writer_that_dies_at_any_rename_leaves_a_checkpoint_and_the_next_one_clears_up(tmp_path, monkeypatch):
    write(tmp_path, 4, keep=1)
    rename, renames = Path.rename, []

    def dies(path, target):
        renames.append(path.name)
        if len(renames) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 4, keep=1)
    assert renames == ["u00004", ".tmp-u00004"]
    assert newest_checkpoint(tmp_path, refused=pytest.fail).state == {"update": 4}
    monkeypatch.undo()
    write(tmp_path, 8, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["u00008"]


def damage_content(folder):
    (folder / "learner" / "weights.bin").write_bytes(b"Weights" * 1000)


def damage_size(folder):
    (folder / "optimizer.bin").write_bytes(b"mom")


def lose_file(folder):
    (folder / "optimizer.bin").unlink()


def add_file(folder):
    (folder / "stray").write_text("x")


def lose_manifest(folder):
    (folder / MANIFEST).unlink()


def cut_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])


def foreign_manifest(folder):
    (folder / MANIFEST).write_text(json.dumps({"format": 99}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_content, "weights.bin is damaged"),
        (damage_size, "optimizer.bin is damaged"),
        (lose_file, "optimizer.bin is missing"),
        (add_file, "stray is not in the manifest"),
        (lose_manifest, "never finished"),
        (cut_manifest, "MANIFEST.json is damaged"),
        (foreign_manifest, "not a checkpoint of this version"),
    ],
)
def test_invariant_9_a_damaged_checkpoint_is_refused_by_name_and_the_older_one_used(tmp_path, damage, reason):
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    with pytest.raises(CheckpointError, match=reason):
        read_checkpoint(tmp_path / "u00002")
    refused = []
    assert newest_checkpoint(tmp_path, refused=refused.append).state == {"update": 1}
    assert len(refused) == 1
    assert "u00002" in refused[0]


def test_invariant_9_a_writer_that_dies_leaves_the_older_ones_alone(tmp_path):
    write(tmp_path, 1, keep=1)

    def dies(folder):
        fill(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, 2, {}, dies, keep=1)
    assert newest_checkpoint(tmp_path, refused=pytest.fail).state == {"update": 1}
    write(tmp_path, 2, keep=1)  # what the dead writer left does not disturb the next
    assert newest_checkpoint(tmp_path, refused=pytest.fail).state == {"update": 2}


def test_checkpoints_of_a_history_that_was_given_up_go_once_there_is_a_newer_one(tmp_path):
    for update in (10, 20, 30, 40):
        write(tmp_path, update, keep=4)
    damage_content(tmp_path / "u00030")
    damage_content(tmp_path / "u00040")
    assert newest_checkpoint(tmp_path, refused=lambda _: None).state == {"update": 20}
    assert newest_checkpoint(tmp_path, refused=pytest.fail, latest=19).state == {"update": 10}
    with pytest.raises(CheckpointError, match="no valid checkpoint of update 9 or before"):
        newest_checkpoint(tmp_path, refused=pytest.fail, latest=9)
    write(tmp_path, 25, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["u00020", "u00025"], "the new one is not the one to go"


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        newest_checkpoint(tmp_path, refused=pytest.fail)
    write(tmp_path, 1)
    shutil.rmtree(tmp_path / "u00001" / "learner")
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        newest_checkpoint(tmp_path, refused=lambda _: None)


@pytest.mark.parametrize("links", [True, False])
def test_a_linked_folder_outlives_its_source_and_replaces_an_older_one(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError("this file system has no hard links")

        monkeypatch.setattr("os.link", refuse)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    fill(source)
    target.mkdir()
    (target / "older").write_text("x")
    link_tree(source, target)
    assert ((source / "optimizer.bin").stat().st_ino == (target / "optimizer.bin").stat().st_ino) is links
    shutil.rmtree(source)
    assert sorted(p.name for p in target.rglob("*")) == ["learner", "optimizer.bin", "weights.bin"]
    assert (target / "learner" / "weights.bin").read_bytes() == b"weights" * 1000
