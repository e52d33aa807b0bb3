"""Loading never holds the model twice: the peak of a process's memory while it loads a checkpoint of random weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MIB = 2**20

# XLA's programs and threads, and one device's share of one stack of layers.
FIXED = 192 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["scan", "unrolled"])
def test_the_host_holds_a_few_tensors_beside_the_weights(loop, tmp_path):
    """960 MiB of weights, the largest tensor 64 MiB: beyond them some two and a half of it, as mapped pages and as the
    copy on its way to the devices. A second copy of half of the layers (448 MiB) would be seen."""
    command = [sys.executable, "-m", "tests.engine_impl.weights.loading_memory", loop, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["largest"] == 64 * MIB
    assert told["weights"] > 950 * MIB
    assert told["beyond"] < 2.5 * told["largest"] + FIXED
