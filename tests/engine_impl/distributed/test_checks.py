"""What hosts must have in common is compared, and told with both values."""

from dataclasses import replace

import numpy as np
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.distributed.checks import TOLD, differing, facts_of, fingerprint
from slipstream.engine_impl.loading import build_engine

from tests.engine_impl.tiny_models import TINY, RandomCheckpoint

CONFIG = EngineConfig(platform="cpu", slots=2, cache_length=128, tensor_parallel=2)


def facts(config=CONFIG, checkpoint=RandomCheckpoint(TINY)):  # noqa: B008
    return facts_of(config, build_engine(config, checkpoint), checkpoint)


def test_two_hosts_of_one_kind_agree():
    assert differing(facts(), facts(replace(CONFIG, model="elsewhere/but-the-same"))) == ""


def test_a_flag_that_differs_is_told_with_both_values_and_what_follows_from_it():
    told = differing(facts(replace(CONFIG, slots=4)), facts())
    assert told.startswith("--slots: '4' here, '2' on the leader; the programs: ")


def test_a_package_or_variable_that_differs_is_told(monkeypatch):
    before = facts()
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--fast")
    monkeypatch.setattr("slipstream.engine_impl.distributed.checks.version", lambda name: "9.9")
    told = differing(facts(), before)
    assert "LIBTPU_INIT_ARGS: '--fast' here, '' on the leader" in told
    assert "the package jax: '9.9' here, '" in told


def test_a_long_list_is_cut():
    told = differing({str(i): "a" for i in range(TOLD + 3)}, {})
    assert told.startswith("0: 'a' here, None on the leader; ")
    assert told.endswith("; and 3 more")


def test_models_of_one_shape_are_told_apart():
    class Tuned(RandomCheckpoint):
        def tensor(self, name):
            return super().tensor(name) * np.float32(1.001)

    assert fingerprint(RandomCheckpoint(TINY)) == fingerprint(RandomCheckpoint(TINY))
    assert fingerprint(RandomCheckpoint(TINY)) != fingerprint(Tuned(TINY))
    assert fingerprint(RandomCheckpoint(TINY)) != fingerprint(RandomCheckpoint(replace(TINY, rope_theta=1e6)))
