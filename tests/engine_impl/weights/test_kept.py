"""Weights that a folder keeps for the next start."""

import errno
import inspect
import json
import os
import socket
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl.assembly import assembled
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.forward import LayerLoop
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.weights import kept
from slipstream.engine_impl.weights.sharding import make_mesh

from ..checkpoints.folders import write_folder


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama's checkpoint."""
    write_folder(tmp_path / "model")
    return tmp_path / "model"


def engine_of(folder, devices=1, loop: LayerLoop = "unrolled", **changes) -> tuple[Engine, SafetensorsCheckpoint]:
    checkpoint = SafetensorsCheckpoint(folder)
    shape = checkpoint.config
    mesh = make_mesh(jax.devices(), shape.num_heads, shape.num_kv_heads, devices)
    model = registry.build(replace(shape, num_kv_heads=max(shape.num_kv_heads, mesh.size)))
    config = EngineConfig(
        slots=1, cache_length=128, cache_tokens=128, weight_cache=str(folder.parent / "kept"), **changes
    )
    tokenizer: Any = None
    engine = assembled(
        model, mesh, config, jnp.dtype("float32"), tokenizer, "tiny", shape.num_kv_heads, layer_loop=loop
    )
    return engine, checkpoint


def entries(folder) -> list[str]:
    return sorted(path.name for path in (folder.parent / "kept").iterdir())


def unreadable(name: str) -> np.ndarray:
    raise AssertionError(f"{name} was read from the checkpoint")


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.sharding.is_equivalent_to(b.sharding, a.ndim)) == (b.dtype, True)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("devices", "loop", "changes"),
    [(1, "unrolled", {}), (4, "scan", {}), (2, "scan", {"quantize_weights": "int8"})],
)
def test_the_second_start_reads_no_tensor_of_the_checkpoint(folder, devices, loop, changes, monkeypatch):
    engine, checkpoint = engine_of(folder, devices, loop, **changes)
    first = engine.parameters.load(checkpoint)
    engine, checkpoint = engine_of(folder, devices, loop, **changes)
    monkeypatch.setattr(checkpoint, "tensor", unreadable)
    second = engine.parameters.load(checkpoint)
    assert_same(first, second)
    assert len(entries(folder)) == 1


def test_what_determines_the_weights_determines_the_entry(folder, monkeypatch):
    def load(**changes):
        engine, checkpoint = engine_of(folder, **changes)
        engine.parameters.load(checkpoint)
        return len(entries(folder))

    assert load() == load() == 1
    assert load(quantize_weights="int8") == 2
    assert load(devices=2) == 3
    assert load(devices=2, loop="scan") == 4
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert load() == 5
    monkeypatch.setattr(kept, "code", lambda: "another version")
    assert load() == 6


def spoil_data(entry):
    data = bytearray((entry / "data").read_bytes())
    data[len(data) // 2] ^= 1
    (entry / "data").write_bytes(data)


def cut_data(entry):
    os.truncate(entry / "data", (entry / "data").stat().st_size // 2)


def spoil_index(entry):
    (entry / "index.json").write_text("{")


def forget_a_leaf(entry):
    index = json.loads((entry / "index.json").read_text())
    index.popitem()
    (entry / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("spoil", [spoil_data, cut_data, spoil_index, forget_a_leaf])
def test_a_damaged_entry_is_told_once_and_mended_from_the_checkpoint(folder, spoil, caplog):
    engine, checkpoint = engine_of(folder)
    first = engine.parameters.load(checkpoint)
    (name,) = entries(folder)
    spoil(folder.parent / "kept" / name)
    assert_same(engine.parameters.load(checkpoint), first)
    (told,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "they come from the checkpoint" in told.getMessage()
    assert_same(engine.parameters.load(checkpoint), first)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_a_full_disk_is_told_and_leaves_nothing_behind(folder, monkeypatch, caplog):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    engine, checkpoint = engine_of(folder)
    engine.parameters.load(checkpoint)
    assert entries(folder) == []
    (told,) = caplog.records
    assert "No space left on device" in told.getMessage()


def test_a_folder_that_cannot_be_made_is_told(folder, caplog):
    (folder.parent / "kept").write_text("a file")
    engine, checkpoint = engine_of(folder)
    engine.parameters.load(checkpoint)
    assert "are not kept" in caplog.text


def test_what_a_killed_start_left_is_taken_away(folder):
    """Here a process that is not there any more tells; of other hosts, that nobody has touched it for an hour."""
    here, parent, long_ago = socket.gethostname(), os.getppid(), time.time() - 2 * kept.LEFT_S
    names = {
        f"{here}-999999999-ab": False,
        f"{here}-{os.getpid()}-ab": False,  # a container's first process, once more
        f"{here}-{parent}-ab": True,
        f"{here}-{parent}-old": True,
        "other-host-7-ab": True,
        "other-host-7-old": False,
        "12345": True,
        "12345-old": False,
    }
    for name in names:
        left = folder.parent / "kept" / f"{kept.BEGUN}{name}"
        left.mkdir(parents=True)
        (left / "data").write_bytes(b"x")
        if name.endswith("old"):
            for path in (left / "data", left):
                os.utime(path, (long_ago, long_ago))
    engine, checkpoint = engine_of(folder)
    engine.parameters.load(checkpoint)
    there = {name for name in names if (folder.parent / "kept" / f"{kept.BEGUN}{name}").exists()}
    assert there == {name for name, stays in names.items() if stays}


def test_two_starts_at_once_do_not_meet(folder, monkeypatch):
    """The second begins, and is done, while the first one writes."""
    write, began = kept._write, []

    def slow(into, params):
        began.append(into)
        if len(began) == 1:
            engine, checkpoint = engine_of(folder)
            monkeypatch.setattr(kept, "_remove_leftovers", lambda folder: None)  # it is of this process
            engine.parameters.load(checkpoint)
        write(into, params)

    monkeypatch.setattr(kept, "_write", slow)
    engine, checkpoint = engine_of(folder)
    first = engine.parameters.load(checkpoint)
    assert len(set(began)) == 2
    assert len(entries(folder)) == 1
    monkeypatch.setattr(checkpoint, "tensor", unreadable)
    assert_same(engine.parameters.load(checkpoint), first)


def test_a_shard_in_anothers_place_is_told_though_a_copy_kept_its_times(folder):
    engine, checkpoint = engine_of(folder)
    engine.parameters.load(checkpoint)
    weights = folder / "model.safetensors"
    before, data = weights.stat(), bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    engine, checkpoint = engine_of(folder)
    engine.parameters.load(checkpoint)
    assert len(entries(folder)) == 2


def test_what_cannot_be_read_now_stays_for_the_next_start(folder, monkeypatch, caplog):
    """Such as where the devices, or the host, have no memory for it."""
    engine, checkpoint = engine_of(folder)
    first = engine.parameters.load(checkpoint)

    def full(*args):
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(kept, "_array", full)
        assert_same(engine.parameters.load(checkpoint), first)
    assert "no room" in caplog.text
    monkeypatch.setattr(checkpoint, "tensor", unreadable)
    assert_same(engine.parameters.load(checkpoint), first)


def test_weights_that_cannot_be_copied_are_loaded_all_the_same(folder, monkeypatch, caplog):
    def broken(file, array):
        raise RuntimeError("the device does not answer")

    monkeypatch.setattr(kept, "_append", broken)
    engine, checkpoint = engine_of(folder)
    engine.parameters.load(checkpoint)
    assert entries(folder) == []
    assert "are not kept" in caplog.text
    assert "the device does not answer" in caplog.text


def test_another_module_of_a_model_makes_another_entry(folder, tmp_path, monkeypatch):
    """It may be the user's own, which says how a checkpoint's tensors become weights."""
    module = tmp_path / "module.py"
    module.write_text("a")
    monkeypatch.setattr(inspect, "getfile", lambda of: str(module))
    for text in ("a", "another"):
        module.write_text(text)
        engine, checkpoint = engine_of(folder)
        engine.parameters.load(checkpoint)
    assert len(entries(folder)) == 2


def test_a_checkpoint_that_does_not_fit_is_still_refused(folder):
    """Nothing of it is kept."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    engine, checkpoint = engine_of(folder)
    with pytest.raises(RefusedError, match="does not fit"):
        engine.parameters.load(checkpoint)
    assert not (folder.parent / "kept").exists()
