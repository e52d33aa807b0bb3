"""What the image is built from is there, locked, and what it runs parses."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from slipstream.cli.main import parse
from slipstream.cli.serve import Serve

from tests.deploy.manifests import ROOT, pod

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
LOCK = (ROOT / "deploy" / "requirements.lock").read_text() + (ROOT / "deploy" / "torch-cpu.lock").read_text()
LOCKED = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}$", LOCK, flags=re.M)
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEEDED = [
    *PROJECT["project"]["dependencies"],
    *(one for extra in ("tpu", "otlp", "gcs", "hf") for one in PROJECT["project"]["optional-dependencies"][extra]),
]
IGNORE = (ROOT / ".dockerignore").read_text().splitlines()


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
    copied = re.findall(r"^COPY (\S+) \1$", DOCKERFILE, flags=re.M)
    assert sorted(copied) == sorted(PROJECT["tool"]["setuptools"]["package-dir"].values())


def test_the_image_is_built_with_its_native_kernels():
    """Slim images have no compiler, and without setup.py the package is built without an extension, silently."""
    stage, *_ = re.findall(r"^FROM (\S+) AS build$", DOCKERFILE, flags=re.M)
    assert "slim" not in stage
    assert re.search(r"^COPY .*\bsetup\.py\b.* \./$", DOCKERFILE, flags=re.M)
    assert "**/*.so" in IGNORE  # a developer's own


def test_what_is_copied_is_there_and_not_ignored():
    sources = [
        source for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, flags=re.M) for source in line.split()
    ]
    assert {*PROJECT["project"]["license-files"], PROJECT["project"]["readme"]} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    kept = [line.removeprefix("!") for line in IGNORE if line.startswith("!")]
    assert IGNORE.index("*") < IGNORE.index(f"!{kept[0]}")
    assert sorted(kept) == sorted(sources)


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda text: Requirement(text).name)
def test_the_lock_has_what_the_package_needs(requirement):
    needed = Requirement(requirement)
    assert needed.specifier.contains(LOCKED[canonicalize_name(needed.name)])


def test_every_line_of_the_locks_has_a_hash_and_no_index():
    lines = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(LOCKED) > 60
    assert "://" not in LOCK


def test_the_user_and_the_cache_are_those_of_the_pods():
    user, group = in_dockerfile(r"^USER (\S+)$").split(":")
    context = pod("cpu")["securityContext"]
    assert (int(user), int(group)) == (context["runAsUser"], context["runAsGroup"])
    for name in ("HOME", "SLIPSTREAM_HOME"):
        assert in_dockerfile(rf"\b{name}=(\S+)") == "/var/cache/slipstream"
