"""What deploy/ says is what the command line and the package understand."""

import re
import tomllib
from pathlib import Path, PurePosixPath

import pytest
import yaml
from slipstream.cli.main import parse
from slipstream.cli.serve import Serve

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))


def in_dockerfile(pattern: str) -> str:
    """The group of the first match."""
    match = re.search(pattern, DOCKERFILE, flags=re.M)
    assert match is not None
    return match[1]


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.stem)
def pod_template(request):
    return yaml.safe_load(request.param.read_text())["spec"]["template"]


@pytest.fixture
def pod(pod_template):
    return pod_template["spec"]


@pytest.fixture
def container(pod):
    (container,) = pod["containers"]
    return container


@pytest.fixture
def command(container):
    command = parse(container["args"])
    assert isinstance(command, Serve)
    return command


def test_probes_and_ports_are_the_servers(container, command):
    ports = [container[probe]["grpc"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {*ports, container["ports"][0]["containerPort"]} == {command.server.port}


def test_the_http_port_is_the_containers_and_the_images(container, command):
    assert {"name": "http", "containerPort": command.server.http_port} in container["ports"]
    assert str(command.server.http_port) in in_dockerfile(r"^EXPOSE (.*)$").split()


def test_prometheus_finds_the_metrics(container, command, pod_template):
    assert {"name": "metrics", "containerPort": command.server.watch.metrics_port} in container["ports"]
    assert pod_template["metadata"]["annotations"]["prometheus.io/port"] == str(command.server.watch.metrics_port)


def test_probes_can_reach_the_server(command):
    assert command.server.host == "0.0.0.0"


def test_the_server_may_finish_before_it_is_killed(pod, command):
    pre_stop_s = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pre_stop_s + command.server.grace_s + 10


def test_the_chips_are_those_of_the_topology(pod, container, command):
    x, y = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(x) * int(y)
    assert container["resources"]["limits"]["google.com/tpu"] == chips
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    assert command.engine.tensor_parallel == chips
    assert command.engine.platform == "tpu"


def test_model_and_cache_are_on_volumes(pod, container, command):
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert str(PurePosixPath(command.engine.model).parent) in mounts
    assert in_dockerfile(r"SLIPSTREAM_HOME=(\S+)") in mounts
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}


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
