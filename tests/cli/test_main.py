"""The command line, from words to what a user sees."""

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from typing import get_args, get_type_hints

import pytest
from slipstream.cli import main as cli
from slipstream.cli.adapter import with_room
from slipstream.cli.bench import Bench
from slipstream.cli.serve import Serve
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.runtime import allocator, garbage
from slipstream.server import child
from slipstream.server.config import ServerConfig

NEVER = "localhost:1"


def test_flags_are_the_fields_of_both_configs():
    command = cli.parse(["serve", "--slots", "3", "--cache-length", "256", "--port", "0", "--grace", "1.5"])
    assert command == Serve(EngineConfig(slots=3, cache_length=256), ServerConfig(port=0, grace_s=1.5))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_reads_well(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        cli.parse([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "{None}" not in text
    assert "slipstream" in text


BENCHES = [get_args(bench)[1].name for bench in get_args(get_type_hints(Bench, include_extras=True)["what"])]


NAMES = 5
"""Names of flags and commands begin left of this column, texts right of it."""


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "words", [[], *([c] for c in cli.COMMANDS), *(["bench", name] for name in BENCHES)], ids=" ".join
)
def test_help_wraps_as_paragraphs(words, width, capsys, monkeypatch):
    """A line ends where the next word has no room, or its paragraph ends."""
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        cli.parse([*words, "--help"])
    _, _, text = capsys.readouterr().out.partition("\n\n")
    lines = text.split("\n")
    assert max(map(len, lines)) <= width
    assert [pair for pair in itertools.pairwise(lines) if is_ragged(*pair, width)] == []


def is_ragged(line, below, width):
    """Whether `below` goes on with the text of `line`, in its column, and its first word had room there."""
    in_box = line.startswith("│")
    line, below = line.strip("│").rstrip(), below.strip("│").rstrip()
    column = len(below) - len(below.lstrip())
    if not below or below[0] in "╭╰" or (in_box and column < NAMES):
        return False
    goes_on = line[column : column + 1].strip() != "" and line[max(0, column - 2) : column].strip() == ""
    return goes_on and len(line) + 1 + len(below.split()[0]) <= width - 3 * in_box


@pytest.mark.parametrize("words", [["serve"], ["bench"], ["bench", "step"]], ids=" ".join)
def test_help_loads_nothing_heavy(words):
    code = (
        "import sys, slipstream.cli.main as cli\n"
        f"try: cli.parse({[*words, '--help']})\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'torch', 'numpy', 'grpc', 'google.protobuf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--cache-length", "100"], "cache_length=100 must be a multiple of 128"),
        (["serve", "--port", "-1"], "port=-1 must be from 0"),
        (["serve", "--max-queued", "0"], "max_queued=0 must be at least 1"),
        (["serve", "--grace", "nan"], "grace=nan"),
        (["ask", "hi", "--temperature", "-1"], "temperature=-1.0"),
        (["ask", "hi", "--max-tokens", "0"], "max_tokens=0 must be at least 1"),
        (["generate"], "no prompt; give at least one --prompt"),
        (["generate", "--prompt", ""], "prompt 1 is empty"),
        (["ask", "\udcff"], "argument 2: the text is not valid UTF-8"),
        (["generate", "--prompt", "a", "--seed", "-1"], "seed=-1"),
        (["generate", "--prompt", "a", "--num-samples", "0"], "num_samples=0 must be at least 1"),
        (["generate", "--prompt", "a", "--stop", ""], "a stop string of 0 characters"),
        (["generate", "--prompt", "a", "--min-p", "2"], "min_p=2.0"),
        (["ask", "hi", "--logit-bias", "5=101"], "logit_bias[5]=101.0 must be from -100 to 100"),
        (["ask", "hi", "--min-tokens", "129"], "min_tokens=129 must be at most max_tokens=128"),
        (["ask", "hi", "--cache-salt", ""], "cache_salt: 0 characters, must be a text of 1 to 256 characters, or left"),
        (["ask", "hi", "--priority", "11"], "priority=11 must be from -10"),
        (["ask", "hi", "--logprobs", "21"], "logprobs=21"),
        (["ask", "hi", "--max-tokens", str(2**40), "--target", NEVER], "out of range"),
        (["ask", "hi", "--stop-token-id", str(2**40), "--target", NEVER], "must be from 0 to 2147483647"),
        (["ask", "hi", "--raw", "--system", "be"], "--raw sends a text alone"),
        (["ask", "hi", "--file", "/nowhere/notes"], "cannot read /nowhere/notes"),
        (["chat", "--num-samples", "2"], "num_samples=2 must be 1: a chat shows one answer"),
        (["demo", "--num-samples", "2"], "num_samples=2 must be 1"),
        (["generate", "--prompt-file", "/nowhere/prompts"], "cannot read the prompt file /nowhere/prompts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_values_are_one_line_and_status_2(words, message, capsys):
    assert cli.run(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("slipstream: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [[], ["serve", "--no-such-flag"], ["serve", "--slots", "x"], ["ask"], ["ask", "a", "--logit-bias", "5"]]
)
def test_lines_that_cannot_be_read_are_status_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(words)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def results(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_generate_json(fake_engine, capsys):
    words = ["generate", "--prompt", "a", "--prompt", "w", "--raw", "--max-tokens", "4", "--json"]
    assert cli.run(words) == 0
    answer = results(capsys)
    assert list(answer) == ["model", "results", "startup"]
    assert answer["startup"].keys() > {"imports_s", "loading_s", "programs_compiled"}
    assert answer["model"] == "fake"
    first, second = answer["results"]
    assert list(first) == [
        "prompt_token_ids", "token_ids", "text", "finish_reason", "cached_tokens", "ttft_ms", "total_ms"
    ]  # fmt: skip
    assert [first[key] for key in list(first)[:4]] == [[97], [98, 99, 100, 101], "bcde", "length"]
    assert [second[key] for key in list(second)[:4]] == [[119], [120, 121, 122], "xyz", "stop"]
    assert 0 < first["ttft_ms"] <= first["total_ms"]


def test_generate_applies_the_chat_template_but_not_to_ids(fake_engine, capsys, tmp_path):
    prompts = tmp_path / "prompts"
    prompts.write_text('"a"\n\n[97]\n')
    assert cli.run(["generate", "--prompt-file", str(prompts), "--json"]) == 0
    assert [result["prompt_token_ids"] for result in results(capsys)["results"]] == [list(b"<u>a"), [97]]


@pytest.mark.parametrize("line", ["{}", "[1.5]", "[true]", '["a"]', "not json", "3", '"\\ud800"'])
def test_prompt_files_with_other_lines_are_refused(line, tmp_path):
    prompts = tmp_path / "prompts"
    prompts.write_text(f'"a"\n{line}\n')
    with pytest.raises(RefusedError, match="line 2"):
        cli.parse(["generate", "--prompt-file", str(prompts)]).run()


def test_generate_refuses_what_does_not_fit(fake_engine, capsys):
    assert cli.run(["generate", "--raw", "--prompt", "a" * 17]) == 2
    assert "the prompt has 17 tokens" in capsys.readouterr().err


def test_generate_prints_text_in_the_order_of_the_prompts(fake_engine, capsys):
    assert cli.run(["generate", "--raw", "--max-tokens", "3", "--prompt", "a"]) == 0
    assert capsys.readouterr().out == "bcd\n"
    words = ["generate", "--raw", "--max-tokens", "3", *(word for text in "azAw" for word in ("--prompt", text))]
    assert cli.run(words) == 0
    assert capsys.readouterr().out == "--- a\nbcd\n--- z\n\n--- A\nBCD\n--- w\nxyz\n"


def test_generate_tells_that_the_engine_failed(fake_engine, capsys):
    fake_engine.late_errors = {0: RuntimeError("boom")}
    assert cli.run(["generate", "--prompt", "a"]) == 1
    assert "failed in the engine: RuntimeError: boom" in capsys.readouterr().err


OPTIONS = ["--stop", "zz", "--stop", "fg", "--logprobs", "1", "--prompt-logprobs", "--max-tokens", "9"]


def test_generate_json_with_everything_asked_for(fake_engine, capsys):
    """The fake's log-probabilities are minus an eighth of the id; see there."""
    assert cli.run(["generate", "--raw", "--prompt", "@a", *OPTIONS, "--json"]) == 0
    (answer,) = results(capsys)["results"]
    assert [answer[key] for key in ("text", "finish_reason", "token_ids")] == ["bcde", "stop", list(b"bcdefg")]
    assert answer["prompt_logprobs"] == [None, -97 / 8]
    assert answer["logprobs"][0] == {"logprob": -98 / 8, "top": [{"token_id": 98, "logprob": -98 / 8}]}
    assert len(answer["logprobs"]) == len(answer["token_ids"])


def test_generate_json_with_several_samples(fake_engine, capsys):
    assert cli.run(["generate", "--raw", "--prompt", "A", "--num-samples", "2", "--max-tokens", "3", "--json"]) == 0
    (answer,) = results(capsys)["results"]
    assert list(answer) == ["prompt_token_ids", "samples", "cached_tokens", "ttft_ms", "total_ms"]
    assert [(s["text"], s["finish_reason"]) for s in answer["samples"]] == [("BCD", "length"), ("LMN", "length")]


def test_generate_prints_samples_and_logprobs(fake_engine, capsys):
    words = ["generate", "--raw", "--prompt", "@A", "--max-tokens", "2", "--num-samples", "2", "--logprobs", "0"]
    assert cli.run([*words, "--prompt-logprobs"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "--- @A [0]", "BC", "--- @A [1]", "LM", "prompt: - -8.125",
        "sample 0, token 66: -8.250", "sample 0, token 67: -8.375",
        "sample 1, token 76: -9.500", "sample 1, token 77: -9.625",
    ]  # fmt: skip


def test_ask_takes_the_same_options(target, fake_engine, capsys):
    assert cli.run(["ask", "@a", "--raw", "--target", target, *OPTIONS, "--json"]) == 0
    answer = results(capsys)
    assert [answer[key] for key in ("text", "finish_reason")] == ["bcde", "stop"]
    assert answer["prompt_logprobs"] == [None, -97 / 8]
    assert answer["logprobs"][0] == {"logprob": -98 / 8, "top": [{"token_id": 98, "logprob": -98 / 8}]}
    assert 0 < answer["ttft_ms"] <= answer["total_ms"]
    words = ["ask", "A", "--raw", "--target", target, "--num-samples", "2", "--max-tokens", "2", "--logprobs", "1"]
    assert cli.run([*words, "--temperature", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == [
        "--- A [0]", "BC", "--- A [1]", "LM", "sample 0, token 66: -8.250  likeliest:  66 -8.250",
    ]  # fmt: skip


def test_sampling_flags_reach_the_engine(target, fake_engine):
    words = ["--temperature", "0.5", "--min-p", "0.25", "--repetition-penalty", "1.5", "--presence-penalty", "0.5"]
    words += ["--frequency-penalty", "-0.5", "--top-k", "3", "--top-p", "0.75", "--seed", "9"]
    assert cli.run(["ask", "a", "--target", target, *words]) == 0
    assert cli.run(["generate", "--prompt", "a", *words]) == 0
    asked, generated = fake_engine.samplings
    assert asked == generated
    assert (asked.min_p, asked.repetition_penalty, asked.frequency_penalty, asked.seed) == (0.25, 1.5, -0.5, 9)


def test_ask(target, fake_engine, capsys):
    assert cli.run(["ask", "a", "--target", target, "--max-tokens", "3"]) == 0
    assert cli.run(["ask", "A", "--target", target, "--max-tokens", "3", "--raw"]) == 0
    assert capsys.readouterr().out == "bcd\nBCD\n"
    assert [call for call in fake_engine.log if "prefill" in call] == ["prefill <u>a", "prefill A"]


def test_ask_shows_the_servers_refusal(target, capsys):
    assert cli.run(["ask", "a" * 50, "--target", target]) == 2
    assert capsys.readouterr().err.startswith("slipstream: the prompt has 53 tokens")


def test_ask_without_a_server(capsys):
    assert cli.run(["ask", "a", "--target", NEVER]) == 1
    assert capsys.readouterr().err.startswith("slipstream: nobody answers at localhost:1")


class Keyboard:
    """Types the lines, then Ctrl-D; an exception is raised instead of typed."""

    def __init__(self, monkeypatch, *lines):
        self._lines = iter(lines)
        monkeypatch.setattr("builtins.input", self)

    def __call__(self, prompt):
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line


def test_chat_remembers(target, fake_engine, monkeypatch, capsys):
    Keyboard(monkeypatch, "a", "", KeyboardInterrupt(), "A", "/new", "B")
    assert cli.run(["chat", "--target", target, "--max-tokens", "1", "--system", "s"]) == 0
    prompts = [call.removeprefix("prefill ") for call in fake_engine.log if "prefill" in call]
    assert prompts == ["<s>s<u>a", "<s>s<u>a<a>b<u>A", "<s>s<u>B"]


@pytest.fixture
def scripted():
    """(host:port, engine): a server whose model answers with a call of `now`."""
    from tests.scripted import Scripted
    from tests.serving import serving_in_thread

    engine = Scripted('<tool_call>{"name": "now", "arguments": {"zone": "UTC"}}</tool_call>')
    with serving_in_thread(engine) as address:
        yield address, engine


@pytest.fixture
def tools(tmp_path):
    """A file of tools, in both forms."""
    file = tmp_path / "tools.json"
    zone = {"type": "object", "properties": {"zone": {"type": "string"}}}
    function = {"name": "now", "description": "The time.", "parameters": zone}
    file.write_text(json.dumps([function, {"type": "function", "function": {"name": "stop"}}]))
    return str(file)


def test_ask_brings_instructions_files_and_tools(scripted, tools, tmp_path, capsys):
    target, engine = scripted
    (tmp_path / "notes.txt").write_text("Note.")
    words = ["ask", "Now?", "--target", target, "--system", "Be", "--file", str(tmp_path / "notes.txt")]
    assert cli.run([*words, "--tools", tools]) == 0
    assert capsys.readouterr().out == '[calls now] {"zone": "UTC"}\n'
    (chat,) = engine.tokenizer.chats
    assert [(turn.role, turn.content) for turn in chat.turns] == [
        ("system", "Be"), ("user", "notes.txt:\nNote.\n\nNow?"),
    ]  # fmt: skip
    assert [(tool.name, tool.description) for tool in chat.tools] == [("now", "The time."), ("stop", "")]
    assert cli.run([*words, "--tools", tools, "--json"]) == 0
    (call,) = results(capsys)["tool_calls"]
    assert (call["name"], call["arguments"]) == ("now", '{"zone": "UTC"}')


def test_chat_asks_what_a_call_gives(scripted, tools, monkeypatch, capsys):
    target, engine = scripted
    original = engine.tokenizer.encode_chat

    def answered(chat, at_most=None):
        engine.script = "Noon." if chat.turns[-1].role == "tool" else engine.script
        return original(chat, at_most)

    engine.tokenizer.encode_chat = answered
    Keyboard(monkeypatch, "Now?", "12:00", "/exit")
    assert cli.run(["chat", "--target", target, "--tools", tools]) == 0
    assert '[calls now] {"zone": "UTC"}\nNoon.\n' in capsys.readouterr().out
    assert [(turn.role, turn.content) for turn in engine.tokenizer.chats[-1].turns] == [
        ("user", "Now?"), ("assistant", ""), ("tool", "12:00"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ("{}", "must be a JSON list"), ('[{"a": 1}]', "tool 1: must be an object")],
)
def test_tools_that_cannot_be_read(text, message, target, tmp_path, capsys):
    (tmp_path / "tools.json").write_text(text)
    assert cli.run(["ask", "a", "--target", target, "--tools", str(tmp_path / "tools.json")]) == 2
    assert message in capsys.readouterr().err


def test_chat_shows_logprobs_and_stops_at_stop_strings(target, fake_engine, monkeypatch, capsys):
    Keyboard(monkeypatch, "a", "A")
    assert cli.run(["chat", "--target", target, "--max-tokens", "4", "--stop", "d", "--logprobs", "0"]) == 0
    assert "bc\ntoken 98: -12.250\ntoken 99: -12.375\ntoken 100: -12.500\n" in capsys.readouterr().out
    assert [call for call in fake_engine.log if "prefill" in call][1] == "prefill <u>a<a>bc<u>A"


def test_chat_leaves_at_exit_and_survives_a_refusal(target, fake_engine, monkeypatch, capsys):
    Keyboard(monkeypatch, "a" * 40, "a", "/exit", "never asked")
    assert cli.run(["chat", "--target", target, "--max-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert "the prompt has 43 tokens" in err
    assert "bcd" in out
    assert [call for call in fake_engine.log if "prefill" in call] == ["prefill <u>a"]


def test_chat_outlives_the_server(monkeypatch, capsys):
    Keyboard(monkeypatch, "a", "b")
    assert cli.run(["chat", "--target", NEVER]) == 0
    assert capsys.readouterr().err.count("nobody answers") == 2


def test_ctrl_c_stops_the_answer_and_not_the_chat(target, fake_engine, monkeypatch, capsys):
    fake_engine.step_s, fake_engine.max_prefill_length = 0.01, 64

    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def press_ctrl_c(step):
        if step == 5:
            signal.pthread_kill(main_thread, signal.SIGINT)

    fake_engine.on_generate = press_ctrl_c
    Keyboard(monkeypatch, "!", "w")
    assert cli.run(["chat", "--target", target, "--max-tokens", "80"]) == 0
    out = capsys.readouterr().out
    assert "[stopped]\nxyz\n" in out
    assert fake_engine.steps < 20, "the server went on with the answer that nobody reads"


FAKE_CLI = """
import sys
from types import SimpleNamespace
from tests.fakes import FakeEngine
sys.modules["slipstream.engine_impl.loading"] = SimpleNamespace(load_engine=lambda config: (FakeEngine(), None))
from slipstream.cli.main import main
main()
"""


def test_demo(monkeypatch, capsys):
    """The real subprocess and signal, with the fake engine inside. The server's log never falls into the answer."""
    monkeypatch.setattr(child, "CLI", [sys.executable, "-c", FAKE_CLI])
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # as on a terminal
    assert cli.run(["demo", "--question", "a", "--max-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "\nbcdef\n\n5 tokens · TTFT" in out
    assert out.index("outcome=ok") > out.index("5 tokens"), "the request's line of the log"
    assert "stopped with status 0" in out


def test_demo_without_a_server(monkeypatch, capfd):
    monkeypatch.setattr(child, "CLI", [sys.executable, "-c", "import sys; sys.exit(2)"])
    with pytest.raises(SystemExit) as stop:
        cli.run(["demo"])
    assert stop.value.code == 2


def test_demo_passes_the_engines_flags_on():
    engine = EngineConfig(slots=3, model="a b.gguf", tensor_parallel=2, quantize_exclude=("*.o_proj", "lm_head"))
    command = cli.parse(["serve", *child.flags(engine)])
    assert isinstance(command, Serve)
    assert command.engine == engine


def test_a_command_that_starts_seldom_looks_for_garbage(monkeypatch):
    monkeypatch.setattr(cli, "run", lambda argv: 0)
    before = gc.get_threshold()
    try:
        with pytest.raises(SystemExit):
            cli.main()
        assert gc.get_threshold() == garbage.SELDOM
    finally:
        gc.set_threshold(*before)


def test_a_servers_memory_is_one_heap(monkeypatch):
    """The C library gives threads heaps of their own if one has allocated before it is told not to."""
    threads = "import os, slipstream.cli.serve; print(len(os.listdir('/proc/self/task')))"
    if os.path.exists("/proc/self/task"):
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        done = subprocess.run([sys.executable, "-c", threads], capture_output=True, text=True, check=True, env=env)
        assert done.stdout == "1\n"

    class Told(Exception): ...

    def tell():
        raise Told

    before = threading.active_count()
    monkeypatch.setattr(allocator, "keep_freed", tell)
    with pytest.raises(Told):
        Serve(EngineConfig(platform="cpu"), ServerConfig()).run()
    assert threading.active_count() == before


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(cli, "parse", lambda argv: os.kill(os.getpid(), signal.SIGINT))
    assert cli.run([]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_what_a_stranger_wrote_does_not_command_the_terminal(capsys):
    assert cli.tell(RefusedError("tensor '\x1b[31mred\x07' in\nfile é"), 2) == 2
    assert capsys.readouterr().err == "slipstream: tensor '\\x1b[31mred\\x07' in\nfile é\n"


def test_generate_with_an_adapter(fake_engine, capsys, tmp_path):
    """A place of its rank is made for it; the fake counts up by one more for a path that ends with -1."""
    folder = tmp_path / "lora-1"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 24, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    fake_engine.max_adapters = 1
    words = ["generate", "--raw", "--prompt", "a", "--max-tokens", "3", "--adapter", str(folder)]
    assert cli.run(words) == 0
    assert capsys.readouterr().out == "ceg\n"
    asked = with_room(EngineConfig(), str(folder))
    assert (asked.max_adapters, asked.max_adapter_rank) == (1, 24)
    assert with_room(EngineConfig(), None) == EngineConfig()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapters", "a=b"], "add --max-adapters N"),
        (["--adapter-dir", "x"], "add --max-adapters N"),
        (["--max-adapters", "-1"], "max_adapters=-1 must be 0"),
        (["--max-adapter-rank", "129"], "max_adapter_rank=129 must be from 1 to 128"),
        (["--max-adapters", "1", "--adapters", "a"], "must be NAME=PATH"),
    ],
)
def test_serve_refuses_adapters_that_it_has_no_room_for(words, message, capsys):
    assert cli.run(["serve", *words]) == 2
    assert message in capsys.readouterr().err
