"""programs.sh: compiled programs that pods share."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.deploy.manifests import files_of

KEY = f"slipstream-{version('slipstream-llm')}-jax-{version('jax')}-v5e-2x4"


@pytest.fixture
def script(tmp_path):
    """(verb, more environment) -> the process, in the folders tmp_path/shared and tmp_path/local."""
    path = tmp_path / "programs.sh"
    path.write_text(files_of("v5e-8", "programs-script")["programs.sh"])
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TOPOLOGY": "v5e-2x4",
        "SHARED": str(tmp_path / "shared"), "LOCAL": str(tmp_path / "local"),
    }  # fmt: skip

    def start(verb: str, **more: str) -> "subprocess.Popen[str]":
        words = ["sh", str(path), verb]
        return subprocess.Popen(words, env=environment | more, stdout=subprocess.PIPE, text=True)

    return start


def programs(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else {}


def test_the_first_pod_finds_nothing(script, tmp_path):
    fetch = script("fetch")
    assert fetch.communicate(timeout=20)[0] == f"{tmp_path}/local: 0 files\n"
    assert fetch.returncode == 0
    assert programs(tmp_path / "local") == {}


def test_a_pod_finds_programs_of_its_kind_alone_and_whole(script, tmp_path):
    for key, name in ((KEY, "a"), (KEY, ".b.other-pod.7"), (KEY.replace("2x4", "2x2"), "c")):
        (tmp_path / "shared" / key).mkdir(parents=True, exist_ok=True)
        (tmp_path / "shared" / key / name).write_text("program")
    fetch = script("fetch")
    assert fetch.communicate(timeout=20)[0] == f"{tmp_path}/local: 1 files\n"
    assert programs(tmp_path / "local") == {"a": "program"}


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_what_was_compiled_is_kept_once_the_server_is_ready(script, tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "shared" / KEY).mkdir(parents=True)
    (tmp_path / "local" / "a").write_text("mine")
    (tmp_path / "local" / "b").write_text("new")
    (tmp_path / "shared" / KEY / "a").write_text("theirs")
    with HTTPServer(("127.0.0.1", 0), Ready) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        with script("keep", READYZ=f"http://127.0.0.1:{http.server_port}/readyz") as keep:
            assert keep.stdout.readline() == f"{tmp_path}/shared/{KEY}: 2 files\n"
            assert programs(tmp_path / "shared" / KEY) == {"a": "theirs", "b": "new"}
            assert keep.poll() is None, "it goes on beside the server"
            keep.terminate()
            assert keep.wait(timeout=20) == 0
        http.shutdown()


def test_nothing_is_kept_of_a_server_that_is_not_ready(script, tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "a").write_text("half")
    with script("keep", READYZ="http://127.0.0.1:1/readyz") as keep:
        with pytest.raises(subprocess.TimeoutExpired):
            keep.wait(timeout=1)
        keep.terminate()
        assert keep.wait(timeout=20) == 0
    assert programs(tmp_path / "shared") == {}
