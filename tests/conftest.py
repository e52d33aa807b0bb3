"""What every test needs before JAX is imported: eight virtual CPUs, and a TPU compiler without a TPU. So whatever may
import it is imported within a fixture."""

import atexit
import os
import signal
import sys
import tempfile
from types import SimpleNamespace

import pytest

os.environ.update(
    JAX_PLATFORMS="cpu",
    XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip(),
    # libtpu as a compiler only: do not look for a TPU's metadata, and let several processes load it.
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-8",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    HF_HUB_OFFLINE="1",
)

if "PYTEST_XDIST_WORKER" not in os.environ:
    # Two engines of one shape are two times the same programs: a run compiles each of them once, whichever of its
    # processes needs it first. JAX reports a program that is found as one that was made, so tests count it as before.
    of_this_run = tempfile.TemporaryDirectory(prefix="slipstream-tests-")
    atexit.register(of_this_run.cleanup)
    os.environ.update(
        JAX_COMPILATION_CACHE_DIR=of_this_run.name,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1",
    )

# A shell that starts the suite in the background has it ignore Ctrl-C, which some tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def fake_engine(monkeypatch):
    """What the command line loads, whatever model it is asked for."""
    from tests.fakes import FakeEngine

    engine = FakeEngine()
    loading = SimpleNamespace(load_engine=lambda config: (engine, None))
    monkeypatch.setitem(sys.modules, "slipstream.engine_impl.loading", loading)
    return engine


@pytest.fixture
def target(fake_engine):
    """host:port of a server over `fake_engine`."""
    from tests.serving import serving_in_thread

    with serving_in_thread(fake_engine) as address:
        yield address
