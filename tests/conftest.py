"""What every test needs before JAX is imported: eight virtual CPUs, and a TPU compiler without a TPU. So whatever may
import it is imported within a fixture."""

import gc
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.update(
    JAX_PLATFORMS="cpu",
    # Programs are compiled here more often than run: LLVM need not improve them, and without XLA's fusion emitters it
    # takes a third of the time. A jaxlib that has one of these flags no more ends at once, and names it. Each stands
    # there once, also in processes that tests or pytest-xdist start: programs are found again by them.
    XLA_FLAGS=" ".join(
        dict.fromkeys(
            [
                *os.environ.get("XLA_FLAGS", "").split(),
                "--xla_force_host_platform_device_count=8",
                "--xla_backend_optimization_level=0",
                "--xla_cpu_use_fusion_emitters=false",
                "--xla_cpu_parallel_codegen_split_count=1",
            ]
        )
    ),
    # libtpu as a compiler only: do not look for a TPU's metadata, and let several processes load it.
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-8",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    HF_HUB_OFFLINE="1",
    # Of torch, where it is the reference: its threads would wait in a loop for the core that another process has.
    OMP_NUM_THREADS="1",
    # Two engines of one shape are two times the same programs. They are compiled once, by whichever process and run
    # needs them first, and not kept among the user's own: the small ones too, of which there are thousands. What JAX
    # reports as made counts those that it found, too, so tests see every program that is asked for anew; `make clean`
    # forgets them.
    JAX_COMPILATION_CACHE_DIR=str(Path(__file__).parents[1] / ".pytest_cache" / "programs"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    # Where operations stand in our code, which no test reads, is a fifteenth of a program's lowering and compiling.
    JAX_TRACEBACK_IN_LOCATIONS_LIMIT="0",
)

SLOW = 50
"""So many other tests last as long as a slow one."""

MOST_RESIDENT = 2 << 30
"""Memory of a process (bytes): what it does not need of more is given back behind a file."""

gc.disable()  # until all is imported, see pytest_collection_finish

# A shell that starts the suite in the background has it ignore Ctrl-C, which some tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """What was imported stays; looking through it for garbage, again and again, took a tenth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 10)
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Several processes take the files that last longest first: one that came last would leave the others idle."""
    if hasattr(config, "workerinput"):
        weight = Counter()
        for item in items:
            weight[item.path] += SLOW if item.get_closest_marker("slow") else 1
        items.sort(key=lambda item: -weight[item.path])


@pytest.fixture(scope="module", autouse=True)
def memory_given_back():
    """Programs stay with JAX, a megabyte or two each, and what is freed stays with the C library, as engines want it
    (runtime/allocator.py): in a process that has loaded hundreds of engines, gigabytes."""
    yield
    if resident() > MOST_RESIDENT and "jax" in sys.modules:
        import jax
        from slipstream.engine_impl.runtime import allocator

        jax.clear_caches()
        allocator.give_back()


def resident() -> int:
    """Bytes of this process's memory; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@pytest.fixture
def without_native_kernels(monkeypatch):
    """CPUs as the package has them without a compiler: XLA's path, and weights lie as a checkpoint has them."""
    from slipstream.kernels import native

    monkeypatch.setattr(native, "is_built", lambda: False)


@pytest.fixture
def one_device(monkeypatch):
    """For processes that the test starts: the model is not shared by three of eight, without native kernels."""
    import jax

    jax.devices()  # this process has its eight before the flag is gone
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))


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
