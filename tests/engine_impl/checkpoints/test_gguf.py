"""GGUF files that are not what they should be."""

import gguf
import numpy as np
import pytest
from slipstream.engine_impl.checkpoints.gguf import GGUFCheckpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.loading import load_engine

HEADS, KV_HEADS, HEAD_DIM, DIM, FFN, VOCABULARY = 4, 2, 8, 32, 48, 259


def write_model(path, *, family="llama", drop=(), extra=None, shapes=None, scaling=None):
    """A whole tiny Llama, random, with a byte-level tokenizer."""
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
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    letters = sorted(pre_tokenizers().ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*letters, "<s>", "</s>", "ab"])
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
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


def pre_tokenizers():
    from tokenizers import pre_tokenizers

    return pre_tokenizers


def load(path):
    return load_engine(EngineConfig(model=str(path), cache_length=128, slots=2, tensor_parallel=1))


def test_a_whole_file_loads_and_answers(tmp_path):
    engine, params = load(write_model(tmp_path / "m.gguf"))
    tokenizer = engine.get_tokenizer()
    assert tokenizer.encode("ab") == [258]
    assert tokenizer.stop_ids == {257}
    prefix, first = engine.prefill(params, *engine.pad(tokenizer.encode("hello")))
    assert 0 <= int(first.token_B[0]) < VOCABULARY
    assert prefix.kv.rows.shape == (1, KV_HEADS, 16, 2 * HEAD_DIM)


def test_the_rope_of_llama_3_comes_from_its_tensor(tmp_path):
    path = write_model(tmp_path / "m.gguf", extra={"rope_freqs.weight": (HEAD_DIM // 2,)})
    checkpoint = GGUFCheckpoint(path)
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    assert checkpoint.config.rope_factors == pytest.approx(stored.data.tolist())
    load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["blk.0.ffn_up.weight"]}, "no tensor for the parameter 'layers.0.mlp.up_proj.weight'"),
        ({"extra": {"blk.0.attn_q.bias": (32,)}}, "no parameter for blk.0.attn_q.bias"),
        ({"shapes": {"blk.0.ffn_gate.weight": (FFN, DIM - 1)}}, r"gate_proj.weight has shape \(48, 31\)"),
        ({"family": "qwen2"}, "family 'qwen2'; the families there are: llama"),
        ({"scaling": "yarn"}, "scales its rope by 'yarn'"),
    ],
)
def test_weights_are_never_wrong_in_silence(tmp_path, change, message):
    with pytest.raises(RefusedError, match=message):
        load(write_model(tmp_path / "m.gguf", **change))


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
