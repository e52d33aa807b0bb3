"""Which host this is: by flags, or by what LeaderWorkerSet and GKE set."""

import pytest
from slipstream.cli.main import parse
from slipstream.cli.serve import Serve
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.hosts import HostsConfig, Place

LWS = {"LWS_LEADER_ADDRESS": "slipstream-0.slipstream", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "2"}
TPUS = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "s-0.s,s-0-1.s,s-0-2.s,s-0-3.s"}
PROCESSES = {"TPU_WORKER_ID": "1", "TPU_PROCESS_ADDRESSES": "10.0.0.1:8476,10.0.0.2:8476"}


def place(environment):
    return HostsConfig(hosts="auto").place(environment)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (LWS, Place("slipstream-0.slipstream:8482", 4, 2)),
        (LWS | TPUS, Place("slipstream-0.slipstream:8482", 4, 2)),
        (LWS | {"LWS_LEADER_ADDRESS": "fd00::1"}, Place("[fd00::1]:8482", 4, 2)),
        (LWS | {"LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"}, None),
        (TPUS, Place("s-0.s:8482", 4, 2)),
        (PROCESSES, Place("10.0.0.1:8482", 2, 1)),
        (TPUS | PROCESSES, Place("10.0.0.1:8482", 2, 1)),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
    ids=["lws", "lws-tpu", "lws-ipv6", "lws-of-one", "gke", "processes", "both", "one-host"],
)
def test_the_environment_tells(environment, expected):
    assert place(environment) == expected


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "finds no hosts: neither LWS_LEADER_ADDRESS, .* nor TPU_WORKER_ID with .*; give --coordinator"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "finds no hosts"),
        (LWS | {"LWS_GROUP_SIZE": ""}, "LWS_GROUP_SIZE='' must be a number"),
        (LWS | {"LWS_WORKER_INDEX": "4"}, "host_index=4 must be from 0 to 3"),
        (LWS | TPUS | {"LWS_GROUP_SIZE": "5"}, "LWS_GROUP_SIZE=5 .* the TPUs' own variables say host 2 of 4"),
        (LWS | TPUS | {"TPU_WORKER_ID": "1"}, "every pod of the group, the leader too, must ask for its host's TPUs"),
        (TPUS | {"TPU_WORKER_ID": "x"}, "TPU_WORKER_ID='x' must be a number"),
    ],
)
def test_an_environment_that_says_no_such_thing_is_refused(environment, told):
    with pytest.raises(RefusedError, match=told):
        place(environment)


def test_flags_tell():
    command = parse(["serve", "--coordinator", "[fd00::1]:8482", "--num-hosts", "2", "--host-index", "1"])
    assert isinstance(command, Serve)
    assert command.hosts.place({}) == Place("[fd00::1]:8482", 2, 1)
    assert Place("[fd00::1]:8482", 2, 1).leader_host == "fd00::1"


@pytest.mark.parametrize("environment", [{}, LWS])
def test_without_them_a_host_is_alone_whatever_the_environment_says(environment):
    assert HostsConfig().place(environment) is None
    assert HostsConfig(coordinator="a:1", num_hosts=1, host_index=0).place(environment) is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--hosts auto --coordinator a:1", "--hosts auto takes all from the environment"),
        ("--hosts auto --host-index 0", "--hosts auto takes all from the environment"),
        ("--coordinator a:1 --num-hosts 2", "are given together, or none of them"),
        ("--num-hosts 2", "are given together, or none of them"),
        ("--coordinator a --num-hosts 2 --host-index 0", "coordinator='a' must be HOST:PORT"),
        ("--coordinator a:0 --num-hosts 2 --host-index 0", "coordinator='a:0' must be HOST:PORT"),
        ("--coordinator a:65536 --num-hosts 2 --host-index 0", "coordinator='a:65536' must be"),
        ("--coordinator a:1 --num-hosts 0 --host-index 0", "num_hosts=0 must be at least 1"),
        ("--coordinator a:1 --num-hosts 2 --host-index 2", "host_index=2 must be from 0 to 1: there are 2 hosts"),
        ("--coordinator a:1 --num-hosts 2 --host-index 0 --orchestrator jetstream", "serves from one host"),
        ("--step-timeout -1", "step_timeout=-1.0 must be 0"),
    ],
)
def test_flags_that_make_no_place_are_refused(words, told):
    with pytest.raises(RefusedError, match=told):
        parse(["serve", *words.split()])
