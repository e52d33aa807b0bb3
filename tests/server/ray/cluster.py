"""`serve run` with the file of deploy/ray/, as a user starts it, on sizes that other tests compile too."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
SERVE = [sys.executable, "-m", "ray.serve.scripts"]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
SIZES = {"slots": 3, "cache-length": 256, "max-prefill-length": 192, "prefill-chunk": 128, "tensor-parallel": 1}
QUICK = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 3, "look_back_period_s": 2}
QUICK |= {"upscale_delay_s": 0, "downscale_delay_s": 3, "metrics_interval_s": 0.5}
ENVIRONMENT = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
}
STOP_S = 60


class Cluster:
    """What it says, and where it is."""

    def __init__(self, process: subprocess.Popen[str], http: int, grpc: int) -> None:
        self.http, self.grpc = f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        self._process, self._text = process, ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def close(self) -> None:
        """Once the process has ended."""
        self._reader.join(STOP_S)

    @property
    def log(self) -> str:
        """All so far, replicas included."""
        return self._text

    @property
    def is_up(self) -> bool:
        return self._process.poll() is None

    def replicas(self) -> set[int]:
        """The processes that have an engine (pids)."""
        found = set[int]()
        for folder in Path("/proc").iterdir():
            try:
                command = (folder / "cmdline").read_text() if folder.name.isdigit() else ""
                ours = command.startswith("ray::ServeReplica:slipstream:Engine") and self._is_ours(folder)
            except OSError:  # it has gone meanwhile
                continue
            if ours:
                found.add(int(folder.name))
        return found

    def _is_ours(self, folder: Path) -> bool:
        return f"SLIPSTREAM_TEST={os.getpid()}\0".encode() in (folder / "environ").read_bytes()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if not re.match(r"\S*\(pid=\)", line):  # of files that are not ours
                    self._text += line


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Of one machine. It is stopped whatever happens, and its processes with it."""
    ports = free_ports(2)
    environment = os.environ | ENVIRONMENT | {"RAY_TMPDIR": str(folder), "SLIPSTREAM_TEST": str(os.getpid())}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config(*ports)))
    process = subprocess.Popen(
        [*SERVE, "run", str(folder / "serve.yaml")], cwd=folder, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    made = Cluster(process, *ports)
    try:
        yield made
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        subprocess.run([*RAY, "stop", "--force"], env=environment, capture_output=True, timeout=STOP_S, check=False)
        made.close()


def config(http: int, grpc: int) -> dict[str, Any]:
    """deploy/ray/cpu.yaml, smaller and quicker."""
    found = yaml.safe_load((ROOT / "deploy" / "ray" / "cpu.yaml").read_text())
    found["http_options"]["port"], found["grpc_options"]["port"] = http, grpc
    (application,) = found["applications"]
    application["args"] |= SIZES
    (engine,) = application["deployments"]
    engine["autoscaling_config"] |= QUICK
    return found


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
