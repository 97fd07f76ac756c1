"""Examples for clusters: they parse, and the settings in them exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tstar_ray.config import load_config

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "cluster" / "examples").iterdir())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_run_command_in_an_example_is_accepted(path):
    text = path.read_text().replace("\\\n", " ")
    if path.suffix == ".yaml":
        assert yaml.safe_load(text)
        text = re.sub(r"(entrypoint: >-)\s+([^\n]+)\n\s+([^\n]+)", r"\1 \2 \3", text)
    else:
        subprocess.run(["bash", "-n", str(path)], check=True)
    commands = re.findall(r"python -m tstar_ray\.run ([^\n#]+)", text)
    assert commands
    for command in commands:
        words = [word for word in shlex.split(command, comments=True) if word not in ("&", "$@")]
        config = words[words.index("--config") + 1]
        settings = [re.sub(r"=\$.*", "=/runs", word) for word in words if re.match(r"[a-z]+\.[a-z_.]+=", word)]
        assert load_config(ROOT / config, settings).run.dir.is_absolute()


def test_labels_in_the_examples_are_those_that_settings_name():
    cluster = yaml.safe_load((ROOT / "cluster" / "examples" / "ray_cluster.yaml").read_text())
    text = (ROOT / "cluster" / "examples" / "ray_cluster.yaml").read_text()
    labels = [node["labels"] for node in cluster["available_node_types"].values() if "labels" in node]
    named = re.findall(r"'((?:learner|actors)\.labels=[^']+)'", text)
    config = load_config(None, named)
    assert [config.learner.labels, config.actors.labels] == labels
