"""What deploy/kubernetes says is what Kubernetes, the command line and the server understand.

The rendered files are checked, so kubectl is not needed; where it is there, they are compared with what it renders.
"""

import json
import shutil
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import jsonschema
import kubernetes_validate
import pytest
import yaml
from slipstream.engine_impl.hosts import Place
from slipstream.server.grpc.service import JETSTREAM_SERVICE, SERVICE

from tests.deploy.manifests import (
    KUBERNETES,
    OVERLAYS,
    ROOT,
    command,
    hosts,
    objects,
    of_kind,
    pod,
    server,
    template,
    the,
    workload,
)

VERSIONS = ("1.29", "1.37")
"""Of Kubernetes: the oldest that knows containers beside others as init containers, and the newest there is."""
LEADER = "leaderworkerset.sigs.k8s.io/worker-index"
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "schemas").iterdir()}
"""Of kinds that are not Kubernetes' own."""

on_every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.mark.tools
@on_every_overlay
def test_rendered_files_are_current(overlay):
    rendered = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)], check=True, capture_output=True, text=True
    )
    assert rendered.stdout == (KUBERNETES / "rendered" / f"{overlay}.yaml").read_text(), "run `make manifests`"


def test_there_is_a_rendered_file_for_each_overlay_and_an_overlay_for_each_component():
    assert sorted(path.stem for path in (KUBERNETES / "rendered").iterdir()) == OVERLAYS
    used = "".join((KUBERNETES / "overlays" / overlay / "kustomization.yaml").read_text() for overlay in OVERLAYS)
    components = [path.name for path in (KUBERNETES / "components").iterdir()]
    assert [name for name in components if f"components/{name}\n" not in used] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_them_strictly(version):
    """Overlays have most objects in common: each is looked at once."""
    known = [one for overlay in OVERLAYS for one in objects(overlay) if one["kind"] not in SCHEMAS]
    known += [{"apiVersion": "v1", "kind": "Pod", **template(overlay)} for overlay in OVERLAYS if hosts(overlay) > 1]
    for one in {json.dumps(one): one for one in known}.values():
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.tools
def test_components_may_be_left_out(tmp_path):
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    overlay = tmp_path / "kubernetes" / "overlays" / "v5e-8"
    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    del kustomization["components"]
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    done = subprocess.run(["kubectl", "kustomize", str(overlay)], check=True, capture_output=True, text=True)
    for one in yaml.safe_load_all(done.stdout):
        kubernetes_validate.validate(one, VERSIONS[-1], strict=True)
        assert "initContainers" not in str(one)


@on_every_overlay
def test_other_kinds_have_the_fields_that_their_makers_declare(overlay):
    for one in objects(overlay):
        if one["kind"] in SCHEMAS:
            jsonschema.validate(one, SCHEMAS[one["kind"]])


@pytest.mark.parametrize("kind", SCHEMAS)
def test_those_schemas_are_used_and_refuse_a_field_that_is_misspelt(kind):
    one = next(one for overlay in OVERLAYS for one in of_kind(overlay, kind))
    for broken in ({**one, "sepc": 1}, {**one, "spec": {**one["spec"], "selecter": {}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMAS[kind])


@on_every_overlay
def test_the_command_line_takes_every_flag_and_ports_are_the_servers(overlay):
    serve = command(overlay)
    assert serve.server.host == "0.0.0.0"
    ports = {port["name"]: port["containerPort"] for port in server(overlay)["ports"]}
    assert ports == {
        "grpc": serve.server.port, "http": serve.server.http_port, "metrics": serve.server.watch.metrics_port
    }  # fmt: skip
    annotations = template(overlay)["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(serve.server.watch.metrics_port)
    assert {port["targetPort"]: port["port"] for port in the(overlay, "Service")["spec"]["ports"]} == {
        name: ports[name] for name in ("grpc", "http")
    }


@on_every_overlay
def test_probes_go_to_the_metrics_port_which_never_has_tls(overlay):
    probes = [server(overlay)[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert probes == [{"path": "/readyz", "port": "metrics"}] * 3


@on_every_overlay
def test_the_server_may_finish_before_it_is_killed(overlay):
    pre_stop_s = int(server(overlay)["lifecycle"]["preStop"]["exec"]["command"][1])
    grace_s = command(overlay).server.grace_s
    assert pod(overlay)["terminationGracePeriodSeconds"] > pre_stop_s + grace_s + 10


@on_every_overlay
def test_every_container_is_closed_in(overlay):
    assert pod(overlay)["securityContext"]["runAsNonRoot"] is True
    assert pod(overlay)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*pod(overlay)["containers"], *pod(overlay).get("initContainers", [])):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts <= {volume["name"] for volume in pod(overlay)["volumes"]}


@on_every_overlay
def test_what_the_server_reads_and_writes_is_mounted(overlay):
    serve = command(overlay)
    mounts = {PurePosixPath(mount["mountPath"]): mount for mount in server(overlay)["volumeMounts"]}
    security = serve.server.security
    read = [security.auth_token_file, security.tls_cert, security.tls_key]
    if serve.engine.model != "embedded":
        read.append(Path(serve.engine.model))
    for path in filter(None, read):
        assert mounts[PurePosixPath(path.parent)]["readOnly"] is True
    written = {str(path) for path, mount in mounts.items() if not mount.get("readOnly")}
    assert written == {"/tmp", "/var/cache/slipstream"}


@on_every_overlay
def test_chips_are_those_of_the_topology(overlay):
    engine, resources = command(overlay).engine, server(overlay)["resources"]
    if engine.platform != "tpu":
        assert "nodeSelector" not in pod(overlay)
        return
    selector = pod(overlay)["nodeSelector"]
    x, y = selector["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(x) * int(y)
    share = chips // hosts(overlay)
    assert resources["limits"]["google.com/tpu"] == resources["requests"]["google.com/tpu"] == share
    assert engine.tensor_parallel == chips
    chip = {"tpu-v5-lite-podslice": "v5e", "tpu-v6e-slice": "v6e"}[selector["cloud.google.com/gke-tpu-accelerator"]]
    annotations = template(overlay)["metadata"]["annotations"]
    assert annotations["slipstream/topology"] == f"{chip}-{x}x{y}"
    fields = [container["env"][0]["valueFrom"]["fieldRef"]["fieldPath"] for container in pod(overlay)["initContainers"]]
    assert fields == ["metadata.annotations['slipstream/topology']"] * 2
    assert overlay.startswith(f"{chip}-{chips}")
    assert (hosts(overlay) > 1) == (command(overlay).hosts.hosts == "auto")


@on_every_overlay
def test_selectors_and_references_meet(overlay):
    labels = template(overlay)["metadata"]["labels"]
    if hosts(overlay) > 1:
        labels |= {LEADER: "0"}  # of the pods that are asked; LeaderWorkerSet adds it
        assert the(overlay, "Service")["spec"]["selector"][LEADER] == "0"
    selectors = [the(overlay, "Service")["spec"]["selector"]]
    for kind, field in (
        ("Deployment", "selector"), ("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector"),
        ("PodMonitoring", "selector"), ("InferencePool", "selector"),
    ):  # fmt: skip
        selectors += [one["spec"][field]["matchLabels"] for one in of_kind(overlay, kind)]
    assert all(selector.items() <= labels.items() for selector in selectors)
    names = {port["name"] for port in server(overlay)["ports"]}
    policy = the(overlay, "NetworkPolicy")["spec"]
    assert {port["port"] for rule in policy["ingress"] for port in rule.get("ports", [])} == names
    to_each_other = [{"podSelector": policy["podSelector"]}]
    among = [{"from": to_each_other} in policy["ingress"], {"to": to_each_other} in policy["egress"]]
    assert among == [hosts(overlay) > 1] * 2, "hosts of a group reach each other on any port"
    for one in of_kind(overlay, "HorizontalPodAutoscaler"):
        target = one["spec"]["scaleTargetRef"]
        scaled = workload(overlay)
        assert target == {
            "apiVersion": scaled["apiVersion"], "kind": scaled["kind"], "name": scaled["metadata"]["name"]
        }  # fmt: skip
    for one in (*of_kind(overlay, "GRPCRoute"), *of_kind(overlay, "HTTPRoute")):
        for rule in one["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                target = the(overlay, backend.get("kind", "Service"))
                assert target["metadata"]["name"] == backend["name"]
                if target["kind"] == "Service":
                    assert backend["port"] in {port["port"] for port in target["spec"]["ports"]}


@on_every_overlay
def test_autoscalers_and_monitors_name_what_the_server_tells(overlay, series):
    for one in of_kind(overlay, "HorizontalPodAutoscaler"):
        names = [metric["pods"]["metric"]["name"] for metric in one["spec"]["metrics"]]
        assert len(names) == 2
        for name in names:
            domain, metric, kind = name.split("|")
            assert (domain, kind) == ("prometheus.googleapis.com", "gauge")
            assert metric in series
    for one in of_kind(overlay, "PodMonitoring"):
        assert [endpoint["port"] for endpoint in one["spec"]["endpoints"]] == ["metrics"]


@pytest.mark.parametrize("overlay", [overlay for overlay in OVERLAYS if hosts(overlay) > 1])
def test_a_group_is_one_slice_and_lives_and_dies_together(overlay):
    group = the(overlay, "LeaderWorkerSet")
    assert group["metadata"]["annotations"] == {
        "leaderworkerset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert group["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert group["spec"]["startupPolicy"] == "LeaderCreated", "hosts wait for each other"
    assert group["metadata"]["name"] != the(overlay, "Service")["metadata"]["name"], "its headless Service has its name"
    environment = {"LWS_LEADER_ADDRESS": "a.b", "LWS_GROUP_SIZE": str(hosts(overlay)), "LWS_WORKER_INDEX": "1"}
    assert command(overlay).hosts.place(environment) == Place("a.b:8482", hosts(overlay), 1)


def test_routes_lead_to_the_servers_own_services():
    (rule,) = the("v6e-8", "GRPCRoute")["spec"]["rules"]
    services = {match["method"]["service"] for match in rule["matches"]}
    assert services == {SERVICE, JETSTREAM_SERVICE, "grpc.health.v1.Health"}


def test_an_inference_pool_leads_to_the_http_port():
    ports = {port["name"]: port["containerPort"] for port in server("v6e-8-inference-pool")["ports"]}
    assert the("v6e-8-inference-pool", "InferencePool")["spec"]["targetPorts"] == [{"number": ports["http"]}]


def test_with_tls_services_say_so():
    for overlay, protocols in (("v5e-8", ["kubernetes.io/h2c", "http"]), ("v5e-8-tls", ["https", "https"])):
        assert [port["appProtocol"] for port in the(overlay, "Service")["spec"]["ports"]] == protocols


@on_every_overlay
def test_images_have_the_packages_version(overlay):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    containers = (*pod(overlay)["containers"], *pod(overlay).get("initContainers", []))
    assert {container["image"] for container in containers} == {f"slipstream:{version}"}
