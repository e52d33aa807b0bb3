"""Engines on a CPU with native kernels hold weights as the checkpoint has them: their numbers are those of an engine
that has the same values in float32, to the last bit."""

import json
import logging

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from slipstream.engine_impl.checkpoints.contract import WEIGHT, Compact
from slipstream.engine_impl.checkpoints.gguf import GGUFCheckpoint
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.loading import build_engine
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.quantization.panels import PanelWeight, decoded
from slipstream.engine_impl.quantization.swap import quantize
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.sizes import Demand
from slipstream.engine_impl.weights.sharding import make_mesh

from ..checkpoints.gguf_writing import HALVES, write_gguf, write_random_llama
from ..checkpoints.test_gguf_families import folder_of
from ..checkpoints.test_widened import FORMATS, UP, float8_folder
from ..tiny_models import TINY, RandomCheckpoint

KINDS = gguf.GGMLQuantizationType
PROMPTS = [[5, 17, 3], [90, 2, 41, 8, 60, 77, 13] * 2]


class InFloat32:
    """The same checkpoint, of which nothing compact is said."""

    def __init__(self, checkpoint):
        self._checkpoint = checkpoint

    def __getattr__(self, name):
        return getattr(self._checkpoint, name)

    def compact(self):
        return {}


def engine_with(checkpoint, **options):
    """An engine and its parameters, which take the memory that was counted before."""
    config = EngineConfig(slots=2, cache_length=128, max_prefill_length=32, tensor_parallel=1, **options)
    engine = build_engine(config, checkpoint)
    params = engine.parameters.load(checkpoint)
    arrays = {id(array): array for array in jax.tree.leaves(params)}  # a tied head is there once
    assert counted(engine, config, checkpoint) == sum(array.nbytes for array in arrays.values())
    return engine, params


def counted(engine, config, checkpoint):
    """What an automatic cache size follows from (bytes)."""
    demand = Demand(config, engine.model.config, engine.mesh, jnp.dtype("float32"), compact=checkpoint.compact())
    return demand.weights_bytes


def forms(engine):
    return {name: str(part.form) for name, part in engine.model.named_modules() if isinstance(part, PanelWeight)}


def numbers(engine, params):
    """Logits behind each prompt, and the tokens and logprobs of some steps."""
    session = Session(engine, params)
    logits = [np.asarray(session.prefilled(slot, prompt).logits_NV)[0] for slot, prompt in enumerate(PROMPTS)]
    for slot, prompt in enumerate(PROMPTS):
        session.start(slot, prompt)
    steps = [session.step() for _ in range(6)]
    return [*logits, *(np.asarray(leaf) for step in steps for leaf in (step.token_BW, step.logprob_BW))]


def check_equal(checkpoint):
    """Gives the engine of the compact forms."""
    engine, params = engine_with(checkpoint)
    twin = engine_with(InFloat32(checkpoint))
    assert set(forms(twin[0]).values()) == {"float32"}
    for ours, theirs in zip(numbers(engine, params), numbers(*twin), strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours, theirs)
    return engine, params


@pytest.mark.slow
def test_numbers_of_gguf_files_are_those_of_float32(tmp_path, caplog):
    """Every kind in one file, so that layers differ; a matrix of float32 among them."""
    kinds = [*HALVES, KINDS.F16, KINDS.BF16, KINDS.F32]
    path = write_random_llama(tmp_path / "m.gguf", kinds, layers=3)
    with caplog.at_level(logging.INFO, "slipstream.engine_impl.loading"):
        engine, _ = check_equal(GGUFCheckpoint(path))
    found = forms(engine)
    assert found["embed_tokens"] == found["lm_head"] == "8-bit codes in blocks of 32"
    assert found["layers.0.self_attn.q_proj"] == "4-bit codes in blocks of 32"
    assert found["layers.1.mlp.down_proj"] == "float16", "the fourteenth matrix and kind"
    assert set(found.values()) == {
        "4-bit codes in blocks of 16", "4-bit codes in blocks of 32", "8-bit codes in blocks of 16",
        "8-bit codes in blocks of 32", "float16", "bfloat16", "float32",
    }  # fmt: skip
    assert (
        "matrices in memory: 8 of 4-bit codes in blocks of 32, 8 of 8-bit codes in blocks of 32, 2 of 4-bit codes in "
        "blocks of 16, 1 of 8-bit codes in blocks of 16, 1 of float16, 1 of bfloat16, 1 of float32"
    ) in caplog.text


FLOAT8_BLOCKS = (
    {"quant_method": "fp8", "weight_block_size": [20, 16]}, "weight_scale_inv", lambda O, I: (-(-O // 20), I // 16),
)  # fmt: skip
"""Which divide the inputs and not the outputs."""


def check_held(checkpoint):
    """That memory holds the very values of the files; gives the forms."""
    engine, params = engine_with(checkpoint)
    plain = decoded(engine.model, params)
    for name in checkpoint.shapes():
        section, _, rest = name.partition(".")
        layer, _, own = rest.partition(".")
        held = plain["layers"][int(layer)][own] if section == "layers" else plain[section][rest]
        np.testing.assert_array_equal(held, checkpoint.tensor(name), name)
    return forms(engine)


@pytest.mark.slow
def test_numbers_of_fp8_are_those_of_float32(tmp_path):
    folder, _ = float8_folder(FLOAT8_BLOCKS, tmp_path)
    engine, params = check_equal(SafetensorsCheckpoint(folder))
    assert forms(engine)["layers.0.mlp.down_proj"] == "float8 in blocks of 16"
    assert params["stacks"]["mlp.down_proj.code"].dtype == jnp.float8_e4m3fn


@pytest.mark.parametrize(
    ("kind", "of_up", "of_down"),
    [
        ("fp8, a tensor", "float8 in blocks of 32", "float8 in blocks of 48"),
        ("float-quantized, channels", "float8 in blocks of 32", "float8 in blocks of 48"),
        ("fp8, blocks", "float32", "float32"),
    ],
)
def test_fp8_is_held_as_it_comes(kind, of_up, of_down, tmp_path):
    """A scale of an output is its inputs' one block; blocks of 12 inputs are none that a product reads."""
    assert kind in FORMATS
    found = check_held(SafetensorsCheckpoint(float8_folder(kind, tmp_path)[0]))
    assert (found["layers.0.mlp.up_proj"], found["layers.1.mlp.down_proj"]) == (of_up, of_down)


def test_fp8_that_is_no_number_is_told(tmp_path):
    def spoil(tensors):
        tensors[f"{UP}weight"].view(np.uint8)[0, 0] = 0x7F

    folder, _ = float8_folder("fbgemm", tmp_path, spoil)
    with pytest.raises(RefusedError, match=r"NaN or infinite as float32: layers\.1\.mlp\.up_proj\.weight; fetch"):
        engine_with(SafetensorsCheckpoint(folder))


@pytest.mark.slow
def test_experts_of_fp8_are_held_as_they_come(tmp_path):
    folder = folder_of("qwen3moe", tmp_path, num_hidden_layers=1, moe_intermediate_size=32)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        O, I = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(-(-O // 20), I // 16) + 0.5
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FLOAT8_BLOCKS[0]}))
    checkpoint = SafetensorsCheckpoint(folder)
    engine, params = engine_with(checkpoint)
    found, plain = forms(engine), decoded(engine.model, params)
    for name in ("w1", "w2", "w3"):
        assert found[f"layers.0.mlp.{name}"] == "float8 in blocks of 16"
        for expert, source in enumerate(engine.model.sources(f"layers.0.mlp.{name}.weight")):
            np.testing.assert_array_equal(plain["layers"][0][f"mlp.{name}.weight"][expert].T, checkpoint.tensor(source))


def write_folder(folder, *, tied):
    """In two files, matrices of bfloat16 and float16 in turns and one of float32."""
    shapes = {name: RandomCheckpoint(TINY).tensor(name) for name in RandomCheckpoint(TINY).shapes()}
    if tied:
        shapes.pop("lm_head.weight")
    dtypes = [torch.bfloat16, torch.float16, torch.bfloat16, torch.float32]
    tensors = {
        name if name == "lm_head.weight" else f"model.{name}": torch.from_numpy(value).to(dtypes[number % 4])
        for number, (name, value) in enumerate(shapes.items())
    }
    names, files = list(tensors), ("model-1.safetensors", "model-2.safetensors")
    where = {name: files[number % 2] for number, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    fields = {
        "model_type": "llama", "num_hidden_layers": TINY.num_layers, "num_attention_heads": TINY.num_heads,
        "num_key_value_heads": TINY.num_kv_heads, "head_dim": TINY.head_dim, "hidden_size": TINY.model_dim,
        "intermediate_size": TINY.ffn_dim, "vocab_size": TINY.vocab_size, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "tie_word_embeddings": tied, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "experts", "sizes"),
    [
        ("mixtral", KINDS.Q4_0, "4-bit codes in blocks of 32", {}),
        ("qwen3moe", KINDS.BF16, "bfloat16", {}),
        ("gpt-oss", KINDS.MXFP4, "4-bit codes in blocks of 32", {"hidden_size": 128, "head_dim": 32}),
    ],
)
def test_numbers_of_experts_are_those_of_float32(family, kind, experts, sizes, tmp_path):
    """With biases and without."""
    folder = folder_of(family, tmp_path, **({"num_hidden_layers": 2, "intermediate_size": 96} | sizes))
    engine, params = check_equal(GGUFCheckpoint(write_gguf(folder, tmp_path / "m.gguf", kind=kind)))
    found = forms(engine)
    assert {found[f"layers.{i}.mlp.{name}"] for i in range(2) for name in ("w1", "w2", "w3")} == {experts}
    assert found["layers.0.mlp.gate"] == found["embed_tokens"] == experts
    held = jax.jit(lambda params: decoded(engine.model, params)["layers"][1]["mlp.w2.weight"])(params)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    for held_IO, source in zip(np.asarray(held), engine.model.sources("layers.1.mlp.w2.weight"), strict=True):
        np.testing.assert_array_equal(held_IO.T, checkpoint.tensor(source))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_numbers_of_folders_are_those_of_float32(tmp_path, tied):
    engine, params = check_equal(SafetensorsCheckpoint(write_folder(tmp_path, tied=tied)))
    found = forms(engine)
    assert set(found.values()) == {"bfloat16", "float16", "float32"}
    assert found["embed_tokens"] == "bfloat16"
    assert (params["stacks"] | params["layers"][0])["mlp.down_proj.code"].dtype == found["layers.0.mlp.down_proj"]


def test_weights_are_the_files(tmp_path):
    """Rows of q and k in the model's order; an untied head; codes beside a head that becomes int8."""
    kinds = [KINDS.Q4_K, KINDS.Q4_1, KINDS.Q5_1, KINDS.Q6_K, KINDS.Q8_0, KINDS.BF16, KINDS.Q5_K]
    path = write_random_llama(tmp_path / "m.gguf", kinds, layers=1, tied=False, head=KINDS.Q6_K)
    check_held(GGUFCheckpoint(path))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "bfloat16"}, {"bfloat16"}),
        ({"dtype": "float32"}, {"4-bit codes in blocks of 32", "8-bit codes in blocks of 32"}),
        ({"quantize_weights": "int8"}, {"int8", "8-bit codes in blocks of 32"}),
        ({"quantize_weights": "int8", "quantize_exclude": ()}, {"int8"}),
        (
            {"quantize_weights": "int4", "quantize_exclude": ("*.q_proj",)},
            {"int4 in blocks of 32", "4-bit codes in blocks of 32", "int8"},
        ),
    ],
)
def test_options_mean_what_they_mean_of_floats(options, expected, tmp_path):
    """What is left out of quantisation keeps its form."""
    path = write_random_llama(tmp_path / "m.gguf", [KINDS.Q4_0], layers=1)
    config, checkpoint = EngineConfig(slots=2, cache_length=128, tensor_parallel=1, **options), GGUFCheckpoint(path)
    engine = build_engine(config, checkpoint)
    assert set(forms(engine).values()) == expected
    assert counted(engine, config, checkpoint) == engine.parameters.bytes


def test_rows_of_a_fused_tensor_keep_its_form(tmp_path):
    fields = {
        "model_type": "phi3", "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4,
        "hidden_size": 128, "intermediate_size": 96, "vocab_size": 101, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "tie_word_embeddings": False, "hidden_act": "silu", "pad_token_id": 0,
    }  # fmt: skip
    model = registry.build(registry.read_config(fields, "config.json"))
    sources = {source for name, _ in model.named_parameters() for source in model.sources(name)}
    codes = Compact("4-bit", 32, "float16", has_offset=True)
    mesh = make_mesh([torch], 1, 1, 1)
    quantize(model, EngineConfig(), jnp.dtype("float32"), mesh, "native_cpu", dict.fromkeys(map(str, sources), codes))
    parts = {name: part for name, part in model.named_modules() if isinstance(part, PanelWeight)}
    assert {name for name, part in parts.items() if part.keeps_codes} == set(parts)
    assert any("qkv" in source for source in sources)


def test_inputs_that_are_no_whole_blocks_stay_floats():
    class Coded(RandomCheckpoint):
        def compact(self):
            return {name: Compact("8-bit", 32, "float16") for name in self.shapes() if name.endswith(WEIGHT)}

    config = EngineConfig(slots=2, cache_length=128, tensor_parallel=1)
    found = forms(build_engine(config, Coded(TINY)))
    assert found["layers.0.mlp.down_proj"] == "float32", "of 48 inputs"
    assert found["layers.0.mlp.up_proj"] == "8-bit codes in blocks of 32"


def test_a_scale_that_is_no_number_is_told_by_its_tensors_name(tmp_path):
    def spoil(stored):
        stored[3, :2] = np.array([np.nan], np.float16).view(np.uint8)

    path = write_random_llama(tmp_path / "m.gguf", [KINDS.Q4_0], layers=1, spoil=("blk.0.ffn_up", spoil))
    with pytest.raises(RefusedError, match=r"NaN or infinite as float32: layers\.0\.mlp\.up_proj\.weight; fetch"):
        engine_with(GGUFCheckpoint(path))
