"""What the image is built from is there, and what it runs parses."""

import re
import tomllib

from slipstream.cli.main import parse
from slipstream.cli.serve import Serve

from tests.deploy.manifests import ROOT

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


def in_dockerfile(pattern: str) -> str:
    """The group of the first match."""
    match = re.search(pattern, DOCKERFILE, flags=re.M)
    assert match is not None
    return match[1]


def test_the_images_command_parses():
    words = in_dockerfile(r"^CMD \[(.*)\]$")
    command = parse(re.findall(r'"([^"]*)"', words))
    assert isinstance(command, Serve)
    assert command.server.host == "0.0.0.0"
    assert f"EXPOSE {command.server.port}" in DOCKERFILE


def test_the_image_holds_every_room():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    copied = re.findall(r"^COPY (\S+) \1$", DOCKERFILE, flags=re.M)
    assert sorted(copied) == sorted(packages.values())
