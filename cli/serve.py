"""slipstream serve"""

import asyncio
import os
import signal
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine_impl.config import EngineConfig
from ..engine_impl.errors import RefusedError
from ..engine_impl.hosts import HostsConfig, Place
from ..engine_impl.runtime import allocator
from ..engine_impl.runtime.platforms import platform_of
from ..server.config import ServerConfig
from ..server.errors import UnavailableError
from .telling import BAD_INPUT, FAILED, tell

if TYPE_CHECKING:
    from ..server.observe.status import StatusLine


@dataclass(frozen=True)
class Serve:
    """Serve a model over gRPC, and over OpenAI's HTTP if asked to, until SIGTERM or Ctrl-C."""

    engine: EngineConfig
    server: ServerConfig
    hosts: HostsConfig = field(default_factory=HostsConfig)
    config: Path | None = None
    """A YAML file of flags (`slots: 64`, a line for each, their names without dashes). Flags given here win over it."""

    def __post_init__(self) -> None:
        self.server.check_adapters(self.engine.max_adapters)
        if self.hosts != HostsConfig() and self.server.orchestrator == "jetstream":
            raise RefusedError("JetStream's orchestrator serves from one host: leave --hosts and --coordinator out")
        if self.hosts != HostsConfig() and self.server.prefill_devices is not None:
            raise RefusedError("--prefill-devices shares the devices of one host: leave it, or --hosts, out")

    def run(self) -> int:
        if platform_of(self.engine.platform) == "cpu":
            allocator.keep_freed()  # before any thread begins, the log's too
        place = self.hosts.place(os.environ)
        # gRPC's core has a line on stderr for every handshake that fails, such as those of port scanners.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # until the server says what they mean
        from ..server.observe import logs, standard_files
        from ..server.observe.status import StatusLine

        standard_files.take_over()
        watch = self.server.watch
        line = StatusLine() if watch.log_format == "text" else None
        logs.configure(watch.log_format, prompts=watch.log_prompts, line=line)
        if place is not None:
            return self._in_group(place, line)
        if self.server.orchestrator == "jetstream":
            from ..server.jetstream.host import host

            return asyncio.run(host(self.engine, self.server))
        from ..server.serve import serve

        return asyncio.run(serve(self._load, self.server, line))

    def _in_group(self, place: Place, line: "StatusLine | None") -> int:
        from ..engine_impl.distributed.group import FollowingGroup, LeadingGroup
        from ..server.following import follow
        from ..server.process import leave_at_once
        from ..server.serve import serve

        timeout_s = self.server.step_timeout_s
        try:
            if not place.is_leader:
                return follow(FollowingGroup(place, self.engine, timeout_s), self.server)
            group = LeadingGroup(place, self.engine, timeout_s)
            return asyncio.run(serve(group.load, self.server, line, group))
        except RefusedError as error:
            status = tell(error, BAD_INPUT)
        except UnavailableError as error:
            status = tell(error, FAILED)
        except Exception:
            traceback.print_exc()
            status = FAILED
        leave_at_once(status)  # Python's own end would wait for the other hosts
        return status

    def _load(self):
        from ..engine_impl import loading

        apart = self.server.prefill_devices
        return loading.load_engine(self.engine) if apart is None else loading.load_disaggregated(self.engine, apart)
