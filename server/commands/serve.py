"""slipstream serve"""

import asyncio
import logging
import sys
from dataclasses import dataclass

from ...engine_impl.config import EngineConfig
from ..config import ServerConfig


@dataclass(frozen=True)
class Serve:
    """Serve a model over gRPC until SIGTERM or Ctrl-C."""

    engine: EngineConfig
    server: ServerConfig

    def run(self) -> int:
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s")
        logging.getLogger("slipstream").setLevel(logging.INFO)
        if self.server.orchestrator == "jetstream":
            from ..jetstream_host import host

            return asyncio.run(host(self.engine, self.server))
        from ..lifecycle import serve

        return asyncio.run(serve(self._load, self.server))

    def _load(self):
        from ...engine_impl.loading import load_engine

        return load_engine(self.engine)
