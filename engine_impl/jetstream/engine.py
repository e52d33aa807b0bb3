"""Our engine as JetStream's: a subclass of its `Engine`, for its orchestrator and its configs.

    engine_create_fn = functools.partial(create_engine, config=EngineConfig(...))    # in a config_lib.ServerConfig

There are two JetStreams, google-jetstream 0.2.2 (wheel.py) and the last source (last_source.py). Which one is installed
tell the members of its `Engine`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..config import EngineConfig
from ..errors import RefusedError
from ..loading import load_engine
from . import compat as jetstream_compat
from .adapter import LONGEST_PREFILL
from .last_source import LastSourceAdapter
from .wheel import WheelAdapter

with jetstream_compat.importing():
    from jetstream.core import orchestrator
    from jetstream.engine import engine_api, token_utils

jetstream_compat.delete_prefixes(orchestrator)  # here, so that every Driver that gets this engine is mended
jetstream_compat.join_bytes(token_utils)
jetstream_compat.pad_lists(token_utils)


def engine_class(api: Any) -> Any:
    """Our engine as a subclass of `api.Engine`; `api` is a `jetstream.engine.engine_api`.

    Raises RefusedError for one that is neither 0.2.2's nor the last source's.
    """
    adapter = LastSourceAdapter if jetstream_compat.is_last_source(api) else WheelAdapter
    members = {"__doc__": "Ours as JetStream's.", "__module__": __name__, "api": api}
    made = type("JetStreamEngine", (adapter, api.Engine), members)
    if missing := sorted(made.__abstractmethods__):
        raise RefusedError(
            f"JetStream's Engine has members that are unknown here: {', '.join(missing)}; "
            f"0.2.2 has none: {jetstream_compat.INSTALL}"
        )
    return made


JetStreamEngine = engine_class(engine_api)
"""JetStreamEngine(engine, params): of the JetStream that is installed."""


def create_engine(devices: Sequence[Any], config: EngineConfig) -> Any:
    """Load and compile the JetStreamEngine that `config` describes, on these devices, with fewer slots than its default
    where the cache holds no more.

    Raises RefusedError as `load_engine` does, and for a `prefill_chunk`.
    """
    if config.prefill_chunk is not None:
        raise RefusedError("under JetStream a prompt is computed in one piece; leave --prefill-chunk out")
    config = replace(config, prefill_chunk=LONGEST_PREFILL)
    engine = JetStreamEngine(*load_engine(config, devices, reserves=True))
    engine.warm_up()
    return engine
