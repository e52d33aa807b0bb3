"""What the C library does with memory that is freed, on hosts whose processors compute the model.

XLA allocates a program's temporaries at every call, 50 MiB and more for a step of 32 slots. glibc would return them to
the system each time, and the system gives them back page by page, filled with zeros: a fifth of such a step. Other C
libraries are left as they are.

Weights are read from end to end at every step: the processor looks up where each page of 4 KiB lies, and fetches
nothing ahead of where it knows that. So the heap has room in huge pages before they are loaded, what came to lie
elsewhere is moved, and the cache behind them is made of some.
"""

import ctypes
import functools
import logging
import os
import re
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Of glibc's malloc.h."""

KEPT_BYTES = 512 << 20
"""Free memory at the heap's end that stays with the process (bytes); `give_back` returns it too."""

SETTINGS = {
    # One heap: another has a part for each thread, of 64 MiB at most, and what is larger is mapped for itself.
    M_ARENA_MAX: 1,
    # Nothing is mapped for itself: it would be unmapped when freed. A threshold would not do, 32 MiB are its limit.
    M_MMAP_MAX: 0,
    M_TRIM_THRESHOLD: KEPT_BYTES,
}

MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
"""Of Linux's mman.h."""

HUGE_PAGE = 2 << 20
"""Bytes, where pages have 4 KiB."""

MAPS = Path("/proc/self/maps")

ROOM = 64 << 20
"""Beside what comes next, for what is allocated before it (bytes)."""

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Who has them: [always], [madvise] or [never]."""

log = logging.getLogger(__name__)


_keeps = False


def keep_freed() -> None:
    """Freed memory is used again from now on, instead of going back to the system.

    Call it before threads begin to allocate: one that has a heap of its own keeps that.
    """
    global _keeps
    if _keeps:
        return
    library = _glibc()
    _keeps = library is not None and all([library.mallopt(name, value) for name, value in SETTINGS.items()])
    log.debug("memory that is freed %s", "is kept" if _keeps else "is the C library's to keep: it is not glibc")


def give_back() -> None:
    """What is free after `keep_freed` goes back to the system. Allocations wait meanwhile, some 60 ms for each GiB."""
    if _keeps and (library := _glibc()) is not None:
        library.malloc_trim(0)


def use_huge_pages(beside: int = 0) -> None:
    """What was allocated since `keep_freed` moves to huge pages, if the system has them, at least for who asks. So do
    the next `beside` bytes, which are free when this returns and not touched yet.

    Allocations wait meanwhile, some 0.7 s for each GiB that moves. What was free in between counts as used again.
    """
    if not _keeps or (library := _glibc()) is None or not has_huge_pages():
        return
    heap = _heap()
    if beside:
        _make_room(library, beside + ROOM)
    for start, end in _heap():
        if library.madvise(start, end - start, MADV_HUGEPAGE):
            return  # an older system has none
    for start, end in heap:
        library.madvise(start, end - start, MADV_COLLAPSE)  # before Linux 6.1 in time


def _make_room(library: ctypes.CDLL, size: int) -> None:
    """So many bytes are free within the heap, and not at its end, where they would go back to the system."""
    block, behind = library.malloc(size), library.malloc(size)
    library.realloc(behind, 64)  # what stays of it keeps the block off the end
    library.free(block)


def _heap() -> list[tuple[int, int]]:
    """(first byte, end) of what the heap has of whole huge pages."""
    pages = [
        (-(-int(first, 16) // HUGE_PAGE), int(end, 16) // HUGE_PAGE)
        for first, end in re.findall(r"^(\w+)-(\w+) .*\[heap\]$", MAPS.read_text(), re.MULTILINE)
    ]
    return [(first * HUGE_PAGE, end * HUGE_PAGE) for first, end in pages if first < end]


def has_huge_pages() -> bool:
    """Whether the system gives them to who asks for them; Linux alone has them so."""
    return HUGE_PAGES.exists() and "[never]" not in HUGE_PAGES.read_text()


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, OSError, ValueError):
        return None
    if not version or not version.startswith("glibc"):
        return None
    library = ctypes.CDLL(None)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    library.malloc.restype, library.malloc.argtypes = address, [size]
    library.realloc.restype, library.realloc.argtypes = address, [address, size]
    library.free.argtypes, library.madvise.argtypes = [address], [address, size, ctypes.c_int]
    return library
