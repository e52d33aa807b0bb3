"""`slipstream bench accuracy`: the exam against the engine's other ways, the numbers by hand, a run on a tiny model."""

import json
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.benchmarks import accuracy, exam
from slipstream.benchmarks.accuracy import agreement
from slipstream.benchmarks.exam import Exam
from slipstream.cli import main as cli
from slipstream.engine_impl.scoring import score
from slipstream.engine_impl.session import Session

from tests.arrays import array
from tests.engine_impl.tiny_models import TINY, RandomCheckpoint, greedy, tiny_engine

SIZES = {"WINDOW": 128, "CONTEXT": 60, "FORCED": 6, "PROMPT": 40, "ANSWER": 8, "SLOTS": 3}


class Letters:
    """A tokenizer: a character's code within the tiny vocabulary."""

    stop_ids = frozenset()

    def encode(self, text):
        return [ord(character) % TINY.vocab_size for character in text]


@dataclass(frozen=True)
class OnGrid(RandomCheckpoint):
    """Its projections are what int4 can be exactly."""

    def tensor(self, name):
        value = super().tensor(name)
        return np.clip(np.round(value * 32), -8, 7) / 16 if fnmatch(name, "*_proj.weight") else value

    def tokenizer(self):
        return Letters()


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(exam, name, value)


@pytest.mark.slow
def test_forced_and_continued_are_what_the_engine_says_itself():
    engine, params = tiny_engine(slots=3)
    window_WT = np.random.default_rng(0).integers(0, TINY.vocab_size, (3, 128)).astype(np.int32)
    questions = Exam(window_WT)
    forced = list(questions.forced(engine, params))
    assert len(forced) == 6
    for slot, window_T in enumerate(window_WT):
        expected = score(Session(engine, params), window_T.tolist())[60:66]
        told = [float(logprob_BV[slot, token_B[slot]]) for logprob_BV, token_B in forced]
        np.testing.assert_allclose(told, expected, atol=1e-4)
    assert np.exp(forced[0][0]).sum(axis=1) == pytest.approx(1, abs=1e-4)
    assert questions.continued(engine, params).tolist() == greedy(engine, params, window_WT[:, :40].tolist(), 8)
    assert len(questions.prefilled(engine, params, 128)) == 127
    assert len(questions.prefilled(engine, params, 384)) == 3 * 127


def test_divergence_by_hand():
    expected_BV, other_BV = np.log([[0.5, 0.5], [0.25, 0.75]]), np.log([[0.25, 0.75], [0.25, 0.75]])
    kl_B, equal_B = accuracy._compared(array(expected_BV, jnp.float32), array(other_BV, jnp.float32))
    np.testing.assert_allclose(kl_B, [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0], atol=1e-6)
    assert equal_B.tolist() == [False, True]


def test_agreement_by_hand():
    expected_BA, answer_BA = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([[1, 2, 9, 4], [5, 6, 7, 8]])
    assert agreement(expected_BA, answer_BA) == {"equal_prefix_mean": 3.0, "equal_share": 7 / 8}


@pytest.mark.slow
def test_a_run_on_a_model_that_is_int4(without_native_kernels, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "open_checkpoint", lambda model: OnGrid(replace(TINY, num_layers=1)))
    words = ["--modes", "int4-32,int8+kv8", "--tokens", "256", "--tensor-parallel", "1", "--json"]
    assert cli.run(["bench", "accuracy", *words]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    reference, int4, int8 = json.loads(last)["modes"]
    assert [line.split()[0] for line in text[-3:]] == ["float32", "int4-32", "int8+kv8"]

    assert (reference["mode"], reference["quantized_share"], reference["kl_mean"]) == ("float32", 0, 0)
    layer = 32 * (8 + 4 + 4) * 16 + 8 * 16 * 32 + 2 * 32 * 48
    down, rest = 48 * 32, 2 * 101 * 32 + 3 * 32  # 48 inputs are no whole block of 32
    assert int4["quantized_share"] == pytest.approx(layer / (layer + down + rest))
    assert int4["perplexity_ratio_prefill"] == pytest.approx(1, abs=1e-5)
    assert int4["perplexity_ratio_decode"] == pytest.approx(1, abs=1e-5)
    assert int4["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert (int4["equal_share"], int4["equal_prefix_mean"], int4["equal_top"]) == (1, 8, 1)
    assert (int4["goal"], int4["goal_met"]) == (1.01, True)

    assert int8["perplexity_prefill"] is None, "prefill does not read the quantised cache"
    assert 1e-6 < int8["kl_mean"] < 0.1
    assert int8["quantized_share"] == pytest.approx((layer + down) / (layer + down + rest))
    assert int8["cache_bytes"] == 3 * 4 * 128 * 2 * (16 + 4)  # slots, heads, rows, k and v
    for mode in (reference, int4, int8):
        assert mode["weights_bytes_over_theory"] == mode["cache_bytes_over_theory"] == 1
        assert (mode["prefilled_tokens"], mode["decoded_tokens"]) == (3 * 127, 3 * 6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modes", "int3"], "modes='int3' is not known; those that are: float32, bfloat16, bfloat16+int8, int8"),
        (["--tokens", "0"], "tokens=0 must be at least 1"),
        (["--model", "llama-9"], "llama-9"),
    ],
)
def test_refusals_name_the_limit(words, message, capsys):
    assert cli.run(["bench", "accuracy", *words]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
