"""`serve --config FILE`: the flags of a YAML file."""

import dataclasses
import json
from pathlib import Path

import pytest
from slipstream.cli import main as cli
from slipstream.cli.config_file import flags_of
from slipstream.cli.serve import Serve
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.config import SecurityConfig, ServerConfig, WatchConfig

FLAGS = json.loads((Path(__file__).parents[1] / "compatibility" / "flags.json").read_text())["serve"]


@pytest.fixture
def serve(tmp_path):
    """Parses `slipstream serve --config FILE` with a file of this text."""
    path = tmp_path / "serve.yaml"

    def parse(text: str, *words: str) -> Serve:
        path.write_text(text)
        command = cli.parse(["serve", "--config", str(path), *words])
        assert isinstance(command, Serve)
        return dataclasses.replace(command, config=None)

    return parse


def test_lines_are_flags(serve):
    text = """
    # a comment
    model: /models/a b.gguf
    slots: 3
    quantize-kv: none
    quantize-exclude: [lm_head, "*.down_proj"]
    grace: 1.5
    prefix-cache: false
    log-prompts: true
    isolate-prefixes: true
    allow-origin: http://a
    """
    assert serve(text) == Serve(
        EngineConfig(model="/models/a b.gguf", slots=3, quantize_exclude=("lm_head", "*.down_proj")),
        ServerConfig(
            grace_s=1.5,
            prefix_cache=False,
            security=SecurityConfig(allow_origin=("http://a",)),
            watch=WatchConfig(log_prompts=True),
        ),
    )


@pytest.mark.parametrize("model", ["1e3", "yes", "null", "0x10", "2026-01-01", "-a", "~"])
def test_a_text_is_what_stands_there(serve, model):
    assert serve(f"model: {model}").engine.model == model


@pytest.mark.parametrize("text", ["", "# nothing"])
def test_an_empty_file_changes_nothing(serve, text):
    assert serve(text) == Serve(EngineConfig(), ServerConfig())


def test_flags_of_the_command_line_win(serve):
    text = "slots: 3\ncache-length: 256\nprefix-cache: false\nallow-origin: [http://a, http://b]\nlog-prompts: true"
    words = ("--slots=4", "--prefix-cache", "--no-log-prompts", "--allow-origin", "http://c")
    command = serve(text, *words)
    assert command.engine == EngineConfig(slots=4, cache_length=256)
    assert command.server == ServerConfig(security=SecurityConfig(allow_origin=("http://c",)))


def test_file_and_command_line_are_checked_together(serve):
    security = serve("tls-cert: a.pem", "--tls-key=b.pem").server.security
    assert (security.tls_cert, security.tls_key) == (Path("a.pem"), Path("b.pem"))
    with pytest.raises(RefusedError, match="TLS takes both"):
        serve("tls-cert: a.pem")


def test_the_last_file_counts(tmp_path):
    for slots in (3, 4):
        (tmp_path / f"{slots}.yaml").write_text(f"slots: {slots}")
    command = cli.parse(["serve", "--config", str(tmp_path / "3.yaml"), f"--config={tmp_path / '4.yaml'}"])
    assert isinstance(command, Serve)
    assert command.engine.slots == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slots: 3\nslot: 4", r":2: 'slot' is no flag of `slipstream serve`; the nearest is slots$"),
        ("cache_length: 256", "'cache_length' is no flag of `slipstream serve`; the nearest is cache-length$"),
        ("no-prefix-cache: true", "'no-prefix-cache' is no flag .*; the nearest is prefix-cache$"),
        ("entirely-else: 1", "'entirely-else' is no flag of `slipstream serve`"),
        ("config: other.yaml", "config names this file"),
        ("slots: 3\n\nslots: 4", ":3: slots stands there twice"),
        ("slots:", ":1: slots has no value; leave the line out for the default"),
        ("slots: [3, 4]", "slots takes one value, not a list"),
        ("slots: {a: 3}", "slots takes a value, not lines of its own"),
        ("allow-origin: [[a]]", "allow-origin takes a value, not lines of its own"),
        ("prefix-cache: no", "prefix-cache='no' must be true or false"),
        ("slots: 0", "slots=0 must be at least 1"),
        ("- slots", "must hold lines of `flag: value`"),
        ("slots", "must hold lines of `flag: value`"),
        ("slots: 3\n---\nslots: 4", "is no YAML: .*"),
        ("slots: [3", "is no YAML: .* line 1"),
    ],
)
def test_what_no_flag_says_is_refused_with_its_line(serve, text, message):
    with pytest.raises(RefusedError, match=message) as refused:
        serve(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xfa"])
def test_a_file_that_cannot_be_read(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "serve.yaml").write_bytes(content)
    assert cli.run(["serve", "--config", str(tmp_path / "serve.yaml")]) == cli.BAD_INPUT
    assert f"cannot read the config file {tmp_path}" in capsys.readouterr().err


def test_a_value_of_another_kind_is_told_as_on_the_command_line(serve, capsys):
    with pytest.raises(SystemExit) as stop:
        serve("slots: many")
    assert stop.value.code == cli.BAD_INPUT
    assert "--slots" in capsys.readouterr().err


def test_every_flag_may_stand_there():
    names = {flag.removeprefix("--").removeprefix("no-") for flag in FLAGS}
    assert names - {"help", "config"} <= set(flags_of(Serve))
