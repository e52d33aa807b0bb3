"""Hugging Face folders: weights as they are in the files, and one clear error for each way to be damaged."""

import json
import tracemalloc
import weakref
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from slipstream.engine_impl import assembly
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.forward import vectors_of
from slipstream.engine_impl.loading import build_engine, load_engine
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.text.chat import Chat

from ..tiny_models import logits_behind
from .folders import CONFIG, random_tensors, write_folder

TIED = CONFIG | {"tie_word_embeddings": True}


def load(folder, **options):
    settings: dict[str, Any] = {"tensor_parallel": 1, **options}
    return load_engine(EngineConfig(model=str(folder), cache_length=128, slots=2, **settings))


JOINED = {
    "mlp.gate_and_up": ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn.k_and_v": ("self_attn.k_proj", "self_attn.v_proj"),
}


def parameters(params, layers=2):
    """Hugging Face's names of all that was loaded."""
    named = {f"model.{part}.{name}": v for part in ("embed_tokens", "norm") for name, v in params[part].items()}
    named |= {f"lm_head.{name}": value for name, value in params["lm_head"].items()}
    for i in range(layers):
        of_layer = dict(params["layers"][i]) if isinstance(params["layers"], tuple) else {
            name: stack[i] for name, stack in params["layers"].items()
        } | vectors_of(params["alike"], i)  # fmt: skip
        for product, names in JOINED.items():
            if (both := of_layer.pop(f"{product}.weight", None)) is not None:
                of_layer |= {f"{name}.weight": both[which] for which, name in enumerate(names)}
        named |= {f"model.layers.{i}.{name}": value for name, value in of_layer.items()}
    return named


@pytest.mark.parametrize("files", [1, 3])
def test_every_tensor_arrives(tmp_path, files):
    engine, params = load(write_folder(tmp_path / "m", files=files))
    tensors = random_tensors()
    loaded = parameters(params)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name], tensor, err_msg=name)
    assert engine.get_tokenizer().stop_ids == {2}


@pytest.mark.parametrize("loop", ["unrolled", "scan"])
@pytest.mark.parametrize("devices", [1, 4])
def test_both_layer_loops_on_any_mesh_hold_the_files_values(tmp_path, loop, devices, monkeypatch):
    """Four devices: kv heads are repeated, a device holds a share; stacked layers are filled one by one."""
    folder = write_folder(tmp_path / "m", files=2)
    checkpoint = SafetensorsCheckpoint(folder)
    monkeypatch.setattr(assembly, "layer_loop_for", lambda platform, *models: loop)
    engine = build_engine(EngineConfig(cache_length=128, tensor_parallel=devices), checkpoint)
    loaded = parameters(engine.parameters.load(checkpoint))
    for name, tensor in random_tensors().items():
        if devices == 4 and name.split(".")[-2] in ("k_proj", "v_proj"):
            tensor = tensor.reshape(2, 8, -1).repeat(2, axis=0).reshape(32, -1)
        np.testing.assert_array_equal(loaded[name], tensor, err_msg=name)
    share = loaded["model.layers.0.mlp.down_proj.weight"].addressable_shards[0].data.shape
    assert share == (32, 48 // devices)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_types_are_cast(tmp_path, stored, wanted):
    tensors = random_tensors(dtype=stored)
    _, params = load(write_folder(tmp_path / "m", tensors=tensors), dtype=wanted)
    value = params["layers"][1]["self_attn.q_proj.weight"]
    assert value.dtype == wanted
    expected = tensors["model.layers.1.self_attn.q_proj.weight"].astype(jnp.dtype(wanted))
    np.testing.assert_array_equal(np.asarray(value), expected)


@pytest.mark.slow
def test_the_model_answers_as_transformers_does(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = write_folder(tmp_path / "m", config=CONFIG | {"architectures": ["LlamaForCausalLM"]}, files=2)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine, params = load(folder)
    prompt = [5, 77, 130, 9]
    with torch.no_grad():
        logits = reference(torch.tensor([prompt])).logits[0, -1].numpy()
    np.testing.assert_allclose(logits_behind(engine, params, prompt), logits, atol=1e-4)


def test_names_that_a_compiled_module_was_saved_with(tmp_path):
    """torch.compile puts `_orig_mod.` before a module's name, the whole model's or a layer's."""
    tensors = random_tensors()
    compiled = {f"_orig_mod.{name.replace('layers.0.', 'layers.0._orig_mod.')}": t for name, t in tensors.items()}
    plain, saved = (
        SafetensorsCheckpoint(write_folder(tmp_path / name, tensors=held))
        for name, held in (("plain", tensors), ("compiled", compiled))
    )
    assert saved.shapes() == plain.shapes()
    for name in plain.shapes():
        np.testing.assert_array_equal(saved.tensor(name), plain.tensor(name))


def test_a_single_file_goes_before_an_index_that_was_left_behind(tmp_path):
    """`save_pretrained` in shards, later whole into the same folder; with the old shards, and without."""
    new = random_tensors()
    old = {name: tensor + 1 for name, tensor in new.items()}
    folder = write_folder(tmp_path / "m", tensors=old, files=2)
    write_folder(folder, tensors=new)
    name = "model.layers.0.mlp.up_proj.weight"
    for shards in (sorted(folder.glob("model-*.safetensors")), []):
        tensor = SafetensorsCheckpoint(folder).tensor(name.removeprefix("model."))
        np.testing.assert_array_equal(tensor, new[name])
        for shard in shards:
            shard.unlink()


def test_only_a_share_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """Every memory map is gone before the second one after it is opened."""

    checkpoint = SafetensorsCheckpoint(write_folder(tmp_path / "m"))
    read, alive = checkpoint.tensor, []

    def tensor(name):
        alive[:] = [ref for ref in alive if ref() is not None]
        assert len(alive) <= 1
        mapped = read(name)
        assert isinstance(mapped, np.memmap)
        alive.append(weakref.ref(mapped))
        return mapped

    monkeypatch.setattr(checkpoint, "tensor", tensor)
    build_engine(EngineConfig(cache_length=128, tensor_parallel=1), checkpoint).parameters.load(checkpoint)


def test_stacking_layers_takes_no_stack_on_the_host(tmp_path, monkeypatch):
    """Eight layers of 2 MiB a matrix: numpy never holds 16 MiB at once (tracemalloc sees its arrays, not JAX's)."""
    config = CONFIG | {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1024}
    checkpoint = SafetensorsCheckpoint(write_folder(tmp_path / "m", config=config))
    monkeypatch.setattr(assembly, "layer_loop_for", lambda platform, *models: "scan")
    engine = build_engine(EngineConfig(cache_length=128, tensor_parallel=2), checkpoint)
    tracemalloc.start()
    try:
        params = engine.parameters.load(checkpoint)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    stack = params["layers"]["mlp.down_proj.weight"]
    assert stack.nbytes == 16 * 2**20
    assert peak < 10 * 2**20


def change(tensors, name, edit):
    return tensors | {name: edit(tensors[name])}


def with_nan(tensor):
    tensor = tensor.copy()
    tensor.flat[-1] = np.nan
    return tensor


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != UP}, r"missing: layers\.1\.mlp\.up_proj\.weight$"),
    "unexpected": (lambda t: t | {"model.layers.0.extra": np.zeros(3, np.float32)}, r"unexpected: layers\.0\.extra$"),
    "a bias": (
        lambda t: t | {"model.layers.0.self_attn.k_proj.bias": np.zeros(16, np.float32)},
        r"unexpected: layers\.0\.self_attn\.k_proj\.bias$",
    ),
    "a layer too many": (
        lambda t: t | {"model.layers.2.mlp.up_proj.weight": t[UP]},
        r"unexpected: layers\.2\.mlp\.up_proj\.weight$",
    ),
    "transposed": (
        lambda t: change(t, UP, lambda v: np.ascontiguousarray(v.T)),
        r"up_proj\.weight is \(32, 48\), the model needs \(48, 32\)",
    ),
    "fewer kv heads": (
        lambda t: change(t, "model.layers.0.self_attn.v_proj.weight", lambda v: v[:8]),
        r"v_proj\.weight is \(8, 32\), the model needs \(16, 32\)",
    ),
    "several": (
        lambda t: {k: v for k, v in t.items() if k != UP} | {"a": t[UP], "model.norm.weight": np.ones(5, np.float32)},
        r"missing: layers\.1.*; unexpected: a; of another shape: norm\.weight is \(5,\)",
    ),
    "NaN": (lambda t: change(t, UP, with_nan), r"NaN or infinite as float32: layers\.1\.mlp\.up_proj\.weight;"),
    "infinite": (
        lambda t: change(t, "lm_head.weight", lambda v: v * np.float32(np.inf)),
        r"NaN or infinite as float32: lm_head\.weight;",
    ),
    "int8": (lambda t: change(t, UP, lambda v: v.astype(np.int8)), r"1 tensors .*up_proj\.weight in I8; .* quantised"),
    "float8": (
        lambda t: change(t, UP, lambda v: v.astype(ml_dtypes.float8_e4m3fn)),
        r"up_proj\.weight in F8_E4M3; .* quantised",
    ),
    "stored twice": (lambda t: t | {UP.removeprefix("model."): t[UP]}, r"up_proj\.weight twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_are_never_wrong_in_silence(tmp_path, fault):
    damage, message = FAULTS[fault]
    with pytest.raises(RefusedError, match=message):
        load(write_folder(tmp_path / "m", tensors=damage(random_tensors())))


def test_a_value_too_large_for_the_type_is_told(tmp_path):
    tensors = change(random_tensors(dtype=np.float64), UP, lambda v: v * 1e60)
    with pytest.raises(RefusedError, match=r"NaN or infinite as float32: layers\.1\.mlp\.up_proj"):
        load(write_folder(tmp_path / "m", tensors=tensors))


def test_a_nan_in_a_stack_is_told_by_its_layer(tmp_path, monkeypatch):
    checkpoint = SafetensorsCheckpoint(write_folder(tmp_path / "m", tensors=change(random_tensors(), UP, with_nan)))
    monkeypatch.setattr(assembly, "layer_loop_for", lambda platform, *models: "scan")
    engine = build_engine(EngineConfig(cache_length=128, tensor_parallel=2), checkpoint)
    with pytest.raises(RefusedError, match=r"infinite as float32: layers\.1\.mlp\.up_proj\.weight;"):
        engine.parameters.load(checkpoint)


def test_stored_rope_frequencies_are_left_alone(tmp_path):
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    load(write_folder(tmp_path / "m", tensors=random_tensors() | extra))


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path, stored):
    tensors = random_tensors(TIED, dtype=stored)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    _, params = load(write_folder(tmp_path / "same", tensors=tensors, config=TIED))
    assert params["lm_head"] is params["embed_tokens"]
    tensors["lm_head.weight"][-1, -1] += 1
    with pytest.raises(RefusedError, match=r"lm_head.weight of its own, but its config ties it"):
        load(write_folder(tmp_path / "other", tensors=tensors, config=TIED))


def test_an_untied_model_needs_its_head(tmp_path):
    tensors = random_tensors()
    del tensors["lm_head.weight"]
    with pytest.raises(RefusedError, match=r"missing: lm_head\.weight"):
        load(write_folder(tmp_path / "m", tensors=tensors))


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_file_is_told(tmp_path, keep):
    folder = write_folder(tmp_path / "m", files=2)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(RefusedError, match=r"model-00002-of-00002\.safetensors' is no whole safetensors file .*anew"):
        load(folder)


def test_a_missing_file_is_told(tmp_path):
    folder = write_folder(tmp_path / "m", files=3)
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(RefusedError, match=r"lacks 1 of 3 files: model-00003-of-00003\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    "index", ["[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": "../m.safetensors"}}', '{"weight_map": {"a": 5}}']
)
def test_a_broken_index_is_told(tmp_path, index):
    folder = write_folder(tmp_path / "m", files=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(RefusedError, match="is no index of safetensors files"):
        load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_never_opened(tmp_path, name):
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(RefusedError, match=rf"only pickled weights \({name}\).*from_pretrained"):
        load(folder)


def test_no_weights_at_all_is_told(tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RefusedError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "cannot be read .*give a config.json"),
        ("{", "is not JSON"),
        ("[]", "is no JSON object"),
        (json.dumps(CONFIG | {"model_type": "mystery"}), "family 'mystery'"),
        (json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}), "lacks hidden_size"),
    ],
    ids=["absent", "cut", "a list", "another family", "a key missing"],
)
def test_a_config_that_is_none_is_told(tmp_path, config, message):
    folder = write_folder(tmp_path / "m")
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(RefusedError, match=message):
        load(folder)


def test_a_folder_without_tokenizer_takes_ids_and_refuses_texts(tmp_path):
    engine, params = load(write_folder(tmp_path / "m"))
    tokenizer = engine.get_tokenizer()
    with pytest.raises(RefusedError, match=r"has no tokenizer .*; give token ids"):
        tokenizer.encode("hello")
    with pytest.raises(RefusedError, match="has no tokenizer"):
        tokenizer.render_chat(Chat.of([{"role": "user", "content": "hello"}]))
    assert tokenizer.encode("") == []
    stream = tokenizer.stream()
    assert (stream.feed(5), stream.finish(), tokenizer.decode([5, 6])) == ("", "", "")
    first = Session(engine, params).start(0, [1, 2, 3])
    assert 0 <= int(first.token_BW[0, 0]) < tokenizer.vocab_size == CONFIG["vocab_size"]
