"""deploy/README.md names what is there."""

import re
import shlex

import pytest
from slipstream.cli.main import parse

from tests.deploy.manifests import KUBERNETES, ROOT
from tests.deploy.test_monitoring import RULES

README = (ROOT / "deploy" / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"^```sh\n(.*?)^```", README, flags=re.M | re.S)).replace("\\\n", " ")
COMMANDS = [line for line in BLOCKS.splitlines() if line.startswith("slipstream ")]


def test_every_alert_is_explained_and_no_other():
    assert re.findall(r"^\| `(Slipstream\w+)` \|", README, flags=re.M) == list(RULES)


def test_every_component_is_told_with_what_it_needs():
    told = {name for row in re.findall(r"^   \| (`.*?) \|", README, flags=re.M) for name in re.findall(r"`(\S+)`", row)}
    assert told == {path.name for path in (KUBERNETES / "components").iterdir()}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(re.sub(r"\s>.*| &$", "", command))
    assert parse(words[1:])


def test_there_are_commands_and_the_files_that_it_names():
    assert len(COMMANDS) == 3
    for name in re.findall(r"`(?:deploy/)?((?:kubernetes|monitoring|tpu-vm)/[\w./-]*|\w+\.(?:py|lock|sh))`", README):
        assert (ROOT / "deploy" / name).exists() or name in ("slipstream.sh",), name
