"""The shims leave no trace outside of JetStream, and say what is missing."""

import importlib.metadata
import logging
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import pytest
from slipstream.cli import main as cli
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.jetstream import compat as jetstream_compat
from slipstream.engine_impl.jetstream.engine import token_utils

from tests.server.jetstream import test_host as test_jetstream_host  # imports JetStream's orchestrator and server, too

TWO_COMMANDS = r"pip install '\.\[jetstream-lean\]' && pip install --no-deps google-jetstream==0\.2\.2"


def test_the_imports_left_nothing_behind():
    assert test_jetstream_host.jetstream_host.orchestrator.root is logging.getLogger()
    assert test_jetstream_host.jetstream_host.orchestrator.handler not in logging.getLogger().handlers
    assert logging.getLogger().level == logging.WARNING
    assert not hasattr(jax, "tree_map")
    assert not {"seqio", "seqio.vocabularies", "tensorflow"} & sys.modules.keys()


def test_who_needs_seqio_after_all_is_told_so():
    with pytest.raises(ModuleNotFoundError, match="seqio"):
        token_utils.load_vocab("tokenizer.model")


@pytest.mark.parametrize("found", [None, "0.2.0"])
def test_without_google_jetstream_the_command_says_what_to_install(found, monkeypatch, capsys):
    def version(package):
        if found is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(RefusedError, match=f"found {found or 'none'}; .*{TWO_COMMANDS}"):
        jetstream_compat.check_installed()
    monkeypatch.delitem(sys.modules, "slipstream.server.jetstream.host")
    monkeypatch.delitem(sys.modules, "slipstream.engine_impl.jetstream.engine")
    assert cli.run(["serve", "--orchestrator", "jetstream"]) == cli.BAD_INPUT
    assert "pip install --no-deps google-jetstream==0.2.2" in capsys.readouterr().err


def test_a_package_that_jetstream_needs_and_that_is_missing_is_named():
    with pytest.raises(RefusedError, match=f"needs the package 'flax'; .*{TWO_COMMANDS}"), jetstream_compat.importing():
        raise ModuleNotFoundError("No module named 'flax'", name="flax")


def test_a_thread_that_fails_is_reported_and_the_process_lives(caplog):
    orchestrator = SimpleNamespace(JetThread=threading.Thread)
    reasons = []
    with jetstream_compat.failures_to(orchestrator, reasons.append):
        thread = orchestrator.JetThread(target=lambda: 1 / 0, name="generate-0")
    assert orchestrator.JetThread is threading.Thread
    thread.start()
    thread.join(10)
    assert reasons == ["JetStream's thread generate-0 failed: ZeroDivisionError: division by zero"]
    assert "Traceback" in caplog.text


def test_a_server_listens_where_it_is_told():
    server_lib = SimpleNamespace(_HOST="[::]")
    with jetstream_compat.listening_on(server_lib, "127.0.0.1"):
        assert server_lib._HOST == "127.0.0.1"
    assert server_lib._HOST == "[::]"


def test_both_packages_called_benchmarks_are_there(tmp_path):
    """JetStream's wheel installs a top-level `benchmarks`; ours is `slipstream.benchmarks`."""
    code = "import benchmarks, slipstream.benchmarks as ours; print(benchmarks.__file__, ours.__file__, sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    theirs, ours = done.stdout.splitlines()
    assert "site-packages" in theirs
    assert theirs != ours
