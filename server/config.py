"""How a server is run: frozen dataclasses, checked once. Imports nothing heavy, the command line reads them first.

A flag's name has no unit where its help tells it: `--grace 30` is the field grace_s.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..engine_impl.errors import RefusedError
from .address import Address, check_port, is_local, join_address


def flag(name: str) -> object:
    """Another name on the command line."""
    return tyro.conf.arg(name=name)


@dataclass(frozen=True, kw_only=True)
class SecurityConfig:
    """Who may ask, and how much one caller may take. By default everybody who reaches the port, in the clear."""

    tls_cert: Path | None = None
    """The server's certificate chain (a PEM file): every connection is encrypted. Files that change are read again."""

    tls_key: Path | None = None
    """The certificate's private key (a PEM file)."""

    tls_client_ca: Path | None = None
    """Mutual TLS: only clients with a certificate of this authority are let in (a PEM file)."""

    auth_token_file: Path | None = None
    """A file of tokens, one a line; requests must bring one as `authorization: Bearer TOKEN`, or are UNAUTHENTICATED.
    Health checks need none. The file is read again when it changes."""

    admin_token_file: Path | None = None
    """A file of tokens, one a line, likewise: who brings one may load and unload adapters. Default: whoever asks from
    this machine, if no other can reach the server."""

    max_streams_per_client: int | None = None
    """Answers that one client may have under way (requests); beyond it RESOURCE_EXHAUSTED. A client is a token, or
    without tokens a network address. Default: no limit."""

    max_message_bytes: int = 4 << 20
    """Largest message that is read (bytes)."""

    allow_origin: tuple[str, ...] = ()
    """Web pages that may use the HTTP port from a browser (SCHEME://HOST[:PORT], several with blanks between). Default:
    those of the server's own address."""

    behind_proxy: bool = False
    """Other machines' requests come through a proxy on this machine (nginx, Ray Serve): nobody counts as this machine,
    and the last address of `x-forwarded-for` on a local connection is the client's, which the proxy must set."""

    isolate_prefixes: bool = True
    """Callers with different tokens share no cached prefixes, so that timing tells no tenant what another asked.
    --no-isolate-prefixes lets all tokens share them. Without --auth-token-file everybody does."""

    def __post_init__(self) -> None:
        for origin in self.allow_origin:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin, re.IGNORECASE):
                raise RefusedError(f"allow_origin={origin!r} must be SCHEME://HOST or SCHEME://HOST:PORT")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise RefusedError("TLS takes both --tls-cert and --tls-key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise RefusedError("--tls-client-ca asks clients for certificates over TLS: add --tls-cert and --tls-key")
        for name in ("max_streams_per_client", "max_message_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RefusedError(f"{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What the server tells of itself."""

    metrics_port: int | None = None
    """HTTP port of /metrics (Prometheus), /healthz and /readyz, on the same host (TCP); 0 takes a free
    one. Default: none."""

    log_format: Literal["text", "json"] = "text"
    """The log on stderr: lines to read, or one JSON object a line. A request's end is one line."""

    log_prompts: bool = False
    """Log what is asked, too: text that users may think private."""

    profile: Path | None = None
    """Trace the first requests with JAX's profiler into this folder (for XProf or Perfetto), and again at every
    SIGUSR1."""

    profile_s: Annotated[float, flag("profile-seconds")] = 10.0
    """How long a trace lasts (seconds)."""

    otlp_endpoint: str | None = None
    """Send each request's spans to this OpenTelemetry collector (http://HOST:4317, gRPC). A W3C traceparent from the
    caller is taken up. Default: none."""

    def __post_init__(self) -> None:
        if self.metrics_port is not None:
            check_port("metrics_port", self.metrics_port)
        if not (math.isfinite(self.profile_s) and self.profile_s > 0):
            raise RefusedError(f"profile_seconds={self.profile_s} must be a positive number of seconds")


AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How the answers of chats are read."""

    tool_format: Literal["auto", "hermes", "llama", "mistral", "gemma", "harmony"] = AUTO
    """How the model writes calls of tools. auto: as its chat template does, or in Hermes' form where that knows none or
    writes them otherwise."""

    reasoning_format: Literal["auto", "none"] = AUTO
    """auto: what a reasoning model thinks aloud is told apart from its answer, as reasoning_content. none: it stays in
    the answer's text."""


@dataclass(frozen=True, kw_only=True)
class AdaptersConfig:
    """LoRA adapters that requests may name; --max-adapters of them are on the devices at once, the others wait."""

    adapters: tuple[str, ...] = ()
    """Adapters that are loaded when the server starts (NAME=PATH, several with blanks between): folders as PEFT writes
    them, or hub ids."""

    adapter_dir: Path | None = None
    """A folder below which callers may load adapters from while the server runs. Default: they may load none."""

    max_host_adapters: int = 64
    """Adapters in the host's memory, those on the devices among them (adapters); who loads one more has to unload one.
    """

    def __post_init__(self) -> None:
        names = list(self.named)
        if len(names) < len(self.adapters):
            raise RefusedError(f"adapters has a name twice, of {', '.join(names)}; give each a name of its own")
        if self.max_host_adapters < max(1, len(names)):
            raise RefusedError(
                f"max_host_adapters={self.max_host_adapters} must be at least {max(1, len(names))}: those of --adapters"
            )

    @property
    def named(self) -> dict[str, str]:
        """{name: path}. Raises RefusedError."""
        named: dict[str, str] = {}
        for entry in self.adapters:
            name, _, path = entry.partition("=")
            if not (name and path):
                raise RefusedError(f"adapters={entry!r} must be NAME=PATH")
            named[name] = path
        return named

    @property
    def asks_for_some(self) -> bool:
        return bool(self.adapters) or self.adapter_dir is not None


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens, how much it lets wait, how it stops."""

    host: str = "127.0.0.1"
    """Address to listen on (name or IP). 0.0.0.0 accepts other machines: see --tls-cert and --auth-token-file."""

    port: int = 9000
    """gRPC port (TCP); 0 takes a free one and prints it."""

    http_port: int | None = None
    """Port of OpenAI's HTTP endpoints, /v1/chat/completions and others (TCP); 0 takes a free one and logs it. Default:
    none."""

    listen: tuple[str, ...] = ()
    """More addresses for gRPC (HOST:PORT, [IPV6]:PORT, or unix:PATH for a Unix domain socket; several with blanks
    between)."""

    http_listen: tuple[str, ...] = ()
    """More addresses for HTTP, likewise, with or without --http-port."""

    web: bool = False
    """Serve the page to try the model, at / of the HTTP port, to other machines, too. A server that only this machine
    reaches always has it."""

    served_model_name: tuple[str, ...] = ()
    """What HTTP clients may call the model; answers have the first one. Default: what --model says."""

    max_queued: int = 256
    """Requests that may wait, those not counted that the free slots will take (requests); beyond it they get
    RESOURCE_EXHAUSTED."""

    max_queued_tokens: int | None = None
    """Prompt tokens of all requests that wait (tokens); beyond it RESOURCE_EXHAUSTED. Default: no limit."""

    prefix_cache: bool = True
    """A prompt is computed from where its longest cached prefix ends. --no-prefix-cache computes all of it: to measure
    without."""

    grace_s: Annotated[float, flag("grace")] = 30.0
    """Time that running requests get to finish after the first SIGTERM or Ctrl-C (seconds). A second one ends it."""

    orchestrator: Literal["slipstream", "jetstream"] = "slipstream"
    """Who schedules requests: we, or JetStream's own Driver and gRPC server (google-jetstream 0.2.2) on our engine."""

    prefill_devices: int | None = None
    """The first so many devices compute prompts alone, and the others decode meanwhile (devices): no step waits for a
    prompt. Both sides hold the weights, and a cache of the same tokens. Default: all devices do both."""

    probe_interval_s: Annotated[float, flag("probe-interval")] = 5.0
    """How often the device is asked for a real step (seconds). The server is NOT_SERVING while it does not answer. 0:
    never."""

    probe_timeout_s: Annotated[float, flag("probe-timeout")] = 30.0
    """How long that may take (seconds); more than a step and a chunk of a prompt (--prefill-chunk) take."""

    step_timeout_s: Annotated[float, flag("step-timeout")] = 120.0
    """How long a step, with the pieces of prompts around it, may take (seconds). A device that takes longer is given
    up: requests end with UNAVAILABLE, the process with status 1. 0: never."""

    lora: AdaptersConfig = field(default_factory=AdaptersConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        if self.prefill_devices is not None and self.prefill_devices < 1:
            raise RefusedError(f"prefill_devices={self.prefill_devices} must be at least 1, or left out")
        if not self.host:
            raise RefusedError("host='' must be a name or an IP address; 127.0.0.1 is this machine only")
        check_port("port", self.port)
        if self.http_port is not None:
            check_port("http_port", self.http_port)
        if self.port and self.port == self.watch.metrics_port:
            raise RefusedError(f"metrics_port={self.port} is the gRPC port already; choose another --metrics-port")
        if self.http_port and self.http_port in (self.port, self.watch.metrics_port):
            other = "gRPC" if self.http_port == self.port else "metrics"
            raise RefusedError(f"http_port={self.http_port} is the {other} port already; choose another --http-port")
        more = [str(address) for address in (*self.more_grpc, *self.more_http)]
        if twice := [address for address in more if more.count(address) > 1 and not address.endswith(":0")]:
            raise RefusedError(f"{twice[0]!r} is listened on twice; name it once in --listen and --http-listen")
        if self.web and not self.has_http:
            raise RefusedError("--web is a page of the HTTP port: add --http-port")
        if not all(self.served_model_name):
            raise RefusedError("served_model_name='' must be a name; leave it out for what --model says")
        if self.max_queued < 1:
            raise RefusedError(f"max_queued={self.max_queued} must be at least 1: every request passes the queue")
        if self.max_queued_tokens is not None and self.max_queued_tokens < 1:
            raise RefusedError(
                f"max_queued_tokens={self.max_queued_tokens} must be at least 1: every prompt has a token"
            )
        if not (math.isfinite(self.grace_s) and self.grace_s >= 0):
            raise RefusedError(f"grace={self.grace_s} must be 0 (stop at once) or a positive number of seconds")
        if not (math.isfinite(self.probe_interval_s) and self.probe_interval_s >= 0):
            raise RefusedError(
                f"probe_interval={self.probe_interval_s} must be 0 (never) or a positive number of seconds"
            )
        if not (math.isfinite(self.probe_timeout_s) and self.probe_timeout_s > 0):
            raise RefusedError(f"probe_timeout={self.probe_timeout_s} must be a positive number of seconds")
        if not (math.isfinite(self.step_timeout_s) and self.step_timeout_s >= 0):
            raise RefusedError(f"step_timeout={self.step_timeout_s} must be 0 (never) or a positive number of seconds")

    def check_adapters(self, places: int) -> None:
        """Raises RefusedError for what takes other places on the devices than the engine has (--max-adapters)."""
        if self.lora.asks_for_some and not places:
            raise RefusedError("--adapters and --adapter-dir need room on the devices: add --max-adapters N")
        if places and self.orchestrator == "jetstream":
            raise RefusedError("JetStream's orchestrator knows no adapters: leave --max-adapters out")

    @property
    def address(self) -> str:
        """host:port, an IPv6 host in brackets."""
        return join_address(self.host, self.port)

    @property
    def hosts(self) -> list[str]:
        """Names and IPs that HTTP is served on."""
        return [self.host, *(address.host for address in self.more_http)]

    @property
    def is_local(self) -> bool:
        """Whether nobody but this machine asks."""
        return self.listens_locally and not self.security.behind_proxy

    @property
    def listens_locally(self) -> bool:
        """Whether only this machine can connect."""
        return is_local(self.host) and all(other.is_local for other in (*self.more_grpc, *self.more_http))

    @property
    def has_http(self) -> bool:
        """Whether OpenAI's endpoints are served."""
        return self.http_port is not None or bool(self.http_listen)

    @property
    def has_page(self) -> bool:
        """Whether / is the page to try the model."""
        return self.has_http and (self.web or self.is_local)

    @property
    def more_grpc(self) -> list[Address]:
        """Beside `address`."""
        return [Address.parse("listen", text) for text in self.listen]

    @property
    def more_http(self) -> list[Address]:
        """Beside http_port."""
        return [Address.parse("http_listen", text) for text in self.http_listen]
