"""A second start compiles nothing, and neither does traffic."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SERVER = """
import asyncio, json, sys
from pathlib import Path
import grpc
from slipstream.engine_impl.runtime import compilations
compilations.keep_in(Path(sys.argv[1]))
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.observe import logs
from slipstream.server.config import ServerConfig
from slipstream.server.lifecycle import Serving
from tests.engine_impl.tiny_models import tiny_engine
from tests.fakes import FakeTokenizer

def load():
    engine, params = tiny_engine(slots=2)
    engine.get_tokenizer = FakeTokenizer
    return engine, params

async def ask(stub, length, **options):
    content = pb.DecodeRequest.TokenContent(token_ids=range(1, length + 1))
    call = stub.Decode(pb.DecodeRequest(token_content=content, max_tokens=4, **options), timeout=60)
    return sum([len(reply.stream_content.samples[0].token_ids) async for reply in call])

async def main():
    async with Serving(load, ServerConfig(port=0, probe_interval_s=0.05)) as serving:
        made = compilations.programs()
        async with grpc.aio.insecure_channel(serving.address) as channel:
            stub = OrchestratorStub(channel)
            asks = [
                ask(stub, 1), ask(stub, 20), ask(stub, 32), ask(stub, 30, temperature=0.7, top_k=5, top_p=0.9, seed=1),
                ask(stub, 3, num_samples=2), ask(stub, 3, logprobs=5, prompt_top_logprobs=3, priority=1),
                ask(stub, 3, temperature=0.5, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.1),
                ask(stub, 3, stop_strings=["never"], stop_token_ids=[254], ignore_eos=True),
                ask(stub, 3, logit_bias={5: 1.5, 7: -100}, min_tokens=3, stop_token_ids=[9], num_samples=2),
            ]
            tokens = await asyncio.gather(*asks)
            content = pb.DecodeRequest.TokenContent(token_ids=[1])
            cancelled = stub.Decode(pb.DecodeRequest(token_content=content, max_tokens=90))
            await cancelled.read()
            cancelled.cancel()
        await asyncio.sleep(0.2)
        late = serving.metrics.registry.get_sample_value("slipstream_compilations_after_warmup_total")
        again = compilations.programs().made - made.made
    print(json.dumps({"compiled": made.compiled, "found": made.found, "tokens": tokens, "late": late, "again": again}))

logs.configure("json")
asyncio.run(main())
"""


def start(cache: Path) -> tuple[dict, str]:
    """What the server counted, and its log."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(cache)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_second_start_compiles_nothing_and_traffic_nothing_at_all(tmp_path, one_device):
    """Lengths, sampling, probes, cancels: whatever comes, the programs are those of the warm-up."""
    first, first_log = start(tmp_path)
    second, second_log = start(tmp_path)
    assert first["compiled"] > 5
    assert (second["compiled"], second["found"]) == (0, first["compiled"] + first["found"])
    for run in (first, second):
        assert (run["late"], run["again"]) == (0, 0)
        assert run["tokens"] == [4] * 8 + [run["tokens"][-1]]
        assert run["tokens"][-1] >= 3
    assert f"compiled {first['compiled']} programs, {first['found']} from the cache" in first_log
    assert f"compiled 0 programs, {second['found']} from the cache" in second_log
