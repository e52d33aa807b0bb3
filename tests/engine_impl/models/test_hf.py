"""Models without a module of ours, by transformers' own code, against transformers."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from slipstream.engine_impl.adapters.sites import sites_of
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.forward import layer_loop_for
from slipstream.engine_impl.loading import build_engine, load_engine
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.models.hf import outside
from slipstream.engine_impl.models.hf.family import HFConfig
from slipstream.engine_impl.quantization.linear import EncodedModule
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.weights.load import check_names
from slipstream.engine_impl.weights.sharding import make_mesh

from ..adapters.test_families import assert_equal as assert_adapters_equal
from ..tiny_models import logits_behind
from .against_transformers import GIVEN, assert_steps_equal, draw_weights, load, reference_logits

SIZES = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 60, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 101, "max_position_embeddings": 512,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
ROPE = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}

MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    # model type: the devices of `make test` (`make product` has both numbers), what its config says beside SIZES
    "gpt_neox": (8, {}),  # q, k and v in one matrix, by heads; a head by another name
    "gpt2": (1, {}),  # learned positions; matrices are [in, out]; tied
    "phi": (1, {}),  # a head with biases; parts of a head turn
    "starcoder2": (8, {"sliding_window": 12}),
    "granite_swa": (1, WINDOWS),  # sinks
    "exaone4": (1, WINDOWS),  # the second layer has no rope
    "helium": (8, {}),  # a rope that turns neighbours
}  # fmt: skip


def config_of(model_type: str, **changes: Any) -> Any:
    import transformers

    fields = {**SIZES, **MODELS.get(model_type, (1, {}))[1], **changes}
    return transformers.AutoConfig.for_model(model_type, **fields, attn_implementation="eager")


def written(model_type: str, folder: Path) -> Any:
    """A checkpoint in that folder; the model whose it is."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config_of(model_type), attn_implementation="eager").eval()
    draw_weights(model, seed=len(model_type))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.mul_(0.2)
    model.save_pretrained(folder)
    return model


def read(model_type: str, **changes: Any) -> HFConfig:
    fields = json.loads(config_of(model_type, **changes).to_json_string())
    config = registry.read_config(fields, "config.json")
    assert isinstance(config, HFConfig)
    return config


PROMPT = [(7 * i * i + 3 * i) % 101 for i in range(256)]
"""Two whole pieces, which take the same program."""


CASES = [
    pytest.param(model_type, devices, marks=() if devices == chosen else pytest.mark.product)
    for model_type, (chosen, _) in MODELS.items()
    for devices in (1, 8)
]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "devices"), CASES)
def test_logits_and_steps_equal_transformers(model_type, devices, tmp_path):
    """Behind two pieces of a prompt longer than the windows, then of 31 steps. Eight devices scan over layers that are
    alike."""
    reference = written(model_type, tmp_path)
    engine, params = load(tmp_path, devices, cache_length=384)
    expected = reference_logits(reference, PROMPT + GIVEN)[len(PROMPT) - 1 :]
    assert len(set(expected.argmax(-1).tolist())) >= 5  # a model that repeats itself would prove little
    np.testing.assert_allclose(logits_behind(engine, params, PROMPT), expected[0], atol=1e-4)
    session = Session(engine, params)
    session.start_given(0, PROMPT + GIVEN[:1])
    assert_steps_equal(session, [expected])


@pytest.mark.slow
def test_adapters_equal_pefts_merged_model(tmp_path):
    assert_adapters_equal(written("starcoder2", tmp_path / "model"), tmp_path / "model", tmp_path, devices=8)


@pytest.mark.slow
def test_linear_modules_are_quantised_as_ours_are(tmp_path):
    reference = written("phi", tmp_path)
    config = EngineConfig(model=str(tmp_path), slots=1, cache_length=128, tensor_parallel=1, quantize_weights="int8")
    engine, params = load_engine(config)
    kinds = {name: module.kind for name, module in engine.model.named_modules() if isinstance(module, EncodedModule)}
    assert {"layers.1.self_attn.dense": "int8", "layers.0.mlp.fc1": "int8"}.items() <= kinds.items()
    logits_V, expected_V = logits_behind(engine, params, PROMPT[:40]), reference_logits(reference, PROMPT[:40])[-1]
    assert np.corrcoef(logits_V, expected_V)[0, 1] > 0.99
    assert np.abs(logits_V - expected_V).max() > 1e-3


def test_what_is_found_of_a_model():
    config = read("exaone4", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 8)
    assert config.windows == (12, None)
    assert config.facts.module_of_layer == (0, 1, 0, 1)
    assert read("gpt2").facts.before == ("transformer.wpe.weight",)
    assert read("gpt2").tied_embeddings


def test_layers_that_are_not_alike_are_not_stacked_and_take_no_adapters(tmp_path):
    written("exaone4", tmp_path)
    model = build_engine(EngineConfig(model=str(tmp_path), slots=1, cache_length=128, tensor_parallel=1)).model
    assert layer_loop_for("tpu", model) == "unrolled"
    assert layer_loop_for("tpu", registry.build(read("phi"))) == "scan"
    with pytest.raises(RefusedError, match="adapters need layers that are alike"):
        sites_of(model, make_mesh(jax.devices(), 8, 4, 1))


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mamba", {}, "whose MambaBlock does not attend .* a state of its own"),
        ("bloom", {}, "their own way with masks"),
        ("gptj", {}, "do not run by themselves"),
        ("diffllama", {}, "several times in one"),
        ("bart", {}, "with 0 lists of 2 layers"),
        ("minicpm3", {}, r"keys of 96 dimensions and values of 8 \(MLA\)"),
        ("llama4_text", {}, "a mask that is neither causal nor a sliding window"),
        ("olmoe", {}, "with experts"),
        ("jetmoe", {}, "goes by its rows' values"),
        ("gemma4_text", {}, "have other heads or score caps than one another"),
        ("vaultgemma", {}, "does more between its layers"),
        ("phi", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, "rope of type dynamic"),
        ("bert", {"is_decoder": True}, "whose tied head has a bias"),
    ],
)
def test_what_could_not_be_right_is_refused_by_name(model_type, changes, message):
    with pytest.raises(RefusedError, match=message):
        read(model_type, **changes)


class Mixing(torch.nn.Module):
    """A feed-forward that also looks at the token before."""

    def forward(self, x):
        return x + 0.1 * torch.roll(x, 1, dims=1)


class FromTheStart(torch.nn.Module):
    """One that counts its rows."""

    def forward(self, x):
        return x * (1 + torch.arange(x.shape[1]))[:, None]


@pytest.mark.parametrize("feed_forward", [Mixing, FromTheStart])
def test_layers_that_need_more_of_a_text_than_keys_and_values_are_refused(feed_forward, monkeypatch):
    from transformers.models.phi import modeling_phi

    monkeypatch.setattr(modeling_phi, "PhiMLP", lambda config: feed_forward())
    with pytest.raises(RefusedError, match="mix tokens in other ways than attention"):
        read("phi")


def test_without_transformers_its_families_are_as_unknown_as_others(monkeypatch):
    fields = config_of("phi").to_dict()
    monkeypatch.setattr(outside.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RefusedError, match=r"family 'phi'; .*pip install 'slipstream-llm\[hf\]'"):
        registry.read_config(fields, "config.json")


@pytest.mark.parametrize("change", [lambda t: t.pop("lm_head.bias"), lambda t: t.update(extra=np.zeros(2, np.float32))])
def test_weights_that_do_not_fit_are_refused(change, tmp_path):
    written("phi", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RefusedError, match=r"missing: lm_head\.bias|unexpected: extra"):
        check_names(*model_and_checkpoint(tmp_path))


def model_and_checkpoint(folder: Path) -> tuple[Any, SafetensorsCheckpoint]:
    checkpoint = SafetensorsCheckpoint(folder)
    return registry.build(checkpoint.config), checkpoint


def test_names_of_older_files_are_taken_as_transformers_takes_them(tmp_path):
    """Without the base model's name before them, with a head by its former name, and with buffers that are none now."""
    written("gpt_neox", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "embed_out.weight" in tensors
    older = {name.removeprefix("gpt_neox."): value for name, value in tensors.items()}
    older["layers.0.attention.masked_bias"] = np.zeros(1, np.float32)
    older["layers.0.attention.rotary_emb.inv_freq"] = np.zeros(1, np.float32)
    save_file(older, tmp_path / "model.safetensors")
    check_names(*model_and_checkpoint(tmp_path))
