"""Memory that is freed: kept for what comes next on CPUs, and given back when asked to."""

import logging
import os
import platform
import resource
import subprocess
import sys

import pytest
from slipstream.engine_impl.runtime import allocator
from slipstream.engine_impl.runtime.platforms import platform_of

IS_GLIBC = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})

BLOCK = """
import ctypes, resource, sys, threading
from slipstream.engine_impl.runtime import allocator
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be one fault

def used():
    at = libc.malloc(100 << 20)  # more than any threshold of glibc's, and than a thread's own heap
    libc.memset(at, 1, 100 << 20)
    libc.free(at)

def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

def faults_of(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    allocator.keep_freed()
used()
print(faults_of(used), faults_of(lambda: in_thread(used)))
allocator.give_back()
print(faults_of(used))
"""
HUGE = """
import ctypes, re
from slipstream.engine_impl.runtime import allocator
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t

def huge():
    found = re.search(r"AnonHugePages: +([0-9]+) kB", open("/proc/self/smaps_rollup").read())
    return int(found[1]) << 10

def move(beside=0):
    before = huge()
    allocator.use_huge_pages(beside)
    print(huge() - before)

move()
allocator.keep_freed()
blocks = [libc.malloc(1 << 20) for _ in range(20)]  # each less than a huge page
for block in blocks:
    libc.memset(block, 7, 1 << 20)
move(beside=700 << 20)  # more than stays free at the heap's end
assert all(ctypes.string_at(block, 1 << 20) == bytes([7]) * (1 << 20) for block in blocks)
before = huge()
libc.memset(libc.malloc(700 << 20), 7, 64 << 20)
print(huge() - before)
"""
PAGES = (100 << 20) // resource.getpagesize()
"""Faults when all of a block's pages are new."""


def has_collapse():
    """Whether Linux moves pages when it is asked to, not some time later: since 6.1."""
    return tuple(map(int, platform.release().split(".")[:2])) >= (6, 1)


def faults(how):
    """Of a block that is allocated again, in the same thread and in another one, and behind `give_back`."""
    done = subprocess.run([sys.executable, "-c", BLOCK, how], capture_output=True, text=True, timeout=60, check=True)
    return [int(count) for count in done.stdout.split()]


@pytest.mark.skipif(not IS_GLIBC, reason="another C library keeps memory as it likes")
def test_what_is_freed_is_there_again_in_any_thread_until_it_is_given_back():
    again, elsewhere, behind = faults("kept")
    assert max(again, elsewhere) < 200
    assert behind > PAGES * 0.9


@pytest.mark.skipif(not IS_GLIBC, reason="another C library keeps memory as it likes")
def test_left_alone_the_library_returns_it():
    assert min(faults("left alone")) > PAGES * 0.9


@pytest.mark.skipif(
    not IS_GLIBC or not allocator.has_huge_pages() or not has_collapse(),
    reason="the system has no huge pages to give, or not at once",
)
def test_what_is_allocated_moves_to_huge_pages_once_the_heap_is_one_and_so_does_what_comes_next():
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, timeout=60, check=True)
    before, moved, beside = map(int, done.stdout.split())
    assert before == 0
    assert moved >= 18 << 20
    assert beside >= 62 << 20


def test_a_system_without_huge_pages_is_not_asked(monkeypatch, tmp_path):
    """MADV_COLLAPSE would give them all the same."""
    monkeypatch.setattr(allocator, "_keeps", True)
    monkeypatch.setattr(allocator, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(allocator, "_glibc", lambda: object())  # it has no madvise
    allocator.use_huge_pages()
    allocator.HUGE_PAGES.write_text("always madvise [never]\n")
    allocator.use_huge_pages()


def test_another_c_library_is_left_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr(allocator, "_keeps", False)
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    with caplog.at_level(logging.DEBUG, allocator.log.name):
        allocator.keep_freed()
        allocator.give_back()
        allocator.use_huge_pages()
    assert "not glibc" in caplog.text


@pytest.mark.parametrize(
    ("asked", "variable", "name"), [("tpu", "cpu", "tpu"), ("auto", "cuda,cpu", "cuda,cpu"), ("cpu", "", "cpu")]
)
def test_a_platform_is_the_one_asked_for_else_the_environments(asked, variable, name, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", variable)
    assert platform_of(asked) == name
