"""What becomes of the fields of a `config.json` that its family has not read: one that could change answers is never
ignored without a word.

A field that is known to change no answer is passed over. One that could change answers is refused, unless it
says what the family does anyway. What nobody here knows is told in the log.
"""

from collections.abc import Callable, Mapping
from typing import Any

from .field_kinds import shown
from .fields import Fields

OF_TRAINING = {
    "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "initializer_range", "pretraining_tp",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "use_flash_attn",
}  # fmt: skip
OF_TRANSFORMERS = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_sliding_window_pattern",
    "add_cross_attention", "architectures", "attn_implementation", "auto_map", "cache_implementation",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "dtype", "finetuning_task", "id2label", "is_decoder",
    "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states", "prefix",
    "problem_type", "pruned_heads", "return_dict", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder",
    "torch_dtype", "torchscript", "transformers_version", "use_bfloat16", "use_cache",
}  # fmt: skip
OF_GENERATION = {
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
"""Defaults for requests, which transformers 4 wrote beside the model's shape; here requests have their own."""
OF_TOKENIZERS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class",
    "model_max_length",
}  # fmt: skip
OF_IMAGES = {
    "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index", "text_config",
}  # fmt: skip
OF_OTHER_PROGRAMS = {
    "transformers.js_config", "is_llama_config", "unsloth_fixed", "unsloth_version", "use_parallel_embedding",
}  # fmt: skip
"""The last is how the authors of Cohere spread an embedding over chips."""
READ_ELSEWHERE = {"quantization_config", "original_max_position_embeddings", "initial_context_length"}
"""By the checkpoint, and by ropes that have a trained length; the last says what gpt-oss' rope says."""

HARMLESS = (
    OF_TRAINING | OF_TRANSFORMERS | OF_GENERATION | OF_TOKENIZERS | OF_IMAGES | OF_OTHER_PROGRAMS | READ_ELSEWHERE
)
"""Change no answer."""

OF_WINDOWS = {"sliding_window", "max_window_layers", "layer_types"}
"""Do nothing where `use_sliding_window` is false."""


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


NEVER = one_of()

SAYS_NOTHING_NEW: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "lm_head_bias", "qkv_bias", "use_qkv_bias", "use_bias"), one_of(False)
    ),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "qk_norm", "norm_topk_prob"), one_of(False)),
    **dict.fromkeys(("use_parallel_residual", "use_parallel_block"), one_of(False)),
    **dict.fromkeys(("use_bidirectional_attention", "alibi", "use_mrope", "rope_interleaved"), one_of(False)),
    **dict.fromkeys(("is_causal", "use_embedding_sharing", "use_gated_activation"), one_of(True)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"), one_of(1)),
    **dict.fromkeys(("rotary_pct", "interpolate_factor", "full_attn_mod", "decoder_sparse_step"), one_of(1)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"), NEVER),
    **dict.fromkeys(("attention_multiplier", "clip_qkv", "rope_local_base_freq", "sliding_window_pattern"), NEVER),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"), NEVER),
    **dict.fromkeys(("swiglu_alpha", "swiglu_limit"), NEVER),
    **dict.fromkeys(("sliding_window", "max_window_layers", "no_rope_layer_interval"), NEVER),
    "use_sliding_window": one_of(False),
    "layer_types": lambda types: set(types) <= {"full_attention"},
    "no_rope_layers": lambda has_rope: all(one == 1 for one in has_rope),
    "mlp_only_layers": one_of([]),
    "position_embedding_type": one_of("rope", "rotary", "absolute"),
    "order_of_interleaved_layers": one_of("local_attn_first"),
    "hidden_act": one_of("silu"),
    "hidden_activation": NEVER,
}
"""Fields that some family or its kin computes with, and whether a value asks for what all others do anyway."""

SAME_AS = {
    "sliding_window_size": "sliding_window", "layer_switch": "sliding_window_pattern",
    "experts_per_token": "num_experts_per_tok",
}  # fmt: skip
"""Other names that published configs give a field beside it: Gemma 2's, Cohere 2's and gpt-oss'."""


def check_unread(fields: Fields) -> list[str]:
    """The fields that nobody here knows. Raises RefusedError for one that could change answers and was not read."""
    unknown = []
    for part, unread in fields.unread():
        for name, value in unread.items():
            if name in HARMLESS or (name in OF_WINDOWS and part.get("use_sliding_window") is False):
                continue
            if name in SAME_AS:
                says_nothing_new = value == part.get(SAME_AS[name])
            elif name in SAYS_NOTHING_NEW:
                says_nothing_new = SAYS_NOTHING_NEW[name](value)
            else:
                unknown.append(name)
                continue
            if not says_nothing_new:
                raise part.refused(
                    f"has {name}={shown(value)}, which its family does not read; if the model was trained without it, "
                    "take it out"
                )
    return sorted(unknown)
