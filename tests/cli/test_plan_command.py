"""slipstream plan on the command line."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import pytest
from slipstream.cli.main import run
from slipstream.cli.plan import mixed
from slipstream.engine_impl.compiler import plan as compiler
from slipstream.engine_impl.compiler.headroom import Headroom
from slipstream.engine_impl.compiler.presets import PRESETS, preset

from tests.tpu import all_compiled_once, tpu_mesh

SMALL = ["--model", "llama-3.2-1b", "--topology", "v5e:2x4", "--slots", "16", "--cache-length", "4096"]
SMALL += ["--cache-tokens", "65536"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """(the object of a plan for a mix of lengths, the folder with its programs, the report). The programs are those of
    engine_impl/compiler/test_plan.py."""
    folder, out, plan, kept = tmp_path_factory.mktemp("hlo"), io.StringIO(), compiler.plan, []

    def keep(*args: Any, **more: Any) -> compiler.PlanReport:
        kept.append(plan(*args, **more))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(compiler, "plan", keep)
        patch.setitem(PRESETS, "llama-3.2-1b", replace(preset("llama-3.2-1b"), num_layers=2, vocab_size=2048))
        with all_compiled_once(tpu_mesh("v5e:2x4")):
            assert run(["plan", *SMALL, "--lengths", "fixed:100,29", "--dump", str(folder), "--json"]) == 0
    return json.loads(out.getvalue().splitlines()[-1]), folder, kept[0]


@pytest.mark.slow
def test_the_last_line_is_one_json_object(planned):
    report, folder, _ = planned
    assert [report[key] for key in ("model", "topology", "chips", "fits")] == ["llama-3.2-1b", "v5e:2x4", 8, True]
    assert set(report["programs"]) == {"generate", "insert", "prefill_512", "carry_16x512"}
    assert (folder / "prefill_512.hlo.txt").exists()


def test_a_misfit_prints_its_object_and_exits_1(capsys):
    assert run(["plan", "--model", "llama-2-70b", "--topology", "v5e:2x2", "--json"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["fits"] is False
    assert report["misfit"]["over_bytes"] > 0


def test_a_misfit_is_told_in_words(capsys):
    assert run(["plan", "--model", "llama-2-70b", "--topology", "v5e:2x2"]) == 1
    out = capsys.readouterr().out
    assert "It does not fit. weights and cache: " in out
    assert "What would make room, each alone: " in out


def test_what_quantisation_saves_is_a_line(capsys):
    assert run(["plan", "--model", "llama-2-70b", "--topology", "v5e:2x2", "--quantize-weights", "int8"]) == 1
    line = capsys.readouterr().out.splitlines()[2]
    assert line.startswith("int8 weights: 15.")
    assert "GiB a chip less than bfloat16; by arithmetic a v5e has room for 0 instead of 0 requests" in line
    assert run(["plan", "--model", "llama-2-70b", "--topology", "v5e:2x2"]) == 1
    assert "less than" not in capsys.readouterr().out


def test_a_quantised_cache_says_what_it_saves(capsys):
    """80 layers, 2 kv heads a chip, 100 x 1024 tokens of 512 bytes, or of 264: of 7.81 GiB 3.78."""
    words = ["--model", "llama-2-70b", "--topology", "v5e:2x2", "--cache-tokens", "102400", "--quantize-kv", "int8"]
    assert run(["plan", *words]) == 1
    assert capsys.readouterr().out.splitlines()[2].startswith("int8 cache: 3.78 GiB a chip less than bfloat16")


@pytest.mark.slow
def test_the_table_is_for_people(planned, monkeypatch, capsys):
    """Of the same plan, which is compiled once."""
    monkeypatch.setattr(compiler, "plan", lambda *_, **__: planned[2])
    assert run(["plan", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "1 x cache_flush" in out
    assert "It fits. Ceiling of the decode step" in out
    assert "Lengths" not in out


@pytest.mark.slow
def test_a_mix_of_lengths_has_lines_and_an_object(planned):
    room = planned[0]["headroom"]
    assert 0 < room["tokens_per_second_ceiling"] <= room["decode_tokens_per_second"]
    sent, pool, ceiling = mixed(Headroom(**room))
    assert sent.startswith("Lengths fixed:100,29: prompts of 100 tokens, answers of 29, 114 in the cache")
    assert f"Requests at once: {room['requests']:,}" in pool
    assert ceiling.endswith(" tokens/s with their prompts' multiplications")


def test_what_does_not_fit_holds_no_requests(capsys):
    assert run(["plan", "--model", "llama-2-70b", "--topology", "v5e:2x2", "--lengths", "fixed:1,1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["headroom"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "v5e:9x9"], "topology='v5e:9x9' does not exist; those that do: v4:"),
        (["--model", "llama-0"], "model preset 'llama-0' is not there"),
        (["--model", "llama-2-7b", "--tensor-parallel", "3"], "tensor_parallel=3 does not work"),
        (["--lengths", "many"], "lengths='many' must be sharegpt, uniform:LOW-HIGH,LOW-HIGH or fixed:PROMPT,ANSWER"),
        (["--model", "llama-2-7b", "--cache-length", "128", "--lengths", "fixed:128,1"], "requests of 129 tokens"),
        (["--max-slots", "--lengths", "sharegpt"], "--max-slots and --lengths ask for two plans"),
    ],
)
def test_bad_input_exits_2_with_the_remedy(capsys, options, message):
    assert run(["plan", *options]) == 2
    assert message in capsys.readouterr().err
