"""The HTTP server behind TLS."""

import asyncio
import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import trustme
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.config import SecurityConfig, ServerConfig
from slipstream.server.lifecycle import Serving
from slipstream.server.net import ports, tls
from slipstream.server.net.security import read_tokens

from tests.server.calls import WAIT_S
from tests.server.http.serving import serving

A: dict[str, Any] = {"model": "fake", "prompt": "a", "max_tokens": 3}


def issue(authority: trustme.CA, folder: Path) -> None:
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert")


@pytest.fixture
def authority(tmp_path) -> trustme.CA:
    """With a server's certificate and key in the test's folder."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca")
    issue(authority, tmp_path)
    return authority


def trusting(authority: trustme.CA, client: trustme.LeafCert | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if client is not None:
        client.configure_cert(context)
    return context


async def health(server, context) -> int:
    connector = aiohttp.TCPConnector(ssl=context)
    session = aiohttp.ClientSession(connector=connector)
    async with session, session.get(f"https://{server.http_address}/health") as answer:
        return answer.status


def test_tls_with_a_token(authority, tmp_path):
    async def scenario():
        (tmp_path / "tokens").write_text("alpha")
        security = SecurityConfig(
            tls_cert=tmp_path / "cert", tls_key=tmp_path / "key", auth_token_file=tmp_path / "tokens"
        )
        http = openai.DefaultAsyncHttpxClient(verify=trusting(authority))
        async with serving(security=security) as (server, in_the_clear), http:
            base_url = f"https://{server.http_address}/v1"
            client = openai.AsyncOpenAI(base_url=base_url, api_key="alpha", max_retries=0, http_client=http)
            assert (await client.completions.create(**A)).choices[0].text == "bcd"
            assert (
                "".join([c.choices[0].text async for c in await client.completions.create(**A, stream=True)]) == "bcd"
            )
            with pytest.raises(openai.APIConnectionError):
                await in_the_clear.completions.create(**A)
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await health(server, ssl.create_default_context())

    asyncio.run(scenario())


def test_mutual_tls_lets_in_only_certificates_of_the_authority(authority, tmp_path):
    async def scenario():
        security = SecurityConfig(tls_cert=tmp_path / "cert", tls_key=tmp_path / "key", tls_client_ca=tmp_path / "ca")
        async with serving(security=security) as (server, _):
            assert await health(server, trusting(authority, authority.issue_cert("me@example.org"))) == 200
            for context in (trusting(authority), trusting(authority, trustme.CA().issue_cert("you@example.org"))):
                with pytest.raises((aiohttp.ClientError, OSError)):
                    await health(server, context)
            # Another authority from now on: the next connection is held to it.
            other = trustme.CA()
            other.cert_pem.write_to_path(tmp_path / "ca")
            assert await health(server, trusting(authority, other.issue_cert("you@example.org"))) == 200
            with pytest.raises((aiohttp.ClientError, OSError)):
                await health(server, trusting(authority, authority.issue_cert("me@example.org")))

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["localhost", None])
def test_a_renewed_certificate_serves_the_next_connection_and_a_damaged_one_does_not(name, authority, tmp_path, caplog):
    """Whether or not the client tells whom it wants."""

    async def scenario():
        security = SecurityConfig(tls_cert=tmp_path / "cert", tls_key=tmp_path / "key")
        async with serving(security=security) as (server, _):
            host, port = server.http_address.split(":")
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

            def served() -> bytes:
                sock = socket.create_connection((host, int(port)))
                with sock, context.wrap_socket(sock, server_hostname=name) as encrypted:
                    certificate = encrypted.getpeercert(binary_form=True)
                    assert certificate is not None
                    return certificate

            first = await asyncio.to_thread(served)
            issue(authority, tmp_path)
            second = await asyncio.to_thread(served)
            (tmp_path / "cert").write_text("half a certif")
            assert first != second == await asyncio.to_thread(served)

    asyncio.run(scenario())
    assert "the old certificate stays" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [("cert", "are no certificate and its key"), ("ca", "tls_client_ca=.* is no certificate in PEM")],
)
def test_files_that_cannot_be_used_are_refused_before_the_load(name, message, authority, tmp_path):
    (tmp_path / name).write_text("half a certif")
    security = SecurityConfig(tls_cert=tmp_path / "cert", tls_key=tmp_path / "key", tls_client_ca=tmp_path / "ca")
    with pytest.raises(RefusedError, match=message):
        Serving(lambda: pytest.fail("loaded"), ServerConfig(port=0, http_port=0, security=security))


def resume(address: str, context: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[bytes, ssl.SSLSession, bool]:
    """(answer, session for the next time, whether this one was resumed); raises OSError for who is not let in."""
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=WAIT_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost", session=session) as sock,
    ):
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = sock.recv(4096)
        if not answer:
            raise ConnectionError("closed")
        assert sock.session is not None
        return answer, sock.session, bool(sock.session_reused)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=str)
def test_a_new_authority_ends_the_old_ones_sessions(version, authority, tmp_path, monkeypatch):
    monkeypatch.setattr(ports, "RENEW_S", 0.05)

    async def scenario():
        security = SecurityConfig(tls_cert=tmp_path / "cert", tls_key=tmp_path / "key", tls_client_ca=tmp_path / "ca")
        context = trusting(authority, authority.issue_cert("me@example.org"))
        context.minimum_version = context.maximum_version = version
        async with serving(security=security) as (server, _):
            first = await asyncio.to_thread(resume, server.http_address, context, None)
            again = await asyncio.to_thread(resume, server.http_address, context, first[1])
            assert b" 200 " in first[0]
            assert again[2], "the session is worth something"
            trustme.CA().cert_pem.write_to_path(tmp_path / "ca")
            await asyncio.sleep(0.3)
            for session in (again[1], None):
                with pytest.raises(OSError):  # noqa: PT011  # of whichever kind
                    await asyncio.to_thread(resume, server.http_address, context, session)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_an_expired_certificate_and_a_token_file_for_everybody_are_told(tmp_path, caplog):
    authority = trustme.CA()
    expired = authority.issue_cert(
        "localhost", not_after=datetime(2020, 1, 2, tzinfo=UTC), not_before=datetime(2020, 1, 1, tzinfo=UTC)
    )
    expired.private_key_pem.write_to_path(tmp_path / "key")
    expired.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    tls.certificates(SecurityConfig(tls_cert=tmp_path / "cert", tls_key=tmp_path / "key"))
    assert "has expired on Jan  2 00:00:00 2020 GMT" in caplog.text
    caplog.clear()
    issue(authority, tmp_path)
    tls.certificates(SecurityConfig(tls_cert=tmp_path / "cert", tls_key=tmp_path / "key"))
    (tmp_path / "tokens").write_text("alpha")
    (tmp_path / "tokens").chmod(0o600)
    read_tokens(tmp_path / "tokens")
    assert caplog.text == ""
    (tmp_path / "tokens").chmod(0o644)
    read_tokens(tmp_path / "tokens")
    assert "has the mode 644" in caplog.text
