"""Loaded weights on local disk, in the form in which the devices have them: `--weight-cache DIR`.

An entry is a folder by the hash of everything that determines the weights: `data` has each device's share of each
array, once, and `index.json` tells where. It is written beside its place and moved there, so it is whole or not there.
Whatever goes wrong with the folder costs time alone: weights then come from the checkpoint, and the log tells why.
"""

import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from ..checkpoints.by_rows import THREADS, empty
from ..forward import Params

log = logging.getLogger(__name__)

DATA, INDEX = "data", "index.json"
ALIGNED = 4096
"""Where arrays begin in `data` (bytes)."""
BLOCK = 16 * 2**20
"""Bytes that have a checksum of their own, and that a thread reads at a time."""
BEGUN = ".begun-"
"""How an entry's name begins until it is whole; behind it are the host, the number of the process, and what is random:
processes of several hosts may share the folder."""
LEFT_S = 3600.0
"""What another host has begun and not touched for so long is left over (seconds)."""
READERS = ("gguf", "ml_dtypes", "safetensors", "transformers")
"""Packages that have a part in what weights become."""


class DamagedError(Exception):
    """An entry that is not what was written."""


def kept(folder: Path, files: Sequence[Path], shapes: Params, load: Callable[[], Params]) -> Params:
    """The parameters: those that the folder keeps, else what `load` gives, which it then keeps.

    Args:
        files: of the checkpoint, see `Checkpoint.files`, and of the model's own code; where there are none, nothing is
            kept.
        shapes: the parameters' shapes, types and shardings, see `load.abstract_params`.
    """
    if not files:
        return load()
    entry = folder / _key(files, shapes)
    params = _read_or_tell(entry, shapes)
    if params is None:
        params = load()
        _write_or_tell(entry, params)
    return params


def _key(files: Sequence[Path], shapes: Params) -> str:
    """An entry's name: by what the weights are made of, what they become, and the code in between. A file that takes
    another's place is told by its time of change, also where a copy has kept size and time of writing."""
    told_of = [(file.resolve(), file.stat()) for file in files]
    sources = [[str(path), of.st_size, of.st_mtime_ns, of.st_ctime_ns] for path, of in told_of]
    leaves = {
        path: [leaf.shape, str(leaf.dtype), str(leaf.sharding.spec), leaf.sharding.mesh.shape_tuple]
        for path, leaf in _leaves(shapes)
    }
    told = json.dumps([sources, leaves, jax.process_index(), code()], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


@functools.cache
def code() -> str:
    """Of all that reads, converts and encodes weights."""
    room, digest = Path(__file__).parents[1], hashlib.sha256()
    folders = ("weights", "checkpoints", "quantization", "models", "../kernels/panel_matmul")
    for path in sorted(path for folder in folders for path in (room / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    for package in READERS:
        digest.update(f"{package} {_version(package)}".encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read_or_tell(entry: Path, shapes: Params) -> Params | None:
    """None where they are not there. What is damaged is taken away; what could not be read, or held, stays."""
    try:
        return _read(entry, shapes)
    except FileNotFoundError:
        return None
    except Exception as error:  # anybody may have written there
        log.warning("weights in %s are not read (%s); they come from the checkpoint", entry, error)
        if isinstance(error, DamagedError | ValueError | KeyError | TypeError | AttributeError):
            shutil.rmtree(entry, ignore_errors=True)
        return None


def _write_or_tell(entry: Path, params: Params) -> None:
    begun: Path | None = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(entry.parent)
        begun = entry.with_name(f"{BEGUN}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
        begun.mkdir()
        _write(begun, params)
        os.replace(begun, entry)
    except Exception as error:  # of the disk, and of what has to be copied from the devices
        if begun is not None:
            shutil.rmtree(begun, ignore_errors=True)
        if not entry.is_dir():  # else another process was faster
            why = error.strerror if isinstance(error, OSError) else None
            log.warning("weights are not kept in %s (%s)", entry.parent, why or error)


def _leaves(params: Params) -> Iterator[tuple[str, Any]]:
    """(path, array), each array once: a tied head is the embedding's."""
    seen: set[int] = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if id(leaf) not in seen:
            seen.add(id(leaf))
            yield jax.tree_util.keystr(path), leaf


def _span(index: Any, shape: tuple[int, ...]) -> str:
    return str([of.indices(size)[:2] for of, size in zip(index, shape, strict=True)])


def _write(folder: Path, params: Params) -> None:
    index: dict[str, dict[str, Any]] = {}
    with (folder / DATA).open("wb") as file:
        for path, leaf in _leaves(params):
            of_leaf = index[path] = {}
            for shard in leaf.addressable_shards:
                span = _span(shard.index, leaf.shape)
                if span not in of_leaf:
                    of_leaf[span] = _append(file, np.asarray(shard.data))
        file.flush()
        os.fsync(file.fileno())
    (folder / INDEX).write_text(json.dumps(index))


def _append(file: BinaryIO, array: np.ndarray) -> list[Any]:
    """[where it begins, checksum of each block]"""
    start = -(-file.tell() // ALIGNED) * ALIGNED
    file.seek(start)
    sums = []
    for block in _blocks(_bytes_of(array)):
        sums.append(zlib.crc32(block))
        file.write(block)
    return [start, sums]


def _read(folder: Path, shapes: Params) -> Params:
    index = json.loads((folder / INDEX).read_text())
    arrays: dict[int, jax.Array] = {}
    with ThreadPoolExecutor(THREADS, "read") as pool, (folder / DATA).open("rb") as file:
        for path, leaf in _leaves(shapes):
            arrays[id(leaf)] = _array(
                leaf,
                lambda of, leaf=leaf, stored=index[path]: _share(file, pool, leaf, of, *stored[_span(of, leaf.shape)]),
            )
    return jax.tree.map(lambda leaf: arrays[id(leaf)], shapes)


def _array(leaf: Any, share: Callable[[Any], np.ndarray]) -> jax.Array:
    """Share by share onto the devices. What several of them have is read once."""
    of_device = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    placed: dict[Any, jax.Array] = {}
    for span in dict.fromkeys(_span(of, leaf.shape) for of in of_device.values()):
        devices = [device for device, of in of_device.items() if _span(of, leaf.shape) == span]
        value = share(of_device[devices[0]])
        placed |= {device: jax.device_put(value, device) for device in devices}
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, [placed[device] for device in of_device])


def _share(file: BinaryIO, pool: ThreadPoolExecutor, leaf: Any, of: Any, start: int, sums: list[int]) -> np.ndarray:
    """One share, read by all threads. Raises DamagedError for one that is not as it was written."""
    shape = tuple(len(range(*part.indices(size))) for part, size in zip(of, leaf.shape, strict=True))
    out = empty(shape, jnp.dtype(leaf.dtype))
    blocks = _blocks(_bytes_of(out))
    if len(blocks) != len(sums):
        raise DamagedError("an array has another size than the index says")

    def read(number: int) -> None:
        block = blocks[number]
        if os.preadv(file.fileno(), [block], start + number * BLOCK) != len(block) or zlib.crc32(block) != sums[number]:
            raise DamagedError("its checksums do not agree")

    for _ in pool.map(read, range(len(blocks))):
        pass
    return out


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _blocks(data: memoryview) -> list[memoryview]:
    return [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]


def _remove_leftovers(folder: Path) -> None:
    """Of processes that were ended before they were done."""
    for left in folder.glob(f"{BEGUN}*"):
        host, _, rest = left.name.removeprefix(BEGUN).rpartition("-")[0].rpartition("-")
        is_here = host == socket.gethostname()
        is_begun_here = is_here and rest.isdecimal() and int(rest) != os.getpid() and Path(f"/proc/{rest}").exists()
        if not is_begun_here and (is_here or time.time() - _touched(left) > LEFT_S):
            shutil.rmtree(left, ignore_errors=True)


def _touched(begun: Path) -> float:
    """When it was written to last (s since 1970); what is gone, just now."""
    try:
        return max(path.stat().st_mtime for path in (begun, *begun.iterdir()))
    except OSError:
        return time.time()
