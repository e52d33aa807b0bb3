"""Certificates, tokens and limits, over real connections to a server with a fake engine."""

import asyncio
import logging
import os
import ssl
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2
from slipstream.cli import main as cli
from slipstream.engine_impl.errors import RefusedError
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.config import SecurityConfig, ServerConfig
from slipstream.server.grpc.channel import PLAIN, ChannelConfig, aio_channel, metadata
from slipstream.server.lifecycle import Serving
from slipstream.server.net.security import Guard, Tokens, warn_if_open

from tests.fakes import FakeEngine
from tests.server import calls
from tests.server.calls import WAIT_S

SERVING = health_pb2.HealthCheckResponse.SERVING
REQUEST = pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text="a"), max_tokens=3)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path, authority) -> Path:
    """A folder with ca, cert and key of a server called localhost, and of a client."""
    authority.cert_pem.write_to_path(tmp_path / "ca")
    issue(authority, tmp_path, "localhost")
    client = authority.issue_cert("somebody@example.org")
    client.private_key_pem.write_to_path(tmp_path / "client_key")
    client.cert_chain_pems[0].write_to_path(tmp_path / "client_cert")
    return tmp_path


def issue(authority: trustme.CA, folder: Path, name: str) -> None:
    certificate = authority.issue_cert(name)
    certificate.private_key_pem.write_to_path(folder / "key")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert")


def tls(files: Path, **others) -> SecurityConfig:
    return SecurityConfig(tls_cert=files / "cert", tls_key=files / "key", **others)


@asynccontextmanager
async def serving(config: SecurityConfig, engine: FakeEngine | None = None):
    """localhost:port of a server."""
    engine = engine or FakeEngine()
    async with Serving(lambda: (engine, None), ServerConfig(port=0, grace_s=0, security=config)) as server:
        yield server.address.replace("127.0.0.1", "localhost")


async def ask(target: str, config: ChannelConfig = PLAIN) -> str:
    async with aio_channel(target, config) as channel:
        replies = OrchestratorStub(channel).Decode(REQUEST, timeout=WAIT_S, metadata=metadata(config))
        return "".join([reply.stream_content.samples[0].text async for reply in replies])


async def ask_again(target: str, config: ChannelConfig) -> str | None:
    """None where the client has too many answers under way."""
    try:
        return await ask(target, config)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        return None


async def code_of(target: str, config: ChannelConfig = PLAIN) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(target, config)
    return caught.value.code()


async def health(target: str, config: ChannelConfig = PLAIN):
    async with aio_channel(target, config) as channel:
        return await calls.health(channel)


def test_tls_is_for_those_who_trust_the_authority(files):
    async def scenario():
        async with serving(tls(files)) as target:
            assert await ask(target, ChannelConfig(tls_ca=files / "ca")) == "bcd"
            assert await code_of(target) is grpc.StatusCode.UNAVAILABLE  # in the clear
            assert (
                await code_of(target, ChannelConfig(tls=True)) is grpc.StatusCode.UNAVAILABLE
            )  # not a known authority

    asyncio.run(scenario())


def test_mutual_tls_lets_in_only_certificates_of_the_authority(files):
    stranger = trustme.CA().issue_cert("stranger@example.org")
    stranger.private_key_pem.write_to_path(files / "stranger_key")
    stranger.cert_chain_pems[0].write_to_path(files / "stranger_cert")

    def client(name: str) -> ChannelConfig:
        return ChannelConfig(tls_ca=files / "ca", tls_cert=files / f"{name}_cert", tls_key=files / f"{name}_key")

    async def scenario():
        async with serving(tls(files, tls_client_ca=files / "ca")) as target:
            assert await ask(target, client("client")) == "bcd"
            assert await code_of(target, client("stranger")) is grpc.StatusCode.UNAVAILABLE
            assert await code_of(target, ChannelConfig(tls_ca=files / "ca")) is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_a_renewed_certificate_serves_the_next_connection_and_a_damaged_one_does_not(files, authority, caplog):
    async def scenario():
        async with serving(tls(files)) as target:
            address = target.split(":")[0], int(target.split(":")[1])

            async def served() -> bytes:
                return ssl.PEM_cert_to_DER_cert(await asyncio.to_thread(ssl.get_server_certificate, address))

            first = await served()
            issue(authority, files, "localhost")
            second = await served()
            (files / "cert").write_text("half a certif")
            assert first != second == await served()
            assert await ask(target, ChannelConfig(tls_ca=files / "ca")) == "bcd"

    asyncio.run(scenario())
    assert "the old certificate stays" in caplog.text


def test_files_that_do_not_belong_together_are_refused_before_the_load(files):
    def config(cert: str, key: str) -> ServerConfig:
        return ServerConfig(port=0, security=SecurityConfig(tls_cert=files / cert, tls_key=files / key))

    for cert, key, message in (
        ("cert", "client_key", "are no certificate and its key"),
        ("ca", "nothing", r"tls_key=.*/nothing cannot be read: No such file"),
        ("nothing", "key", r"tls_cert=.*/nothing cannot be read: No such file"),
    ):
        with pytest.raises(RefusedError, match=message):
            Serving(lambda: pytest.fail("loaded"), config(cert, key))


def token_file(folder: Path, *tokens: str) -> Path:
    path = folder / "tokens"
    path.write_text("\n".join(tokens))
    return path


def bearer(folder: Path, token: str) -> ChannelConfig:
    path = folder / f"token_{token[:6].strip()}"
    path.write_text(f"{token}\n")
    return ChannelConfig(token_file=path)


def test_requests_need_a_known_token_and_health_checks_none(tmp_path):
    async def scenario():
        config = SecurityConfig(auth_token_file=token_file(tmp_path, "alpha", "", "  beta  "))
        async with serving(config) as target:
            assert await ask(target, bearer(tmp_path, "alpha")) == "bcd"
            assert await ask(target, bearer(tmp_path, "beta")) == "bcd"
            for wrong in (PLAIN, bearer(tmp_path, "gamma"), bearer(tmp_path, "alph"), bearer(tmp_path, "alphax")):
                assert await code_of(target, wrong) is grpc.StatusCode.UNAUTHENTICATED
            assert await health(target) == SERVING
            async with aio_channel(target) as channel:
                path = "/jetstream_proto.Orchestrator/HealthCheck"
                is_live = channel.unary_unary(
                    path, pb.HealthCheckRequest.SerializeToString, pb.HealthCheckResponse.FromString
                )
                assert (await is_live(pb.HealthCheckRequest(), timeout=WAIT_S)).is_live

    asyncio.run(scenario())


@pytest.mark.parametrize("value", ["alpha", "Basic alpha", "Bearer", "Bearer ", "bearer alpha beta"])
def test_what_is_no_bearer_token_is_no_token(value, tmp_path):
    async def scenario():
        config = SecurityConfig(auth_token_file=token_file(tmp_path, "alpha"))
        async with serving(config) as target, aio_channel(target) as channel:
            call = OrchestratorStub(channel).Decode(REQUEST, timeout=WAIT_S, metadata=[("authorization", value)])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(scenario())


def test_jetstreams_path_needs_a_token_too(tmp_path):
    async def scenario():
        config = SecurityConfig(auth_token_file=token_file(tmp_path, "alpha"))
        async with serving(config) as target, aio_channel(target) as channel:
            decode = channel.unary_stream(
                "/jetstream_proto.Orchestrator/Decode",
                pb.DecodeRequest.SerializeToString,
                pb.DecodeResponse.FromString,
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await decode(REQUEST, timeout=WAIT_S).read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(scenario())


def change(path: Path, text: str, seconds: int) -> None:
    """A file's time has a grain: move it on, so that a quick test sees the change."""
    path.write_text(text)
    os.utime(path, (2_000_000_000 + seconds, 2_000_000_000 + seconds))


def test_tokens_are_read_again_when_the_file_changes_and_stay_when_it_is_damaged(tmp_path, caplog):
    path = token_file(tmp_path, "alpha")
    tokens = Tokens(path)
    change(path, "beta\ngamma\n", 1)
    assert [tokens.number_of(token) for token in ("alpha", "beta", "gamma")] == [None, 0, 1]
    change(path, "\n", 2)
    assert tokens.number_of("beta") == 0
    path.unlink()
    assert tokens.number_of("beta") == 0
    assert "holds no token" in caplog.text
    assert "cannot be read" in caplog.text
    change(path, "delta", 3)
    assert tokens.number_of("beta") is None
    assert tokens.number_of("delta") == 0


@pytest.mark.parametrize(("content", "message"), [(b"", "holds no token"), ("naïve".encode(), "printable ASCII")])
def test_a_token_file_that_cannot_be_used_is_refused_before_the_load(tmp_path, content, message):
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(RefusedError, match=message):
        Serving(lambda: pytest.fail("loaded"), ServerConfig(security=SecurityConfig(auth_token_file=path)))


@pytest.mark.parametrize("by_token", [False, True])
def test_one_client_has_so_many_answers_under_way(by_token, tmp_path):
    """The third is refused while two run, whoever else asks; when one has ended there is room again."""

    async def scenario():
        path = token_file(tmp_path, "alpha", "beta") if by_token else None
        config = SecurityConfig(max_streams_per_client=2, auth_token_file=path)
        ours = bearer(tmp_path, "alpha") if by_token else PLAIN
        long = pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text="\x01"), max_tokens=115)
        engine = FakeEngine(step_s=0.02, max_concurrent_decodes=4)
        async with serving(config, engine) as target, aio_channel(target) as channel:
            stub = OrchestratorStub(channel)
            running = [stub.Decode(long, timeout=WAIT_S, metadata=metadata(ours)) for _ in range(2)]
            for call in running:
                await call.read()
            assert await code_of(target, ours) is grpc.StatusCode.RESOURCE_EXHAUSTED  # another connection, one client
            assert await health(target) == SERVING
            if by_token:
                assert await ask(target, bearer(tmp_path, "beta")) == "bcd"
            running[0].cancel()
            while (answer := await ask_again(target, ours)) is None:
                await asyncio.sleep(0.01)
            assert answer == "bcd"

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_a_message_that_is_too_large_is_refused():
    async def scenario():
        async with serving(SecurityConfig(max_message_bytes=1000)) as target, aio_channel(target) as channel:
            text = pb.DecodeRequest.TextContent(text="a" * 1001)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await OrchestratorStub(channel).Decode(pb.DecodeRequest(text_content=text, max_tokens=1)).read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await ask(target) == "bcd"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("host", "security", "warnings"),
    [
        ("127.0.0.1", {}, []),
        ("0.0.0.0", {}, ["whoever reaches this port may ask", "unencrypted"]),
        ("0.0.0.0", {"auth_token_file": Path("t")}, ["unencrypted"]),
        ("127.0.0.1", {"behind_proxy": True}, ["whoever reaches this port may ask"]),
        ("0.0.0.0", {"behind_proxy": True}, ["whoever reaches this port may ask", "unencrypted"]),
        ("0.0.0.0", {"tls_cert": Path("c"), "tls_key": Path("k")}, ["whoever reaches this port may ask"]),
        ("::", {"tls_cert": Path("c"), "tls_key": Path("k"), "tls_client_ca": Path("a")}, []),
    ],
)
def test_an_open_server_says_so(host, security, warnings, caplog):
    with caplog.at_level(logging.WARNING):
        warn_if_open(ServerConfig(host=host, security=SecurityConfig(**security)))
    assert len(caplog.records) == len(warnings)
    assert all(warning in caplog.text for warning in warnings)


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("", "10.0.0.1", "10.0.0.1"),  # a Unix socket
        ("127.0.0.1", "10.0.0.1, 10.0.0.2", "10.0.0.2"),
        ("::ffff:127.0.0.1", "10.0.0.1", "10.0.0.1"),
        ("::1", "2001:db8::1", "2001:db8::1"),
        ("127.0.0.1", None, "127.0.0.1"),
        ("192.0.2.1", "10.0.0.1", "192.0.2.1"),  # which may say what it wants
    ],
)
def test_a_proxy_on_this_machine_names_the_client(peer, forwarded, address):
    assert Guard(SecurityConfig(behind_proxy=True)).address(peer, forwarded) == address
    assert Guard(SecurityConfig()).address(peer, forwarded) == peer


def test_ask_with_a_certificate_and_a_token(files, fake_engine, capsys):
    """The command line, both ends: as a user would start them."""

    async def scenario():
        config = tls(files, auth_token_file=token_file(files, "alpha"))
        async with serving(config, fake_engine) as target:
            words = ["ask", "a", "--raw", "--target", target, "--max-tokens", "3", "--tls-ca", str(files / "ca")]
            refused = await asyncio.to_thread(cli.run, words)
            answered = await asyncio.to_thread(cli.run, [*words, "--token-file", str(files / "tokens")])
            assert (refused, answered) == (1, 0)

    asyncio.run(scenario())
    out, err = capsys.readouterr()
    assert out == "bcd\n"
    assert "UNAUTHENTICATED: send `authorization: Bearer TOKEN`" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tls-ca", "/nowhere/ca"], "tls_ca=/nowhere/ca cannot be read"),
        (["--token-file", os.devnull], f"token_file={os.devnull} must begin with a line"),
    ],
)
def test_a_clients_files_are_checked(flags, message, capsys):
    assert cli.run(["ask", "a", *flags]) == 2
    assert message in capsys.readouterr().err
