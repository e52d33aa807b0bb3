"""Every scaling of a rope against transformers: its frequencies, and a tiny random checkpoint's logits and tokens."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from slipstream.engine_impl.assembly import assembled, twin
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.models.rope_scaling import FIXED, SCALINGS, UNREAD
from slipstream.engine_impl.models.transformer import TransformerConfig
from slipstream.engine_impl.scoring import Through, score
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.weights.sharding import make_mesh

from ..tiny_models import greedy, logits_behind
from .test_families import SIZES, draw_weights, in_old_form, reference_logits

THETA = {"rope_theta": 1000.0}
LISTS = {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0]}
"""For the first twelve of a head's sixteen dimensions."""

ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # family, rope, what else is in the config
    "linear": ("Llama", {"rope_type": "linear", "factor": 4.0}, {}),
    "yarn": (
        "Qwen2",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"max_position_embeddings": 64},
    ),
    "yarn-of-its-own": (
        "Llama",
        {
            "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 100, "beta_fast": 8.0,
            "beta_slow": 2.0, "mscale": 1.3, "mscale_all_dim": 0.7, "truncate": False,
        },
        {},
    ),
    "yarn-told": ("Mistral", {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.9}, {"sliding_window": None}),
    "dynamic": ("Llama", {"rope_type": "dynamic", "factor": 2.0}, {"max_position_embeddings": 128}),
    "longrope": (
        "Phi3",
        {"rope_type": "longrope", "partial_rotary_factor": 0.75, **LISTS},
        {"original_max_position_embeddings": 128, "head_dim": None, "hidden_size": 128},
    ),
    "partial": ("Phi3", {"rope_type": "default", "partial_rotary_factor": 0.5}, {"head_dim": None, "hidden_size": 128}),
    "llama3": (
        "Llama",
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {},
    ),
}  # fmt: skip


BY_LENGTH = [kind for kind in SCALINGS if kind not in FIXED]


def hf_config(name):
    import transformers

    family, rope, fields = ROPES[name]
    fields = {**SIZES, "rope_parameters": {**THETA, **rope}, **fields}
    if fields["head_dim"] is None:
        del fields["head_dim"]  # hidden_size // num_attention_heads
    return getattr(transformers, f"{family}Config")(**fields)


def reference_angles(config, length):
    """(frequencies, what cos and sin are multiplied by), as transformers computes them for a text of that length."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, None, seq_len=length)
    return frequencies.tolist(), scale


def read(fields: dict[str, Any]) -> TransformerConfig:
    """A `config.json`'s fields as the family's config."""
    config = registry.read_config(fields, "config.json")
    assert isinstance(config, TransformerConfig)
    return config


@pytest.mark.parametrize("length", [64, 128, 129, 256, 500])
@pytest.mark.parametrize("name", [name for name in ROPES if name != "partial"])
def test_angles_equal_transformers(name, length):
    config = hf_config(name)
    frequencies, scale = reference_angles(config, length)
    ours = read(config.to_dict())
    angles = ours.angles
    assert of_text(ours, length) == pytest.approx(frequencies, rel=1e-5)
    assert angles.scale == pytest.approx(scale, rel=1e-6)


def of_text(config: TransformerConfig, length: int) -> list[float]:
    """The frequencies of a text that may come to so many tokens."""
    angles, reach = config.angles, config.reach_of(length)
    frequency_F = torch.tensor(angles.frequencies)
    if angles.stretched is None:
        assert reach == 0
        return frequency_F.tolist()
    (of_text_F,) = angles.stretched.of_texts(torch.tensor([reach]), frequency_F)
    return of_text_F.tolist()


@pytest.mark.parametrize("name", ROPES)
def test_both_forms_of_a_config_say_the_same(name):
    fields = hf_config(name).to_dict()
    assert registry.read_config(in_old_form(fields), "config.json") == registry.read_config(fields, "config.json")


@pytest.mark.parametrize(
    ("name", "reach"), [("linear", 512), ("yarn", 256), ("yarn-of-its-own", 512), ("dynamic", 256), ("longrope", 512)]
)
def test_how_far_a_rope_carries(name, reach):
    assert registry.read_config(hf_config(name).to_dict(), "config.json").context_length == reach


def load(folder, cache_length, *, devices=1, **more):
    checkpoint = SafetensorsCheckpoint(folder)
    shape = checkpoint.config
    mesh = make_mesh(jax.devices(), shape.num_heads, shape.num_kv_heads, devices)
    model = registry.build(replace(shape, num_kv_heads=max(shape.num_kv_heads, mesh.size)))
    tokenizer: Any = None
    config = EngineConfig(slots=2, cache_length=cache_length, cache_tokens=2 * cache_length, **more)
    engine = assembled(model, mesh, config, jnp.dtype("float32"), tokenizer, "tiny")
    return engine, engine.parameters.load(checkpoint)


CASES = [
    # rope, cache length, prompts' lengths
    ("yarn", 128, (20, 90)),  # short and beyond the original 64
    ("yarn-of-its-own", 256, (20, 128)),
    ("partial", 128, (20, 90)),
    # Other angles, which are compared above, in the same program:
    pytest.param("linear", 128, (20, 90), marks=pytest.mark.product),
    pytest.param("yarn-told", 128, (20, 90), marks=pytest.mark.product),
]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.product)])
@pytest.mark.parametrize(("name", "cache_length", "lengths"), CASES)
def test_logits_and_greedy_tokens_equal_transformers(name, cache_length, lengths, devices, tmp_path):
    import transformers

    config = hf_config(name)
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    draw_weights(reference, seed=6)
    reference.save_pretrained(tmp_path)
    engine, params = load(tmp_path, cache_length, devices=devices)
    prompts = [[(7 * i * i + 3 * i) % 101 for i in range(n)] for n in lengths]
    answers = greedy(engine, params, prompts, 32)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = reference_logits(reference, prompt + answer[:-1])[len(prompt) - 1 :]
        first = logits_behind(engine, params, prompt)
        np.testing.assert_allclose(first, reference_logits(reference, prompt)[-1], atol=1e-4)
        assert expected.argmax(-1).tolist() == answer
        assert len(set(answer)) >= 5  # a model that repeats itself would prove little


STEPS = 24
LENGTHS = ((90, 90 + STEPS), (110, 110 + STEPS), (110, 250))
"""Of texts: the prompt, and what it may come to (tokens). The rope was trained for 128."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "devices"),
    [  # how a rope computes its angles knows no devices
        pytest.param(name, devices, marks=() if (number + devices) % 2 else pytest.mark.product)
        for number, name in enumerate(BY_LENGTH)
        for devices in (1, 8)
    ],
)
def test_each_text_turns_by_what_it_may_come_to(name, devices, tmp_path):
    """Side by side in the same steps, in prompts of several pieces, and in wide steps. A reference that is given a text
    filled up to what it may come to turns by that."""
    import transformers

    config = hf_config(name)
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    draw_weights(reference, seed=6)
    reference.save_pretrained(tmp_path)
    engine, params = load(tmp_path, 256, devices=devices, prefill_chunk=128, speculate="auto")
    engine = twin(engine, shapes=replace(engine.shapes, chunk=engine.sizes.page_rows))
    prompts = [[(7 * i * i + 3 * i) % 101 for i in range(n)] for n, _ in LENGTHS]

    def answers(texts, width, predictions=((), ())):
        session, found = Session(engine, params), {}
        for slot, text in enumerate(texts):
            length, prediction = LENGTHS[text][1], predictions[slot]
            first = session.start(slot, prompts[text], length=length, prediction=prediction)
            found[text] = [int(first.token_BW[0, 0])]
        while min(map(len, found.values())) < STEPS:
            result = session.step(width)
            for slot, text in enumerate(texts):
                found[text] += np.asarray(result.token_BW)[slot, : int(result.count_B[slot])].tolist()
        return {text: answer[:STEPS] for text, answer in found.items()}

    told = answers([0, 2], 1) | answers([2, 1], 1)
    assert answers([0, 2], engine.sizes.tokens_per_step, (told[0], told[2])) == {0: told[0], 2: told[2]}
    for text, (prompt, (_, length)) in enumerate(zip(prompts, LENGTHS, strict=True)):  # its angles only grow
        answer = told[text]
        filled = prompt + answer[:-1] + [0] * (length - len(prompt) - STEPS + 1)
        expected = reference_logits(reference, filled)[len(prompt) - 1 : len(prompt) + STEPS - 1]
        assert expected.argmax(-1).tolist() == answer
        assert len(set(answer)) >= 5  # a model that repeats itself would prove little
        logits_V = np.asarray(Session(engine, params).prefilled(0, prompt, length).logits_NV)[0]
        np.testing.assert_allclose(logits_V, expected[0], atol=1e-4)
    of_one_prompt = [np.asarray(Session(engine, params).prefilled(0, prompts[1], n).logits_NV) for _, n in LENGTHS]
    assert np.abs(of_one_prompt[0] - of_one_prompt[1]).max() > 1e-2


@pytest.mark.slow
def test_a_text_is_scored_by_its_own_length(tmp_path):
    """By a prefill and by steps: within the trained length as though no longer text could come."""
    import transformers

    config = hf_config("dynamic")
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    draw_weights(reference, seed=6)
    reference.save_pretrained(tmp_path)
    session = Session(*load(tmp_path, 256))
    cases: list[tuple[int, Through]] = [(60, "prefill"), (128, "prefill"), (131, "prefill"), (131, "decode")]
    for length, through in cases:
        text = [(7 * i * i + 3 * i) % 101 for i in range(length)]
        logprob_TV = torch.log_softmax(torch.tensor(reference_logits(reference, text)), -1)
        expected = [float(logprob_TV[at, token]) for at, token in enumerate(text[1:])]
        assert score(session, text, through) == pytest.approx(expected, abs=1e-4)


def test_layers_with_a_window_scale_a_rope_of_their_own():
    """Gemma 3: a set of parameters for each type of layer."""
    import transformers

    ropes = {
        "full_attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA},
        "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
    }
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**SIZES | {"rope_parameters": ropes, "layer_types": kinds})
    rope = transformers.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding(config)
    position_R = torch.tensor([0, 1, 63, 64, 300])
    model = registry.build(registry.read_config(config.to_dict(), "config.json"))
    ours = model.rope(position_R)
    for (cos_R1H, sin_R1H), kind in zip(ours, reversed(kinds), strict=True):
        cos_1RH, sin_1RH = rope(torch.zeros(1), position_R[None], kind)
        np.testing.assert_allclose(cos_R1H[:, 0], cos_1RH[0], atol=1e-4)
        np.testing.assert_allclose(sin_R1H[:, 0], sin_1RH[0], atol=1e-4)


def test_texts_of_one_reach_have_the_same_angles():
    """Of LongRoPE there are two kinds of texts, of a dynamic rope one for each length beyond the trained one."""
    longrope, dynamic, linear = (read(hf_config(name).to_dict()) for name in ("longrope", "dynamic", "linear"))
    assert [longrope.reach_of(length) for length in (1, 128, 129, 512)] == [0, 0, 129, 129]
    assert [dynamic.reach_of(length) for length in (1, 128, 129, 512)] == [0, 0, 129, 512]
    assert linear.reach_of(512) == 0
    plain = of_text(longrope, 128)
    longer = [a * b for a, b in zip(of_text(longrope, 129), LISTS["long_factor"], strict=True)]
    assert longer == pytest.approx([a * b for a, b in zip(plain, LISTS["short_factor"], strict=True)])
    assert of_text(dynamic, 128) == pytest.approx(of_text(replace(dynamic, rope_beyond=None), 128))


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_server_of_short_requests_has_one_rope(name):
    """Its programs are those of a model whose rope depends on nothing."""
    config = read(hf_config(name).to_dict())
    assert config.for_length(128).rope_beyond is None
    assert config.for_length(128).angles.frequencies == config.angles.frequencies
    assert config.for_length(129) == config


def test_a_rope_that_depends_on_the_length_is_not_computed_without_one():
    rope = registry.build(read(hf_config("dynamic").to_dict())).rope
    with pytest.raises(ValueError, match="needs its reach"):
        rope(torch.tensor([1]))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_a_rope_scaling_beside_rope_parameters_takes_their_place():
    """A model card's `rope_scaling`, added to a config that transformers 5 wrote."""
    fields = hf_config("linear").to_dict()
    alone = {name: value for name, value in fields.items() if name != "rope_parameters"} | THETA
    added = fields | {"rope_scaling": YARN, "rope_theta": 1000.0}
    expected = read(alone | {"rope_scaling": YARN})
    assert registry.read_config(added, "config.json") == expected
    assert expected.rope_factors != read(fields).rope_factors
    with pytest.raises(RefusedError, match="rope_scaling beside rope_parameters, without rope_theta; move it into"):
        registry.read_config(fields | {"rope_scaling": YARN}, "config.json")


def test_older_names_of_longrope():
    fields = hf_config("longrope").to_dict()
    for name in ("su", "yarn"):
        rope = {**fields["rope_parameters"], "rope_type": None, "type": name}
        older = fields | {"rope_parameters": rope}
        assert registry.read_config(older, "config.json") == registry.read_config(fields, "config.json")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("linear", {"rope_type": "proportional"}, "'proportional'; those there are: default, linear, dynamic, llama3"),
        ("linear", {"factor": None}, "type linear without factor"),
        ("linear", {"mrope_section": [2, 3, 3]}, "a rope with mrope_section, which is not read"),
        ("llama3", {"original_max_position_embeddings": None}, "llama3 without original_max_position_embeddings"),
        ("partial", {"partial_rotary_factor": 0.7}, "turns 11 of a head's 16 dimensions; it has to be an even part"),
        ("partial", {"partial_rotary_factor": 1.5}, "turns 24 of a head's 16 dimensions"),
        ("longrope", {"long_factor": [1.0] * 8}, "a long_factor of 8 numbers; its rope needs 6"),
        ("longrope", {"short_factor": None}, "longrope without short_factor"),
        ("longrope", {"rope_type": "linear", "factor": 2.0}, "'linear'; those there are: default, longrope"),
    ],
)
def test_what_cannot_be_right_is_refused(name, change, message):
    fields = hf_config(name).to_dict()
    with pytest.raises(RefusedError, match=message):
        registry.read_config(fields | {"rope_parameters": fields["rope_parameters"] | change}, "config.json")


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_layers_with_a_window_take_no_rope_that_depends_on_the_length(kind):
    import transformers

    full, local = {"rope_type": "default", **THETA}, {"rope_type": kind, "factor": 2.0, **THETA}
    fields = transformers.Gemma3TextConfig(**SIZES).to_dict()
    ropes = {"full_attention": full, "sliding_attention": local}
    with pytest.raises(RefusedError, match=f"scales its rope by '{kind}'; those there are: {', '.join(FIXED)}"):
        registry.read_config(fields | {"rope_parameters": ropes}, "config.json")


def test_what_does_nothing_may_stand_there():
    fields = hf_config("yarn").to_dict()
    rope = fields["rope_parameters"] | dict.fromkeys(UNREAD, "yarn")
    assert registry.read_config(fields | {"rope_parameters": rope}, "c") == registry.read_config(fields, "c")


def test_a_mistral_that_leaves_its_window_out_has_its_classes_window():
    fields = json.loads(hf_config("yarn-told").to_json_string(use_diff=False))
    assert registry.read_config(fields, "config.json").windows == (None,)
    del fields["sliding_window"]
    assert registry.read_config(fields, "config.json").windows == (4096,)
