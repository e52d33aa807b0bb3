"""Tokenizers against Hugging Face's and llama.cpp's published behaviour; streams against whole decodes."""

import random
import threading
import time

import pytest
from slipstream.engine_impl.checkpoints.open import open_checkpoint
from slipstream.engine_impl.errors import RefusedError, TooLongError
from slipstream.engine_impl.text import chat_template
from slipstream.engine_impl.text.chat import Chat
from slipstream.engine_impl.text.chat_template import ChatTemplate
from slipstream.engine_impl.text.tokenizer import Tokenizer, byte_level_bpe

TEXTS = ["Hello world", "naïve café 東京 🥚", "a  b\n\n\tc", "<|im_start|>user\nhi<|im_end|>", "", " leading"]


@pytest.fixture(scope="module")
def tokenizer():
    return open_checkpoint("embedded").tokenizer()


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte, and `<s>`: ids computed by hand."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = byte_level_bpe([*letters, "<s>"], [], split="gpt-2", control_ids=[256])
    return Tokenizer(
        backend, vocab_size=257, bos_id=256, eos_id=256, stop_ids=frozenset([256]), first_ids=[256], chat_template=None
    )


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")


def test_digits_are_split_one_by_one(tokenizer):
    """The embedded model was trained so; transformers' reading of the GGUF forgets it and makes other ids."""
    assert tokenizer.encode("1234") == [token for digit in "1234" for token in tokenizer.encode(digit)]


def test_control_tokens_in_text_become_their_ids(tokenizer):
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.encode("<|im_end|>") == [2]


def test_bos_only_if_the_tokenizer_says_so(tokenizer, byte_tokenizer):
    assert tokenizer.encode("") == []
    assert byte_tokenizer.encode("")[0] == 256


def test_the_chat_form_is_the_models_own(tokenizer):
    chat = Chat.of([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    text = tokenizer.render_chat(chat)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_model_without_chat_template_refuses_messages(byte_tokenizer):
    with pytest.raises(RefusedError, match="no chat template; send raw text"):
        byte_tokenizer.render_chat(Chat.of([{"role": "user", "content": "Hi"}]))


def with_template(template):
    backend = byte_level_bpe(["a"], [], split="gpt-2", control_ids=[])
    return Tokenizer(
        backend, vocab_size=1, bos_id=None, eos_id=0, stop_ids=frozenset(), chat_template=ChatTemplate(template, {})
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__[-1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_templates_run_in_a_sandbox_and_their_refusals_are_told(template, message):
    with pytest.raises(RefusedError, match=message):
        with_template(template).render_chat(Chat.of([{"role": "user", "content": "Hi"}]))


def test_a_stream_writes_out_the_control_tokens_that_it_is_told_to(tokenizer):
    token_ids = tokenizer.encode("one<|im_start|> two<|im_end|>")
    for shown, text in (((), "one two"), (["<|im_start|>", "none"], "one<|im_start|> two")):
        stream = tokenizer.stream(shown)
        assert "".join(map(stream.feed, token_ids)) + stream.finish() == text
    assert (tokenizer.control_id("<|im_start|>"), tokenizer.control_id("one")) == (1, None)


def test_a_stream_holds_a_character_back_until_it_is_whole(byte_tokenizer):
    stream = byte_tokenizer.stream()
    pieces = [stream.feed(token) for token in byte_tokenizer.encode("é€🥚a")[1:]]
    assert pieces == ["", "é", "", "", "€", "", "", "", "🥚", "a"]
    assert stream.finish() == ""


def test_a_stream_that_ends_inside_a_character_says_so(byte_tokenizer):
    stream = byte_tokenizer.stream()
    assert [stream.feed(token) for token in byte_tokenizer.encode("a€")[1:-1]] == ["a", "", ""]
    assert stream.finish() == "\ufffd"


def test_streams_give_what_a_whole_decode_gives(tokenizer):
    """Real text, and 200 random token sequences, broken characters among them."""
    rng = random.Random(0)
    sequences = [tokenizer.encode(text * 3) for text in TEXTS]
    sequences += [[rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(40))] for _ in range(200)]
    for token_ids in sequences:
        stream = tokenizer.stream()
        pieces = [stream.feed(token) for token in token_ids]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(token_ids)


def test_an_unknown_split_is_refused():
    """A wrong pre-tokenizer would give wrong ids in silence."""
    with pytest.raises(RefusedError, match="'mystery' is not there; those there are: gpt-2, smollm, starcoder"):
        byte_level_bpe(["a"], [], split="mystery", control_ids=[])


@pytest.mark.parametrize("unit", ["hello world ", "7", "a", " ", "<|im_end|>", "é", "qx"])
def test_a_text_that_is_much_too_long_is_refused_from_its_beginning(tokenizer, unit):
    """A text that just fits is not: the tokens of a piece differ a little from those of the whole."""
    characters = 400_000 if unit == " " else 100_000  # a token is up to 256 spaces
    text = unit * (characters // len(unit))
    count = len(tokenizer.encode(text))
    assert len(tokenizer.encode(text, count)) == count
    with pytest.raises(TooLongError, match="more than 500 tokens"):
        tokenizer.encode(text, 500)


def test_only_a_piece_of_a_long_text_is_read(tokenizer, monkeypatch):
    lengths: list[int] = []

    def ids(text):
        lengths.append(len(text))
        return [0] * len(text)

    monkeypatch.setattr(tokenizer, "_ids", ids)
    with pytest.raises(TooLongError):
        tokenizer.encode("x" * 1_000_000, 20_000)
    assert lengths == [1 << 14, 1 << 16]


def test_other_threads_run_while_a_text_is_read(tokenizer):
    """The library's other calls keep the interpreter: of 1.5 s without a pause, this sees all."""
    stop, longest = threading.Event(), 0.0

    def watch():
        nonlocal longest
        last = time.perf_counter()
        while not stop.is_set():
            time.sleep(0.001)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    tokenizer.encode("7" * 400_000)
    taken = time.perf_counter() - begin
    stop.set()
    watcher.join()
    assert longest < taken / 2


ENDLESS_TEMPLATES = {
    "takes longer than": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "takes too much memory": "{% set ns = namespace(x='0123456789') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "takes too much memory ": "{{ 'a\nb' | indent(10 ** 9) }}",
    "writes more than": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
}


@pytest.mark.slow
@pytest.mark.parametrize(("message", "source"), ENDLESS_TEMPLATES.items())
def test_templates_that_come_to_no_end_are_refused_at_load_and_later(message, source, monkeypatch):
    monkeypatch.setattr(chat_template.WORKERS, "_seconds", 1.0)
    with pytest.raises(RefusedError, match=f"{message.strip()}.* with one short message"):
        ChatTemplate(source, {}).check()
    tokenizer = with_template("{% if messages[0]['content'] == 'loop' %}" + source + "{% else %}fine{% endif %}")
    with pytest.raises(RefusedError, match=f"{message.strip()}.* with these messages"):
        tokenizer.render_chat(Chat.of([{"role": "user", "content": "loop"}]))
    assert tokenizer.render_chat(Chat.of([{"role": "user", "content": "Hi"}])) == "fine"


def test_a_template_that_refuses_the_probe_is_no_reason_not_to_load():
    ChatTemplate("{{ raise_exception('only after a system message') }}", {}).check()
    ChatTemplate("{{ nonsense", {}).check()
