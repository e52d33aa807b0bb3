"""What adapters add, on bases of floats and of codes."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl.adapters.sites import adapted, term
from slipstream.engine_impl.adapters.stacks import AdapterWeights
from slipstream.engine_impl.api import Piece
from slipstream.engine_impl.assembly import assembled, twin
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.errors import AdaptersLostError, RefusedError
from slipstream.engine_impl.models.llama import Llama
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.weights.sharding import make_mesh

from tests.arrays import array

from ..tiny_models import TINY, RandomCheckpoint

PROMPT = list(range(3, 12))


def test_rows_get_their_own_adapters_term_and_exactly_zero_without():
    generator = np.random.default_rng(0)
    x_RI, down_XrI, up_XOr = (generator.normal(size=size) for size in ((4, 5), (3, 2, 5), (3, 6, 2)))
    adapter_R = array([0, 3, 1, 3])
    out_RO = np.asarray(term(jnp.float32(x_RI), adapter_R, jnp.float32(down_XrI), jnp.float32(up_XOr)))
    assert (out_RO[0] == 0).all()
    for row, index in ((1, 2), (2, 0), (3, 2)):
        np.testing.assert_allclose(out_RO[row], up_XOr[index] @ (down_XrI[index] @ x_RI[row]), rtol=1e-5)


def test_an_overflow_of_one_adapter_is_not_anothers():
    """0 times infinity would be NaN: a row's columns are chosen, not multiplied."""
    down_XrI = jnp.stack([jnp.ones((1, 2)), jnp.full((1, 2), 3e38)])
    out_RO = term(jnp.ones((1, 2)), array([1]), down_XrI, jnp.ones((2, 3, 1)))
    assert out_RO.tolist() == [[2, 2, 2]]


@dataclass(frozen=True)
class GridCheckpoint(RandomCheckpoint):
    """Matrices whose values are codes from `low` to `high` times a scale, with both in each block: they are kept."""

    low: int = -127
    high: int = 127

    def tensor(self, name: str) -> np.ndarray:
        values = super().tensor(name)
        if not name.endswith("_proj.weight"):
            return values
        codes = np.round(np.clip(values * self.high, self.low, self.high))
        codes[:, ::16], codes[:, 1::16] = self.high, self.low
        return (codes / (4 * self.high)).astype(np.float32)


def engine_of(low: int = -127, high: int = 127, **config: Any):
    model = replace(TINY, ffn_dim=64)
    shape = GridCheckpoint(model, low=low, high=high)
    mesh = make_mesh(jax.devices(), 8, 4, 1)
    sizes: dict[str, Any] = {"slots": 1, "cache_length": 128, "cache_tokens": 128, "max_adapters": 2}
    tokenizer: Any = None
    engine = assembled(Llama(model), mesh, EngineConfig(**sizes | config), jnp.dtype("float32"), tokenizer, "tiny")
    return engine, engine.parameters.load(shape)


def random_adapter(engine: Engine, seed: int) -> AdapterWeights:
    assert engine.parameters.places is not None
    generator = np.random.default_rng(seed)
    arrays = {
        name: generator.normal(size=(2, *of.shape[2:])).astype(np.float32) * 0.1
        for name, of in engine.parameters.places.abstract("scan").items()
    }
    return AdapterWeights(engine.parameters.places.rank, arrays, 0)


def logits(session: Session, index: int) -> np.ndarray:
    session.adapter = index
    return np.asarray(session.prefilled(0, PROMPT).logits_NV)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "low", "high"), [("int8", -127, 127), ("int4", -8, 7)])
def test_bases_of_codes_get_the_same_terms(kind, low, high):
    told = []
    for config in ({}, {"quantize_weights": kind}):
        engine, params = engine_of(low, high, **config)
        session = Session(engine, engine.put_adapter(params, 2, random_adapter(engine, 1)))
        told.append([logits(session, index) for index in (0, 2)])
    np.testing.assert_allclose(told[0], told[1], atol=2e-3)
    assert np.abs(told[0][0] - told[0][1]).max() > 0.1


def test_adapters_come_and_go_without_a_compilation():
    engine, params = engine_of()
    session = Session(engine, params)
    base = logits(session, 1)
    compiled = [program._cache_size() for program in engine.jitted]  # pyright: ignore[reportAttributeAccessIssue]
    first, second = random_adapter(engine, 1), random_adapter(engine, 2)
    session.params = engine.put_adapter(session.params, 1, first)
    with_first = logits(session, 1)
    session.params = engine.put_adapter(session.params, 2, second)
    np.testing.assert_array_equal(logits(session, 1), with_first)
    np.testing.assert_array_equal(logits(session, 0), base)
    session.params = engine.put_adapter(session.params, 1, AdapterWeights(1, {}, 0))
    np.testing.assert_array_equal(logits(session, 1), base)
    assert [program._cache_size() for program in engine.jitted] == compiled  # pyright: ignore[reportAttributeAccessIssue]
    places = engine.parameters.places
    assert places is not None
    assert places._put["unrolled"]._cache_size() == 1


def test_a_write_that_fails_loses_those_that_were_there_and_says_so(monkeypatch):
    engine, params = engine_of()
    session, first = Session(engine, params), random_adapter(engine, 1)
    base = logits(session, 0)
    session.params = engine.put_adapter(session.params, 1, first)
    with_first = logits(session, 1)
    places = engine.parameters.places
    assert places is not None

    def fails(before_donation: bool):
        def put(stacks, arrays, at):
            if not before_donation:
                for array in jax.tree.leaves(stacks):
                    array.delete()
            raise RuntimeError("out of memory")

        return {"scan": put, "unrolled": put}

    with monkeypatch.context() as patch:
        patch.setitem(vars(places), "_put", fails(before_donation=True))
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.put_adapter(session.params, 2, first)
    np.testing.assert_array_equal(logits(session, 1), with_first)
    with monkeypatch.context() as patch:
        patch.setitem(vars(places), "_put", fails(before_donation=False))
        with pytest.raises(AdaptersLostError, match="are lost"):
            engine.put_adapter(session.params, 2, first)
    session.params = engine.without_adapters(session.params)
    np.testing.assert_array_equal(logits(session, 1), base)
    session.params = engine.put_adapter(session.params, 1, first)
    np.testing.assert_array_equal(logits(session, 1), with_first)


@pytest.mark.slow
def test_a_step_and_the_piece_that_it_carries_have_their_own_adapters():
    engine, params = engine_of(slots=2, cache_tokens=256)
    engine = twin(engine, shapes=replace(engine.shapes, platform="tpu"))
    for index in (1, 2):
        params = engine.put_adapter(params, index, random_adapter(engine, index))
    alone, carrying = Session(engine, params), Session(engine, params)
    for session in (alone, carrying):
        session.adapter = 1
        session.start(0, PROMPT)
    piece = Piece(token_T=np.array(PROMPT, np.int32), start=0, page_J=carrying.page_BJ[1], adapter=2)
    expected = np.asarray(engine.prefill(params, carrying.state, [piece]).logits_NV)
    assert np.abs(expected - logits(Session(engine, params), 1)).max() > 0.1
    for _ in range(3):
        token_BW = np.asarray(alone.step().token_BW)
        carrying.state, result, prefix = engine.carry(
            params, carrying.state, np.array([0], np.int32), carrying.page_BJ[:1], [piece]
        )
        np.testing.assert_allclose(np.asarray(prefix.logits_NV), expected, atol=1e-4)
        assert np.asarray(result.token_BW)[0] == token_BW[0]


def test_an_engine_without_adapters_has_nothing_of_them():
    engine, params = engine_of(max_adapters=0)
    assert "adapters" not in params
    assert engine.init_decode_state().adapter_B is None
    assert adapted(engine.model.layers[0]) == []
    with pytest.raises(RefusedError, match="there are no adapters; serve with --max-adapters N"):
        engine.read_adapter("x")
