"""Mistral's own format against the Hugging Face folder that says the same."""

import base64
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from slipstream.engine_impl.checkpoints.hf_config import read_fields, read_hf_config
from slipstream.engine_impl.checkpoints.mistral_format import MODULES, OF_IMAGES, of_params
from slipstream.engine_impl.checkpoints.open import open_checkpoint
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.compiler.plan import shape_of
from slipstream.engine_impl.errors import RefusedError

from .folders import CONFIG, write_folder

MISTRAL = CONFIG | {"model_type": "mistral", "sliding_window": None}
MIXTRAL = MISTRAL | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
PARAMS = {
    "dim": 32, "n_layers": 2, "head_dim": 8, "hidden_dim": 48, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
    "vocab_size": 259, "rope_theta": 10000.0, "max_position_embeddings": 256,
}  # fmt: skip
MOE = {"num_experts": 3, "num_experts_per_tok": 2}


def in_pairs(value, heads):
    """Rows for halves as rows for neighbours: what transformers' converter undoes."""
    return value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)


def theirs(name, value):
    """A tensor of a Hugging Face folder under its other name."""
    path, _, kind = name.removeprefix("model.").rpartition(".")
    layer, module = "", path
    if path.startswith("layers."):
        _, number, module = path.split(".", 2)
        layer = f"layers.{number}."
    if "experts." in module:
        return f"{layer}feed_forward.{module.removeprefix('block_sparse_moe.')}.{kind}", value
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(module)
    called = {ours: own for own, ours in MODULES.items()}[module]
    return f"{layer}{called}.{kind}", value if heads is None else in_pairs(value, heads)


def mistral_folder(root, config=MISTRAL, params=PARAMS, **more):
    """(a folder of theirs, the Hugging Face one with its weights)."""
    ours = write_folder(root / "ours", config=config)
    folder = root / "theirs"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params | more))
    tensors = dict(theirs(name, value) for name, value in load_file(ours / "model.safetensors").items())
    save_file(tensors, folder / "consolidated.safetensors")
    return folder, ours


@pytest.mark.parametrize(("config", "more"), [(MISTRAL, {}), (MIXTRAL, {"moe": MOE})], ids=["mistral", "mixtral"])
def test_config_and_weights_equal_the_folders(config, more, tmp_path):
    folder, ours = mistral_folder(tmp_path, config, **more)
    checkpoint, expected = open_checkpoint(str(folder)), SafetensorsCheckpoint(ours)
    assert checkpoint.config == expected.config == shape_of(str(folder))
    assert checkpoint.shapes() == expected.shapes()
    for name in expected.shapes():
        np.testing.assert_array_equal(checkpoint.tensor(name), expected.tensor(name), err_msg=name)


def test_a_config_json_goes_first(tmp_path):
    """Some folders hold a model in both formats."""
    folder, ours = mistral_folder(tmp_path)
    (ours / "params.json").write_text(json.dumps(PARAMS | {"dim": 999}))
    assert read_fields(ours) == json.loads((ours / "config.json").read_text())
    assert SafetensorsCheckpoint(ours).shapes() == open_checkpoint(str(folder)).shapes()


def test_yarn_and_windows_are_read(tmp_path):
    yarn = {"original_max_position_embeddings": 64, "factor": 4.0, "beta": 16.0, "alpha": 2.0}
    folder, ours = mistral_folder(tmp_path, yarn=yarn | {"apply_scale": False}, sliding_window=40)
    scaling = {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0,
    }  # fmt: skip
    (ours / "config.json").write_text(
        json.dumps(MISTRAL | {"sliding_window": 40, "rope_scaling": scaling | {"attention_factor": 1.0}})
    )
    assert read_hf_config(folder) == read_hf_config(ours)
    fields = of_params(PARAMS | {"yarn": yarn}, "params.json")
    assert fields["rope_scaling"] == scaling  # the usual scale of cos and sin


def test_the_tower_for_images_is_left_out(tmp_path):
    folder, _ = mistral_folder(tmp_path, vision_encoder={"hidden_size": 16})
    tensors = load_file(folder / "consolidated.safetensors")
    names = set(SafetensorsCheckpoint(folder).shapes())
    more = {f"{start}patch.weight": np.ones((2, 2), np.float32) for start in OF_IMAGES}
    save_file(tensors | more, folder / "consolidated.safetensors")
    assert set(SafetensorsCheckpoint(folder).shapes()) == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, "lacks dim"),
        ({"max_position_embeddings": None}, "neither max_position_embeddings nor max_seq_len; add the one"),
        ({"use_biases": True}, "use_biases=True; those there are: False"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "has quantization, which is not read"),
        ({"llama_4_scaling": {"beta": 0.1}}, "has llama_4_scaling, which is not read; take the folder with a config"),
        ({"moe": MOE | {"num_shared_experts": 1}}, "has num_shared_experts, which is not read"),
        ({"sliding_window": [None, 8]}, "sliding_window"),
    ],
)
def test_what_is_not_read_is_refused_by_name(change, message, tmp_path):
    folder, _ = mistral_folder(tmp_path, **change)
    with pytest.raises(RefusedError, match=rf"params\.json' .*{message}"):
        SafetensorsCheckpoint(folder)


def test_a_folder_without_weights_is_told(tmp_path):
    folder, _ = mistral_folder(tmp_path)
    (folder / "consolidated.safetensors").unlink()
    with pytest.raises(RefusedError, match=r"has a params\.json and no consolidated\*\.safetensors"):
        SafetensorsCheckpoint(folder)


WORDS = [b"ab", b"abc", b" a", "é".encode(), b"bc"]
"""By rank, behind the bytes; the last one is beyond the vocabulary's size."""


def write_tekken(folder, **changes):
    """Two control tokens of three are named."""
    vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
             for i, token in enumerate([bytes([b]) for b in range(256)] + WORDS)]  # fmt: skip
    told = {
        "config": {
            "pattern": r"\w+| \w+|\s+|[^\w\s]+", "num_vocab_tokens": len(vocab), "default_vocab_size": 263,
            "default_num_special_tokens": 3, "version": "v3",
        },
        "vocab": vocab,
    }  # fmt: skip
    (folder / "tekken.json").write_text(json.dumps(told | changes))


def test_tekken_is_read(tmp_path):
    folder, _ = mistral_folder(tmp_path, vocab_size=263)
    write_tekken(folder)
    tokenizer = SafetensorsCheckpoint(folder).tokenizer()
    a, b, c = (3 + ord(letter) for letter in "abc")
    assert tokenizer.encode("abc ab") == [1, 260, 3 + 32, 259]  # <s>; a space and a letter are split before merging
    assert tokenizer.encode("a") == [1, a]
    assert tokenizer.encode("bc") == [1, b, c]  # beyond the size
    assert tokenizer.encode("é") == [1, 262]
    assert tokenizer.decode([259, 262]) == "abé"
    assert tokenizer.stop_ids == {2}
    assert tokenizer.vocab_size == 263


def test_control_tokens_may_be_listed(tmp_path):
    folder, _ = mistral_folder(tmp_path, vocab_size=263)
    special = [{"rank": 1, "token_str": "<s>"}, {"rank": 0, "token_str": "<unk>"}, {"rank": 2, "token_str": "</s>"}]
    write_tekken(folder, special_tokens=special)
    assert SafetensorsCheckpoint(folder).tokenizer().encode("ab") == [1, 259]


@pytest.mark.parametrize("change", [{"config": {"pattern": "("}}, {"vocab": [{"token_bytes": "?"}]}, {"vocab": 3}])
def test_a_damaged_tekken_is_told(change, tmp_path):
    folder, _ = mistral_folder(tmp_path)
    write_tekken(folder, **change)
    with pytest.raises(RefusedError, match="fetch it anew"):
        SafetensorsCheckpoint(folder).tokenizer()
