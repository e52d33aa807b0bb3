"""Tokenizers of Hugging Face folders against transformers and the SentencePiece library, on the same files."""

import json
import random
import warnings

import pytest
import sentencepiece
from slipstream.engine_impl.checkpoints.pieces import backend_of, read_pieces
from slipstream.engine_impl.checkpoints.tokenizer_files import read_tokenizer
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.text.chat import Chat
from slipstream.engine_impl.text.tokenizer import NoTokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from .vocabularies import CORPUS, train_pieces

TEXTS = [
    *CORPUS,
    "",
    "a",
    "word",
    "trailing ",
    "two  spaces   three\tand a tab",
    "line\n\nline\r\n\n\n  indented",
    "unseen: ﷽ ༼ つ ◕_◕ ༽つ \U0001d518\U0001d52b \u200b\u00a0",
    "<s>already begun",
    "before</s>after </s> spaced",
    "<|im_start|>user\nhi<|im_end|>",
]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " 東京? 🥚\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c <s> </s> {{ x }}"},
    ],
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n    {%- if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}\n"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% if loop.index > 20 %}{% break %}{% endif %}{% endfor %}"
    "{% generation %}{{ {'größe': messages | length, 'html': '<&>'} | tojson }}{% endgeneration %}"
    "{% if tools is not none or documents is not none %}tools{% endif %}{{ strftime_now('%Y') }}{{ unk_token }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ eos_token }}"
)


def write(folder, **files):
    """JSON files by name; `tokenizer_config` is tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory):
    """tokenizer.json of a byte-level BPE of 600 tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    backend.save(str(path))
    return path


def save_with_bos(path, folder):
    """With a post-processor that puts `<s>` before a text."""
    backend = Backend.from_file(str(path))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))


def pieces_folder(tmp_path, model, **config):
    folder = write(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **config})
    (folder / "tokenizer.model").write_bytes(model)
    return folder


def both(folder):
    """(ours, transformers')"""
    from transformers import AutoTokenizer

    write(folder, config={"model_type": "llama"})
    return read_tokenizer(folder, "the model", 999), AutoTokenizer.from_pretrained(folder)


def check_round_trips(tokenizer, reference, texts=TEXTS):
    for text in texts:
        token_ids = tokenizer.encode(text)
        assert token_ids == reference.encode(text), text
        assert tokenizer.decode(token_ids) == reference.decode(token_ids, skip_special_tokens=True), text
        check_stream(tokenizer, token_ids)


def check_stream(tokenizer, token_ids):
    """Pieces make up the whole; nothing half is given out."""
    stream = tokenizer.stream()
    pieces = [stream.feed(token) for token in token_ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(token_ids)


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"__type": "AddedToken", "content": "<s>"}}
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}


@pytest.mark.parametrize("adds_bos", [None, True, False])
@pytest.mark.parametrize("post_processor", ["none", "bos", "bos and eos"])
def test_byte_level_bpe_and_its_bos_rule(tmp_path, byte_level, adds_bos, post_processor):
    """The file's post-processor decides, whatever add_bos_token says. An EOS never comes behind a prompt."""
    backend = Backend.from_file(str(byte_level))
    if post_processor != "none":
        form = "<s> $A </s>" if "eos" in post_processor else "<s> $A"
        backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 0), ("</s>", 1)])
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    told = {} if adds_bos is None else {"add_bos_token": adds_bos}
    tokenizer, reference = both(write(tmp_path, tokenizer_config=GENERIC | told))
    begins = [] if post_processor == "none" else [0]
    for text in TEXTS:
        expected = reference.encode(text)
        expected = expected[:-1] if expected[-1:] == [1] else expected
        expected = expected[1:] if expected[:2] == [0, 0] else expected  # ours: never twice
        assert tokenizer.encode(text) == expected, text
    assert list(tokenizer.first_ids) == begins
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 1, {1})


def test_byte_level_round_trips(tmp_path, byte_level):
    (tmp_path / "tokenizer.json").write_bytes(byte_level.read_bytes())
    tokenizer, reference = both(write(tmp_path, tokenizer_config=GENERIC))
    check_round_trips(tokenizer, reference)
    rng = random.Random(0)
    for _ in range(300):
        check_stream(tokenizer, [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(30))])


@pytest.mark.parametrize("form", ["a text", "a jinja file", "several by name"])
def test_chats_are_rendered_and_encoded_as_transformers_does(tmp_path, byte_level, form):
    save_with_bos(byte_level, tmp_path)
    config = dict(GENERIC)
    if form == "a jinja file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
        config["chat_template"] = "stale"
    else:
        several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        config["chat_template"] = TEMPLATE if form == "a text" else several
    tokenizer, reference = both(write(tmp_path, tokenizer_config=config))
    for chat in CHATS:
        text = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert tokenizer.render_chat(Chat.of(chat)) == text
        token_ids = reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_chat(Chat.of(chat)).token_ids == token_ids
        assert token_ids[:2] != [0, 0]
        assert tokenizer.encode(text) == token_ids, "a rendered chat that comes as raw text has its BOS already"
    with pytest.raises(RefusedError, match="refuses these messages: system comes first"):
        tokenizer.render_chat(Chat.of([*CHATS[0], *CHATS[1]]))


def test_a_template_without_bos_gets_none(tmp_path, byte_level):
    save_with_bos(byte_level, tmp_path)
    config = GENERIC | {"chat_template": "{{ messages[0].content }}"}
    tokenizer, reference = both(write(tmp_path, tokenizer_config=config))
    token_ids = reference.apply_chat_template(CHATS[0], add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(Chat.of(CHATS[0])).token_ids == token_ids == tokenizer.encode("Hi")[1:]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"one": "x", "two": "y"}, r"of its templates \(one, two\) none is the default; send raw text"),
        ("{% if %}", "refuses these messages: Expected an expression"),
        ("{{ messages[0].content + 1 }}", "refuses these messages: can only concatenate str"),
        ("{{ 1 / 0 }}", "refuses these messages: division by zero"),
        ("{{ range(999999) }}", "refuses these messages: Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses these messages: maximum recursion depth"),
        (None, "no chat template; send raw text"),
    ],
    ids=["no default", "broken", "a type error", "a division", "the sandbox", "a recursion", "none"],
)
def test_a_model_without_a_usable_template_still_takes_raw_text(tmp_path, byte_level, template, message):
    (tmp_path / "tokenizer.json").write_bytes(byte_level.read_bytes())
    tokenizer = read_tokenizer(write(tmp_path, tokenizer_config=GENERIC | {"chat_template": template}), "m", 999)
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"
    with pytest.raises(RefusedError, match=message):
        tokenizer.encode_chat(Chat.of(CHATS[0]))


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        ({"eos_token_id": 3}, {}, {1, 3}),
        ({"eos_token_id": [3, 2]}, {"eos_token_id": 5}, {1, 2, 3, 5}),
        ({}, {"text_config": {"eos_token_id": [1, 4]}}, {1, 4}),
        ({}, {}, {1}),
    ],
)
def test_every_place_that_names_an_end_is_heard(tmp_path, byte_level, generation, config, stops):
    (tmp_path / "tokenizer.json").write_bytes(byte_level.read_bytes())
    write(tmp_path, tokenizer_config=GENERIC, generation_config=generation, config=config)
    assert read_tokenizer(tmp_path, "m", 999).stop_ids == stops


def test_tokens_named_beside_the_vocabulary(tmp_path, byte_level):
    """transformers adds them too; here an id that contradicts the vocabulary is refused."""
    (tmp_path / "tokenizer.json").write_bytes(byte_level.read_bytes())
    size = Backend.from_file(str(byte_level)).get_vocab_size()
    added = {str(size): {"content": "<new>", "special": True, "lstrip": False, "rstrip": False, "normalized": False,
                         "single_word": False}}  # fmt: skip
    tokenizer, reference = both(write(tmp_path, tokenizer_config=GENERIC | {"added_tokens_decoder": added}))
    assert tokenizer.encode("a<new>b") == reference.encode("a<new>b")
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.decode([size]) == ""
    write(tmp_path, tokenizer_config=GENERIC | {"added_tokens_decoder": {"7": {"content": "<new>"}}})
    with pytest.raises(RefusedError, match=rf"'<new>' has the id {size} in the vocabulary and 7"):
        read_tokenizer(tmp_path, "m", 999)


@pytest.mark.parametrize("files", [{"tokenizer_config": []}, {"tokenizer": {"model": {}}}], ids=["list", "empty"])
def test_damaged_files_are_told(tmp_path, files):
    with pytest.raises(RefusedError, match="fetch it anew"):
        read_tokenizer(write(tmp_path, **files), "m", 999)


def test_ids_beyond_the_model_are_not_in_its_vocabulary(tmp_path, byte_level):
    (tmp_path / "tokenizer.json").write_bytes(byte_level.read_bytes())
    write(tmp_path, tokenizer_config=GENERIC)
    size = Backend.from_file(str(byte_level)).get_vocab_size()
    assert read_tokenizer(tmp_path, "m", size - 1).vocab_size == size - 1
    assert read_tokenizer(tmp_path, "m", size + 64).vocab_size == size


def test_no_tokenizer_at_all(tmp_path):
    write(tmp_path, config={"bos_token_id": 1, "eos_token_id": [4, 2]})
    tokenizer = read_tokenizer(tmp_path, "m", 999)
    assert isinstance(tokenizer, NoTokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids, tokenizer.vocab_size) == (1, 2, {2, 4}, 999)


@pytest.mark.parametrize("kind", ["llama", "gemma", "unigram"])
def test_pieces_equal_the_sentencepiece_library(tmp_path, request, kind):
    """Control tokens are no text to that library, so only texts without them."""
    model = request.getfixturevalue(f"{kind}_pieces")
    tokenizer = read_tokenizer(pieces_folder(tmp_path, model, add_bos_token=False), "m", 999)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in [*TEXTS, " leading", "   ", "a     b"]:
        if "</s>" in text or "<s>" in text:
            continue
        expected = reference.encode(text)
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == reference.decode(expected), text
        check_stream(tokenizer, expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_pieces_with_control_tokens_equal_transformers(tmp_path, llama_pieces, legacy):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer, reference = both(pieces_folder(tmp_path, llama_pieces, legacy=legacy, **SPECIAL))
    texts = [text for text in TEXTS if not text.startswith("<s>")]
    if (
        legacy
    ):  # Its texts behind a control token begin as if behind a space, as SentencePiece makes them begin: a space
        # that is there is a second one, which transformers 5 forgets.
        texts = [text.replace("</s> ", "</s>") for text in texts]
    check_round_trips(tokenizer, reference, texts)
    assert tokenizer.encode("<s>begun") == reference.encode("<s>begun")[1:], "a BOS never comes twice"


def test_byte_pieces_are_held_back_until_they_are_a_character(tmp_path, llama_pieces):
    tokenizer = read_tokenizer(pieces_folder(tmp_path, llama_pieces), "m", 999)
    pieces = [f"<0x{byte:02X}>" for byte in "🥚".encode()]
    egg = [token for piece in pieces if (token := tokenizer._backend.token_to_id(piece)) is not None]
    stream = tokenizer.stream()
    assert [stream.feed(token) for token in egg] == ["", "", "", "🥚"]
    assert stream.feed(egg[0]) == ""
    word = tokenizer.encode("word")[1:]
    assert "".join(stream.feed(token) for token in word) + stream.finish() == "\ufffd word"
    cut = tokenizer.stream()
    assert [cut.feed(token) for token in egg[:2]] == ["", ""]
    assert cut.finish() == "\ufffd\ufffd"


def test_a_space_behind_a_control_token_stays(tmp_path, llama_pieces):
    """A decoder drops a text's first space; in the middle of an answer there is none to drop."""
    tokenizer = read_tokenizer(pieces_folder(tmp_path, llama_pieces), "m", 999)
    the = tokenizer.encode("the")[1:]
    answer = [*the, 1, 1, *the, 2, *the]
    assert tokenizer.decode(answer) == "the the the"
    check_stream(tokenizer, answer)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x00\xff" * 50])
def test_a_file_that_is_no_sentencepiece_model(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(RefusedError, match="is no SentencePiece model; fetch it anew"):
        read_pieces(tmp_path / "tokenizer.model")


def test_a_word_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_pieces(model_type="word", vocab_size=60, hard_vocab_limit=False))
    with pytest.raises(RefusedError, match="neither a BPE nor a unigram model"):
        read_pieces(tmp_path / "tokenizer.model")


def test_pieces_carry_their_own_control_tokens(tmp_path, llama_pieces):
    """A bare tokenizer.model, no other file: BOS and EOS as it was trained with."""
    (tmp_path / "tokenizer.model").write_bytes(llama_pieces)
    pieces, ids = read_pieces(tmp_path / "tokenizer.model")
    assert ids == {"bos_token": 1, "eos_token": 2, "unk_token": 0}
    tokenizer = read_tokenizer(tmp_path, "m", 999)
    assert (tokenizer.first_ids, tokenizer.stop_ids) == ((1,), {2})
    assert tokenizer.vocab_size == len(pieces.texts)
    assert backend_of(pieces, space_after_control=True)[1] == ""
