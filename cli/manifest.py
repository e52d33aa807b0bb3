"""`plan --manifest`: an overlay of deploy/kubernetes for what was planned, so that nobody copies numbers by hand."""

from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine_impl.config import EngineConfig
from ..engine_impl.errors import RefusedError

if TYPE_CHECKING:
    from ..engine_impl.compiler.plan import PlanReport

GIB = 2**30
SPARE_BYTES = 8 * GIB
"""Of host memory, beside the weights on their way to the chips."""
CPUS_PER_CHIP = 2
MODELS = "/models"
"""Where the component weights-pvc shows them."""


@dataclass(frozen=True)
class Slices:
    """TPU slices, as GKE calls them."""

    accelerator: str
    of_one_host: tuple[str, ...]
    of_several: tuple[str, ...]
    """Hosts of CHIPS_OF_SEVERAL chips each."""

    @property
    def topologies(self) -> tuple[str, ...]:
        return *self.of_one_host, *self.of_several


GKE = {
    "v4": Slices("tpu-v4-podslice", ("2x2x1",), ("2x2x2", "2x2x4")),
    "v5e": Slices("tpu-v5-lite-podslice", ("2x2", "2x4"), ("4x4", "4x8")),
    "v5p": Slices("tpu-v5p-slice", ("2x2x1",), ("2x2x2", "2x2x4")),
    "v6e": Slices("tpu-v6e-slice", ("2x2", "2x4"), ("4x4", "4x8")),
}
"""https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus"""
CHIPS_OF_SEVERAL = 4
"""Of each host (ct5lp-hightpu-4t, ct6e-standard-4t and their like)."""


def check_slice(topology: str) -> None:
    """Raises RefusedError for a topology that no overlay is made for."""
    chip, _, shape = topology.partition(":")
    if chip not in GKE or shape not in GKE[chip].topologies:
        there = ", ".join(f"{name}:{one}" for name, slices in GKE.items() for one in slices.topologies)
        raise RefusedError(f"--manifest takes TPU slices of up to 32 chips, topology={topology!r} is none: {there}")


def hosts_of(topology: str) -> int:
    """How many pods a server has."""
    chip, _, shape = topology.partition(":")
    return prod(map(int, shape.split("x"))) // CHIPS_OF_SEVERAL if shape in GKE[chip].of_several else 1


def overlay(report: "PlanReport", planned: EngineConfig, summary: str) -> str:
    """The text of a kustomization.yaml that belongs into a folder of deploy/kubernetes/overlays.

    Args:
        report: of a plan that fits.
        planned: what was planned; its flags go into the server's config file.
        summary: lines that tell of the plan.
    """
    import yaml

    components = ["compile-cache", "tokens", "autoscaling"]
    if model_in_pod(planned.model).startswith(f"{MODELS}/"):
        components.insert(0, "weights-pvc")
    if hosts_of(report.topology) > 1:
        components.append("group")
    serve = yaml.safe_dump(serve_flags(report, planned), sort_keys=False, width=120)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../../base"],
        "components": [f"../../components/{name}" for name in components],
        "images": [{"name": "slipstream", "newTag": version("slipstream-llm")}],
        "configMapGenerator": [{"name": "slipstream", "literals": [f"serve.yaml={serve}"]}],
        "patches": [patch(report)],
    }
    comment = "".join(f"# {line}\n" for line in summary.splitlines())
    return comment + yaml.dump(kustomization, Dumper=block_texts(yaml.SafeDumper), sort_keys=False, width=120)


def patch(report: "PlanReport") -> dict[str, Any]:
    """Brings the pods' part to the Deployment; to a LeaderWorkerSet one by one: kustomize cannot merge its lists."""
    import yaml

    template, hosts = pod_template(report), hosts_of(report.topology)
    if hosts == 1:
        deployment = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "slipstream"},
            "spec": {"template": template},
        }
        return {"patch": yaml.safe_dump(deployment, sort_keys=False)}
    pods = "/spec/leaderWorkerTemplate/workerTemplate"
    ((annotation, kind),) = template["metadata"]["annotations"].items()
    (container,) = template["spec"]["containers"]
    values = {
        "/spec/leaderWorkerTemplate/size": hosts,
        f"{pods}/metadata/annotations/{annotation.replace('/', '~1')}": kind,
        f"{pods}/spec/nodeSelector": template["spec"]["nodeSelector"],
        f"{pods}/spec/containers/0/resources": container["resources"],
    }
    operations = [{"op": "add", "path": path, "value": value} for path, value in values.items()]
    return {"target": {"kind": "LeaderWorkerSet"}, "patch": yaml.safe_dump(operations, sort_keys=False)}


def pod_template(report: "PlanReport") -> dict[str, Any]:
    """What a pod needs of its node: the slice, all of the node's chips, host memory to load its weights with."""
    chip, _, shape = report.topology.partition(":")
    hosts = hosts_of(report.topology)
    chips, weights = prod(map(int, shape.split("x"))) // hosts, report.weights_bytes_per_chip * report.chips // hosts
    host = {"cpu": str(CPUS_PER_CHIP * chips), "memory": f"{-(-(weights + SPARE_BYTES) // GIB)}Gi"}
    resources = {"requests": host | {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}}
    return {
        "metadata": {"annotations": {"slipstream/topology": f"{chip}-{shape}"}},
        "spec": {
            "nodeSelector": {
                "cloud.google.com/gke-tpu-accelerator": GKE[chip].accelerator,
                "cloud.google.com/gke-tpu-topology": shape,
            },
            "containers": [{"name": "slipstream", "resources": resources}],
        },
    }


def serve_flags(report: "PlanReport", planned: EngineConfig) -> dict[str, Any]:
    """For `serve --config`: the sizes that were planned, and all that is not as it would be without a flag."""
    served = replace(
        planned,
        model=model_in_pod(planned.model),
        platform="tpu",
        tensor_parallel=report.chips,
        slots=report.slots,
        cache_length=report.cache_length,
        cache_tokens=report.cache_tokens,
    )
    plain = EngineConfig()
    values = {one.name: getattr(served, one.name) for one in fields(served)}
    return {
        name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value != getattr(plain, name) or name == "model"
    }


def model_in_pod(model: str) -> str:
    """A preset's name, or a path of this machine, is a folder or file of the volume; a hub id stays one."""
    is_hub_id = "/" in model and not Path(model).expanduser().exists() and not model.startswith(("/", ".", "~"))
    return model if model == "embedded" or is_hub_id else f"{MODELS}/{Path(model).name}"


def block_texts(dumper: Any) -> Any:
    """A YAML dumper that writes texts of several lines as they are."""

    class Dumper(dumper):
        def represent_text(self, text: str) -> Any:
            return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, Dumper.represent_text)
    return Dumper
