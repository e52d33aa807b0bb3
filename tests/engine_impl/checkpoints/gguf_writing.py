"""A folder that transformers wrote as a GGUF file, as llama.cpp's converter does it; names are the gguf package's."""

import json

import gguf
import numpy as np
from safetensors.numpy import load_file
from tokenizers.pre_tokenizers import ByteLevel

ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "qwen3_moe": "qwen3moe",
    "cohere": "command-r",
    "gpt_oss": "gpt-oss",
    "olmo3": "olmo2",
}
"""Model types that have another name in GGUF."""

KINDS = gguf.GGMLQuantizationType
HALVES = {
    KINDS.Q4_0: (0,), KINDS.Q4_1: (0, 2), KINDS.Q5_0: (0,), KINDS.Q5_1: (0, 2), KINDS.Q8_0: (0,), KINDS.Q2_K: (80, 82),
    KINDS.Q3_K: (108,), KINDS.Q4_K: (0, 2), KINDS.Q5_K: (0, 2), KINDS.Q6_K: (208,), KINDS.IQ4_NL: (0,),
    KINDS.IQ4_XS: (0,), KINDS.MXFP4: (),
}  # fmt: skip
"""Where a block has its float16 numbers (bytes); MXFP4 has an exponent instead."""


def add_shape(writer, fields):
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if "layer_norm_eps" in fields:
        writer.add_layer_norm_eps(fields["layer_norm_eps"])
    else:
        writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    if fields.get("sliding_window") and fields["model_type"] != "mistral":
        writer.add_sliding_window(fields["sliding_window"])
    if fields["model_type"] == "olmo3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in fields["layer_types"]])
    if fields.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(fields["attn_logit_softcapping"])
    if fields.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(fields["final_logit_softcapping"])
    if "num_local_experts" in fields:
        writer.add_expert_count(fields["num_local_experts"])
        writer.add_expert_used_count(fields["num_experts_per_tok"])
    if fields["model_type"] == "gpt_oss":
        writer.add_expert_feed_forward_length(fields["intermediate_size"])
    if "moe_intermediate_size" in fields:
        writer.add_expert_feed_forward_length(fields["moe_intermediate_size"])
    if "logits_scaling" in fields:
        writer.add_attention_scale(fields["attention_multiplier"])
        writer.add_embedding_scale(fields["embedding_multiplier"])
        writer.add_residual_scale(fields["residual_multiplier"])
        writer.add_logit_scale(fields["logits_scaling"])
    if "logit_scale" in fields:
        writer.add_logit_scale(fields["logit_scale"])
    return head_dim


def stacked(tensors):
    """`...experts.0.w1.weight`, ... as one tensor, `...experts.w1.weight`; the norms of heads, likewise."""
    stacks = {}
    for name, value in tensors.items():
        parts = name.split(".")
        several = next((part for part in ("experts", "norms") if part in parts), None)
        number = int(parts.pop(parts.index(several) + 1)) if several else None
        if several == "norms":
            parts.remove("norms")
        stacks.setdefault(".".join(parts), {})[number] = value
    return {
        name: of_number[None] if None in of_number else np.stack([of_number[e] for e in sorted(of_number)])
        for name, of_number in stacks.items()
    }


def of_gpt_oss(tensors):
    """Experts are stacked already: gate and up in turns become two, and matrices [out, in]."""
    named = {}
    for name, value in tensors.items():
        if "experts" not in name:
            named[f"{name}.weight" if name.endswith("sinks") else name] = value
            continue
        path, _, own = name.rpartition(".")
        matrix, kind = own.removesuffix("_bias"), "bias" if own.endswith("_bias") else "weight"
        value = value if kind == "bias" else value.swapaxes(1, 2)
        parts = {"gate_proj": value[:, ::2], "up_proj": value[:, 1::2]} if "up" in matrix else {"down_proj": value}
        named |= {f"{path}.{part}.{kind}": np.ascontiguousarray(array) for part, array in parts.items()}
    return named


def llama3_factors(rope, head_dim):
    """What Llama 3's rope divides its frequencies by."""
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = original / (2 * np.pi) * rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return np.float32(1 / ((1 - share) / factor + share))


def add_rope(writer, rope, head_dim):
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    elif "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.float32(rope[f"{kind}_factor"]))


def add_byte_tokenizer(writer, *, vocab_size, pre="smollm", control=("<s>", "</s>"), eos_id=257):
    """256 bytes, control tokens, and a token that merges: `ab`."""
    letters = sorted(ByteLevel.alphabet())
    fill = [f"<{i}>" for i in range(vocab_size - 257 - len(control))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*letters, *control, "ab", *fill])
    writer.add_token_types([1] * 256 + [3] * len(control) + [1] * (1 + len(fill)))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(eos_id)


def stored(name, value, fields, architecture):
    if architecture in ("llama", "smollm3", "granite") and ("q_proj" in name or "k_proj" in name):
        heads = fields["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    return value + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else value


def write_gguf(folder, path, *, extra=None, fields=None, kind=None, **tokenizer):
    """The folder's model with one token a byte for a tokenizer. `extra`: tensors beside the model's; `fields`: of its
    architecture, which the gguf package has a method for; `kind`: how matrices are quantised."""
    more = fields or {}
    fields = json.loads((folder / "config.json").read_text())
    model_type: str = fields["model_type"]
    architecture = ARCHITECTURES.get(model_type, model_type)
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = add_shape(writer, fields)
    rope = fields["rope_parameters"]
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    add_rope(writer, rope.get("full_attention", rope), head_dim)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    add_byte_tokenizer(writer, vocab_size=fields["vocab_size"], **tokenizer)
    kinds: dict[str, gguf.MODEL_ARCH] = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], fields["num_hidden_layers"])
    tensors = load_file(folder / "model.safetensors")
    tensors = of_gpt_oss(tensors) if model_type == "gpt_oss" else stacked(tensors)
    for name, value in tensors.items():
        if fields["tie_word_embeddings"] and name == "lm_head.weight":
            continue
        value, its_kind = stored(name, value, fields, architecture), None
        if kind is not None and value.ndim > 1:
            value, its_kind = gguf.quantize(value, kind), kind
        writer.add_tensor(str(names.get_name(name, (".weight", ".bias"))), value, raw_dtype=its_kind)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_codes(rng, kind, shape, halves):
    """A matrix's rows of bytes: random codes, and for each block the float16 numbers that `halves` draws."""
    inputs, size = gguf.GGML_QUANT_SIZES[kind]
    stored = rng.integers(0, 256, (shape[0], shape[1] // inputs, size), np.uint8)
    for at in HALVES[kind]:
        stored[..., at : at + 2] = halves(rng, stored.shape[:2])[..., None].view(np.uint8)
    if kind == KINDS.MXFP4:
        stored[..., 0] = rng.integers(119, 123, stored.shape[:2])
    return stored.reshape(shape[0], -1)


def random_matrix(rng, kind, shape):
    """Likewise of any kind, of values that are about as large as they should be in a matrix of so many inputs."""
    if kind in (KINDS.F32, KINDS.F16, KINDS.BF16):
        return gguf.quantize(rng.normal(size=shape).astype(np.float32) * shape[1] ** -0.5, kind)
    of_ones = random_codes(
        np.random.default_rng(0), kind, (64, shape[1]), lambda rng, shape: np.ones(shape, np.float16)
    )
    scale = shape[1] ** -0.5 / gguf.dequantize(of_ones, kind).std()
    return random_codes(rng, kind, shape, lambda rng, shape: (rng.uniform(0.5, 1.5, shape) * scale).astype(np.float16))


def write_random_llama(path, kinds, *, layers=2, dim=256, tied=True, head=KINDS.Q8_0, spoil=None):
    """A Llama whose layers' matrices are of these kinds in turns. `spoil`: changes the bytes of the matrix it names."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    fields = {
        "num_hidden_layers": layers, "max_position_embeddings": 256, "hidden_size": dim, "intermediate_size": dim,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "model_type": "llama",
    }  # fmt: skip
    add_shape(writer, fields)
    writer.add_rope_freq_base(10000.0)
    add_byte_tokenizer(writer, vocab_size=261)
    matrices = {"token_embd": ((261, dim), head)} | ({} if tied else {"output": ((261, dim), head)})
    of_layer = {
        "attn_q": dim,
        "attn_k": dim // 2,
        "attn_v": dim // 2,
        "attn_output": dim,
        "ffn_gate": dim,
        "ffn_up": dim,
    }
    names = [f"blk.{i}.{name}" for i in range(layers) for name in (*of_layer, "ffn_down")]
    for number, name in enumerate(names):
        matrices[name] = ((of_layer.get(name.split(".")[-1], dim), dim), kinds[number % len(kinds)])
    for name, (shape, kind) in matrices.items():
        stored = random_matrix(rng, kind, shape)
        if spoil and name == spoil[0]:
            spoil[1](stored)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
    for name in ["output_norm", *(f"blk.{i}.{norm}" for i in range(layers) for norm in ("attn_norm", "ffn_norm"))]:
        writer.add_tensor(f"{name}.weight", rng.uniform(0.9, 1.1, dim).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
