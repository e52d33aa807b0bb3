"""slipstream serve"""

import asyncio
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from ..engine_impl.config import EngineConfig
from ..server.config import ServerConfig


@dataclass(frozen=True)
class Serve:
    """Serve a model over gRPC, and over OpenAI's HTTP if asked to, until SIGTERM or Ctrl-C."""

    engine: EngineConfig
    server: ServerConfig
    config: Path | None = None
    """A YAML file of flags (`slots: 64`, a line for each, their names without dashes). Flags given here win over it."""

    def __post_init__(self) -> None:
        self.server.check_adapters(self.engine.max_adapters)

    def run(self) -> int:
        # gRPC's core has a line on stderr for every handshake that fails, such as those of port scanners.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # until the server says what they mean
        from ..server.observe import logs
        from ..server.observe.status import StatusLine

        watch = self.server.watch
        line = StatusLine() if watch.log_format == "text" else None
        logs.configure(watch.log_format, prompts=watch.log_prompts, line=line)
        logs.take_over_stderr()
        if self.server.orchestrator == "jetstream":
            from ..server.jetstream.host import host

            return asyncio.run(host(self.engine, self.server))
        from ..server.lifecycle import serve

        return asyncio.run(serve(self._load, self.server, line))

    def _load(self):
        from ..engine_impl.loading import load_engine

        return load_engine(self.engine)
