"""Every key of published configs: read, known to change no answer, or refused when it says something new."""

import logging

import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.models.fields import Fields
from slipstream.engine_impl.models.registry import read_config
from slipstream.engine_impl.models.unread import HARMLESS, OF_WINDOWS, SAME_AS, SAYS_NOTHING_NEW, check_unread

from .published_configs import LLAMA_3_1_8B, MISTRAL_7B_V0_3, PUBLISHED, QWEN2_5_7B, SMOLLM3_3B


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_is_read_or_harmless_or_refused(name):
    fields = Fields(PUBLISHED[name], "config.json")
    registry.FAMILIES[PUBLISHED[name]["model_type"]].read_config(fields)
    assert check_unread(fields) == []


def test_there_are_enough_of_them():
    assert {config["model_type"] for config in PUBLISHED.values()} >= set(registry.FAMILIES) - {"glm", "olmo3", "gemma"}


@pytest.mark.parametrize("name", sorted({*SAYS_NOTHING_NEW, *SAME_AS} - {"attention_bias", "mlp_bias", "hidden_act"}))
def test_a_field_that_would_change_answers_is_refused_by_name(name):
    """In the plainest family, which reads three of them."""
    with pytest.raises(RefusedError, match=f"has {name}="):
        read_config(LLAMA_3_1_8B | {name: ["strange"]}, "config.json")


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (LLAMA_3_1_8B, {"sliding_window": 4096}),
        (LLAMA_3_1_8B, {"final_logit_softcapping": 30.0}),
        (LLAMA_3_1_8B, {"layer_types": ["sliding_attention"] * 32}),
        (LLAMA_3_1_8B, {"num_local_experts": 8}),
        (PUBLISHED["gemma_2_9b"], {"sliding_window_size": 512}),
        (PUBLISHED["command_r7b"], {"layer_switch": 3}),
        (LLAMA_3_1_8B, {"no_rope_layers": [1, 1, 1, 0] * 8}),
        (MISTRAL_7B_V0_3, {"logit_scale": 0.5}),
        (MISTRAL_7B_V0_3, {"use_qk_norm": True}),
        (QWEN2_5_7B, {"use_mrope": True}),
        (QWEN2_5_7B, {"query_pre_attn_scalar": 64}),
    ],
)
def test_a_field_of_another_family_is_refused(config, change):
    (name,) = change
    with pytest.raises(RefusedError, match=f"has {name}="):
        read_config(config | change, "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 32},
        {"no_rope_layers": [1] * 32},
        {"logit_scale": 1.0},
        {"temperature": 0.6, "top_p": 0.9},
    ],
    ids=str,
)
def test_what_says_nothing_new_may_stand_there(change):
    assert read_config(LLAMA_3_1_8B | change, "config.json") == read_config(LLAMA_3_1_8B, "config.json")


def test_what_nobody_knows_is_told(caplog):
    with caplog.at_level(logging.INFO):
        read_config(SMOLLM3_3B | {"zebra\x1b": 3, "apple": [1], "nothing": None}, "config.json")
    assert r"config.json has fields that nobody reads here: 'apple', 'zebra\x1b'" in caplog.text


def test_a_field_is_in_one_list():
    lists = [HARMLESS, set(SAYS_NOTHING_NEW), set(SAME_AS)]
    assert len(set().union(*lists)) == sum(map(len, lists))
    assert set(SAYS_NOTHING_NEW) >= OF_WINDOWS


def test_parts_are_looked_at_too():
    config = PUBLISHED["gemma_3_4b"]
    config = config | {"text_config": config["text_config"] | {"logit_scale": 0.5}}
    with pytest.raises(RefusedError, match=r"config\.json: text_config' has logit_scale=0.5"):
        read_config(config, "config.json")
