"""Programs that are kept from start to start, and what becomes of damaged ones."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

START = """
import logging, sys
from pathlib import Path
from slipstream.engine_impl.runtime import compilations
logging.basicConfig(format="%(message)s")
compilations.keep_in(Path(sys.argv[1]))
import jax
def double(x): return x * 2
def triple(x): return x * 3
def halve(x): return x / 2
print(jax.jit(double)(1.0), jax.jit(triple)(1.0), jax.jit(halve)(1.0), compilations.programs().compiled)
"""


def start(folder, before=""):
    """(programs compiled, the log)"""
    done = subprocess.run(
        [sys.executable, "-c", before + START, str(folder)], capture_output=True, text=True, timeout=120, check=True
    )
    *values, compiled = done.stdout.split()
    assert values == ["2.0", "3.0", "0.5"]
    return int(compiled), done.stderr


def test_damaged_programs_are_replaced_and_the_start_after_compiles_nothing(tmp_path):
    """One is empty, one is cut off, and one is whole."""
    compiled, log = start(tmp_path)
    assert (compiled > 2, log) == (True, "")
    for name, keep in (("double", 0), ("triple", 20)):
        (damaged,) = tmp_path.glob(f"jit_{name}-*-cache")
        damaged.write_bytes(damaged.read_bytes()[:keep])
    compiled, log = start(tmp_path)
    assert compiled == 2
    lines = log.splitlines()
    assert len(lines) == 2
    assert all(f"a compiled program in {tmp_path} is damaged" in line for line in lines)
    assert start(tmp_path) == (0, "")


def test_a_disk_that_is_full_is_told_and_what_it_left_does_no_harm(tmp_path):
    compiled, log = start(
        tmp_path, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))"
    )
    assert compiled > 0
    assert f"a compiled program cannot be kept in {tmp_path} (OSError: [Errno 27] File too large)" in log
    assert "Traceback" not in log
    again, _ = start(tmp_path)
    assert again == compiled
    assert start(tmp_path) == (0, "")
