"""Who may ask: TLS, bearer tokens, and how many answers one client may have under way. Health checks stay open."""

import hmac
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from ..engine_impl.errors import RefusedError
from .config import SecurityConfig, ServerConfig

log = logging.getLogger(__name__)

OPEN_METHODS = ("/grpc.health.v1.Health/", "/jetstream_proto.Orchestrator/HealthCheck")
"""Path prefixes that need no token: whoever watches the server has none, and learns nothing but that it lives."""

AUTHORIZATION, BEARER = "authorization", "bearer"

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class WatchedFiles:
    """Files that are read again when one of them has changed. A stat() each costs microseconds."""

    def __init__(self, *paths: Path | None) -> None:
        self._paths = [path for path in paths if path is not None]
        self._seen = self._stamps()

    def have_changed(self) -> bool:
        """Since the last time that this was asked."""
        before, self._seen = self._seen, self._stamps()
        return self._seen != before

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [stamp(path) for path in self._paths]


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None while it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


class Tokens:
    """The tokens of a file, one a line."""

    def __init__(self, path: Path) -> None:
        """Raises RefusedError for a file that cannot be read or holds no token."""
        self._path, self._file = path, WatchedFiles(path)
        self._tokens = read_tokens(path)

    def number_of(self, token: str) -> int | None:
        """Which of the tokens it is; None of none. Takes as long for a wrong one as for a right one."""
        if self._file.have_changed():
            self._read_again()
        sent = token.encode()
        matches = [hmac.compare_digest(sent, known) for known in self._tokens]
        return matches.index(True) if any(matches) else None

    def _read_again(self) -> None:
        """A damaged file must not lock everybody out, nor let everybody in: then the old tokens stay."""
        try:
            self._tokens = read_tokens(self._path)
        except RefusedError as error:
            log.error("the old tokens stay: %s", error)
        else:
            log.info("read %d tokens from %s", len(self._tokens), self._path)


def read_tokens(path: Path) -> list[bytes]:
    """Blank lines and blanks around a token are left out. Raises RefusedError."""
    tokens = [line.strip() for line in read_bytes("auth_token_file", path).splitlines() if line.strip()]
    if not tokens:
        raise RefusedError(f"auth_token_file={path} holds no token; write one a line")
    if not all(token.isascii() and token.decode().isprintable() for token in tokens):
        raise RefusedError(f"auth_token_file={path} must hold printable ASCII: gRPC carries nothing else")
    return tokens


def read_bytes(name: str, path: Path) -> bytes:
    """Raises RefusedError naming the flag."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RefusedError(f"{name}={path} cannot be read: {error.strerror}") from error


class TokenCheck(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED to requests without a known token."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(OPEN_METHODS):
            return handler
        if token_number(self._tokens, handler_call_details.invocation_metadata) is not None:
            return handler
        return refusing(
            handler, grpc.StatusCode.UNAUTHENTICATED, "send `authorization: Bearer TOKEN` with a known token"
        )


def token_number(tokens: Tokens, metadata: Any) -> int | None:
    """Which token the call brought; None of none that is known."""
    for key, value in metadata or ():
        if key == AUTHORIZATION and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == BEARER:
                return tokens.number_of(token.strip())
    return None


def refusing(handler: Any, code: grpc.StatusCode, details: str) -> Any:
    """A handler of the same kind that only refuses."""

    async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, details)

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(refuse, handler.request_deserializer, handler.response_serializer)


class StreamLimit(grpc.aio.ServerInterceptor):
    """Answers RESOURCE_EXHAUSTED to a client that has `limit` answers under way. All in the event loop's thread."""

    def __init__(self, limit: int, tokens: Tokens | None) -> None:
        """`tokens` tell clients apart where there are any, else addresses do."""
        self._limit, self._tokens = limit, tokens
        self._streams: Counter[str] = Counter()

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler.unary_stream or handler_call_details.method.startswith(OPEN_METHODS):
            return handler

        async def limited(request: Any, context: grpc.aio.ServicerContext) -> None:
            client = self._client(context)
            if self._streams[client] >= self._limit:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{self._streams[client]} answers are under way for this client and "
                    f"max_streams_per_client={self._limit}; wait for one to end",
                )
            self._streams[client] += 1
            try:
                await handler.unary_stream(request, context)
            finally:
                self._streams[client] -= 1
                if not self._streams[client]:
                    del self._streams[client]

        return grpc.unary_stream_rpc_method_handler(limited, handler.request_deserializer, handler.response_serializer)

    def _client(self, context: grpc.aio.ServicerContext) -> str:
        if self._tokens is not None:
            return f"token {token_number(self._tokens, context.invocation_metadata())}"
        return context.peer().rpartition(":")[0]  # without the port: "ipv4:192.0.2.1"


def interceptors(config: SecurityConfig) -> list[grpc.aio.ServerInterceptor]:
    """In the order in which they are asked. Raises RefusedError for a token file that cannot be used."""
    tokens = Tokens(config.auth_token_file) if config.auth_token_file is not None else None
    chain: list[grpc.aio.ServerInterceptor] = []
    if tokens is not None:
        chain.append(TokenCheck(tokens))
    if config.max_streams_per_client is not None:
        chain.append(StreamLimit(config.max_streams_per_client, tokens))
    return chain


def credentials(config: SecurityConfig) -> grpc.ServerCredentials | None:
    """For the server's port; None without TLS. Raises RefusedError for files that cannot be used."""
    if config.tls_cert is None:
        return None
    files = WatchedFiles(config.tls_cert, config.tls_key, config.tls_client_ca)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks before every handshake; None: no change."""
        if not files.have_changed():
            return None
        try:
            return certificates(config)
        except RefusedError as error:
            log.error("the old certificate stays: %s", error)
            return None

    return grpc.dynamic_ssl_server_credentials(
        certificates(config),
        renewed,  # pyright: ignore[reportArgumentType]  # None is allowed, the stubs do not know
        require_client_authentication=config.tls_client_ca is not None,
    )


def certificates(config: SecurityConfig) -> grpc.ServerCertificateConfiguration:
    """Raises RefusedError for files that cannot be read or do not belong together."""
    assert config.tls_cert is not None
    assert config.tls_key is not None
    check_pair(config.tls_cert, config.tls_key)
    pair = read_bytes("tls_key", config.tls_key), read_bytes("tls_cert", config.tls_cert)
    roots = None if config.tls_client_ca is None else read_bytes("tls_client_ca", config.tls_client_ca)
    return grpc.ssl_server_certificate_configuration([pair], roots)


def check_pair(cert: Path, key: Path) -> None:
    """gRPC itself would only log in its core and refuse every handshake. Raises RefusedError."""
    import ssl

    read_bytes("tls_cert", cert)
    read_bytes("tls_key", key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except (ssl.SSLError, OSError) as error:
        raise RefusedError(
            f"tls_cert={cert} and tls_key={key} are no certificate and its key, in PEM without a password: {error}"
        ) from error


def warn_if_open(config: ServerConfig) -> None:
    """Logs what a server that other machines reach lacks."""
    if config.is_local:
        return
    security = config.security
    if security.auth_token_file is None and security.tls_client_ca is None:
        log.warning("%s: whoever reaches this port may ask; see --auth-token-file and --tls-client-ca", config.address)
    if security.tls_cert is None:
        log.warning("%s: requests and answers travel unencrypted; see --tls-cert", config.address)
