"""`slipstream bench start`: where the time goes, by hand, and real processes with a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from slipstream.benchmarks import start
from slipstream.benchmarks.measure import disk, random_checkpoint
from slipstream.benchmarks.measure.random_checkpoint import write_checkpoint
from slipstream.benchmarks.options.start import StartOptions
from slipstream.cli import main as cli
from slipstream.engine_impl.checkpoints.open import open_checkpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.text.chat import Chat
from slipstream.engine_impl.weights.load import needed_shapes

from tests.engine_impl.checkpoints.folders import write_folder


def test_the_words_of_a_command():
    """The sizes are told to the process, which would choose others by itself on another device."""
    size = ["--slots", "4", "--cache-length", "256"]
    options = StartOptions(slots=4, cache_length=256, prompt="hi")
    assert start.words(options, options.engine) == ["generate", *size, "--prompt", "hi", "--max-tokens", "1", "--json"]
    options = StartOptions(slots=4, cache_length=256, command="serve")
    assert start.words(options, options.engine) == ["serve", "--port", "0", "--log-format", "json", *size]


def test_what_a_process_cannot_see_of_itself_is_the_rest():
    """It tells 7 s, and our clock says 8."""
    told = {"imports_s": 1.0, "loading_s": 2.0, "tracing_s": 1.0, "compiling_s": 2.5, "rest_s": 0.5}
    found = start.start_of(8.0, told | {"programs_compiled": 3, "programs_found": 4})
    assert found.stages == {"imports": 1.0, "loading": 2.0, "tracing": 1.0, "compiling": 2.5, "rest": 1.5}
    assert (found.seconds, found.programs_compiled, found.programs_found) == (8.0, 3, 4)


def test_pairs_of_runs_and_the_goal(monkeypatch, capsys, tmp_path):
    """Cold and warm share a home within a pair; the stages told are those of the run in the middle."""
    homes, seconds_of = [], iter([20.0, 11.0, 22.0, 9.0, 30.0, 8.0])

    def measure(options, command, folder):
        homes.append(folder)
        assert (folder / "models").is_symlink()
        took = next(seconds_of)
        return start.Start(took, {"imports": took / 2, "loading": took / 2}, len(homes), 0)

    monkeypatch.setattr(start, "measure", measure)
    (tmp_path / "model").write_bytes(bytes(1000))
    monkeypatch.setattr(start, "files_of", lambda options, engine: [tmp_path / "model"])
    assert cli.run(["bench", "start", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert [homes[0], homes[2], homes[4]] == [homes[1], homes[3], homes[5]]
    assert len(set(homes)) == 3
    assert result["cold"]["seconds"] == [20.0, 22.0, 30.0]
    warm = result["warm"]
    assert (warm["seconds_p50"], warm["seconds_min"], warm["seconds_max"]) == (9.0, 8.0, 11.0)
    assert (warm["stages"], warm["programs_compiled"]) == ({"imports": 4.5, "loading": 4.5}, 4)
    assert (result["goal_seconds"], result["goal_met"]) == (10.0, True)
    assert result["files"]["bytes"] == 1000
    assert "goal: a warm start within 10 s: met" in out


def test_what_is_read_of_a_random_checkpoint(tmp_path, monkeypatch):
    """With a cache of weights its files, which a start has filled that nobody times."""
    tiny = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    monkeypatch.setattr(random_checkpoint, "SHAPE", random_checkpoint.SHAPE | tiny | {"vocab_size": 300})
    folder = write_checkpoint(tmp_path / "random", 2**17 / 2**30, torch.bfloat16, random_checkpoint.SHAPE)
    checkpoint = open_checkpoint(str(folder))
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert checkpoint.config.num_layers == layers > 1
    assert set(checkpoint.shapes()) == set(needed_shapes(registry.build(checkpoint.config), 2))
    size = sum(checkpoint.tensor(name).nbytes for name in checkpoint.shapes())
    assert 0.8 < size / 2**17 <= 1
    assert checkpoint.tensor("layers.1.mlp.up_proj.weight").std() > 0.01
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.render_chat(Chat.of([{"role": "user", "content": "ab"}])) == "ab"
    assert tokenizer.encode("ab") == [64, 65]
    with pytest.raises(RefusedError, match=r"random_gib=1e-06 is less than a model of one layer has; give at least"):
        write_checkpoint(tmp_path / "none", 1e-6, torch.bfloat16, random_checkpoint.SHAPE)
    assert start.files_of(StartOptions(), EngineConfig(model=str(folder))) == checkpoint.files()

    def measure(options, command, home):
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "data").write_bytes(b"1")

    monkeypatch.setattr(start, "measure", measure)
    engine = EngineConfig(model=str(folder), weight_cache=str(tmp_path / "weights"))
    assert start.files_of(StartOptions(weight_cache=True), engine) == [tmp_path / "weights" / "data"]


def test_what_is_started():
    """A random checkpoint takes the type that is computed in."""
    options = StartOptions(random_gib=2.0, dtype="bfloat16", weight_cache=True)
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "write_checkpoint", lambda *given: written.append(given) or given[0])
        with start.started(options) as engine:
            assert written == [(Path(engine.model), 2.0, torch.bfloat16)]
            assert engine.weight_cache == str(Path(engine.model).with_name("weights"))
            assert {"--dtype", "bfloat16", "--weight-cache"} <= set(start.words(options, engine))
    with start.started(StartOptions()) as engine:
        assert engine == StartOptions().engine


def test_a_read_without_what_memory_holds(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3 * disk.CHUNK + 1))
    assert disk.plain_read_s([tmp_path / "a"]) > 0
    assert start.of_disk(2_000_000, 0.5, 2.0) == {
        "bytes": 2_000_000, "plain_read_s": 0.5, "plain_read_mb_per_s": 4, "cold_loading_share": 0.25,
    }  # fmt: skip


@pytest.mark.slow
def test_a_warm_server_compiles_nothing(tmp_path, capsys):
    folder = write_folder(tmp_path / "m")
    size = ["--model", str(folder), "--slots", "2", "--cache-length", "128"]
    assert cli.run(["bench", "start", "--command", "serve", *size, "--runs", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    cold, warm = result["cold"], result["warm"]
    assert cold["programs_compiled"] == warm["programs_found"] > 5
    assert (cold["programs_found"], warm["programs_compiled"]) == (0, 0)
    for state in (cold, warm):
        assert sum(state["stages"].values()) == pytest.approx(state["seconds_p50"], abs=0.01)
        assert all(took >= 0 for took in state["stages"].values())
    assert result["goal_seconds"] is None


@pytest.mark.slow
def test_a_command_that_fails_is_told_with_its_words(tmp_path, capsys):
    """This folder has no tokenizer."""
    folder = write_folder(tmp_path / "m")
    words = ["--model", str(folder), "--cache-length", "128", "--runs", "1"]
    assert cli.run(["bench", "start", *words]) == cli.FAILED
    err = capsys.readouterr().err
    assert "ended with status 2" in err
    assert "has no tokenizer" in err


def test_a_start_that_takes_too_long_is_ended(capsys):
    assert cli.run(["bench", "start", "--runs", "1", "--timeout-s", "0.2"]) == cli.FAILED
    assert "ended with status -9 after 0 s: it said nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runs", "0"], "runs=0 must be at least 1"),
        (["--cache-length", "100"], "cache_length=100 must be a multiple of 128"),
        (["--model", "/nowhere"], "'/nowhere' does not exist"),
    ],
)
def test_refusals(words, message, capsys):
    assert cli.run(["bench", "start", *words]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
