"""Every family against Hugging Face transformers: a tiny random checkpoint that transformers wrote, token by token."""

import functools
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from slipstream.engine_impl import bridge
from slipstream.engine_impl.checkpoints.hf_config import read_hf_config
from slipstream.engine_impl.compiler.presets import PRESETS
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.loading import load_engine
from slipstream.engine_impl.models import experts, mixtral, registry
from slipstream.engine_impl.models.fields import Fields
from slipstream.engine_impl.models.transformer import windows_of_layers
from slipstream.engine_impl.models.unread import check_unread

from tests.arrays import array

from ..tiny_models import logits_behind
from .against_transformers import PROMPTS, assert_equal, draw_weights, load, reference_logits

SIZES = {
    "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 60, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 101, "max_position_embeddings": 512,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
"""Nothing is round: eight chips share four kv heads, and neither divide the ffn nor the vocabulary."""

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
OLMO3_ROPES = {
    "full_attention": DEFAULT | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "sliding_attention": DEFAULT,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-biases": ("Llama", {"rope_parameters": DEFAULT, "attention_bias": True}),
    "mistral": ("Mistral", {"rope_parameters": DEFAULT, "sliding_window": 12}),
    "qwen2": ("Qwen2", {"rope_parameters": DEFAULT, "tie_word_embeddings": True}),
    "qwen2-windows": (
        "Qwen2",
        {"rope_parameters": DEFAULT, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"rope_parameters": DEFAULT, "num_key_value_heads": 8}),
    "gemma": ("Gemma", {"rope_parameters": DEFAULT, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {
            "rope_parameters": DEFAULT, "sliding_window": 12, "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0, "final_logit_softcapping": 0.5,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "rope_parameters": GEMMA3_ROPES, "sliding_window": 7, "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": (
        "Mixtral",
        {
            "rope_parameters": DEFAULT, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 50,
            "intermediate_size": 64,
        },
    ),
    "phi3": ("Phi3", {"rope_parameters": DEFAULT, "sliding_window": 12, "num_key_value_heads": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "rope_parameters": DEFAULT, "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "rope_parameters": OLMO3_ROPES["full_attention"] | {"truncate": False}, "num_local_experts": 8,
            "num_experts_per_tok": 3, "sliding_window": 7, "swiglu_limit": 1.0,
        },
    ),
    "smollm3": ("SmolLM3", {"rope_parameters": DEFAULT, "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "smollm3-windows": (
        "SmolLM3",
        {
            "rope_parameters": DEFAULT, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9,
        },
    ),
    "olmo2": ("Olmo2", {"rope_parameters": DEFAULT, "hidden_size": 128}),
    "olmo3": (
        "Olmo3",
        {
            "rope_parameters": OLMO3_ROPES, "hidden_size": 128, "num_key_value_heads": 8, "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "cohere": (
        "Cohere",
        {
            "rope_parameters": DEFAULT, "hidden_size": 128, "use_qk_norm": True, "logit_scale": 0.3,
            "num_hidden_layers": 3,
        },
    ),
    "granite": (
        "Granite",
        {
            "rope_parameters": DEFAULT, "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
            "residual_multiplier": 0.7, "logits_scaling": 1.7,
        },
    ),
    "glm": ("Glm", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}),
    "glm4": ("Glm4", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.75}, "num_key_value_heads": 2}),
    "cohere2": (
        "Cohere2",
        {
            "rope_parameters": DEFAULT, "hidden_size": 128, "sliding_window": 12, "logit_scale": 0.3,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "stablelm": (
        "StableLm",
        {
            "rope_parameters": DEFAULT | {"partial_rotary_factor": 0.25}, "hidden_size": 128,
            "use_qkv_bias": True,
        },
    ),
    "stablelm-parallel": (
        "StableLm",
        {
            "rope_parameters": DEFAULT | {"partial_rotary_factor": 0.25}, "hidden_size": 128,
            "use_parallel_residual": True, "qk_layernorm": True,
        },
    ),
}  # fmt: skip


@functools.cache
def written_by_transformers(family: str, root: Path) -> tuple[Path, Any]:
    """(a checkpoint's folder, the model whose it is); weights large enough that greedy tokens vary."""
    import transformers

    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SIZES | fields), attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    draw_weights(model, seed=len(family))
    model.save_pretrained(root / family)
    return root / family, model


ON_ONE_ONLY = {"qwen2-windows", "smollm3-windows"}
ON_BOTH = {"gemma3", "mixtral", "cohere2"}
"""On one device layers are unrolled, by one code for all families: these have what it may get wrong (windows, ropes,
experts). Speculation's tests compare the others that do, token by token (llama, gemma2, phi3, gpt_oss, glm)."""


def marks_of(family, devices):
    is_chosen = family in ON_BOTH or (family in ON_ONE_ONLY) == (devices == 1)
    return pytest.mark.slow if is_chosen else (pytest.mark.slow, pytest.mark.product)


CASES = [
    pytest.param(*case, id="-".join(map(str, case)), marks=marks_of(*case))
    for case in itertools.product(FAMILIES, (1, 8))
]


@pytest.mark.parametrize(("family", "devices"), CASES)
def test_logits_and_steps_equal_transformers(family, devices, tmp_path_factory):
    """Prompts longer than the windows, in one piece and in two; then 32 tokens, of each of which a step says what
    transformers says of it. Eight devices scan over the layers, one has them unrolled."""
    folder, reference = written_by_transformers(family, tmp_path_factory.getbasetemp())
    assert_equal(reference, *load(folder, devices))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", {"sliding_window": 512}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma3", {"sliding_window": 512}),
        ("gemma3", {"rope_parameters": {kind: DEFAULT for kind in GEMMA3_ROPES}}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("gpt_oss", {"sliding_window": 512}),
        ("gpt_oss", {"swiglu_limit": 7.0}),
        ("gpt_oss", {"swiglu_alpha": 1.0}),
        ("smollm3", {"no_rope_layers": [1, 1, 1]}),
        ("smollm3-windows", {"sliding_window": 512}),
        ("olmo3", {"rope_parameters": {kind: DEFAULT for kind in OLMO3_ROPES}}),
        ("granite", {"embedding_multiplier": 1.0}),
        ("granite", {"attention_multiplier": 0.25}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
        ("cohere2", {"sliding_window": 512}),
        ("cohere2", {"logit_scale": 0.0625}),
    ],
)
def test_every_field_matters(family, change, tmp_path_factory):
    """The reference itself changes with it, so that a field ignored could not pass above."""
    import transformers

    folder, reference = written_by_transformers(family, tmp_path_factory.getbasetemp())
    fields = json.loads((folder / "config.json").read_text())
    config = type(reference.config)(**(fields | change))
    other = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    other.load_state_dict(reference.state_dict())
    difference = reference_logits(other, PROMPTS[0]) - reference_logits(reference, PROMPTS[0])
    assert np.abs(difference).max() > 1e-3


def in_old_form(fields):
    """As the hub has it: `rope_theta` beside `rope_scaling`, Gemma 3's local rope in a field of its own."""
    fields = dict(fields)
    rope = fields.pop("rope_parameters")
    if "full_attention" in rope:
        if fields["model_type"] == "olmo3":
            assert rope["sliding_attention"]["rope_theta"] == rope["full_attention"]["rope_theta"]
        else:
            fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return fields | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_of_a_config_say_the_same(family):
    import transformers

    name, changes = FAMILIES[family]
    fields = getattr(transformers, f"{name}Config")(**(SIZES | changes)).to_dict()
    shape = registry.read_config(fields, "config.json")
    assert registry.read_config(in_old_form(fields), "config.json") == shape
    without = {name: value for name, value in fields.items() if name != "rope_parameters"}
    with pytest.raises(RefusedError, match="neither rope_parameters nor rope_theta"):
        registry.read_config(without, "config.json")


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias=True; those there are: False"),
        ("mistral", {"attention_bias": True}, "attention_bias=True; those there are: False"),
        ("qwen2", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'; those there are: silu"),
        ("llama", {"hidden_size": None}, "lacks hidden_size"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ("gemma2", {"layer_types": ["linear_attention"]}, "layers of type linear_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0; those there are: None"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3", {"rope_parameters": {"full_attention": DEFAULT}}, "rope_parameters without sliding_attention"),
        ("mixtral", {"model_type": "mixtrol"}, "family 'mixtrol'; the families there are: cohere, cohere2, gemma"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act='gelu'; those there are: silu"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias=False; those there are: True"),
        ("llama", {"model_type": "deepseek_v2"}, r"'deepseek_v2', which is not there: its cache .*\(MLA\)"),
        ("llama", {"model_type": "deepseek_v3"}, r"'deepseek_v3', which is not there: its cache .*\(MLA\)"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers for 2 of 3 layers"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv=8.0; those there are: None"),
        ("granite", {"mlp_bias": True}, "mlp_bias=True"),
        ("glm4", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("cohere2", {"use_qk_norm": True}, "use_qk_norm=True; those there are: False"),
        ("cohere2", {"position_embedding_type": "rope_neox"}, "position_embedding_type='rope_neox'"),
        ("stablelm", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_a_family_cannot_do_is_refused(family, change, message):
    import transformers

    name, changes = FAMILIES[family]
    fields = getattr(transformers, f"{name}Config")(**(SIZES | changes)).to_dict()
    with pytest.raises(RefusedError, match=message):
        registry.read_config(fields | change, "config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_transformers_has_is_read_or_does_nothing_here(family):
    import transformers

    name, changes = FAMILIES[family]
    fields = Fields(getattr(transformers, f"{name}Config")(**(SIZES | changes)).to_dict(), "config.json")
    registry.FAMILIES[fields["model_type"]].read_config(fields)
    assert check_unread(fields) == []


@pytest.mark.parametrize(
    ("family", "field", "published"),
    [
        ("glm4", "partial_rotary_factor", 0.5),
        ("glm", "attention_bias", True),
        ("stablelm", "partial_rotary_factor", 0.25),
        ("smollm3", "no_rope_layer_interval", 4),
        ("olmo3", "sliding_window", 4096),
        ("cohere", "logit_scale", 0.0625),
        ("cohere2", "sliding_window_pattern", 4),
        ("cohere2", "sliding_window", 4096),
        ("cohere2", "logit_scale", 0.0625),
        ("gpt_oss", "sliding_window", 128),
        ("gpt_oss", "attention_bias", True),
        ("gpt_oss", "swiglu_limit", 7.0),
        ("gpt_oss", "swiglu_alpha", 1.702),
        ("granite", "logits_scaling", 1.0),
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_takes(family, field, published):
    import transformers

    name, changes = FAMILIES[family]
    config_type = getattr(transformers, f"{name}Config")
    fields = in_old_form(config_type().to_dict() | SIZES | changes | {"rope_parameters": DEFAULT})
    dropped = (field, "layer_types", "no_rope_layers")
    fields = {said: value for said, value in fields.items() if said not in dropped} | {"num_hidden_layers": 8}
    stated = fields | {field: published}
    assert config_type(**fields).to_dict() == config_type(**stated).to_dict()
    assert registry.read_config(fields, "config.json") == registry.read_config(stated, "config.json")


@pytest.mark.parametrize(
    ("layer_types", "windows"),
    [
        (["full_attention"] * 4, (None,)),
        (["sliding_attention", "full_attention"] * 2, (7, None)),
        (["sliding_attention", "full_attention", "full_attention"], (7, None, None)),
        (["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"], (7, 7, None)),
    ],
)
def test_layer_types_become_the_shortest_turn(layer_types, windows):
    assert windows_of_layers(Fields({}, "config.json"), layer_types, 7) == windows


def the_pages_family():
    """The module that docs/adding-a-model.md shows."""
    page = (Path(__file__).parents[3] / "docs/adding-a-model.md").read_text()
    return page.partition("```python\n")[2].partition("```")[0]


@pytest.fixture
def parrot(tmp_path, monkeypatch):
    """A module outside the package, and a checkpoint of its family: a Qwen2's under another name."""
    folder, reference = written_by_transformers("qwen2", tmp_path)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "parrot"}))
    (tmp_path / "parrots.py").write_text(the_pages_family())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    monkeypatch.delitem(sys.modules, "parrots", raising=False)
    return folder, reference


def test_a_family_from_outside_is_served(parrot):
    folder, reference = parrot
    config = EngineConfig(
        model=str(folder), model_module="parrots", slots=1, cache_length=128, max_prefill_length=64, tensor_parallel=1
    )
    engine, params = load_engine(config)
    logits_V = logits_behind(engine, params, PROMPTS[0][:40])
    np.testing.assert_allclose(logits_V, reference_logits(reference, PROMPTS[0][:40])[-1], atol=1e-4)


def test_a_family_from_an_installed_package_is_found(parrot, tmp_path):
    """By its entry point, without a word on the command line."""
    package = tmp_path / "parrots-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: parrots\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[slipstream.models]\nparrot = parrots\n")
    assert type(read_hf_config(parrot[0])).__name__ == "ParrotConfig"


def test_a_module_that_is_not_there_is_told():
    with pytest.raises(RefusedError, match="model_module='no_such' cannot be imported"):
        registry.use_module("no_such")


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match=r"model_type='llama' is .*\.llama\.Llama already"):
        registry.register("llama")(registry.FAMILIES["qwen2"])


def test_both_ways_through_the_experts_agree():
    """All rows through all of them, or a row through its own: under the bridge, and in torch alone."""
    mixtral_8x7b = PRESETS["mixtral-8x7b"]
    assert isinstance(mixtral_8x7b, mixtral.MixtralConfig)
    shape = replace(mixtral_8x7b, model_dim=16, ffn_dim=24)
    module = experts.MixtureOfExperts(shape, bias=True)
    weights = {name: 0.3 * torch.randn(p.shape) for name, p in module.named_parameters()}
    x_RD = torch.randn(12, shape.model_dim)
    arrays = {name: array(value.numpy()) for name, value in weights.items()}
    alone = [torch.func.functional_call(module, weights, x_RD[i : i + 1]).detach().numpy()[0] for i in range(12)]
    together = torch.func.functional_call(module, weights, x_RD).detach().numpy()
    np.testing.assert_allclose(together, alone, atol=1e-5)
    run = jax.jit(functools.partial(bridge.run, module))  # one program each; op by op would compile every op
    np.testing.assert_allclose(run(arrays, array(x_RD.numpy())), alone, atol=1e-5)
    np.testing.assert_allclose(run(arrays, array(x_RD[:1].numpy())), alone[:1], atol=1e-5)
