"""The way to a server: a channel with TLS and a token, or without.

The command line reads its flags here: hence the late imports of gRPC.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ...engine_impl.errors import RefusedError

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True, kw_only=True)
class ChannelConfig:
    """How the server is reached. By default in the clear, as `slipstream serve` listens."""

    tls: bool = False
    """Encrypt; the server's certificate is checked against the usual authorities."""

    tls_ca: Path | None = None
    """Encrypt, and check the server's certificate against this authority instead (a PEM file)."""

    tls_cert: Annotated[Path | None, tyro.conf.arg(name="tls-client-cert")] = None
    """Our own certificate, for a server with --tls-client-ca (a PEM file)."""

    tls_key: Annotated[Path | None, tyro.conf.arg(name="tls-client-key")] = None
    """Its private key (a PEM file)."""

    token_file: Path | None = None
    """A file with the token that the server knows us by; its first line."""

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise RefusedError("our own certificate takes both --tls-client-cert and --tls-client-key")
        if self.tls_cert is not None and not self.is_encrypted:
            raise RefusedError("--tls-client-cert is for TLS: add --tls or --tls-ca")

    @property
    def is_encrypted(self) -> bool:
        return self.tls or self.tls_ca is not None


PLAIN = ChannelConfig()
DEFAULT_TARGET = "localhost:9000"
"""Where `slipstream serve` listens unless told otherwise."""


def channel(target: str, config: ChannelConfig = PLAIN) -> "grpc.Channel":
    """Raises RefusedError for files that cannot be used."""
    import grpc

    credentials = _credentials(config)
    return grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target)


def aio_channel(target: str, config: ChannelConfig = PLAIN) -> "grpc.aio.Channel":
    """The same for asyncio."""
    import grpc

    credentials = _credentials(config)
    return grpc.aio.secure_channel(target, credentials) if credentials else grpc.aio.insecure_channel(target)


def metadata(config: ChannelConfig = PLAIN) -> tuple[tuple[str, str], ...]:
    """What every call brings along: the token, if there is one. Raises RefusedError for a file without one."""
    content = _read("token_file", config.token_file)
    if content is None:
        return ()
    token = content.decode(errors="replace").partition("\n")[0].strip()
    if not (token and token.isascii() and token.isprintable()):
        raise RefusedError(f"token_file={config.token_file} must begin with a line of printable ASCII, the token")
    return (("authorization", f"Bearer {token}"),)


def _credentials(config: ChannelConfig) -> "grpc.ChannelCredentials | None":
    import grpc

    if not config.is_encrypted:
        return None
    return grpc.ssl_channel_credentials(
        root_certificates=_read("tls_ca", config.tls_ca),
        private_key=_read("tls_client_key", config.tls_key),
        certificate_chain=_read("tls_client_cert", config.tls_cert),
    )


def _read(name: str, path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise RefusedError(f"{name}={path} cannot be read: {error.strerror}") from error
