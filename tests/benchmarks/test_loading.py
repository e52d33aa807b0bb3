"""Loading never holds the model twice: the peak of resident memory, measured while a small checkpoint is loaded."""

import json

import pytest
from slipstream.cli import main as cli

MIB = 2**20


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["scan", "unrolled"])
def test_the_host_holds_a_few_tensors_beside_the_weights(loop, tmp_path, capsys):
    """256 MiB of weights, the largest tensor 54 MiB. Beyond them, three of the largest and what compiling takes."""
    words = ["--shape", "smollm2-135m", "--loop", loop, "--tensor-parallel", "3", "--folder", str(tmp_path)]
    assert cli.run(["bench", "loading", *words, "--json"]) == 0
    text, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    assert told["weights_bytes"] > 250 * MIB
    assert told["largest_tensor_bytes"] == 49152 * 576 * 2
    assert told["beyond_weights_bytes"] < 3 * told["largest_tensor_bytes"] + 96 * MIB
    assert f"{told['peak_bytes'] / MIB:.0f} MiB = weights" in text
    assert list(tmp_path.iterdir()) == [], "the checkpoint is gone"


def test_only_llamas_are_written(capsys):
    assert cli.run(["bench", "loading", "--shape", "qwen3-0.6b"]) == 2
    assert "shape='qwen3-0.6b' must be a Llama's" in capsys.readouterr().err
