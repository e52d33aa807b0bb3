"""The store by itself: what is loaded, waited for, refused and told."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.adapters.store import AdapterStore
from slipstream.server.config import AdaptersConfig
from slipstream.server.errors import DeadlineError, UnavailableError, UnknownModelError

from tests.fakes import FakeAdapter

WAIT_S = 10


def store_of(read: Callable[[str], FakeAdapter] = FakeAdapter, folder=None, most=64):
    store = AdapterStore(folder, most)
    store.open(read, ["base"])
    return store


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, WAIT_S))


def test_an_adapter_is_there_until_it_is_unloaded():
    async def scenario():
        store = store_of()
        loaded = await store.load("a", "x-1")
        assert await store.load("a", "x-1") is loaded
        assert await store.get("a") is loaded
        assert time.time() - loaded.last_asked < WAIT_S
        (info,) = store.listed([])
        assert (info.name, info.status, info.device_bytes, info.host_bytes) == ("a", "loaded_cpu", 0, 1 << 20)
        (info,) = store.listed([loaded])
        assert (info.status, info.device_bytes) == ("loaded_hbm", 2 << 20)
        assert store.unload("a") is loaded
        assert not loaded.is_served
        assert store.listed([loaded]) == []
        with pytest.raises(UnknownModelError, match="adapter 'a' is not there"):
            await store.get("a")

    run(scenario())


def test_the_hosts_memory_takes_no_more_than_it_was_told():
    async def scenario():
        store = store_of(most=2)
        for name in ("a", "b"):
            await store.load(name, f"x-{name}")
        with pytest.raises(RefusedError, match="2 adapters are in the host's memory and max_host_adapters=2; unload"):
            await store.load("c", "x-c")
        await store.load("b", "x-b")
        await store.load("b", "x-other", anew=True)
        store.unload("a")
        await store.load("c", "x-c")

    run(scenario())


def test_those_at_the_start_have_room():
    with pytest.raises(RefusedError, match="max_host_adapters=1 must be at least 2"):
        AdaptersConfig(adapters=("a=x", "b=y"), max_host_adapters=1)


def test_loaded_anew_it_is_another_one():
    async def scenario():
        store = store_of()
        first = await store.load("a", "x-1")
        with pytest.raises(RefusedError, match="adapter 'a' is loaded from 'x-1' already"):
            await store.load("a", "x-2")
        second = await store.load("a", "x-1", anew=True)
        assert second.number != first.number
        assert (first.is_served, second.is_served) == (False, True)

    run(scenario())


def test_whoever_asks_for_one_that_is_loading_waits_until_his_deadline():
    may_read = threading.Event()

    def read(path):
        assert may_read.wait(WAIT_S)
        return FakeAdapter(path)

    async def scenario():
        store = store_of(read)
        loading = asyncio.create_task(store.load("a", "x-1"))
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="adapter 'a' is loaded from 'x-1' already"):
            await store.load("a", "x-2")
        assert [info.status for info in store.listed([])] == ["loading"]
        with pytest.raises(RefusedError, match="is being loaded"):
            store.unload("a")
        with pytest.raises(DeadlineError, match="while adapter 'a' was being loaded"):
            await store.get("a", time.monotonic() + 0.01)
        waiting = asyncio.create_task(store.get("a", time.monotonic() + WAIT_S))
        may_read.set()
        assert await waiting is await loading

    run(scenario())


def test_what_cannot_be_read_is_told_to_all_who_wait_and_may_be_tried_again():
    faults = [RefusedError("damaged")]

    def read(path):
        if faults:
            raise faults.pop()
        return FakeAdapter(path)

    async def scenario():
        store = store_of(read)
        results = await asyncio.gather(*(store.load("a", "x-1") for _ in range(2)), return_exceptions=True)
        assert [str(result) for result in results] == ["damaged", "damaged"]
        assert (await store.load("a", "x-1")).path == "x-1"

    run(scenario())


@pytest.mark.parametrize("name", ["", "base", "a b", "a\n", "a" * 129, "é"])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(RefusedError, match="adapter name"):
        run(store_of().load(name, "x-1"))


def test_callers_load_from_below_a_folder_alone(tmp_path):
    (tmp_path / "inside" / "a-1").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "inside" / "circle").symlink_to(tmp_path / "inside" / "circle")
    store = store_of(folder=tmp_path / "inside")
    assert store.allowed("a-1") == store.allowed(str(tmp_path / "inside" / "a-1")) == str(tmp_path / "inside" / "a-1")
    no_file = ("circle", "a\0b", "a" * 300, "\ud800")
    for path in ("", ".", "..", "../outside", "link", str(tmp_path), "/etc", "b", "a-1/../..", *no_file):
        with pytest.raises(RefusedError, match="must be a folder below adapter_dir"):
            store.allowed(path)
    with pytest.raises(RefusedError, match="serve with --adapter-dir"):
        store_of().allowed("a-1")


def test_names_and_paths_of_the_command_line():
    assert AdaptersConfig(adapters=("a=x=1", "b=y")).named == {"a": "x=1", "b": "y"}
    for wrong in (("a",), ("=x",), ("a=",)):
        with pytest.raises(RefusedError, match="must be NAME=PATH"):
            AdaptersConfig(adapters=wrong)
    with pytest.raises(RefusedError, match="a name twice, of a"):
        AdaptersConfig(adapters=("a=x", "a=y"))


def test_who_waits_for_a_load_that_does_not_begin_before_the_close_is_told():
    async def scenario():
        begun, goes_on = threading.Event(), threading.Event()

        def read(path):
            begun.set()
            assert goes_on.wait(WAIT_S)
            return FakeAdapter(path)

        store = store_of(read)
        first, second = (asyncio.create_task(store.load(name, "x-1")) for name in "ab")
        assert await asyncio.to_thread(begun.wait, WAIT_S)
        asked = asyncio.create_task(store.get("b"))
        await asyncio.sleep(0)
        store.close()
        for waiting in (second, asked):
            with pytest.raises(UnavailableError, match="adapter 'b' is not loaded any more: the server is stopping"):
                await waiting
        goes_on.set()
        assert (await first).name == "a", "what is being read is not cut off"

    run(scenario())
