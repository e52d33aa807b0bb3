"""What deploy/ray says is what KubeRay, Ray Serve and the application understand."""

import json
import re
import tomllib
import warnings
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from slipstream.server.ray.settings import configs

from tests.deploy.manifests import ROOT, Object

RAY = ROOT / "deploy" / "ray"
SCHEMA = json.loads((Path(__file__).parent / "RayService.json").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SERVICE, GRPC = yaml.safe_load_all((RAY / "rayservice.yaml").read_text())
CLUSTER: Object = SERVICE["spec"]["rayClusterConfig"]
HEAD, (WORKERS,) = CLUSTER["headGroupSpec"], CLUSTER["workerGroupSpecs"]
SERVE_CONFIGS: dict[str, Object] = {
    "rayservice.yaml": yaml.safe_load(SERVICE["spec"]["serveConfigV2"]),
    "cpu.yaml": yaml.safe_load((RAY / "cpu.yaml").read_text()),
}
LOCK = (RAY / "requirements.lock").read_text()

on_every_config = pytest.mark.parametrize("name", SERVE_CONFIGS)


@pytest.fixture(scope="module")
def schema() -> Any:
    """What Serve reads such a file by."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own use of pydantic
        from ray.serve.schema import ServeDeploySchema
    return ServeDeploySchema


def application(name: str) -> Object:
    (found,) = SERVE_CONFIGS[name]["applications"]
    return found


def deployments(name: str) -> dict[str, Object]:
    return {one["name"]: one for one in application(name)["deployments"]}


def container(group: Object) -> Object:
    (found,) = group["template"]["spec"]["containers"]
    return found


def test_kuberay_and_kubernetes_take_them_strictly():
    jsonschema.validate(SERVICE, SCHEMA)
    for broken in ({**SERVICE, "sepc": 1}, {**SERVICE, "spec": {**SERVICE["spec"], "serveConfig": ""}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **group["template"]} for group in (HEAD, WORKERS)
    ]
    for one in (*pods, GRPC):
        kubernetes_validate.validate(one, "1.37", strict=True)


@on_every_config
def test_serve_takes_its_part(name, schema):
    from ray.serve.config import AutoscalingConfig

    config = schema.model_validate(SERVE_CONFIGS[name])
    scaled = [one.autoscaling_config for one in config.applications[0].deployments]
    for one in scaled:
        assert one.keys() <= AutoscalingConfig.model_fields.keys()  # Serve lets others pass
        AutoscalingConfig(**one)
    paths = [one["policy"]["policy_function"] for one in scaled if "policy" in one]
    assert len(paths) == 1
    for path in (*paths, *config.grpc_options.grpc_servicer_functions, application(name)["import_path"]):
        module, _, attribute = path.partition(":")
        assert callable(getattr(import_module(module), attribute))


@on_every_config
def test_the_application_takes_its_arguments(name):
    engine, server = configs(application(name)["args"])
    assert deployments(name).keys() <= {"Engine", "Ingress"}
    scaled = deployments(name)["Engine"]["autoscaling_config"]
    assert engine.slots is not None
    assert scaled["target_ongoing_requests"] < engine.slots
    assert server.max_queued


def test_ports_are_those_of_serves_proxies():
    config = SERVE_CONFIGS["rayservice.yaml"]
    ports = {"serve": config["http_options"]["port"], "grpc": config["grpc_options"]["port"]}
    for group in (HEAD, WORKERS):
        assert ports.items() <= {port["name"]: port["containerPort"] for port in container(group)["ports"]}.items()
    (port,) = GRPC["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (ports["grpc"], "grpc")
    labels = GRPC["spec"]["selector"].items() - {("ray.io/serve", "true")}
    for group in (HEAD, WORKERS):
        assert labels <= group["template"]["metadata"]["labels"].items()


def test_a_replica_has_all_chips_of_a_host():
    engine, _ = configs(application("rayservice.yaml")["args"])
    x, y = WORKERS["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    resources, options = container(WORKERS)["resources"], deployments("rayservice.yaml")["Engine"]["ray_actor_options"]
    chips = {
        int(x) * int(y), engine.tensor_parallel, options["resources"]["TPU"],
        resources["limits"]["google.com/tpu"], resources["requests"]["google.com/tpu"],
    }  # fmt: skip
    assert chips == {8}
    assert options["num_cpus"] <= int(resources["requests"]["cpu"])
    scaled = deployments("rayservice.yaml")["Engine"]["autoscaling_config"]
    bounds = (WORKERS["minReplicas"], WORKERS["maxReplicas"])
    assert bounds == (scaled["min_replicas"], scaled["max_replicas"])
    assert CLUSTER["enableInTreeAutoscaling"]


def test_what_a_replica_reads_is_mounted_and_it_may_finish():
    engine, server = configs(application("rayservice.yaml")["args"])
    mounts = {PurePosixPath(mount["mountPath"]): mount for mount in container(WORKERS)["volumeMounts"]}
    assert server.security.auth_token_file is not None
    for path in (Path(engine.model), server.security.auth_token_file):
        assert mounts[PurePosixPath(path.parent)]["readOnly"] is True
    spec = WORKERS["template"]["spec"]
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in spec["volumes"]}
    assert spec["terminationGracePeriodSeconds"] > server.grace_s + 10


def test_containers_are_closed_in_and_images_have_the_versions():
    dockerfile = (RAY / "Dockerfile").read_text()
    assert f"FROM slipstream:{PROJECT['version']}\n" in dockerfile
    for group in (HEAD, WORKERS):
        assert container(group)["image"] == f"slipstream-ray:{PROJECT['version']}"
        assert container(group)["securityContext"] == {
            "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        context = group["template"]["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile
    assert f"ray=={CLUSTER['rayVersion']} " in LOCK


def test_the_lock_has_what_the_extra_needs_and_nothing_of_the_first_images():
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    matches = [re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    locked = {canonicalize_name(match[1]): match[2] for match in matches if match}
    assert len(locked) == len(lines) > 5
    for text in PROJECT["optional-dependencies"]["ray"]:
        needed = Requirement(text)
        assert needed.specifier.contains(locked[canonicalize_name(needed.name)])
    first = (ROOT / "deploy" / "requirements.lock").read_text()
    assert not locked.keys() & {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", first, flags=re.M)}
