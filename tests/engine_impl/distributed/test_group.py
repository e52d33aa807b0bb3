"""Followers do what the leader does, in its order, and nothing else; who is no follower is turned away."""

import gc
import threading
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from slipstream.engine_impl.api import Opening, Piece
from slipstream.engine_impl.distributed.failures import Failures
from slipstream.engine_impl.distributed.follower import FAILED, REFUSED, DivergedError, Follower, Replay
from slipstream.engine_impl.distributed.leader import Leader
from slipstream.engine_impl.distributed.plan_stream import GroupLostError, PlanStream
from slipstream.engine_impl.distributed.verbs import CHECK, VERBS, functions_of
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.protos import hosts_pb2 as pb
from slipstream.protos import hosts_pb2_grpc

from tests.fakes import FakeEngine

from .groups import SECRET, WAIT_S, Group, agreeing, group

PAGES = np.arange(16, dtype=np.int32)


def answer(engine: Leader, state, prompt: str, steps: int):
    """(state, text): a prompt of one piece in slot 0."""
    params, token_T = engine.load(), np.frombuffer(prompt.encode(), np.uint8).astype(np.int32)
    prefix = engine.prefill(params, state, [Piece(token_T=token_T, start=0, page_J=PAGES)])
    opening = Opening(text=token_T, prompt_length=len(token_T), sampling=SamplingParams())
    prefix, first = engine.first_tokens(prefix, [opening])
    state = engine.insert(prefix, state, [0], PAGES[None])
    tokens = [read(first)]
    for _ in range(steps):
        state, result = engine.generate(params, state, np.zeros(1, np.int32), PAGES[None])
        tokens.append(read(result))
    return state, "".join(map(chr, tokens))


def until(event: threading.Event):
    """A call that takes until then."""

    def wait(_) -> None:
        event.wait(WAIT_S)

    return wait


def read(result):
    result.token_BW.copy_to_host_async()
    return int(np.asarray(result.token_BW)[0, 0])


@pytest.mark.parametrize("hosts", [2, 3])
def test_followers_do_what_the_leader_does_in_its_order(hosts):
    engines = [FakeEngine(max_adapters=1) for _ in range(hosts)]
    with group(*engines) as made:
        engine = made.leader
        _, text = answer(engine, engine.warm_up(engine.load(), engine.init_decode_state()), "abc", steps=3)
        assert text == "defg"
    assert engines[0].log == ["warm_up", "prefill abc", "insert 0", *["generate"] * 3]
    for other in engines[1:]:
        assert other.log == engines[0].log


def test_what_is_decided_on_the_host_is_decided_by_the_leader_alone():
    leader, follower = FakeEngine(carries_pieces=True), FakeEngine()
    with group(leader, follower) as made:
        assert made.leader.carries(1, [3])
        assert made.leader.sizes.slots == leader.max_concurrent_decodes
    assert follower.log == []


def test_what_the_leaders_caller_drops_the_followers_drop():
    """A state that was donated, a prefix that was stored: else their memory would fill."""
    with group(FakeEngine(), FakeEngine()) as made:
        state, _ = answer(made.leader, made.leader.init_decode_state(), "a", steps=5)
        gc.collect()
        made.leader.read_adapter("adapter-1")  # answered when all before it is done, what is freed included
        replay = made.followers[0]._replay
        assert replay is not None
        assert replay.held == 2  # the state, and the adapter
        del state


def test_a_verb_that_raises_on_all_hosts_is_told_to_its_caller_alone():
    def refuse(prompt):
        if prompt == [ord("x")]:
            raise ValueError("not this one")

    with group(FakeEngine(on_prefill=refuse), FakeEngine(on_prefill=refuse)) as made:
        state = made.leader.init_decode_state()
        for _ in range(2):
            with pytest.raises(ValueError, match="not this one"):
                answer(made.leader, state, "x", steps=0)
        assert answer(made.leader, state, "a", steps=1)[1] == "bc"


def fail_here(prompt):
    raise ValueError("only here")


def test_a_verb_that_raises_on_the_leader_alone_ends_the_group_at_the_next():
    with group(FakeEngine(on_prefill=fail_here), FakeEngine()) as made:
        with pytest.raises(ValueError, match="only here"):
            answer(made.leader, made.leader.init_decode_state(), "a", steps=0)
        with pytest.raises(GroupLostError, match="host 1"):
            made.leader.init_decode_state()
        assert made.lost.wait() == "host 1: DivergedError: call 5 failed on the leader and not here"
        assert made.followers[0].wait()[0] == FAILED


def test_a_verb_that_raises_on_a_follower_alone_ends_the_group_at_once():
    """Though the leader asks for nothing more."""
    with group(FakeEngine(), FakeEngine(), FakeEngine(on_prefill=fail_here)) as made:
        state, piece = made.leader.init_decode_state(), Piece(token_T=np.ones(1, np.int32), start=0, page_J=PAGES)
        made.leader.prefill(made.leader.load(), state, [piece])
        assert made.lost.wait() == "host 2: call 5 failed there and not here: ValueError: only here"
        assert [follower.wait()[0] for follower in made.followers] == [FAILED] * 2
        with pytest.raises(GroupLostError, match="host 2"):
            made.leader.init_decode_state()


def test_a_follower_may_tell_of_a_failure_before_or_after_the_leader_has_it():
    failures = Failures(followers=2)
    assert failures.there(1, 1, "ValueError") == failures.here(1, raised=True) == failures.there(1, 2, "") == ""
    assert failures.here(2, raised=True) == failures.here(3, raised=False) == failures.there(2, 1, "") == ""
    assert failures.there(2, 2, "") == failures.there(5, 1, "late") == failures.here(4, raised=False) == ""
    assert failures.here(5, raised=False) == "host 1: call 5 failed there and not here: late"
    assert failures.there(3, 2, "early") == "host 2: call 3 failed there and not here: early"


def test_adapters_are_read_on_every_host():
    engines = FakeEngine(max_adapters=1), FakeEngine(max_adapters=1)
    with group(*engines) as made:
        adapter = made.leader.read_adapter("adapter-3")
        assert (adapter.rank, adapter.bytes, adapter.device_bytes) == (4, 1 << 20, 2 << 20)
        made.leader.put_adapter(made.leader.load(), 1, adapter)
    assert [engine.at_index[1].path for engine in engines] == ["adapter-3"] * 2


def test_an_adapter_that_a_host_lacks_is_refused_with_the_hosts_number():
    def lacks(path):
        raise RefusedError(f"there is no {path}")

    with group(FakeEngine(), FakeEngine(), FakeEngine(on_read_adapter=lacks)) as made:
        with pytest.raises(RefusedError, match=r"^host 2: there is no adapter-3$"):
            made.leader.read_adapter("adapter-3")
        assert made.lost.reasons == []


def test_an_adapter_that_breaks_its_reader_is_refused_likewise():
    def breaks(path):
        raise OSError("the disk is gone")

    with group(FakeEngine(), FakeEngine(on_read_adapter=breaks)) as made:
        with pytest.raises(RefusedError, match=r"^host 1: OSError: the disk is gone$"):
            made.leader.read_adapter("adapter-3")
        assert made.lost.reasons == []


def test_an_adapter_asked_for_while_a_verb_fails_on_all_hosts_ends_no_group():
    """The leader is still at the verb when the call for the adapter, from another thread, reaches a follower."""
    replay = Replay(functions_of(FakeEngine(), lambda: "parameters"))
    replay._failed[1] = "ValueError: on all hosts"
    replay.begin(pb.Call(number=2, verb="read_adapter", results=[2]))
    replay.begin(pb.Call(number=3, verb="init_decode_state", results=[3], failed=[1]))


def test_a_slow_adapter_holds_up_no_step():
    may_go_on = threading.Event()
    with group(FakeEngine(), FakeEngine(on_read_adapter=until(may_go_on))) as made:
        reading = threading.Thread(target=made.leader.read_adapter, args=("adapter-1",))
        reading.start()
        assert answer(made.leader, made.leader.init_decode_state(), "a", steps=1)[1] == "bc"
        may_go_on.set()
        reading.join(WAIT_S)


def test_a_mismatch_is_refused_on_both_sides():
    def differs(facts, sizes):
        raise RefusedError(f"jax: '1' here, {facts['jax']!r} on the leader")

    made = Group(FakeEngine(), FakeEngine(), prepare=lambda: differs)
    answers = made.leader.ask(CHECK, {"jax": "2"}, {})
    assert answers == {1: "jax: '1' here, '2' on the leader"}
    assert made.lost.reasons == [], "the leader can tell what was refused"
    made.leader.stop("host 1 differs")
    assert made.followers[0].wait() == (REFUSED, answers[1])
    made.close()


def test_hosts_that_agree_are_told_why_the_group_never_began():
    made = Group(FakeEngine(), FakeEngine())
    made.leader.ask(CHECK, {}, {})
    made.leader.stop("host 2 differs")
    assert made.followers[0].wait() == (REFUSED, "host 2 differs")
    assert made.followers[0].is_stopped
    made.close()


def test_a_follower_that_cannot_begin_tells_why():
    is_made = threading.Event()

    def missing():
        is_made.wait(WAIT_S)  # else the leader may hear of it while it waits for followers
        raise RefusedError("there is no such model")

    made = Group(FakeEngine(), FakeEngine(), prepare=missing)
    is_made.set()
    assert made.lost.wait() == "host 1: there is no such model"
    made.close()


def test_a_follower_that_is_asked_to_stop_asks_the_leader():
    with group(FakeEngine(), FakeEngine()) as made:
        made.followers[0].leave()
        assert made.leaving.wait() == "host 1 was asked to stop"
        assert made.lost.reasons == []


@pytest.mark.parametrize("what", ["call", "result"])
def test_a_step_that_does_not_end_on_a_follower_ends_the_group(what):
    """Its own watchdog: the stream to it stands, and JAX's heartbeat goes on."""
    may_end = threading.Event()
    if what == "call":
        hanging = FakeEngine(on_generate=until(may_end))
    else:
        hanging = FakeEngine(pace=SimpleNamespace(acquire=lambda timeout: may_end.wait(WAIT_S)))  # pyright: ignore
    with group(FakeEngine(), hanging, step_timeout_s=0.2) as made:
        answer(made.leader, made.leader.init_decode_state(), "a", steps=1)
        assert "has taken longer than --step-timeout=0.2 s" in made.lost.wait()
        assert made.followers[0].wait()[0] == FAILED
        may_end.set()


def test_a_step_that_fails_on_a_followers_device_ends_the_group():
    with group(FakeEngine(), FakeEngine(late_errors={0: RuntimeError("out of memory")})) as made:
        answer(made.leader, made.leader.init_decode_state(), "a", steps=1)
        assert made.lost.wait() == "host 1: a step failed: RuntimeError: out of memory"


def test_a_follower_whose_leader_is_gone_ends():
    made = Group(FakeEngine(), FakeEngine())
    made.plan._server.stop(0)
    status, why = made.followers[0].wait()
    assert (status, why[:18]) == (FAILED, "the leader is gone")
    made.close()


def test_followers_that_do_not_come_are_named():
    plan = PlanStream("127.0.0.1", 3, SECRET, 0)
    follower = Follower(plan.address, SECRET, 2, agreeing(FakeEngine()), 0)
    with pytest.raises(RefusedError, match=r"hosts \[1\] have not come within 0.5 s; all 3 must start"):
        plan.wait_for_followers(0.5)
    follower.close()
    plan._server.stop(0)


@pytest.mark.parametrize(
    ("host", "secret", "code"),
    [
        ("1", "another", grpc.StatusCode.PERMISSION_DENIED),
        ("1", None, grpc.StatusCode.PERMISSION_DENIED),
        ("1", SECRET, grpc.StatusCode.ALREADY_EXISTS),
        ("2", SECRET, grpc.StatusCode.ALREADY_EXISTS),
        ("0", SECRET, grpc.StatusCode.ALREADY_EXISTS),
    ],
)
def test_who_is_no_follower_hears_nothing_and_harms_nobody(host, secret, code):
    with group(FakeEngine(), FakeEngine()) as made:
        about = [("host", host), *([("secret", secret)] if secret else [])]
        with grpc.insecure_channel(made.plan.address) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                next(hosts_pb2_grpc.PlanStub(channel).Follow(iter([pb.Report(is_leaving=True)]), metadata=about))
            assert caught.value.code() is code  # pyright: ignore[reportAttributeAccessIssue]
        assert answer(made.leader, made.leader.init_decode_state(), "a", steps=1)[1] == "bc"
        assert made.lost.reasons == made.leaving.reasons == []


def test_a_replay_notices_that_it_has_diverged():
    replay = Replay(functions_of(FakeEngine(), lambda: "parameters"))
    replay.do(pb.Call(number=1, verb="load", results=[1]))
    with pytest.raises(DivergedError, match="call 1 failed on the leader and not here"):
        replay.begin(pb.Call(number=2, verb="init_decode_state", results=[2], failed=[1]))


def test_every_verb_is_one_of_an_engines():
    assert [name for name in VERBS if not hasattr(FakeEngine, name)] == ["load"]
    assert [name for name in VERBS if not hasattr(Leader, name)] == []
