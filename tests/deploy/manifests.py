"""The rendered manifests of deploy/kubernetes, by overlay."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from slipstream.cli.main import parse
from slipstream.cli.serve import Serve

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())

Object = dict[str, Any]


@cache
def objects(overlay: str) -> tuple[Object, ...]:
    """As `make manifests` wrote them."""
    return tuple(yaml.safe_load_all((KUBERNETES / "rendered" / f"{overlay}.yaml").read_text()))


def the(overlay: str, kind: str) -> Object:
    """The only object of a kind."""
    (found,) = of_kind(overlay, kind)
    return found


def of_kind(overlay: str, kind: str) -> list[Object]:
    return [one for one in objects(overlay) if one["kind"] == kind]


def workload(overlay: str) -> Object:
    """What makes the pods: a Deployment, or a LeaderWorkerSet where a server has several hosts."""
    (found,) = [one for one in objects(overlay) if one["kind"] in ("Deployment", "LeaderWorkerSet")]
    return found


def hosts(overlay: str) -> int:
    """Pods of one server."""
    return workload(overlay)["spec"].get("leaderWorkerTemplate", {}).get("size", 1)


def template(overlay: str) -> Object:
    """Of the pods."""
    spec = workload(overlay)["spec"]
    return spec["template"] if "template" in spec else spec["leaderWorkerTemplate"]["workerTemplate"]


def pod(overlay: str) -> Object:
    return template(overlay)["spec"]


def server(overlay: str) -> Object:
    """The container that serves."""
    (container,) = pod(overlay)["containers"]
    return container


def volume(overlay: str, name: str) -> Object:
    (found,) = [one for one in pod(overlay)["volumes"] if one["name"] == name]
    return found


def files_of(overlay: str, name: str) -> dict[str, str]:
    """What a volume shows of a ConfigMap."""
    config = volume(overlay, name)["configMap"]["name"]
    (found,) = [one["data"] for one in of_kind(overlay, "ConfigMap") if one["metadata"]["name"] == config]
    return found


@cache
def command(overlay: str) -> Serve:
    """What the server would run, its config file from the ConfigMap."""
    (mount,) = [one["mountPath"] for one in server(overlay)["volumeMounts"] if one["name"] == "config"]
    with TemporaryDirectory() as folder:
        for name, text in files_of(overlay, "config").items():
            (Path(folder) / name).write_text(text)
        parsed = parse([word.replace(f"--config={mount}/", f"--config={folder}/") for word in server(overlay)["args"]])
    assert isinstance(parsed, Serve)
    return parsed
