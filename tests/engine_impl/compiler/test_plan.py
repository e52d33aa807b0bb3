"""Planning, and the shapes that it plans for."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from slipstream.engine_impl.checkpoints.hf_config import read_hf_config
from slipstream.engine_impl.checkpoints.open import open_checkpoint
from slipstream.engine_impl.compiler import plan as plan_module
from slipstream.engine_impl.compiler import topology
from slipstream.engine_impl.compiler.budget import Budget
from slipstream.engine_impl.compiler.chips import CHIPS, GPU_MEMORY_SHARE, GPUS
from slipstream.engine_impl.compiler.plan import abstract_engine, largest_slots, plan, shape_of
from slipstream.engine_impl.compiler.presets import PRESETS, preset
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.models.llama import LlamaConfig
from slipstream.engine_impl.models.rope import frequencies

from tests.tpu import all_compiled_once, tpu_mesh

VOCABULARY = 2048
SMALL = replace(preset("llama-3.2-1b"), num_layers=2, vocab_size=VOCABULARY)  # 128,256 take the compiler far longer
PREFILL, CARRY = "prefill_512", "carry_16x512"
"""Of a whole chunk, and of it beside all slots."""


def planned(slots=16, cache_length=4096, topology="v5e:2x4", dump=None, **quantized):
    tokens = slots * cache_length
    config = EngineConfig(model="small", slots=slots, cache_length=cache_length, cache_tokens=tokens, **quantized)
    return plan(config, SMALL, topology, dump=dump)


@pytest.fixture(scope="module")
def small_plan(tmp_path_factory):
    """Its programs are those of test_plan_command, too."""
    folder = tmp_path_factory.mktemp("hlo")
    with all_compiled_once(tpu_mesh("v5e:2x4")):
        return planned(dump=folder), folder


@pytest.mark.slow
def test_memory_is_what_arithmetic_says(small_plan):
    """bf16, 8 chips: a kv head and an eighth of every matrix each, but for norms."""
    report, _ = small_plan
    matrices = VOCABULARY * 2048 + 2 * (2048 * 2048 * 2 + 2 * 512 * 2048 + 3 * 2048 * 8192)
    norms = (2 * 2 + 1) * 2048
    assert report.chips == 8
    assert report.weights_bytes_per_chip == 2 * (matrices // 8 + norms)
    assert report.cache_bytes_per_chip == 2 * 2 * 16 * 4096 * 128  # bytes, layers, slots, rows, k and v
    generate = report.programs["generate"]
    assert generate.hbm_floor_bytes == report.weights_bytes_per_chip + report.cache_bytes_per_chip
    assert generate.floor_ms == pytest.approx(generate.hbm_floor_bytes / 819e9 * 1e3)
    assert generate.tokens_per_second_ceiling == pytest.approx(16 / generate.floor_ms * 1e3)
    assert report.resident_bytes_per_chip > generate.argument_bytes
    a_row = 2 * 2 * 128  # bytes, layers, k and v
    carry = report.programs[CARRY]
    assert carry.hbm_floor_bytes == generate.hbm_floor_bytes + 512 * a_row
    assert carry.compute_floor_ms == pytest.approx(
        generate.compute_floor_ms + report.programs[PREFILL].compute_floor_ms
    )


LAYERS = 2 * (2048 * 2048 * 2 + 2 * 512 * 2048 + 3 * 2048 * 8192)
HEAD = VOCABULARY * 2048


@pytest.mark.parametrize(
    ("options", "layers_rate"),
    [
        ({}, 197e12),
        ({"quantize_weights": "int8", "quantize_kv": "int8"}, 197e12),
        ({"quantize_weights": "int8", "quantize_activations": "int8"}, 393e12),
        ({"quantize_weights": "int4"}, 197e12),
    ],
)
def test_operations_are_counted_by_elements_not_bytes(options, layers_rate):
    """Two an element and row; only int8 by int8 has another rate. The head stays as it is."""
    config = EngineConfig(**options)
    budget = Budget(abstract_engine(SMALL, "v5e:2x4", config), CHIPS["v5e"])
    assert budget.row_seconds == pytest.approx(2 * (LAYERS / 8 / layers_rate + HEAD / 8 / 197e12))


def test_what_quantisation_saves_by_hand():
    """Far too many slots: nothing is compiled. v5e:2x4 in bf16; a scale is 4 bytes, o_proj's and down_proj's are on
    every chip."""
    report = planned(slots=10**6, quantize_weights="int8", quantize_kv="int8")
    assert (report.fits, report.programs) == (False, {})
    scales = 2 * 4 * ((2048 + 2 * 512 + 2 * 8192) // 8 + 2 * 2048)
    cache = 2 * 10**6 * 4096 * (2 * 128 - (128 + 8))
    assert report.saving is not None
    assert report.saving.quantized == "int8 weights and int8 cache"
    assert report.saving.bytes_per_chip == LAYERS // 8 - scales + cache
    plain = planned(slots=10**6)
    assert plain.saving is None
    assert report.saving.slots_unquantized == plain.slots_with_room
    room = int(0.98 * 15.75 * 2**30)
    assert plain.slots_with_room == (room - plain.weights_bytes_per_chip) // (2 * 4096 * 256)
    assert report.slots_with_room == (room - report.weights_bytes_per_chip) // (2 * 4096 * 136)


@pytest.mark.slow
def test_the_report_names_kernels_collectives_and_no_copies(small_plan):
    report, _ = small_plan
    assert report.fits
    assert set(report.programs) == {"generate", "insert", PREFILL, CARRY}
    generate = report.programs["generate"]
    assert generate.pallas_calls == {"live_steps": 1, "ragged_attention": 2, "cache_flush": 1}
    carry = report.programs[CARRY]
    assert carry.pallas_calls == generate.pallas_calls | {"chunk_attention": 2}
    for step in (generate, carry):
        assert step.collectives["all-reduce"] == 2 * 2 + 1  # o_proj and down_proj a layer, and the embedding
    assert all(program.cache_sized_copies == [] for program in report.programs.values())
    assert json.loads(json.dumps(report.as_json()))["programs"]["insert"]["alias_bytes"] >= report.cache_bytes_per_chip


@pytest.mark.slow
def test_dump_writes_the_programs(small_plan):
    _, folder = small_plan
    assert {path.name for path in folder.iterdir()} == {
        "generate.hlo.txt", "insert.hlo.txt", f"{PREFILL}.hlo.txt", f"{CARRY}.hlo.txt"
    }  # fmt: skip
    assert (folder / "generate.hlo.txt").read_text().startswith("HloModule")


@pytest.mark.slow
def test_a_misfit_says_which_by_how_much_and_what_would_help(monkeypatch):
    """Of the programs only the one that needs the most is compiled: the step with a piece beside it."""
    lowered = plan_module.lowered
    monkeypatch.setattr(
        plan_module, "lowered", lambda *what: {n: one for n, one in lowered(*what).items() if n.startswith("carry")}
    )
    shape, config = replace(SMALL, num_layers=16), EngineConfig(slots=2, cache_length=131072, cache_tokens=64 * 131072)
    report = plan(config, shape, "v5e:2x4")
    assert not report.fits
    assert report.misfit is not None
    assert report.misfit.program == "weights and cache"
    total = report.weights_bytes_per_chip + report.cache_bytes_per_chip
    assert report.misfit.over_bytes == total - int(15.75 * 2**30)
    tokens, chips = report.misfit.remedies
    assert tokens.startswith("--cache-tokens ")
    assert plan(replace(config, cache_tokens=int(tokens.split()[1])), shape, "v5e:2x4").fits
    assert chips == "at least 17 of these chips, or chips with more HBM"


@pytest.mark.slow
def test_the_compilers_own_refusal_is_a_misfit_too():
    """Weights and cache fit to half a MiB; what the program needs beside them does not."""
    arithmetic = planned(slots=10**6)  # compiles nothing
    a_token = arithmetic.cache_bytes_per_chip // arithmetic.cache_tokens
    tokens = (arithmetic.hbm_bytes_per_chip - arithmetic.weights_bytes_per_chip) // a_token // 1024 * 1024
    report = plan(EngineConfig(slots=1, cache_length=4096, cache_tokens=tokens), SMALL, "v5e:2x4")
    assert not report.fits
    assert report.misfit is not None
    assert report.misfit.program == "generate"
    assert report.misfit.compiler is not None


@pytest.mark.slow
def test_max_slots_is_the_last_that_fits(monkeypatch):
    """Few of them, and of the programs the step alone: the compiler takes long for each."""
    lowered = plan_module.lowered
    monkeypatch.setattr(plan_module, "lowered", lambda *what: {"generate": lowered(*what)["generate"]})
    shape, config = replace(SMALL, num_layers=64), EngineConfig(cache_length=131072)
    best = largest_slots(config, shape, "v5e:2x4")
    assert best.fits
    assert best.slots > 1
    assert best.cache_tokens == best.slots * 131072
    one_more = {"slots": best.slots + 1, "cache_tokens": (best.slots + 1) * 131072}
    assert not plan(replace(config, **one_more), shape, "v5e:2x4").fits


@pytest.mark.parametrize("topology", ["v5e:3x3", "v9:2x2", "v5e", ""])
def test_an_unknown_topology_lists_those_there_are(topology):
    with pytest.raises(RefusedError, match=r"does not exist; those that do: .*v5e:\{2x2,2x4,"):
        planned(topology=topology)


def test_without_libtpu_the_install_command_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(RefusedError, match=r"pip install 'jax\[tpu\]'"):
        planned()


def test_without_the_gpu_compiler_the_install_command_is_told(monkeypatch):
    def no_plugin(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", no_plugin)
    with pytest.raises(RefusedError, match="pip install jax-cuda12-pjrt=="):
        planned(topology="h100:1")


def test_a_gpu_topology_is_so_many_devices_of_its_target(monkeypatch):
    """XLA's shape of a GPU topology is slices x hosts x devices."""
    asked = {}
    described = SimpleNamespace(devices=("a", "b"))
    monkeypatch.setattr(topology.topologies, "get_topology_desc", lambda **words: asked.update(words) or described)
    assert topology.devices_of("h100:2") == ["a", "b"]
    assert (asked["platform"], asked["topology"]) == ("cuda", "1x1x2")
    assert f"device_memory_size: {round(GPUS['h100'].hbm_bytes / GPU_MEMORY_SHARE)}" in asked["target_config"]


def test_shapes_come_from_presets_configs_and_the_embedded_model(tmp_path):
    assert shape_of("llama-2-7b").num_kv_heads == 32
    assert shape_of("embedded") == replace(open_checkpoint("embedded").config, rms_norm_eps=1e-5)
    with pytest.raises(RefusedError, match="preset 'llama-7' is not there; those there are: llama-2-7b,"):
        shape_of("llama-7")
    with pytest.raises(RefusedError, match=r"give a config\.json or its folder"):
        shape_of(str(tmp_path))


PUBLISHED = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "smollm2-135m": 134_515_008, "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b": 7_248_023_552, "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352, "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360, "qwen3-32b": 32_762_123_264,
    "gemma-7b": 8_537_680_896, "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "gemma-3-1b": 999_885_952,
    "gemma-3-12b": 11_766_034_176, "mixtral-8x7b": 46_702_792_704, "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200, "qwen3-30b-a3b": 30_532_122_624, "smollm3-3b": 3_075_098_624, "olmo-2-7b": 7_298_617_344,
    "granite-3.3-8b": 8_170_864_640, "glm-4-9b": 9_400_279_040, "command-r7b": 8_028_033_024,
    "stablelm-2-12b": 12_143_185_920, "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672,
    "olmo-3-7b": 7_298_011_136, "command-r": 34_980_831_232,
}  # fmt: skip
"""As their authors count, but for StableLM 2, which is counted from its shapes; of Gemma 3 12B the text model."""


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    tied = PRESETS[name].tied_embeddings
    parameters = registry.build(PRESETS[name]).named_parameters()
    assert sum(p.numel() for which, p in parameters if not (tied and which == "lm_head.weight")) == PUBLISHED[name]


def hf_config(tmp_path, **fields):
    """What transformers itself writes."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, max_position_embeddings=512, **fields,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return config


@pytest.mark.parametrize("old_form", [False, True])
def test_hf_configs_of_both_forms_are_read(tmp_path, old_form):
    hf_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 777.0}, tie_word_embeddings=True)
    path = tmp_path / "config.json"
    if old_form:
        fields = json.loads(path.read_text())
        fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
        path.write_text(json.dumps(fields | {"rope_scaling": None}))
    shape = read_hf_config(tmp_path)
    assert isinstance(shape, LlamaConfig)
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (3, 4, 2, 16)
    assert (shape.rope_theta, shape.rope_factors, shape.tied_embeddings) == (777.0, None, True)
    assert read_hf_config(path) == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "a model whose MambaBlock does not attend by transformers' attention functions"),
        ({"rope_parameters": None}, 'neither rope_parameters nor rope_theta; .* for Llama 2 is "rope_theta": 10000.0'),
        ({"rope_parameters": None, "model_type": "qwen3"}, "nor rope_theta; add the one it was trained with$"),
        (
            {"rope_parameters": {"rope_type": "axial", "rope_theta": 1.0}},
            "'axial'; those there are: default, linear, dynamic, llama3",
        ),
        ({"mlp_bias": True}, "mlp_bias=True"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(tmp_path, change, message):
    hf_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RefusedError, match=message):
        read_hf_config(path)


def test_a_config_that_is_no_json_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RefusedError, match="is not JSON"):
        read_hf_config(tmp_path)


def test_llama3_rope_scaling_equals_transformers(tmp_path):
    """Slow, fast and blended frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }  # fmt: skip
    config = hf_config(tmp_path, rope_parameters=scaling, head_dim=128)
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    shape = read_hf_config(tmp_path)
    assert isinstance(shape, LlamaConfig)
    assert factor == 1.0
    assert frequencies(128, 500000.0, shape.rope_factors) == pytest.approx(expected.tolist(), rel=1e-6)
