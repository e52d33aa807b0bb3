"""The application's arguments are flags, and make the configs that the command line would."""

from pathlib import Path

import pytest
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.config import AdaptersConfig, SecurityConfig, ServerConfig, WatchConfig
from slipstream.server.ray.settings import configs, with_sockets

PROXIED = SecurityConfig(behind_proxy=True)


def test_args_are_flags():
    args = {
        "model": "/models/a",
        "slots": 8,
        "quantize-exclude": ["lm_head", "*.down_proj"],
        "max-adapters": 2,
        "adapters": ["fr=/adapters/fr"],
        "served-model-name": ["a", "b"],
        "grace": 2.5,
        "prefix-cache": False,
        "auth-token-file": "/tokens",
        "log-format": "json",
    }
    assert configs(args) == (
        EngineConfig(model="/models/a", slots=8, quantize_exclude=("lm_head", "*.down_proj"), max_adapters=2),
        ServerConfig(
            port=0,
            served_model_name=("a", "b"),
            grace_s=2.5,
            prefix_cache=False,
            lora=AdaptersConfig(adapters=("fr=/adapters/fr",)),
            security=SecurityConfig(auth_token_file=Path("/tokens"), behind_proxy=True),
            watch=WatchConfig(log_format="json"),
        ),
    )


def test_values_may_be_texts_as_serve_run_has_them():
    engine, server = configs({"slots": "8", "prefix-cache": "false", "grace": "1"})
    assert (engine.slots, server.prefix_cache, server.grace_s) == (8, False, 1.0)


def test_left_out_all_is_as_by_default_and_callers_are_not_this_machine():
    assert configs({}) == (EngineConfig(), ServerConfig(port=0, security=PROXIED))
    assert not configs({"behind-proxy": False})[1].is_local


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"slot": 8}, r"args: 'slot' is no flag of `slipstream serve`; the nearest is slots"),
        ({"slots": "many"}, r"args: slots='many': Input should be a valid integer"),
        ({"slots": 0}, r"slots=0 must be at least 1"),
        ({"dtype": "float16"}, r"args: dtype='float16': Input should be 'auto'"),
        ({"tls-cert": "/a"}, r"tls-cert is not for replicas under Ray Serve: connections end at Serve's proxies"),
        ({"adapter-dir": "/a"}, r"adapter-dir is not for .* each loads it"),
        ({"orchestrator": "jetstream"}, r"orchestrator is not for"),
        ({"hosts": "auto"}, r"hosts is not for .*: a replica has one host"),
        ({"adapters": ["a=/b"]}, r"add --max-adapters"),
    ],
)
def test_what_is_wrong_is_refused_by_name(args, message):
    with pytest.raises(RefusedError, match=message):
        configs(args)


def test_sockets_are_listened_on_beside_what_the_args_say():
    server = with_sockets(configs({"http-listen": ["127.0.0.1:0"]})[1], "/a/grpc", "/a/http")
    assert (server.listen, server.http_listen) == (("unix:/a/grpc",), ("127.0.0.1:0", "unix:/a/http"))
