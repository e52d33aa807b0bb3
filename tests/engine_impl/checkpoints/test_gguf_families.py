"""Every architecture of GGUF files against the safetensors folder whose weights it holds."""

from dataclasses import asdict
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl.assembly import assembled
from slipstream.engine_impl.checkpoints.gguf import GGUFCheckpoint
from slipstream.engine_impl.checkpoints.gguf_architectures import ARCHITECTURES
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.weights.load import needed_shapes
from slipstream.engine_impl.weights.sharding import make_mesh

from ..models.test_families import DEFAULT, LLAMA3, SIZES, draw_weights
from ..tiny_models import logits_behind
from .gguf_writing import write_gguf

YARN = DEFAULT | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = DEFAULT | {
    "rope_type": "longrope", "partial_rotary_factor": 0.75, "attention_factor": 1.25,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
}  # fmt: skip
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": DEFAULT | {"rope_type": "linear", "factor": 4.0}}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-biases": ("Llama", {"rope_parameters": DEFAULT, "attention_bias": True}),
    "mistral": ("Mistral", {"rope_parameters": DEFAULT, "sliding_window": None}),
    "mixtral": (
        "Mixtral",
        {"rope_parameters": DEFAULT, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2": ("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"rope_parameters": DEFAULT}),
    "phi3": (
        "Phi3",
        {
            "rope_parameters": LONGROPE, "original_max_position_embeddings": 128, "sliding_window": 300,
            "hidden_size": 128,
        },
    ),
    "gemma": ("Gemma", {"rope_parameters": DEFAULT}),
    "gemma2": ("Gemma2", {"rope_parameters": DEFAULT, "sliding_window": 12, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3Text",
        {
            "rope_parameters": GEMMA3_ROPES, "sliding_window": 7, "query_pre_attn_scalar": 16, "num_hidden_layers": 7,
        },
    ),
    "qwen3moe": (
        "Qwen3Moe",
        {
            "rope_parameters": DEFAULT, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "rope_parameters": YARN | {"truncate": False}, "num_local_experts": 6, "num_experts_per_tok": 2,
            "sliding_window": 7,
        },
    ),
    "smollm3": ("SmolLM3", {"rope_parameters": YARN, "num_hidden_layers": 5}),
    "olmo2": ("Olmo2", {"rope_parameters": DEFAULT, "hidden_size": 128}),
    "olmo3": (
        "Olmo3",
        {
            "rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT}, "hidden_size": 128,
            "sliding_window": 7, "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "granite": (
        "Granite",
        {
            "rope_parameters": DEFAULT, "embedding_multiplier": 12.0, "attention_multiplier": 0.0625,
            "residual_multiplier": 0.25, "logits_scaling": 8.0,
        },
    ),
    "glm4": ("Glm4", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}),
    "command-r": (
        "Cohere", {"rope_parameters": DEFAULT, "hidden_size": 128, "use_qk_norm": True, "logit_scale": 0.25},
    ),
    "cohere2": (
        "Cohere2",
        {
            "rope_parameters": DEFAULT, "hidden_size": 128, "sliding_window": 12, "logit_scale": 0.25,
            "num_hidden_layers": 5,
        },
    ),
    "stablelm": (
        "StableLm",
        {
            "rope_parameters": DEFAULT | {"partial_rotary_factor": 0.25}, "hidden_size": 128, "use_qkv_bias": True,
        },
    ),
    "stablelm-parallel": (
        "StableLm",
        {
            "rope_parameters": DEFAULT | {"partial_rotary_factor": 0.25}, "hidden_size": 128, "qk_layernorm": True,
            "use_parallel_residual": True,
        },
    ),
}  # fmt: skip


def folder_of(family, root, **sizes):
    import transformers

    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SIZES | {"vocab_size": 261} | fields | sizes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    draw_weights(model, seed=1)
    model.save_pretrained(root)
    return root


def test_every_architecture_is_tried():
    of_others = {"mistral", "mixtral", "llama3", "llama-biases", "olmo3", "stablelm-parallel"}
    assert set(FAMILIES) - of_others == set(ARCHITECTURES)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_weights_equal_the_folders(family, tmp_path):
    """To the last bit; GGUF keeps its numbers in float32."""
    folder = SafetensorsCheckpoint(folder_of(family, tmp_path))
    file = GGUFCheckpoint(write_gguf(tmp_path, tmp_path / "m.gguf"))
    ours, expected = asdict(file.config), asdict(folder.config)
    for name, value in expected.items():
        if isinstance(value, float) or name.endswith("factors"):
            assert ours.pop(name) == (value if value is None else pytest.approx(value, rel=1e-6)), name
        elif name == "rope_beyond" and value is not None:
            beyond = ours.pop(name)
            assert beyond == {key: pytest.approx(one, rel=1e-6) for key, one in value.items()}
        else:
            assert ours.pop(name) == value, name
    assert not ours
    needed = needed_shapes(registry.build(file.config), file.config.num_kv_heads)
    assert set(file.shapes()) == set(needed)
    exact = 0 if "gemma" not in family else 1e-6  # one was added to the norms and taken off again
    for name in needed:
        np.testing.assert_allclose(file.tensor(name), folder.tensor(name), atol=exact, rtol=0, err_msg=name)


def can_quantise(kind):
    try:
        gguf.quantize(np.zeros((1, 256), np.float32), kind)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_quantised_matrices_have_the_quantisers_values(family, tmp_path):
    """In rows that were put in another order, and in stacks of experts; of every kind that the package writes."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 256, "head_dim": 32}
    folder = SafetensorsCheckpoint(folder_of(family, tmp_path, **sizes))
    kinds = [kind for kind in gguf.quants._type_traits if can_quantise(kind)]
    assert len(kinds) >= 8
    for kind in kinds:
        file = GGUFCheckpoint(write_gguf(tmp_path, tmp_path / f"{kind.name}.gguf", kind=kind))
        for name in file.shapes():
            expected = np.array(folder.tensor(name))
            if expected.ndim > 1:
                expected = gguf.dequantize(gguf.quantize(expected, kind), kind)
            np.testing.assert_array_equal(file.tensor(name), expected, f"{kind.name} {name}")


@pytest.mark.parametrize(
    ("name", "layers", "dim", "heads", "head_dim", "scalar"),
    [("gemma2", 46, 4608, 32, 128, 144), ("gemma2", 42, 3584, 16, 256, 256), ("gemma3", 62, 5376, 32, 128, 168)],
)
def test_gemmas_of_27b_scale_queries_by_their_width(name, layers, dim, heads, head_dim, scalar):
    """As their config.json says; a file does not."""
    fields = {
        "block_count": layers, "embedding_length": dim, "attention.head_count": heads, "attention.key_length": head_dim,
        "attention.sliding_window": 1024,
    }  # fmt: skip
    read = ARCHITECTURES[name].fields(lambda key, *default: fields.get(key, *default), ())
    assert read["query_pre_attn_scalar"] == scalar


def read_window(tmp_path, **fields):
    path = write_gguf(folder_of("gemma3", tmp_path), tmp_path / "m.gguf", fields=fields)
    config: Any = GGUFCheckpoint(path).config
    return config.window_of_layer


def test_which_layers_have_a_window(tmp_path):
    """By number, or told for each layer; where a file tells nothing, five of six."""
    every = tuple(7 if (i + 1) % 6 else None for i in range(7))
    assert read_window(tmp_path / "nothing") == every
    assert read_window(tmp_path / "number", sliding_window_pattern=2) == (7, None, 7, None, 7, None, 7)
    told = [True, True, False, True, False, False, True]
    expected = tuple(7 if each else None for each in told)
    assert read_window(tmp_path / "list", sliding_window_pattern=told) == expected
    assert read_window(tmp_path / "all", sliding_window_pattern=[True] * 7) == (7,) * 7


def logits(checkpoint):
    mesh = make_mesh(jax.devices(), checkpoint.config.num_heads, checkpoint.config.num_kv_heads, 1)
    model = registry.build(checkpoint.config.for_length(128))
    tokenizer: Any = None
    config = EngineConfig(slots=1, cache_length=128, cache_tokens=128)
    engine = assembled(model, mesh, config, jnp.dtype("float32"), tokenizer, "tiny")
    params = engine.parameters.load(checkpoint)
    return logits_behind(engine, params, [(7 * i * i) % 101 for i in range(30)])


def test_logits_equal_the_folders(tmp_path):
    """Of the architecture with fused matrices, a part of each head that turns, and lists of factors."""
    folder = SafetensorsCheckpoint(folder_of("phi3", tmp_path))
    file = GGUFCheckpoint(write_gguf(tmp_path, tmp_path / "m.gguf"))
    np.testing.assert_allclose(logits(file), logits(folder), atol=1e-4)


def split(path, *, parts, count=None):
    """A file's tensors over several, as `llama-gguf-split` names and numbers them."""
    reader = gguf.GGUFReader(path)
    paths = [path.with_name(f"{path.stem}-{number + 1:05}-of-{parts:05}.gguf") for number in range(parts)]
    for number, part in enumerate(paths):
        writer = gguf.GGUFWriter(part, "ignored" if number else str(reader.fields["general.architecture"].contents()))
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith(("GGUF.", "general.architecture")):
                    of_items = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(key, field.contents(), field.types[0], of_items)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", count or len(reader.tensors))
        for tensor in reader.tensors[number::parts]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_model_in_several_files(tmp_path):
    whole = write_gguf(folder_of("qwen3", tmp_path), tmp_path / "m.gguf")
    first, second, third = split(whole, parts=3)
    file, expected = GGUFCheckpoint(first), GGUFCheckpoint(whole)
    assert file.config == expected.config
    assert file.shapes().keys() == expected.shapes().keys()
    for name in file.shapes():
        np.testing.assert_array_equal(file.tensor(name), expected.tensor(name))
    with pytest.raises(RefusedError, match="is file 2 of 3; give the first one"):
        GGUFCheckpoint(second)
    third.unlink()
    with pytest.raises(RefusedError, match=r"lacks 1 of 3 files: m-00003-of-00003\.gguf"):
        GGUFCheckpoint(first)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(RefusedError, match=r"is the first of 3 files; its name has to end in '-00001-of-00003.gguf'"):
        GGUFCheckpoint(renamed)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("m-00003-of-00003.gguf", r"00002-of-00003\.gguf' says that it is file 3 of 3, by its name it is 2 of 3"),
        ("other-00002-of-00002.gguf", r"00002-of-00003\.gguf' says that it is file 2 of 2, by its name it is 2 of 3"),
    ],
)
def test_files_in_another_order_or_of_another_model(second, message, tmp_path):
    whole = write_gguf(folder_of("qwen3", tmp_path), tmp_path / "m.gguf")
    first, _, _ = split(whole, parts=3)
    split(whole.rename(tmp_path / "other.gguf"), parts=2)
    (tmp_path / second).replace(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "other-00001-of-00002.gguf").replace(tmp_path / "m-00003-of-00003.gguf")
    with pytest.raises(RefusedError, match=message):
        GGUFCheckpoint(first)


def test_files_that_do_not_add_up(tmp_path):
    first, _ = split(write_gguf(folder_of("qwen3", tmp_path), tmp_path / "m.gguf"), parts=2, count=99)
    with pytest.raises(RefusedError, match="tells of 99 tensors, its 2 files hold others"):
        GGUFCheckpoint(first)


@pytest.mark.parametrize(
    ("control", "eos_id", "stops"),
    [
        (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), 256, {256, 258}),
        (("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"), 256, {256, 257, 258}),
        (("<eos>", "<end_of_turn>"), 256, {256, 257}),
        (("<|endoftext|>", "<|end|>", "<|user|>"), 256, {256, 257}),
        (("<|end|>", "<|return|>", "<|call|>"), 257, {257, 258}),
        (("<s>", "</s>"), 257, {257}),
    ],
)
def test_an_answer_ends_where_the_chat_form_ends_a_turn(control, eos_id, stops, tmp_path):
    path = write_gguf(folder_of("qwen3", tmp_path), tmp_path / "m.gguf", control=control, eos_id=eos_id)
    assert GGUFCheckpoint(path).tokenizer().stop_ids == stops
