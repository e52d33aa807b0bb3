"""What Limits lets in, an idle server has room for: whoever waits first is overtaken by nobody."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.request.limits import Limits
from slipstream.server.request.request import Request
from slipstream.server.scheduler.prompt import Prompt
from slipstream.server.scheduler.room import Room

from tests.fakes import FakeEngine

ROWS, LONGEST, SLOTS = 4, 48, 4


def prompt_of(request: Request, room: Room) -> Prompt:
    token_T = np.asarray(request.prompt_ids, np.int32)
    return Prompt(tuple(request.samples), token_T, room.names(token_T, ""))


@settings(deadline=None, max_examples=400)
@given(
    length=st.integers(1, LONGEST - 1),
    samples=st.integers(1, SLOTS),
    max_tokens=st.integers(1, 8),
    chunk=st.integers(1, 4),
    pages=st.integers(3, SLOTS * LONGEST // ROWS),
    entries=st.integers(LONGEST // ROWS, SLOTS * LONGEST // ROWS),
    cached=st.integers(0, LONGEST // ROWS),
)
def test_an_idle_server_lets_in_what_is_not_refused(length, samples, max_tokens, chunk, pages, entries, cached):
    """Whatever prefix of it is cached: where that ends decides where its last piece begins. And what is refused for
    the sake of its samples does not fit, if it is one piece."""
    engine = FakeEngine(
        max_concurrent_decodes=SLOTS,
        max_prefill_length=LONGEST,
        cache_length=LONGEST,
        page_rows=ROWS,
        prefill_chunk=chunk * ROWS,
        pages=pages,
        table_entries=entries,
    )
    room, limits = Room(engine, prefix_cache=True), Limits.of(engine)
    request = Request(prompt_ids=[1] * length, max_tokens=max_tokens, num_samples=samples, deliver=print)
    prompt = prompt_of(request, room)
    before = Request(prompt_ids=[1] * min(length, cached * ROWS), max_tokens=1, deliver=print)
    try:
        limits.check(request)
    except RefusedError as error:
        if str(error).startswith("num_samples") and length <= engine.prefill_chunk:
            need = room.need(prompt)
            assert need.pages > pages or need.entries > entries
        return
    if before.prompt_ids:
        earlier = prompt_of(before, room)
        room.let_in(earlier, [])
        room.advance(earlier, len(earlier.token_T))
        room.leave(earlier.tables[0])
    need = room.need(prompt)
    assert need.pages <= room.available()
    assert need.entries <= room.entries_left
    room.let_in(prompt, range(prompt.slots_needed))
    room.check_integrity()
