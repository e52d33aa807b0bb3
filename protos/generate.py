"""Makes the stubs from the protos: `make protos`. Needs grpcio-tools; a test checks that they are current."""

import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

HERE = Path(__file__).parent
PROTOS = ("orchestrator.proto", "adapters.proto", "hosts.proto")
STUBS = (
    "orchestrator_pb2.py",
    "orchestrator_pb2.pyi",
    "orchestrator_pb2_grpc.py",
    "adapters_pb2.py",
    "adapters_pb2.pyi",
    "hosts_pb2.py",
    "hosts_pb2.pyi",
    "hosts_pb2_grpc.py",
)


def generate(target: Path) -> None:
    """Writes STUBS into `target`. Protos are compiled as slipstream/protos/..., so that the stubs import that way."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as root:
        package = Path(root, "slipstream", "protos")
        package.mkdir(parents=True)
        for proto in PROTOS:
            shutil.copy(HERE / proto, package)
        wellknown = resources.files("grpc_tools") / "_proto"
        out = [f"--{kind}_out={root}" for kind in ("python", "pyi", "grpc_python")]
        status = protoc.main(
            ["protoc", f"-I{root}", f"-I{wellknown}", *out, *(str(package / proto) for proto in PROTOS)]
        )
        if status:
            raise SystemExit(status)
        for name in STUBS:
            shutil.copy(package / name, target)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
