"""Who may know what: the rooms' imports, read from their source."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"protos", "kernels", "cache_manager", "engine_impl", "server", "benchmarks"}

MAY_IMPORT = {
    # room: (other rooms, packages beside the standard library)
    "protos": (set(), {"google", "grpc", "grpc_tools"}),
    "kernels": (set(), {"jax", "numpy"}),
    "cache_manager": ({"kernels"}, {"jax", "numpy"}),
    "engine_impl": (
        {"kernels", "cache_manager"},
        {"jax", "numpy", "torch", "torchax", "gguf", "tokenizers", "jinja2", "libtpu", "jetstream"}
        | {"safetensors", "sentencepiece", "huggingface_hub", "google"},
    ),
    "server": (
        {"protos", "engine_impl"},
        {"grpc", "grpc_health", "grpc_reflection", "google", "tyro", "numpy", "jetstream", "prometheus_client"}
        | {"aiohttp", "pydantic"},
    ),
    "benchmarks": (
        {"protos", "kernels", "cache_manager", "engine_impl", "server"},
        {"jax", "numpy", "torch", "grpc", "aiohttp", "transformers", "matplotlib", "safetensors"},
    ),
}
ONLY_IN = {
    "torchax": {"engine_impl/bridge.py"},
    "jetstream": {
        "engine_impl/jetstream/engine.py",
        "server/jetstream/host.py",
    },  # shims: compat.py
}


def imports(path: Path):
    """Absolute names of all that a file imports, our own as slipstream.<room>..."""
    package = ["slipstream", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            # `from .. import kernels` names rooms, `from .x import name` does not name modules that we must tell apart
            yield from (".".join([*module, alias.name]) for alias in node.names)


def sources(room: str):
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_it_may(room):
    rooms, packages = MAY_IMPORT[room]
    forbidden = []
    for path in sources(room):
        for name in imports(path):
            top, *rest = name.split(".")
            if top == "slipstream":
                allowed = rest[0] in rooms | {room}
            else:
                allowed = top in packages or top in sys.stdlib_module_names
            if not allowed:
                forbidden.append(f"{path.relative_to(ROOT)}: {name}")
    assert forbidden == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_that_few_may_know(package):
    users = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in sources(room)
        if any(name.split(".")[0] == package for name in imports(path))
    }
    assert users == ONLY_IN[package]


def test_benchmarks_are_imported_by_their_commands_alone_and_only_when_they_run():
    for path in sources("server"):
        lines = [line for line in path.read_text().splitlines() if "import" in line and "benchmarks" in line]
        assert not lines or path.is_relative_to(ROOT / "server/commands/bench")
        assert all(line.startswith("        from ....benchmarks.") for line in lines)  # within a method


def test_models_import_torch_alone():
    tops = {name.split(".")[0] for path in sources("engine_impl/models") for name in imports(path)}
    assert tops - set(sys.stdlib_module_names) - {"slipstream"} == {"torch"}


def test_the_cache_knows_only_its_own_kernel():
    names = {name for path in sources("cache_manager") for name in imports(path) if ".kernels" in name}
    of_kernels = {"Backend", "backend.AXIS", "cache_flush", "is_xla", "page_rows"}
    assert names == {f"slipstream.kernels.{name}" for name in of_kernels}
