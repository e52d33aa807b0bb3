"""Gemma 3 from 4B on, which sees images: the text model in it, against transformers; configs as they are published."""

from dataclasses import asdict

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.compiler.presets import PRESETS
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.models.gemma3 import LEFT_OUT
from slipstream.engine_impl.weights.load import check_names

from ..tiny_models import greedy, logits_behind
from .test_families import PROMPTS, SIZES, draw_weights, load, reference_logits

TEXT = SIZES | {
    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1000.0, "rope_local_base_freq": 100.0,
    "sliding_window": 7, "query_pre_attn_scalar": 24, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "image_size": 4, "patch_size": 2, "vision_use_head": False,
}  # fmt: skip

PUBLISHED = {  # the fields of google/gemma-3-*-it that a text model's shape could come from
    "4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
    "12b": {
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "27b": {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168,
    },
}  # fmt: skip


def published(size, **changes):
    text = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    return {"model_type": "gemma3", "text_config": text | PUBLISHED[size] | changes, "vision_config": {}}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(transformers' model, its folder with names as published, its folder with the names of transformers 5)"""
    import transformers

    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    draw_weights(model, seed=3)
    folder = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(folder / "published")
    model.save_pretrained(folder / "today", save_original_format=False)
    return model, folder / "published", folder / "today"


def names_in(folder):
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.slow
def test_the_text_model_equals_transformers(written):
    """Prompts longer than the window; then 16 tokens, each what transformers would say after the same text."""
    reference, folder, _ = written
    assert {"language_model.model.norm.weight", "multi_modal_projector.mm_soft_emb_norm.weight"} <= names_in(folder)
    engine, params = load(folder, devices=1)
    prompts = [PROMPTS[0][:40], [(7 * i * i + 3 * i) % 101 for i in range(136)]]
    for prompt, answer in zip(prompts, greedy(engine, params, prompts, 16), strict=True):
        expected = reference_logits(reference, prompt + answer[:-1])[len(prompt) - 1 :]
        logits_V = logits_behind(engine, params, prompt)
        np.testing.assert_allclose(logits_V, expected[0], atol=1e-4)
        assert expected.argmax(-1).tolist() == answer
        assert len(set(answer)) >= 5


@pytest.mark.parametrize("head", [None, "lm_head.weight", "language_model.lm_head.weight"])
def test_names_of_every_layout_are_the_same_tensors(written, head, tmp_path):
    """Also where a copy of the embedding stands beside it as the head."""
    _, published_folder, today_folder = written
    assert {"model.language_model.norm.weight", "model.vision_tower.post_layernorm.bias"} <= names_in(today_folder)
    tensors = load_file(today_folder / "model.safetensors")
    if head is not None:
        tensors[head] = tensors["model.language_model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((today_folder / "config.json").read_bytes())
    today, other = SafetensorsCheckpoint(tmp_path), SafetensorsCheckpoint(published_folder)
    check_names(registry.build(today.config), today)
    assert today.config == other.config
    assert set(today.shapes()) - {"lm_head.weight"} == set(other.shapes())
    for name in other.shapes():
        np.testing.assert_array_equal(today.tensor(name), other.tensor(name))


def test_only_what_sees_images_is_left_out(written, tmp_path):
    _, folder, _ = written
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"audio_tower.weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    checkpoint = SafetensorsCheckpoint(tmp_path)
    with pytest.raises(RefusedError, match=r"unexpected: audio_tower\.weight$"):
        check_names(registry.build(checkpoint.config), checkpoint)


def test_other_families_leave_nothing_out():
    assert {family for family in registry.FAMILIES.values() if family.ignored} == {registry.FAMILIES["gemma3"]}


def test_what_published_configs_leave_out_is_transformers_default():
    import transformers

    fields = transformers.Gemma3TextConfig().to_dict()
    ropes = fields["rope_parameters"]
    fields["rope_theta"] = ropes["full_attention"]["rope_theta"]
    fields["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    assert {name: fields[name] for name in LEFT_OUT} == LEFT_OUT


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configs_mean_what_transformers_reads_in_them(size):
    """It writes them in full, in the form of today."""
    import transformers

    whole = transformers.Gemma3Config(**published(size)).to_dict()
    assert whole["text_config"]["rope_parameters"]["full_attention"]["factor"] == 8.0
    shape = registry.read_config(whole, "config.json")
    assert registry.read_config(published(size), "config.json") == shape
    if size == "12b":
        assert asdict(shape) == asdict(PRESETS["gemma-3-12b"])


def test_the_ties_beside_the_text_config_count():
    fields = published("4b", tie_word_embeddings=True) | {"tie_word_embeddings": False}
    assert not registry.read_config(fields, "config.json").tied_embeddings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma3"}, "'config.json' lacks text_config"),
        ({"model_type": "gemma3", "text_config": []}, "'config.json' has a text_config that is no JSON object"),
        (published("4b", hidden_size=None), "'config.json: text_config' lacks hidden_size"),
        (published("4b", sliding_window=None), "'config.json: text_config' lacks sliding_window"),
        (published("4b", use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        (published("4b") | {"model_type": "gemma3_text"}, "'config.json' lacks head_dim"),
    ],
)
def test_nothing_else_is_guessed(fields, message):
    with pytest.raises(RefusedError, match=message):
        registry.read_config(fields, "config.json")
