"""What the plan stream costs: decode steps of a tiny model over four virtual CPU devices, in processes of this machine.

    python -m slipstream.benchmarks.hosts

Three ways, in turns: one process with all devices; two with half of them each, every one for itself (possible here
alone, where both do the same); and two where a follower replays what the leader sends. The stream's cost is what the
third takes more than the second. The last line is one JSON object.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ALONE, APART, LED = "one process", "two, each for itself", "two, by the plan stream"
WAYS = {ALONE: 1, APART: 2, LED: 2}
DEVICES = 4
CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8,
    "hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLOTS, LENGTH, BLOCKS = 2, 2048, 4
END_S = 300


def main(words: Sequence[str]) -> None:
    """The command line; with --host it is one of the processes."""
    parser = argparse.ArgumentParser(prog="python -m slipstream.benchmarks.hosts", description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="timed steps of each block (count)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the three take their turn (count)")
    parser.add_argument("--host", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.host is not None:
        way, index, port, folder = asked.host
        one_host(way, int(index), int(port), folder, asked.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        rounds = [{way: measured(way, folder, asked.steps) for way in WAYS} for _ in range(asked.rounds)]
    of_way = {way: [one[way]["step_ms"] for one in rounds] for way in WAYS}
    for way, values in of_way.items():
        print(f"{way:<26}{median(values):8.2f} ms a step   ({', '.join(f'{value:.2f}' for value in values)})")
    send_us = median(one[LED]["send_us"] for one in rounds)
    cost_ms = median(one[LED]["step_ms"] - one[APART]["step_ms"] for one in rounds)
    print(f"the stream: {cost_ms:+.2f} ms a step; the leader's loop spends {send_us:.0f} us of each on it")
    of_json = {"step_ms": of_way, "stream_ms": cost_ms, "send_us": send_us, "load_average": os.getloadavg()[0]}
    print(json.dumps(of_json), flush=True)


def measured(way: str, folder: str, steps: int) -> dict[str, float]:
    """What host 0 tells of its steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = WAYS[way]
    flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __spec__.name, f"--steps={steps}", "--host", way, str(index), str(port), folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for index in range(count)
    ]
    told = [process.communicate(timeout=END_S)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{way}: the hosts ended with {[process.returncode for process in processes]}")
    return json.loads(told[0].splitlines()[-1])


def one_host(way: str, index: int, port: int, folder: str, steps: int) -> None:
    """One of the processes; host 0 prints its times as JSON."""
    from ..engine_impl.config import EngineConfig
    from ..engine_impl.distributed import joining
    from ..engine_impl.distributed.group import FollowingGroup, LeadingGroup
    from ..engine_impl.hosts import Place
    from ..engine_impl.loading import load_engine

    config = EngineConfig(model=folder, slots=SLOTS, cache_length=LENGTH, tensor_parallel=DEVICES)
    place = Place(f"127.0.0.1:{port}", WAYS[way], index)
    if way == LED and index:
        status, why = FollowingGroup(place, config, 0).run()
        if status:
            sys.exit(why)
        return
    group = LeadingGroup(place, config, 0) if way == LED else None
    if way == APART:
        joining.join(place)
    engine, params = load_engine(config) if group is None else group.load()
    sends: list[float] = []
    if group is not None:
        time_sends(engine, sends)
    step_ms = min(block(engine, params, steps) for _ in range(BLOCKS))
    if group is not None:
        group.stop()
    elif way == APART:
        joining.leave()
    print(json.dumps({"step_ms": step_ms, "send_us": 1e6 * median(sends or [0.0])}), flush=True)


def block(engine: Any, params: Any, steps: int) -> float:
    """ms per step; each is started before the tokens of the one before it are read, as the server does."""
    from ..engine_impl.session import Session

    session = Session(engine, params)
    for slot in range(SLOTS):
        session.start(slot, [1, 2, 3])
    pending = session.step()
    read(pending)
    pending = session.step()
    began = time.perf_counter()
    for _ in range(steps):
        earlier, pending = pending, session.step()
        read(earlier)
    ended = time.perf_counter()
    read(pending)
    return (ended - began) / steps * 1000


def read(result: Any) -> None:
    import numpy as np

    np.asarray(result.token_BW)


def time_sends(leader: Any, seconds: list[float]) -> None:
    """Notes what each call takes until it is in the followers' queues."""
    send = leader.send

    def timed(*arguments: Any) -> int:
        began = time.perf_counter()
        number = send(*arguments)
        seconds.append(time.perf_counter() - began)
        return number

    leader.send = timed


def write_model(folder: Path) -> None:
    """A random Llama."""
    import numpy as np
    from safetensors.numpy import save_file

    from ..engine_impl.models import registry
    from ..engine_impl.weights.load import needed_shapes

    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng, shape = np.random.default_rng(0), registry.read_config(CONFIG, "random")
    shapes = needed_shapes(registry.build(shape), shape.num_kv_heads)
    names = {name: name if name.startswith("lm_head") else f"model.{name}" for name in shapes}
    tensors = {names[name]: rng.normal(size=of).astype(np.float32) / 8 for name, of in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
