"""deploy/tpu-vm: the unit, its flags, and the script with a system that only writes down what it is asked for."""

import os
import re
import subprocess

import pytest
from slipstream.cli.main import parse
from slipstream.cli.serve import Serve

from tests.deploy.manifests import ROOT

FOLDER = ROOT / "deploy" / "tpu-vm"
SCRIPTS = [*(ROOT / "deploy").rglob("*.sh")]
UNIT = dict(re.findall(r"^(\w+)=(.*)$", (FOLDER / "slipstream.service").read_text(), flags=re.M))

STUBS = {
    # the script under `#!/bin/sh`, after it has been noted
    "systemctl": '[ "$1" != is-active ] || [ -z "${ENDED:-}" ]',
    "useradd": "",
    "id": "exit 1",
    "runuser": "",
    "journalctl": "",
    "sleep": "",
    "curl": '[ -n "${WARM:-}" ] || grep -q "^${WARM_FROM:-never}$" "$DESTDIR/opt/slipstream/current/name"',
    "date": 'echo "${RELEASE:-first}"',
    "python3": 'mkdir -p "$3/bin"; basename "$3" > "$3/name"; cp "$0.pip" "$3/bin/pip"',
    "python3.pip": "",
}


@pytest.fixture
def system(tmp_path):
    """(verb, more environment) -> (status, what was called, output)"""
    stubs, called = tmp_path / "stubs", tmp_path / "called"
    stubs.mkdir()
    for name, script in STUBS.items():
        note = f'echo "{name.removeprefix("python3.")} $*" >> {called}\n'
        (stubs / name).write_text(f"#!/bin/sh\n{note}{script}\n")
        (stubs / name).chmod(0o755)

    def run(*words: str, **more: str) -> tuple[int, list[str], str]:
        called.write_text("")
        environment = {"PATH": f"{stubs}:{os.environ['PATH']}", "DESTDIR": str(tmp_path / "root")} | more
        done = subprocess.run(
            ["bash", str(FOLDER / "slipstream.sh"), *words], env=environment, capture_output=True, text=True
        )
        return done.returncode, called.read_text().splitlines(), done.stdout + done.stderr

    return run


@pytest.mark.tools
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.stdout == ""


def test_the_units_flags_parse_and_its_stop_waits_for_the_grace():
    words = UNIT["ExecStart"].replace("/etc/slipstream/serve.yaml", str(FOLDER / "serve.yaml")).split()
    assert words[0] == "/opt/slipstream/current/bin/slipstream"
    command = parse(words[1:])
    assert isinstance(command, Serve)
    assert command.server.watch.metrics_port == 9100
    assert int(UNIT["TimeoutStopSec"]) > command.server.grace_s + 10
    assert "SLIPSTREAM_HOME=/var/cache/slipstream" in UNIT["Environment"]


def test_an_installation_is_from_the_locks_and_starts_nothing(system, tmp_path):
    status, called, told = system("install")
    assert status == 0, told
    pips = [line for line in called if line.startswith("pip ")]
    assert len(pips) == 4
    assert all("--require-hashes" in line for line in pips[:2])
    assert pips[3] == "pip check"
    root = tmp_path / "root"
    assert os.readlink(root / "opt/slipstream/current") == str(root / "opt/slipstream/first")
    assert (root / "etc/slipstream/serve.yaml").read_text() == (FOLDER / "serve.yaml").read_text()
    assert (root / "etc/systemd/system/slipstream.service").exists()
    assert [line for line in called if line.startswith("systemctl")] == [
        "systemctl daemon-reload", "systemctl enable slipstream"
    ]  # fmt: skip
    assert any(line.startswith("useradd --system") for line in called)


def test_another_installation_leaves_the_flags_alone(system, tmp_path):
    system("install")
    (tmp_path / "root/etc/slipstream/serve.yaml").write_text("model: mine\n")
    assert system("install")[0] == 0
    assert (tmp_path / "root/etc/slipstream/serve.yaml").read_text() == "model: mine\n"


def test_an_upgrade_that_serves(system, tmp_path):
    system("install")
    status, called, told = system("upgrade", RELEASE="second", WARM_FROM="second")
    assert status == 0, told
    assert "systemctl restart slipstream" in called
    assert os.readlink(tmp_path / "root/opt/slipstream/current").endswith("/second")
    assert "it serves" in told


@pytest.mark.parametrize("how", [{"WARM_S": "0"}, {"ENDED": "yes"}], ids=["never warm", "ends"])
def test_an_upgrade_that_does_not_serve_goes_back(system, tmp_path, how):
    system("install")
    status, called, told = system("upgrade", RELEASE="second", WARM_FROM="first", **how)
    assert status == 1
    assert called.count("systemctl restart slipstream") == 2
    assert os.readlink(tmp_path / "root/opt/slipstream/current").endswith("/first")
    assert "the new version did not serve" in told


def test_without_a_metrics_port_nothing_is_waited_for(system, tmp_path):
    system("install")
    (tmp_path / "root/etc/slipstream/serve.yaml").write_text("model: mine\n")
    status, called, told = system("serve")
    assert status == 0
    assert "nobody can tell when it is warm" in told
    assert not any(line.startswith("curl") for line in called)


@pytest.mark.parametrize("words", [(), ("help",), ("fetch",)])
def test_it_tells_how_it_is_used(system, words):
    status, called, told = system(*words)
    assert status != 0
    assert called == []
    assert "slipstream.sh" in told
