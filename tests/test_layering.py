"""Who may know what: the rooms' imports, read from their source.

Every import counts, wherever it stands: within a function and under TYPE_CHECKING as well. A *unit* is what arrows are
drawn between: a room without sub-rooms (`protos`), a sub-room (`server/grpc`), or a file at the root of a room
(`server/errors`). Root files are a room's vocabulary, below its sub-rooms, or its composition, above them; sub-rooms
declare here what they may import.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    # room: (other rooms, packages beside the standard library)
    "protos": (set(), {"google", "grpc", "grpc_tools"}),
    "kernels": (set(), {"jax", "numpy"}),
    "cache_manager": ({"kernels"}, {"jax", "numpy"}),
    "engine_impl": (
        {"kernels", "cache_manager", "protos"},  # protos and grpc: distributed/ alone, see below
        {"jax", "numpy", "torch", "torchax", "gguf", "tokenizers", "jinja2", "libtpu", "jetstream"}
        | {"safetensors", "sentencepiece", "huggingface_hub", "google", "llguidance", "grpc", "transformers", "gcsfs"},
    ),
    "server": (
        {"protos", "cache_manager", "engine_impl"},
        {"grpc", "grpc_health", "grpc_reflection", "google", "numpy", "jetstream", "prometheus_client"}
        | {"aiohttp", "pydantic", "pydantic_core", "ray", "starlette", "tyro", "opentelemetry", "yarl"},
    ),
    "benchmarks": (
        {"protos", "kernels", "cache_manager", "engine_impl", "server"},
        {"jax", "numpy", "torch", "grpc", "aiohttp", "transformers", "matplotlib", "tyro", "safetensors"},
    ),
    "cli": ({"protos", "engine_impl", "server", "benchmarks"}, {"tyro", "grpc", "numpy", "yaml"}),
}

SUB_ROOMS: dict[str, dict[str, set[str]]] = {
    # room: {sub-room: units of the same room}
    "kernels": {
        "blockwise_matmul": {"backend"},
        "cache_flush": {"backend"},
        "chunk_attention": {"backend", "lanes", "native", "scores"},
        "expert_matmul": {"backend", "native", "panel_matmul"},
        "native": set(),
        "panel_matmul": {"backend", "native"},
        "ragged_attention": {"backend", "lanes", "native", "scores"},
        "rms_norm": {"backend", "native"},
    },
    "engine_impl": {
        "runtime": set(),
        "text": {"errors", "runtime"},
        "models": {"errors"},
        "sampling": {"errors", "option", "placing"},
        "speculation": {"api"},
        "checkpoints": {"errors", "models", "text", "runtime"},
        "adapters": {"errors", "config", "bridge", "runtime", "models", "checkpoints", "placing"},
        "quantization": {"errors", "config", "bridge", "models", "checkpoints"},
        "weights": {"errors", "forward", "models", "checkpoints", "quantization"},
        "compiler": {
            *(
                "errors",
                "config",
                "sizes",
                "sampling",
                "forward",
                "state",
                "programs",
                "shapes",
                "draft_model",
                "assembly",
                "engine",
            ),
            *("models", "checkpoints", "quantization", "weights"),
        },
        "distributed": {
            *("errors", "config", "api", "hosts", "sampling", "runtime", "checkpoints", "engine", "loading", "sizes"),
        },
        "jetstream": {
            *("errors", "config", "api", "text", "sampling", "forward", "state", "programs", "engine", "loading"),
        },
    },
    "server": {
        "dialects": set(),
        "request": {"errors", "config", "dialects"},
        "adapters": {"errors", "request"},
        "net": {"errors", "address", "config"},
        "observe": {"net", "request"},
        "delivery": {"errors", "dialects", "request", "observe"},
        "scheduler": {"errors", "request", "observe", "delivery"},
        "grpc": {"errors", "config", "dialects", "request", "net", "gateway"},
        "http": {"errors", "config", "adapters", "dialects", "request", "net", "delivery", "gateway", "rests"},
        "jetstream": {"errors", "config", "net", "observe", "grpc", "process"},
        "ray": {"errors", "config", "flags", "gateway", "grpc", "http", "lifecycle", "net", "observe", "scheduler"},
    },
    "benchmarks": {
        "options": set(),
        "measure": set(),
        "load": {"measure", "options"},
        "baselines": {"measure"},
        "compiler": {"measure", "baselines"},
    },
    "cli": {"bench": {"ask"}},
}

ENGINE_FACE = {
    # what the server may import of engine_impl
    "api",
    "config",
    "errors",
    "hosts",
    "loading",
    "option",
    "runtime/allocator",
    "runtime/compilations",
    "runtime/garbage",
    "runtime/timeline",
    "runtime/tracing",
    "runtime/watchdog",
    "runtime/workers",
    "sampling/params",
    "text/chat",
    "jetstream/compat",
    "jetstream/engine",
}

ONLY_IN = {
    "torchax": {"engine_impl/bridge.py"},
    "llguidance": {"engine_impl/text/grammar.py"},
    "gcsfs": {"engine_impl/checkpoints/buckets.py"},
    "opentelemetry": {"server/observe/traces.py"},
    "ray": {f"server/ray/{name}.py" for name in ("application", "ingress", "router", "scaling")},
    "starlette": {"server/ray/ingress.py"},
    "yarl": {"server/ray/fronts.py"},
    "jetstream": {
        *(f"engine_impl/jetstream/{name}.py" for name in ("engine", "adapter", "tokenizer")),  # shims: compat.py
        "server/jetstream/host.py",
    },
}


class Import(NamedTuple):
    """One name that a file imports."""

    file: str
    """from the root, without its suffix: server/grpc/service"""
    line: int
    name: str
    """our file, likewise, or another package's name, dotted"""
    alias: str
    """what of it: a definition, or the same as `name`"""

    def __str__(self) -> str:
        return f"{self.file}.py:{self.line} imports {self.name}" + (f" ({self.alias})" if "/" in self.name else "")


def file_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix("")).replace("\\", "/")


@cache
def files() -> frozenset[str]:
    return frozenset(file_of(path) for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def resolved(module: list[str], alias: str) -> str:
    """The file that `from module import alias` reads: `alias` may be one itself."""
    base = "/".join(module)
    candidates = [f"{base}/{alias}", f"{base}/{alias}/__init__", base, f"{base}/__init__"]
    return next((name.lstrip("/") for name in candidates if name.lstrip("/") in files()), f"{base} (no such file)")


def imports_of(file: str, source: str) -> Iterator[Import]:
    """All imports, at whatever depth."""
    package = file.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, *rest = alias.name.split(".")
                name = resolved(rest, "__init__") if top == "slipstream" else alias.name
                yield Import(file, node.lineno, name, alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                ours = [*package[: len(package) + 1 - node.level], *module]
            elif module[0] == "slipstream":
                ours = module[1:]
            else:
                ours = None
            for alias in node.names:
                name = node.module or "" if ours is None else resolved(ours, alias.name)
                yield Import(file, node.lineno, name, alias.name)


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(it for file in sorted(files()) for it in imports_of(file, (ROOT / f"{file}.py").read_text()))


def our_imports() -> list[Import]:
    return [it for it in all_imports() if "/" in it.name]


def room(file: str) -> str:
    return file.split("/")[0]


def unit(file: str) -> str:
    """What arrows are drawn between."""
    parts = file.split("/")
    return parts[0] if parts[0] not in SUB_ROOMS else "/".join(parts[:2])


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """A way back to its start, for each start that has one not yet told: the shortest there is."""
    after: dict[str, set[str]] = {}
    for start, end in edges:
        after.setdefault(start, set()).add(end)
    found: list[list[str]] = []
    for start in sorted(after):
        if any(start in way for way in found):
            continue
        ways, seen = [[start]], set[str]()
        for way in ways:  # grows as it is read
            ends = after.get(way[-1], set())
            if start in ends:
                found.append([*way, start])
                break
            ways += [[*way, end] for end in sorted(ends - seen)]
            seen |= ends
    return found


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(name):
    rooms, packages = MAY_IMPORT[name]
    forbidden = [
        str(it)
        for it in all_imports()
        if room(it.file) == name
        and (
            room(it.name) not in rooms | {name}
            if "/" in it.name
            else it.name.split(".")[0] not in packages | set(sys.stdlib_module_names)
        )
    ]
    assert forbidden == []


@pytest.mark.parametrize("name", SUB_ROOMS)
def test_a_sub_room_imports_only_what_it_declares(name):
    folders = {unit(file) for file in files() if room(file) == name and file.count("/") > 1}
    declared = {f"{name}/{sub}": {f"{name}/{other}" for other in may} for sub, may in SUB_ROOMS[name].items()}
    assert sorted(folders - set(declared)) == [], "sub-rooms that declare nothing above"
    forbidden = [
        str(it)
        for it in our_imports()
        if room(it.name) == name
        and (source := unit(it.file)) in declared
        and unit(it.name) not in declared[source] | {source}
    ]
    assert forbidden == []


def test_no_file_imports_itself_by_way_of_others():
    assert circles((it.file, it.name) for it in our_imports()) == []


def test_no_unit_imports_itself_by_way_of_others():
    arrows = {(unit(it.file), unit(it.name)) for it in our_imports()}
    assert circles((start, end) for start, end in arrows if start != end) == []


def test_the_server_knows_the_engines_face():
    other = [
        str(it)
        for it in our_imports()
        if room(it.file) == "server" and room(it.name) == "engine_impl" and it.name.partition("/")[2] not in ENGINE_FACE
    ]
    assert other == []


def test_of_the_engine_one_room_knows_a_network_and_only_its_own_proto():
    known = {
        it.name
        for it in all_imports()
        if room(it.file) == "engine_impl" and it.name.split("/")[0].split(".")[0] in ("grpc", "protos")
        if unit(it.file) != "engine_impl/distributed"
    }
    assert known == set()
    protos = {it.name for it in our_imports() if room(it.file) == "engine_impl" and room(it.name) == "protos"}
    assert protos == {"protos/hosts_pb2", "protos/hosts_pb2_grpc"}
    elsewhere = {it.file for it in our_imports() if it.name in protos} - {"protos/hosts_pb2_grpc"}
    assert {unit(file) for file in elsewhere} == {"engine_impl/distributed"}


def test_the_server_knows_whose_pages_are_whose_and_nothing_else_of_the_cache():
    names = {it.name for it in our_imports() if room(it.file) == "server" and room(it.name) == "cache_manager"}
    assert names == {"cache_manager/pages", "cache_manager/prefix_tree"}


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_that_few_may_know(package):
    assert {f"{it.file}.py" for it in all_imports() if it.name.split(".")[0] == package} == ONLY_IN[package]


def test_what_starts_with_an_underscore_stays_in_its_file():
    assert [str(it) for it in our_imports() if it.alias.startswith("_") and not it.alias.endswith("__")] == []


def test_benchmarks_ask_for_no_private_attribute():
    """What they need of an engine or a server is public there."""
    found = [
        f"{file}.py:{node.lineno} {ast.unparse(node)}"
        for file in sorted(files())
        if room(file) == "benchmarks"
        for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__")
        if not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]
    assert found == []


def test_models_import_torch_alone():
    """But for those that are transformers'."""
    of_models = [it for it in all_imports() if it.file.startswith("engine_impl/models/")]
    tops = {it.name.split(".")[0] for it in of_models if not it.file.startswith("engine_impl/models/hf/")}
    assert {top for top in tops if "/" not in top} - set(sys.stdlib_module_names) == {"torch"}
    knowing = {it.file for it in all_imports() if room(it.file) == "engine_impl" and it.name.startswith("transformers")}
    assert {file.rpartition("/")[0] for file in knowing} == {"engine_impl/models/hf"}


def test_the_cache_knows_only_its_own_kernel():
    names = {f"{it.name}: {it.alias}" for it in our_imports() if room(it.file) == "cache_manager"}
    assert {name for name in names if name.startswith("kernels/")} == {
        *(f"kernels/__init__: {name}" for name in ("Backend", "is_xla", "page_rows")),
        "kernels/cache_flush/__init__: cache_flush",
        "kernels/backend: AXIS",
    }


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..errors import RefusedError", "engine_impl/errors"),
        ("from .. import errors", "engine_impl/errors"),
        ("from . import tokenizer", "engine_impl/text/tokenizer"),
        ("from ...kernels import Backend", "kernels/__init__"),
        ("from ... import kernels", "kernels/__init__"),
        ("from slipstream.server.errors import QueueFullError", "server/errors"),
        ("import slipstream.server.errors", "server/errors"),
        ("def later():\n    from ..errors import RefusedError", "engine_impl/errors"),
        ("if TYPE_CHECKING:\n    from ..errors import RefusedError", "engine_impl/errors"),
        ("import jax.numpy as jnp", "jax.numpy"),
        ("from jax import numpy", "jax"),
    ],
)
def test_every_way_to_import_is_seen(source, expected):
    assert [it.name for it in imports_of("engine_impl/text/chat_template", source)] == [expected]


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ("ab bc", []),
        ("ab ba", ["aba"]),
        ("aa", ["aa"]),
        ("ab bc ca cd", ["abca"]),
        ("ab bc cd db", ["bcdb"]),
        ("ab ba cd dc", ["aba", "cdc"]),
    ],
)
def test_circles_are_found(edges: str, expected: list[str]):
    assert ["".join(way) for way in circles((a, b) for a, b in edges.split())] == expected
