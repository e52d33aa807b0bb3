"""GGUF files that are not what they should be."""

import struct
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from slipstream.engine_impl.checkpoints.damage import damage_told
from slipstream.engine_impl.checkpoints.gguf import GGUFCheckpoint
from slipstream.engine_impl.checkpoints.gguf_config import DOES_NOTHING, KEYS, read_gguf_config
from slipstream.engine_impl.checkpoints.gguf_file import GGUFFile
from slipstream.engine_impl.checkpoints.gguf_parts import GGUFParts
from slipstream.engine_impl.checkpoints.pieces import read_pieces
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.loading import load_engine
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.text.chat import Chat
from tokenizers.pre_tokenizers import ByteLevel

from .vocabularies import CORPUS

HEADS, KV_HEADS, HEAD_DIM, DIM, FFN, VOCABULARY = 4, 2, 8, 32, 48, 259


def write_model(
    path, *, family="llama", drop=(), extra=None, shapes=None, scaling=None, pieces=None, fields=None, model="gpt2",
    pre="smollm",
):  # fmt: skip
    """A whole tiny Llama, random, with a byte-level tokenizer, or with these SentencePiece pieces."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    for key, value in (fields or {}).items():
        kinds = {
            bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32,
            str: gguf.GGUFValueType.STRING,
        }  # fmt: skip
        key = key if key.startswith("tokenizer") else f"{family}.{key}"
        if f"{family}." in key and isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    if pieces is None:
        letters = sorted(ByteLevel.alphabet())
        writer.add_tokenizer_model(model)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list([*letters, "<s>", "</s>", "ab"])
        writer.add_token_types([1] * 256 + [3, 3, 1])
        writer.add_token_merges(["a b"])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces.texts)
        writer.add_token_scores(pieces.scores)
        writer.add_token_types(pieces.kinds)
        writer.add_bos_token_id(1)
    writer.add_eos_token_id(257 if pieces is None else 2)
    tensors = {
        "token_embd.weight": (VOCABULARY, DIM),
        "output_norm.weight": (DIM,),
        "blk.0.attn_norm.weight": (DIM,),
        "blk.0.attn_q.weight": (HEADS * HEAD_DIM, DIM),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, DIM),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, DIM),
        "blk.0.attn_output.weight": (DIM, HEADS * HEAD_DIM),
        "blk.0.ffn_norm.weight": (DIM,),
        "blk.0.ffn_gate.weight": (FFN, DIM),
        "blk.0.ffn_up.weight": (FFN, DIM),
        "blk.0.ffn_down.weight": (DIM, FFN),
        **(extra or {}),
        **(shapes or {}),
    }
    for name, shape in tensors.items():
        if name not in drop:
            writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path):
    return load_engine(EngineConfig(model=str(path), cache_length=128, slots=2, tensor_parallel=1))


def test_a_whole_file_loads_and_answers(tmp_path):
    engine, params = load(write_model(tmp_path / "m.gguf"))
    tokenizer = engine.get_tokenizer()
    assert tokenizer.encode("ab") == [258]
    assert tokenizer.stop_ids == {257}
    session = Session(engine, params)
    assert session.prefilled(0, tokenizer.encode("hello")).kv.rows.shape == (1, KV_HEADS, 16, 2 * HEAD_DIM)
    assert 0 <= int(session.start(0, tokenizer.encode("hello")).token_BW[0, 0]) < VOCABULARY


def test_the_rope_of_llama_3_comes_from_its_tensor(tmp_path):
    path = write_model(tmp_path / "m.gguf", extra={"rope_freqs.weight": (HEAD_DIM // 2,)})
    checkpoint = GGUFCheckpoint(path)
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    config: Any = checkpoint.config
    assert config.rope_factors == pytest.approx(stored.data.tolist())
    load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["blk.0.ffn_up.weight"]}, "missing: layers.0.mlp.up_proj.weight"),
        ({"extra": {"blk.0.attn_v.bias": (16,)}}, "unexpected: layers.0.self_attn.v_proj.bias"),
        ({"extra": {"blk.0.attn_q.bias": (32,)}}, "missing: layers.0.self_attn.k_proj.bias"),
        (
            {"shapes": {"blk.0.ffn_gate.weight": (FFN, DIM - 1)}},
            r"gate_proj.weight is \(48, 31\), the model needs \(48, 32\)",
        ),
        ({"family": "deepseek2"}, r"family 'deepseek2', which is not there: its cache .*\(MLA\); the families"),
        ({"family": "mamba"}, "family 'mamba'; the families there are: llama, qwen2, qwen3, smollm3, olmo2"),
        ({"scaling": "longrope"}, "scales its rope by 'longrope'; those there are: none, linear, yarn"),
        ({"family": "qwen2", "fields": {"expert_count": 8}}, "is a qwen2 with experts; those there are: llama"),
        ({"fields": {"rope.scaling.alpha": 8.0}}, "has rope.scaling.alpha=8.0, which is not read for a llama"),
        ({"fields": {"attention.sliding_window": 64}}, "attention.sliding_window=64, which is not read for a llama"),
        ({"fields": {"rope.dimension_sections": [2, 1, 1]}}, r"rope.dimension_sections=\[2, 1, 1\], which is not read"),
        ({"fields": {"attn_logit_softcapping": 50.0}}, "attn_logit_softcapping=50.0, which is not read for a llama"),
        ({"fields": {"attention.causal": False}}, "attention.causal=False, which is not read for a llama"),
        ({"fields": {"attention.value_length": 16}}, "heads of 8 for keys and 16 for values"),
        ({"fields": {"rope.dimension_count": 4}}, "turns only a part of each head"),
        ({"fields": {"attention.head_count_kv": [2, 4]}}, r"layers that differ in attention.head_count_kv: \[2, 4\]"),
        (
            {"extra": {"rope_freqs.weight": (HEAD_DIM // 2,)}, "fields": {"rope.scaling.factor": 4.0}},
            "scales its rope twice",
        ),
    ],
)
def test_weights_are_never_wrong_in_silence(tmp_path, change, message):
    with pytest.raises(RefusedError, match=message):
        load(write_model(tmp_path / "m.gguf", **change))


@pytest.mark.parametrize(
    ("fields", "factors"),
    [
        ({"rope.scale_linear": 4.0}, (4.0,) * 4),
        ({"rope.scaling.factor": 4.0}, (4.0,) * 4),
        ({"rope.scaling.factor": 0.0}, None),
        ({"logit_scale": 1.0, "attention.scale": 0.0, "attention.causal": True, "vocab_size": 5}, None),
        ({"rope.dimension_sections": [0, 0, 0, 0], "attention.layer_norm_epsilon": 0.1}, None),
        ({}, None),
    ],
)
def test_a_factor_without_a_type_is_linear(fields, factors, tmp_path):
    """Two names of one thing, as in llama.cpp; 0 and 1 are no scaling."""
    config: Any = GGUFCheckpoint(write_model(tmp_path / "m.gguf", fields=fields)).config
    assert config.rope_factors == factors


@pytest.mark.parametrize("key", ["eot", "eom"])
def test_a_turn_ends_where_the_file_says(key, tmp_path):
    path = write_model(tmp_path / "m.gguf", fields={f"tokenizer.ggml.{key}_token_id": 100})
    assert GGUFCheckpoint(path).tokenizer().stop_ids == {100, 257}


def test_every_known_field_is_read_or_refused(tmp_path):
    """Of those that the package knows, so that a new one is refused until somebody looks at it."""
    parts = GGUFParts(write_model(tmp_path / "m.gguf"))
    fields, config = parts.fields, read_gguf_config(parts, "m")
    for key in KEYS:
        parts.fields = fields | {f"llama.{key}": 3}
        try:
            with damage_told("m"):
                changed = read_gguf_config(parts, "m") != config
        except RefusedError:
            changed = True
        assert changed or key in DOES_NOTHING, key


def test_the_chat_template_is_the_files(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}>"
    fields = {
        "tokenizer.chat_template": template, "tokenizer.chat_template.tool_use": "not this one",
        "tokenizer.ggml.bos_token_id": 256,
    }  # fmt: skip
    tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", fields=fields)).tokenizer()
    chat = Chat.of([{"role": "user", "content": "hi"}])
    assert tokenizer.render_chat(chat) == "<s>[user]hi</s>>"
    without = GGUFCheckpoint(write_model(tmp_path / "without.gguf")).tokenizer()
    with pytest.raises(RefusedError, match="has no chat template"):
        without.render_chat(chat)
    broken = write_model(tmp_path / "broken.gguf", fields={"tokenizer.chat_template": "{% for %}"})
    with pytest.raises(RefusedError, match="chat template"):
        GGUFCheckpoint(broken).tokenizer().render_chat(chat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "viking"}, "pre-tokenizer 'viking' is not there; those there are: gpt-2"),
        ({"pre": "default"}, "pre-tokenizer 'default' is not there"),
        ({"pre": None}, r"lacks the field 'tokenizer\.ggml\.pre'"),
        ({"model": "t5"}, r"has a tokenizer 't5'; those there are: gpt2 \(byte-level BPE\), llama"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused_by_name(change, message, tmp_path):
    with pytest.raises(RefusedError, match=message):
        GGUFCheckpoint(write_model(tmp_path / "m.gguf", **change)).tokenizer()


@pytest.mark.parametrize(
    ("fields", "first_ids"),
    [
        ({"tokenizer.ggml.bos_token_id": 256}, []),
        ({"tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.add_bos_token": False}, []),
        ({"tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.add_bos_token": True}, [256]),
    ],
)
def test_a_bos_comes_first_where_the_file_says_so(fields, first_ids, tmp_path):
    tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", fields=fields)).tokenizer()
    assert tokenizer.encode("ab") == [*first_ids, 258]


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType, ids=lambda kind: kind.name)
def test_every_kind_is_read_or_refused_by_name(tmp_path, kind):
    """Random codes of each kind, whole and one entry of a stack, are what the package makes of them; by this every kind
    that a later package has is tried too."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    width = 2 * block_size
    stored = rng.integers(0, 256, (3, 5, 2 * block_bytes)).astype(np.uint8)
    file = write_tensors(tmp_path / "m.gguf", {"x": (kind, stored)})
    assert file.tensors["x"].shape == (3, 5, width)
    if kind not in (KINDS.F32, KINDS.F16, *gguf.quants._type_traits):
        with pytest.raises(ValueError, match=f"tensor x is stored as {kind.name}, which cannot be dequantised"):
            file.tensor("x")
        return
    with np.errstate(all="ignore"):  # random scales
        expected = gguf.quants.dequantize(stored, kind)
        whole, one = file.tensor("x"), file.tensor("x", 2)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(one, expected[2])


def test_a_kind_that_the_package_does_not_know_is_told(tmp_path):
    path = tmp_path / "m.gguf"
    write_tensors(path, {"weights": (KINDS.I8, np.zeros((2, 4), np.int8))})
    number = struct.pack("<I", KINDS.I8)
    data = path.read_bytes()
    at = data.index(b"weights") + 7 + 4 + 2 * 8
    assert data[at : at + 4] == number
    path.write_bytes(data[:at] + struct.pack("<I", 99) + data[at + 4 :])
    with pytest.raises(RefusedError, match=r"tensor weights is of kind 99, which gguf \S+ does not know"):
        GGUFCheckpoint(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(RefusedError, match="does not exist; give `embedded` or the path of a GGUF file"):
        GGUFCheckpoint(tmp_path / "none.gguf")


@pytest.mark.parametrize("keep", [0, 3, 40, 5000, 40000])
def test_a_cut_or_foreign_file_is_told(tmp_path, keep):
    path = write_model(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RefusedError, match=r"m\.gguf.*fetch it anew"):
        GGUFCheckpoint(path)


def test_a_cache_longer_than_the_models_context_is_refused(tmp_path):
    config = EngineConfig(model=str(write_model(tmp_path / "m.gguf")), cache_length=512)
    with pytest.raises(RefusedError, match="cache_length=512 is beyond what tiny was trained for; use at most 256"):
        load_engine(config)


def write_tensors(path, tensors, **fields):
    """Tensors as bytes, by name: (kind, u8 array of rows)."""
    writer = gguf.GGUFWriter(path, "none")
    for key, value in fields.items():
        writer.add_key_value(key, *value)
    for name, (kind, stored) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


KINDS = gguf.GGMLQuantizationType


def block(*parts):
    """One quantised block: f16 scales, then bytes."""
    return np.concatenate([np.frombuffer(np.asarray(part).tobytes(), np.uint8) for part in parts])[None]


def f16(*values):
    return np.array(values, np.float16)


def u8(count, value):
    return np.full(count, value, np.uint8)


BLOCKS = {
    # By the layouts in ggml-common.h: value = d * q, d * (q - 8), d * q + m, ...
    KINDS.F16: (f16(1.5, -2.0).view(np.uint8)[None], [1.5, -2.0]),
    KINDS.BF16: (np.array([0x3FC0, 0xC000], np.uint16).view(np.uint8)[None], [1.5, -2.0]),
    KINDS.Q8_0: (block(f16(0.5), np.full(32, -3, np.int8)), [-1.5] * 32),
    KINDS.Q4_0: (block(f16(0.5), u8(16, 0x3C)), [2.0] * 16 + [-2.5] * 16),
    KINDS.Q4_1: (block(f16(0.5, 1.0), u8(16, 0x3C)), [7.0] * 16 + [2.5] * 16),
    # 8 sub-blocks, each with scale 2 and minimum 1, of q = 3: 0.5 * 2 * 3 - 0.25 * 1
    KINDS.Q4_K: (block(f16(0.5, 0.25), u8(4, 2), u8(4, 1), u8(4, 0x12), u8(128, 0x33)), [2.75] * 256),
    # 16 scales of 3, q = 5 + 16 * 2 - 32
    KINDS.Q6_K: (block(u8(128, 0x55), u8(64, 0xAA), u8(16, 3), f16(0.5)), [7.5] * 256),
}  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_each_kind_of_quantisation_by_hand(tmp_path, kind):
    stored, values = BLOCKS[kind]
    file = write_tensors(tmp_path / "m.gguf", {"x": (kind, np.repeat(stored, 3, axis=0))})
    assert file.tensors["x"].shape == (3, len(values))
    np.testing.assert_array_equal(file.tensor("x"), [values] * 3)


def test_every_kind_of_field(tmp_path):
    kinds = gguf.GGUFValueType
    fields = {
        "u8": (200, kinds.UINT8), "i8": (-3, kinds.INT8), "u16": (60000, kinds.UINT16), "i16": (-5, kinds.INT16),
        "u32": (2**31, kinds.UINT32), "i32": (-(2**30), kinds.INT32), "u64": (2**63, kinds.UINT64),
        "i64": (-(2**62), kinds.INT64), "f32": (0.5, kinds.FLOAT32), "f64": (0.1, kinds.FLOAT64),
        "yes": (True, kinds.BOOL), "text": ("größe", kinds.STRING),
    }  # fmt: skip
    lists = {"numbers": [1, 2, 3], "floats": [0.5, 1.5], "texts": ["a", "", "東京"], "flags": [True, False]}
    path = tmp_path / "m.gguf"
    file = write_tensors(path, {}, **fields, **{key: (value, kinds.ARRAY) for key, value in lists.items()})
    expected = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if "GGUF" not in key}
    assert file.fields == expected
    assert {key: file.fields[key] for key in lists} == lists
    assert {key: file.fields[key] for key in fields} == {key: value for key, (value, _) in fields.items()}


def test_sentencepiece_tokenizers(tmp_path, llama_pieces):
    """The pieces of a tokenizer.model, moved into a GGUF file, give the ids of the SentencePiece library."""
    (tmp_path / "tokenizer.model").write_bytes(llama_pieces)
    pieces, _ = read_pieces(tmp_path / "tokenizer.model")
    tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", pieces=pieces)).tokenizer()
    reference = sentencepiece.SentencePieceProcessor(model_proto=llama_pieces)
    for text in [*CORPUS, " leading", "two  spaces"]:
        assert tokenizer.encode(text) == [1, *reference.encode(text)], text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a</s>b") == [1, *reference.encode("a"), 2, *reference.encode("b")]
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (1, {2})


def test_sentencepiece_without_a_space_in_front(tmp_path, gemma_pieces):
    """As Gemma's: the file says so, and a space of the text's own counts."""
    (tmp_path / "tokenizer.model").write_bytes(gemma_pieces)
    pieces, _ = read_pieces(tmp_path / "tokenizer.model")
    fields = {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = GGUFCheckpoint(write_model(tmp_path / "m.gguf", pieces=pieces, fields=fields)).tokenizer()
    reference = sentencepiece.SentencePieceProcessor(model_proto=gemma_pieces)
    for text in [*CORPUS, " leading", "two  spaces"]:
        assert tokenizer.encode(text) == [1, *reference.encode(text)], text
        assert tokenizer.decode(tokenizer.encode(text)) == text
