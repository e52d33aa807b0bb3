"""Server flags that refuse what cannot be meant."""

from typing import Any, cast

import pytest
from slipstream.cli import main as cli
from slipstream.cli.serve import Serve
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.config import SecurityConfig, ServerConfig, WatchConfig
from slipstream.server.grpc.channel import ChannelConfig


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics-port", "70000"], "metrics_port=70000 must be from 0"),
        (["--metrics-port", "9000"], "metrics_port=9000 is the gRPC port already"),
        (["--http-port", "70000"], "http_port=70000 must be from 0"),
        (["--http-port", "9000"], "http_port=9000 is the gRPC port already; choose another --http-port"),
        (["--http-port", "9100", "--metrics-port", "9100"], "http_port=9100 is the metrics port already"),
        (["--max-queued-tokens", "0"], "max_queued_tokens=0 must be at least 1"),
        (["--probe-interval", "-1"], "probe_interval=-1.0 must be 0 (never)"),
        (["--probe-timeout", "0"], "probe_timeout=0.0 must be a positive number"),
        (["--probe-timeout", "inf"], "probe_timeout=inf"),
        (["--profile-seconds", "0"], "profile_seconds=0.0 must be a positive number"),
        (["--tls-cert", "a.pem"], "TLS takes both --tls-cert and --tls-key"),
        (["--tls-key", "a.pem"], "TLS takes both --tls-cert and --tls-key"),
        (["--tls-client-ca", "a.pem"], "add --tls-cert and --tls-key"),
        (["--max-streams-per-client", "0"], "max_streams_per_client=0 must be at least 1"),
        (["--max-message-bytes", "0"], "max_message_bytes=0 must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_values_name_the_flag_and_the_remedy(words, message, capsys):
    assert cli.run(["serve", *words]) == 2
    assert message in capsys.readouterr().err


def test_flags_reach_the_nested_groups():
    words = ["--metrics-port", "9100", "--log-format", "json", "--max-streams-per-client", "4", "--no-isolate-prefixes"]
    command = cli.parse(["serve", "--no-prefix-cache", *words])
    assert isinstance(command, Serve)
    assert command.server == ServerConfig(
        prefix_cache=False,
        watch=WatchConfig(metrics_port=9100, log_format="json"),
        security=SecurityConfig(max_streams_per_client=4, isolate_prefixes=False),
    )


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_who_can_reach_the_server(host, is_local):
    assert ServerConfig(host=host).is_local is is_local


@pytest.mark.parametrize("words", [["ask", "hi"], ["chat"], ["bench", "serve"]], ids=lambda words: " ".join(words))
def test_every_client_takes_the_channels_flags(words, tmp_path):
    command = cli.parse([*words, "--tls-ca", "ca.pem", "--token-file", "token"])
    command = cast(Any, getattr(command, "what", command))  # any of the clients
    assert (str(command.channel.tls_ca), str(command.channel.token_file)) == ("ca.pem", "token")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tls_cert": "a", "tls": True}, "takes both"),
        ({"tls_cert": "a", "tls_key": "b"}, "add --tls or --tls-ca"),
    ],
)
def test_a_channel_that_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(RefusedError, match=message):
        ChannelConfig(**fields)
