"""Real processes, a host each, with two virtual devices: `slipstream serve` as a person starts it."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.session import Session
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub

from ..checkpoints.folders import CONFIG, random_tensors, write_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
DEVICES = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
START_S, END_S = 300.0, 30.0
STEP_S = 5.0
"""--step-timeout: what a test of a host that hangs takes."""
MODEL = CONFIG | {"num_attention_heads": 12, "num_key_value_heads": 12}
"""For two hosts and for three."""
SIZES = ("--slots=1", "--cache-length=128", "--max-prefill-length=16")
"""One step and one prefill, as each host of a group compiles all there are; texts come one behind the other."""
PROMPT = [5, 6, 7, 8, 9]
SAMPLED = {"temperature": 1.5, "seed": 7, "top_k": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model") / "m", config=MODEL)


class Hosts:
    """The processes of a group."""

    def __init__(self, folder: Path, count: int, *more: str, of_followers: tuple[str, ...] = ()) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = (*SIZES, "--port=0", f"--step-timeout={STEP_S}", f"--num-hosts={count}")
        self._flags = [f"--model={folder}", *common, f"--coordinator=127.0.0.1:{port}", *more]
        self._logs = folder.parent
        self.processes = [self._started(index, of_followers if index else ()) for index in range(count)]
        self.leader, *self.followers = self.processes

    def _started(self, index: int, flags: tuple[str, ...]) -> subprocess.Popen[str]:
        words = ["-m", "slipstream.cli.main", "serve", *self._flags, f"--host-index={index}", *flags]
        environment = os.environ | {"XLA_FLAGS": DEVICES, "SLIPSTREAM_HOME": str(ROOT / ".pytest_cache" / "hosts")}
        out = subprocess.DEVNULL if index else subprocess.PIPE
        with self._log(index).open("w") as log:
            return subprocess.Popen(
                [sys.executable, *words], env=environment, cwd=ROOT, stdout=out, stderr=log, text=True
            )

    def address(self) -> str:
        """host:port of the leader, once it serves."""
        assert self.leader.stdout is not None
        for line in self.leader.stdout:
            if line.startswith("SERVING on "):
                return line.split()[-1]
        raise AssertionError(self.log(0))

    def log(self, index: int) -> str:
        """What a host wrote to stderr."""
        return self._log(index).read_text()

    def _log(self, index: int) -> Path:
        return self._logs / f"{index}.log"

    def ends(self, within_s: float = END_S) -> list[int]:
        """The exit status of each."""
        return [process.wait(within_s) for process in self.processes]


@contextmanager
def hosts(folder: Path, count: int, *more: str, of_followers: tuple[str, ...] = ()) -> Iterator[Hosts]:
    group = Hosts(folder, count, *more, of_followers=of_followers)
    try:
        yield group
    finally:
        for process in group.processes:
            with process:  # closes its pipe
                process.kill()


def asked(address: str, max_tokens: int, **options) -> Iterator[int]:
    """The tokens of an answer, as they come."""
    content = pb.DecodeRequest.TokenContent(token_ids=PROMPT)
    request = pb.DecodeRequest(token_content=content, max_tokens=max_tokens, ignore_eos=True, **options)
    with grpc.insecure_channel(address) as channel:
        for reply in OrchestratorStub(channel).Decode(request, timeout=START_S):
            yield from reply.stream_content.samples[0].token_ids


@functools.cache
def on_one_host(folder: Path, devices: int, steps: int, **options) -> list[int]:
    """What one process with as many devices answers."""
    from slipstream.engine_impl.config import EngineConfig
    from slipstream.engine_impl.loading import load_engine

    config = EngineConfig(model=str(folder), slots=1, cache_length=128, max_prefill_length=16, tensor_parallel=devices)
    session = Session(*load_engine(config))
    results = [session.start(0, PROMPT, SamplingParams(ignore_eos=True, **options))]
    results += [session.step() for _ in range(steps - 1)]
    return [int(np.asarray(result.token_BW)[0, 0]) for result in results]


def test_a_group_answers_as_one_host_does_and_ends_in_order(folder):
    """Greedy and drawn; SIGTERM to a follower has the leader drain: what runs is answered, and all exit with 0."""
    count = 3
    with hosts(folder, count) as group:
        address = group.address()
        assert list(asked(address, 12)) == on_one_host(folder, 2 * count, 12)
        assert list(asked(address, 12, **SAMPLED)) == on_one_host(folder, 2 * count, 12, **SAMPLED)
        running = asked(address, 100)
        tokens = [next(running)]
        group.followers[-1].send_signal(signal.SIGTERM)
        tokens += running
        assert len(tokens) == 100
        assert group.ends() == [0] * count
    assert f"draining: host {count - 1} was asked to stop" in group.log(0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_follower_that_dies_or_hangs_ends_the_group_in_time(folder, number):
    """Whoever waits gets UNAVAILABLE, all that can exit do, and not with 0: whoever supervises makes the group anew.
    Until then two hosts answer as one does."""
    expected = on_one_host(folder, 4, 12)
    with hosts(folder, 2) as group:
        running = asked(group.address(), 120)
        assert [next(running) for _ in expected] == expected
        group.followers[0].send_signal(number)
        sent = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            assert [*running] == [*asked(group.address(), 120)], "one of them breaks"
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # pyright: ignore[reportAttributeAccessIssue]
        assert group.leader.wait(END_S) == 1
        assert time.monotonic() - sent < 3 * STEP_S
        group.followers[0].send_signal(signal.SIGCONT)
        assert group.followers[0].wait(END_S) != 0


def test_a_follower_whose_leader_dies_ends(folder):
    with hosts(folder, 2) as group:
        group.address()
        group.leader.kill()
        assert group.followers[0].wait(END_S) != 0


def test_hosts_that_differ_are_refused_with_both_values(folder):
    with hosts(folder, 2, of_followers=("--prefill-chunk=256",)) as group:
        assert group.ends(START_S) == [2, 2]
        told = "--prefill-chunk: '256' here, 'None' on the leader"
        assert f"slipstream: host 1: {told}" in group.log(0)
        assert f"slipstream: {told}" in group.log(1)


def test_hosts_with_other_weights_are_refused(folder, tmp_path):
    tensors = {name: tensor * 1.001 for name, tensor in random_tensors(MODEL).items()}
    other = write_folder(tmp_path / "other", config=MODEL, tensors=tensors)
    with hosts(folder, 2, of_followers=(f"--model={other}",)) as group:
        assert group.ends(START_S) == [2, 2]
        assert "the model: '" in group.log(1)
