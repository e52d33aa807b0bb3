"""TLS for both doors, from the same files: renewed ones serve the next connection, damaged ones leave the old."""

import logging
import ssl
import time
from pathlib import Path

import grpc

from ...engine_impl.errors import RefusedError
from ..config import SecurityConfig
from .security import WatchedFiles, read_bytes

log = logging.getLogger(__name__)


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
    warn_if_expired(config.tls_cert)
    load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), config.tls_cert, config.tls_key)  # to check it
    pair = read_bytes("tls_key", config.tls_key), read_bytes("tls_cert", config.tls_cert)
    roots = None if config.tls_client_ca is None else read_bytes("tls_client_ca", config.tls_client_ca)
    return grpc.ssl_server_certificate_configuration([pair], roots)


def context(config: SecurityConfig) -> ssl.SSLContext | None:
    """The same for asyncio's sockets: no client's certificate, no handshake. Raises RefusedError likewise."""
    if config.tls_cert is None:
        return None
    files = WatchedFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
    first = newest = one_context(config)

    def renew(connection: ssl.SSLObject, server_name: str | None, used: ssl.SSLContext) -> None:
        """Called in every handshake, whether or not the client names a server."""
        nonlocal newest
        if files.have_changed():
            try:
                newest = one_context(config)
            except RefusedError as error:
                log.error("the old certificate stays: %s", error)
        connection.context = newest

    first.sni_callback = renew  # pyright: ignore[reportAttributeAccessIssue]  # the stubs know sockets only
    return first


class Renewal:
    """Tells of files that have changed, for whoever holds a context: with a new one the sessions and tickets of the old
    end, by which a client comes back without its certificate being looked at."""

    def __init__(self, config: SecurityConfig) -> None:
        self._config = config
        self._files = WatchedFiles(config.tls_cert, config.tls_key, config.tls_client_ca)

    def renewed(self) -> ssl.SSLContext | None:
        """A new context, once after each change that can be used; damaged files are told elsewhere."""
        if not self._files.have_changed():
            return None
        try:
            return context(self._config)
        except RefusedError:
            return None


def one_context(config: SecurityConfig) -> ssl.SSLContext:
    """Of the files as they are now. Raises RefusedError."""
    assert config.tls_cert is not None
    assert config.tls_key is not None
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    made.set_alpn_protocols(["http/1.1"])
    load_pair(made, config.tls_cert, config.tls_key)
    if config.tls_client_ca is not None:
        made.verify_mode = ssl.CERT_REQUIRED
        try:
            made.load_verify_locations(cadata=read_bytes("tls_client_ca", config.tls_client_ca).decode())
        except (ssl.SSLError, ValueError) as error:
            raise RefusedError(f"tls_client_ca={config.tls_client_ca} is no certificate in PEM: {error}") from error
    return made


def load_pair(into: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Raises RefusedError; gRPC itself would only log in its core and refuse every handshake."""
    read_bytes("tls_cert", cert)
    read_bytes("tls_key", key)
    try:
        into.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, OSError) as error:
        raise RefusedError(
            f"tls_cert={cert} and tls_key={key} are no certificate and its key, in PEM without a password: {error}"
        ) from error


def warn_if_expired(cert: Path) -> None:
    """Logs the date of a certificate that clients will refuse."""
    try:
        fields = ssl._ssl._test_decode_cert(str(cert))  # pyright: ignore[reportAttributeAccessIssue]  # no public way
        expired = ssl.cert_time_to_seconds(fields["notAfter"]) < time.time()
    except (AttributeError, KeyError, ValueError, OSError):
        return  # it is looked at elsewhere
    if expired:
        log.warning("tls_cert=%s has expired on %s: clients will refuse it; renew it", cert, fields["notAfter"])
