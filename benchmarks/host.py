"""What the host costs a decode step: a model of no size behind the real orchestrator, so that what remains is dispatch,
read-back and delivery.
"""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..engine_impl.config import EngineConfig
from ..engine_impl.engine import Engine
from ..engine_impl.loading import build_engine
from ..engine_impl.models.llama import LlamaConfig
from ..engine_impl.sampling.params import SamplingParams
from ..server.request.events import Event
from ..server.request.request import Request
from ..server.scheduler.orchestrator import Orchestrator
from .baselines.steppers import EngineStepper
from .measure.models import RandomCheckpoint
from .options.flags import PlatformName

TINY = LlamaConfig(
    num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, model_dim=32, ffn_dim=32, vocab_size=128,
    rope_theta=10000.0, rms_norm_eps=1e-5, tied_embeddings=True, context_length=4096,
)  # fmt: skip
HOST_STEPS = 64
"""Steps that are counted while all slots are live."""


class HostBench:
    """A tiny engine with so many slots."""

    def __init__(self, slots: int, platform: PlatformName) -> None:
        self._slots = slots
        # A turn admits one request and then steps: the first answer is `slots` tokens long when the last one begins.
        self._tokens = slots + HOST_STEPS + 2
        length = -(-(self._tokens + 2) // 128) * 128
        config = EngineConfig(
            slots=slots, cache_length=length, cache_tokens=slots * length, platform=platform, tensor_parallel=1
        )
        checkpoint = Textless(TINY, "tiny")
        self._engine = build_engine(config, checkpoint)
        self._params = self._engine.parameters.load(checkpoint)
        self._bare = EngineStepper(self._engine, self._params)
        self._bare.fill([])

    def bare_ms(self) -> float:
        """The median step of the engine alone."""
        self._bare.set_length(self._slots)
        return float(np.median(self._bare.block(HOST_STEPS).step_ms))

    def served_ms(self) -> float:
        """The median gap between an answer's tokens behind the orchestrator, all slots live."""
        return host_ms(self._engine, self._params, self._slots, self._tokens)


class Textless(RandomCheckpoint):
    """Random weights, and a tokenizer whose texts are empty."""

    def tokenizer(self) -> Any:
        return NoText()


class NoText:
    """A tokenizer, and its streams, of a model without text."""

    stop_ids = frozenset()

    def stream(self, shown: Any = ()) -> "NoText":
        return self

    def feed(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def host_ms(engine: Engine, params: Any, slots: int, tokens: int) -> float:
    """The median gap between the tokens of the request that began last: all others are under way by then."""
    times: dict[int, list[float]] = {number: [] for number in range(slots)}
    orchestrator = Orchestrator(engine, params, max_queued=slots, warm_up=False)
    ends = SimpleNamespace(left=slots)

    def deliver(number: int, event: Event) -> None:
        times[number].append(time.perf_counter())
        ends.left -= event.is_last

    orchestrator.start()
    try:
        for number in range(slots):
            orchestrator.submit(
                Request(
                    prompt_ids=[1],
                    max_tokens=tokens,
                    sampling=SamplingParams(),
                    deliver=lambda event, number=number: deliver(number, event),
                )
            )
        while ends.left:
            time.sleep(0.01)
    finally:
        orchestrator.close()
    last = max(times.values(), key=lambda of_one: of_one[0])
    # The first answer ends `slots` steps before this one, a prefill apart: only what came before that counts.
    return float(np.median(np.diff(last)[:HOST_STEPS]) * 1000)
