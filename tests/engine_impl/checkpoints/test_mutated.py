"""Model files from strangers: whatever is changed in real ones, they load, or are refused in one printable line."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slipstream.engine_impl.checkpoints import tokenizer_files as tokenizer_files_module
from slipstream.engine_impl.checkpoints.gguf import GGUFCheckpoint
from slipstream.engine_impl.checkpoints.hf_config import read_hf_config
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.checkpoints.tokenizer_files import read_tokenizer
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.models.field_kinds import check_kinds
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from .folders import CONFIG, write_folder
from .gguf_writing import write_gguf

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, 10**18, 2**31, math.nan, math.inf, -0.0, "", "2", "x" * 1000, "\x1b[31mred",
    "\ud800", [], [1], ["a"], [[]], [None], {}, {"a": 1}, [{"id": 1}],
]  # fmt: skip

ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "llama": CONFIG,
    "yarn": CONFIG | {"rope_scaling": ROPE},
    "mixtral": CONFIG | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": CONFIG
    | {
        "model_type": "gemma2",
        "sliding_window": 64,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}

LIGHT = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything within."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, inner in list(items)[:20]:
        found += paths_of(inner, (*path, key))
    return found


def changed(data: st.DataObject, whole: Any) -> Any:
    """Another one, with something odd in one or two places."""
    made = copy.deepcopy(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        if not paths_of(made):
            break
        *parents, last = data.draw(st.sampled_from(paths_of(made)))
        at = made
        for key in parents:
            at = at[key]
        if data.draw(st.booleans()):
            at[last] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
        else:
            del at[last]
    return made


def check_told(error: RefusedError) -> None:
    assert len(str(error)) < 2000
    assert "Traceback" not in str(error)


@pytest.mark.parametrize("name", CONFIGS)
@LIGHT
@given(data=st.data())
def test_configs(name, tmp_path, data):
    (tmp_path / "config.json").write_text(json.dumps(changed(data, CONFIGS[name])), encoding="utf-8", errors="replace")
    try:
        config = read_hf_config(tmp_path)
        registry.build(config)
    except RefusedError as error:
        check_told(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", "2"),
        ("vocab_size", 1.5),
        ("vocab_size", -1),
        ("vocab_size", 10**18),
        ("vocab_size", True),
        ("num_hidden_layers", 2**31),
        ("hidden_size", 2**31),
        ("rope_theta", 0),
        ("rope_theta", []),
        ("rms_norm_eps", math.nan),
        ("rope_scaling", "linear"),
        ("rope_scaling", {"rope_type": "linear", "factor": 0}),
        ("eos_token_id", [{"id": 2}]),
        ("eos_token_id", "2"),
    ],
)
def test_a_value_that_none_can_have_is_named_with_its_file_and_what_is_allowed(field, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {field: value}))
    with pytest.raises(RefusedError, match=rf"config\.json' has {field}(\.factor)?=.*, which must be "):
        read_hf_config(tmp_path)


def test_counts_without_end_are_refused_before_anything_is_built():
    with pytest.raises(RefusedError, match="num_local_experts=1000000000, which must be a whole number from 1 to 4096"):
        registry.read_config(CONFIGS["mixtral"] | {"num_local_experts": 10**9}, "config.json")


def test_every_kind_takes_what_real_configs_have():
    for config in CONFIGS.values():
        check_kinds(config, "config.json")


@pytest.fixture(scope="module")
def tokenizer_files() -> dict[str, Any]:
    """A whole, small tokenizer, by its files."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocabulary | {"he": 256}, merges=[("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return {
        "tokenizer": json.loads(backend.to_str()),
        "tokenizer_config": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>"},
            "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "added_tokens_decoder": {"257": {"content": "<s>", "special": True}},
        },
        "generation_config": {"eos_token_id": [258]},
        "config": {"eos_token_id": 258, "bos_token_id": 257},
    }


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields), encoding="utf-8", errors="replace")
    return folder


@LIGHT
@given(data=st.data())
def test_tokenizer_files(tmp_path, tokenizer_files, data):
    name = data.draw(st.sampled_from(sorted(tokenizer_files)))
    write(tmp_path, tokenizer_files | {name: changed(data, tokenizer_files[name])})
    try:
        tokenizer = read_tokenizer(tmp_path, "the model", 259)
        tokenizer.encode("hello")
    except RefusedError as error:
        check_told(error)


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        {"normalizer": CHARSMAP},
        {"normalizer": CHARSMAP | {"precompiled_charsmap": "/////w=="}},
        {"normalizer": CHARSMAP | {"precompiled_charsmap": "CAAAAP////8AAAAA"}},
        {"normalizer": {"type": "Prepend", "prepend": "x" * 10_000_000}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$|("}, "behavior": "Isolated", "invert": False}},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_a_tokenizer_that_panics_aborts_or_hangs_is_refused_and_this_process_lives(
    change, tmp_path, tokenizer_files, monkeypatch
):
    monkeypatch.setattr(tokenizer_files_module.WORKERS, "_seconds", 3.0)
    files = {"tokenizer": tokenizer_files["tokenizer"] | change}
    with pytest.raises(RefusedError, match=r"the tokenizer of the model|is no tokenizer"):
        read_tokenizer(write(tmp_path, files), "the model", 259)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", '{"a": ' * 100_000 + "1" + "}" * 100_000),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": []}}'),
        ("generation_config.json", '{"eos_token_id": "2"}'),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_files_around_the_vocabulary(file, content, tmp_path, tokenizer_files):
    folder = write(tmp_path, tokenizer_files)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RefusedError):
        read_tokenizer(folder, "the model", 259)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    write_folder(folder, config=CONFIG | {"rope_parameters": rope})
    return write_gguf(folder, folder / "model.gguf").read_bytes()


@LIGHT
@given(data=st.data())
def test_gguf_files(tmp_path, gguf_file, data):
    """Bytes of the head, where counts, lengths and types stand."""
    whole = bytearray(gguf_file)
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 4000)) % len(whole)] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    try:
        GGUFCheckpoint(path).tokenizer()
    except RefusedError as error:
        check_told(error)


@LIGHT
@given(data=st.data())
def test_safetensors_files(tmp_path, data):
    folder = write_folder(tmp_path / "model")
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 3000)) % len(whole)] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        SafetensorsCheckpoint(folder)
    except RefusedError as error:
        check_told(error)
