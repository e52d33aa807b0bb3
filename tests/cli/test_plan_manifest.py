"""`plan --manifest` and `--price`, of plans that need no compiler."""

import shutil
import subprocess

import pytest
import yaml
from slipstream.cli.main import parse, run
from slipstream.cli.manifest import hosts_of, overlay
from slipstream.cli.plan import cost_of
from slipstream.cli.serve import Serve
from slipstream.engine_impl.compiler.budget import ProgramReport
from slipstream.engine_impl.compiler.headroom import Headroom
from slipstream.engine_impl.compiler.plan import PlanReport
from slipstream.engine_impl.config import EngineConfig

from tests.deploy.manifests import KUBERNETES, objects

GIB = 2**30
PLANNED = EngineConfig(model="llama-3.1-8b", quantize_kv="int8", quantize_exclude=("lm_head", "*.down_proj"))


def generate(ceiling: float) -> ProgramReport:
    """Whose decode step has that ceiling (tokens/s)."""
    return ProgramReport(
        compile_seconds=1.0, argument_bytes=0, temp_bytes=0, output_bytes=0, alias_bytes=0, code_bytes=0,
        cache_bytes=0, cache_sized_copies=[], pallas_calls={}, collectives={}, estimated_cycles=0, hbm_floor_bytes=0,
        floor_ms=1.0, compute_floor_ms=1.0, tokens_per_second_ceiling=ceiling,
    )  # fmt: skip


def report(topology="v5e:2x4", **more) -> PlanReport:
    facts = {
        "model": "llama-3.1-8b", "chips": 8, "slots": 256, "cache_length": 8192, "cache_tokens": 847872,
        "dtype": "bfloat16", "hbm_bytes_per_chip": 16 * GIB, "weights_bytes_per_chip": 2 * GIB, "quantize_kv": "int8",
        "cache_bytes_per_chip": 8 * GIB, "resident_bytes_per_chip": 12 * GIB, "fits": True,
        "programs": {"generate": generate(36_000.0)}, "slots_with_room": 400,
    }  # fmt: skip
    return PlanReport(topology=topology, **facts | more)


def served(text: str, tmp_path) -> EngineConfig:
    """What the server would be started with."""
    (literal,) = yaml.safe_load(text)["configMapGenerator"][0]["literals"]
    name, _, flags = literal.partition("=")
    (tmp_path / name).write_text(flags)
    command = parse(["serve", f"--config={tmp_path / name}"])
    assert isinstance(command, Serve)
    return command.engine


def test_the_server_gets_the_flags_that_were_planned(tmp_path):
    assert served(overlay(report(), PLANNED, "told"), tmp_path) == EngineConfig(
        model="/models/llama-3.1-8b", platform="tpu", tensor_parallel=8, slots=256, cache_length=8192,
        cache_tokens=847872, quantize_kv="int8", quantize_exclude=("lm_head", "*.down_proj"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "in_pod", "has_volume"),
    [
        ("llama-3.1-8b", "/models/llama-3.1-8b", True),
        ("{tmp_path}/model.gguf", "/models/model.gguf", True),
        ("org/name@main", "org/name@main", False),
        ("embedded", "embedded", False),
    ],
)
def test_where_the_pod_finds_the_model(model, in_pod, has_volume, tmp_path):
    text = overlay(report(), EngineConfig(model=model.format(tmp_path=tmp_path)), "")
    assert served(text, tmp_path).model == in_pod
    assert ("../../components/weights-pvc" in yaml.safe_load(text)["components"]) is has_volume


def test_it_tells_of_the_plan_above():
    assert overlay(report(), PLANNED, "one\ntwo").startswith(
        "# one\n# two\napiVersion: kustomize.config.k8s.io/v1beta1\n"
    )


def rendered(text: str, tmp_path, kind: str) -> dict:
    """The one object of a kind."""
    folder = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    (folder / "overlays" / "planned").mkdir()
    (folder / "overlays" / "planned" / "kustomization.yaml").write_text(text)
    done = subprocess.run(
        ["kubectl", "kustomize", folder / "overlays" / "planned"], check=True, capture_output=True, text=True
    )
    (found,) = [one for one in yaml.safe_load_all(done.stdout) if one["kind"] == kind]
    return found


def check_pods(mine: dict, theirs: dict, resources: dict) -> None:
    assert mine["metadata"]["annotations"].items() <= theirs["metadata"]["annotations"].items()
    mine, theirs = mine["spec"], theirs["spec"]
    assert mine["nodeSelector"] == theirs["nodeSelector"]
    assert mine["initContainers"] == theirs["initContainers"]
    assert mine["containers"][0]["args"] == theirs["containers"][0]["args"]
    assert mine["containers"][0]["resources"] == resources


@pytest.mark.tools
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_it_renders_to_the_pods_of_the_overlay_that_is_there(chip, tmp_path):
    """But for the host's memory and CPUs, which a plan asks for by the model's size."""
    mine = rendered(overlay(report(f"{chip}:2x4"), PLANNED, ""), tmp_path, "Deployment")
    (theirs,) = [one for one in objects(f"{chip}-8") if one["kind"] == "Deployment"]
    requests = {"cpu": "16", "memory": "24Gi", "google.com/tpu": 8}
    resources = {"requests": requests, "limits": {"google.com/tpu": 8}}
    check_pods(mine["spec"]["template"], theirs["spec"]["template"], resources)


@pytest.mark.tools
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_a_slice_of_several_hosts_is_a_group_whose_pods_load_their_share(chip, tmp_path):
    """Sixteen chips with 9 GiB of the weights each: 36 GiB at each host."""
    planned = report(f"{chip}:4x4", chips=16, weights_bytes_per_chip=9 * GIB)
    mine = rendered(overlay(planned, PLANNED, ""), tmp_path, "LeaderWorkerSet")
    (theirs,) = [one for one in objects(f"{chip}-16") if one["kind"] == "LeaderWorkerSet"]
    mine, theirs = mine["spec"]["leaderWorkerTemplate"], theirs["spec"]["leaderWorkerTemplate"]
    assert mine["size"] == theirs["size"] == 4
    requests = {"cpu": "8", "memory": "44Gi", "google.com/tpu": 4}
    resources = {"requests": requests, "limits": {"google.com/tpu": 4}}
    check_pods(mine["workerTemplate"], theirs["workerTemplate"], resources)


@pytest.mark.parametrize(("topology", "hosts"), [("v5e:2x4", 1), ("v5e:4x8", 8), ("v5p:2x2x4", 4), ("v4:2x2x2", 2)])
def test_how_many_pods_a_server_has(topology, hosts):
    assert hosts_of(topology) == hosts


def test_what_a_million_tokens_cost():
    """Eight chips at 1.20 make 36,000 tokens a second, or half as many with prompts: 129.6 million an hour."""
    assert cost_of(report(), None, 1.2) == pytest.approx(9.6 / 129.6)
    room = Headroom(
        lengths="fixed:1,1", prompt_tokens=1, answer_tokens=1, live_tokens=1, pool_tokens=1, page_rows=1, requests=1,
        whole_requests=1, running=1, step_ms=1, decode_tokens_per_second=36_000, tokens_per_second_ceiling=18_000,
    )  # fmt: skip
    assert cost_of(report(), room, 1.2) == pytest.approx(9.6 / 64.8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--manifest", "--topology", "v5e:8x8"], "--manifest takes TPU slices of up to 32 chips, topology='v5e:8x8'"),
        (["--manifest", "--topology", "h100:1"], "topology='h100:1' is none: v4:2x2x1, v4:2x2x2, v4:2x2x4, v5e:2x2"),
        (["--manifest", "--json"], "--manifest and --json ask for two answers"),
        (["--price", "0"], "price=0.0 must be what a chip costs in an hour, more than 0"),
        (["--price", "nan"], "price=nan must be"),
    ],
)
def test_what_cannot_be_is_refused(options, message, capsys):
    assert run(["plan", "--model", "llama-2-7b", *options]) == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_has_no_manifest(capsys):
    assert run(["plan", "--model", "llama-2-70b", "--topology", "v5e:2x2", "--manifest", "--price", "1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "It does not fit." in err
    assert "million" not in err
