"""The page to try the model, in a real browser: `make web-test`."""

import asyncio
import json
import threading
from contextlib import asynccontextmanager

import pytest
from slipstream.server.config import SecurityConfig

from tests.fakes import FakeEngine
from tests.server.calls import until
from tests.server.http.serving import serving, url
from tests.web.browser import browsing

pytestmark = [pytest.mark.web, pytest.mark.slow]

ARTICLES = "[...document.querySelectorAll('article')].map(one => [one.className, one.querySelector('p').textContent])"
STATUS = "document.getElementById('status').textContent"
IDLE = "running === null"


@asynccontextmanager
async def opened(tmp_path, engine=None, **config):
    """(server, tab) with the page."""
    engine = engine or FakeEngine(max_prefill_length=128, prefill_chunk=128)
    async with serving(engine, **config) as (server, _), browsing(tmp_path / "browser") as tab:
        await tab.open(url(server, "/"))
        yield server, tab


def setting(name, value):
    return f"document.getElementById({name!r}).value = {json.dumps(str(value))}"


def test_a_conversation_by_keyboard(tmp_path):
    """Enter sends, Shift+Enter breaks the line, and what was said goes along; nothing comes from elsewhere."""
    engine = FakeEngine(max_prefill_length=128, prefill_chunk=128, step_s=0.01)

    async def scenario():
        async with opened(tmp_path, engine) as (server, tab):
            await tab.until("document.getElementById('served').textContent.startsWith('fake · 256 tokens')")
            assert await tab.value("document.activeElement.id") == "text"
            for name, value in (("max_tokens", 4), ("system", "S"), ("temperature", 0.5), ("seed", 7), ("stop", "zz")):
                await tab.value(setting(name, value))
            await tab.write("x")
            await tab.press("Enter", shift=True)
            await tab.write("a")
            await tab.press("Enter")
            await tab.until(f"{IDLE} && {ARTICLES}.length === 2")
            assert await tab.value(ARTICLES) == [["user", "x\na"], ["assistant", "bcde"]]
            status = await tab.value(STATUS)
            assert status.startswith("4 tokens · ")
            assert "tokens/s" in status
            assert status.endswith("cut at the longest answer")
            await tab.write("k")
            await tab.press("Enter")
            await tab.until(f"{IDLE} && {ARTICLES}.length === 4")
            assert (await tab.value(ARTICLES))[2:] == [["user", "k"], ["assistant", "lmno"]]
            assert [call for call in engine.log if call.startswith("prefill")][-1].endswith("<u>x\na<a>bcde<u>k")
            asked = engine.samplings[-1]
            assert (asked.temperature, asked.seed) == (0.5, 7)
            await tab.value("document.getElementById('new').click()")
            assert await tab.value(ARTICLES) == []
            assert tab.complaints == []
            assert all(one.startswith((url(server), "data:")) for one in tab.requests)

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_an_answer_is_stopped_and_its_slot_is_free(tmp_path, how):
    engine = FakeEngine(max_prefill_length=128, prefill_chunk=128, pace=threading.Semaphore(3), cache_length=256)

    async def scenario():
        async with opened(tmp_path, engine) as (server, tab):
            await tab.write("A")
            await tab.press("Enter")
            await tab.until(f"{ARTICLES}.length === 2 && {ARTICLES}[1][1].length >= 3")
            assert await tab.value("document.getElementById('send').textContent") == "Stop"
            if how == "Escape":
                await tab.press("Escape")
            else:
                await tab.value("document.getElementById('send').click()")
            await tab.until(IDLE)
            engine.pace.release(999)
            await until(lambda: server.orchestrator.slots_in_use == 0)
            assert (await tab.value(STATUS)).endswith("stopped")
            assert await tab.value("document.getElementById('send').textContent") == "Send"
            assert (await tab.value(ARTICLES))[1][1].startswith("BCD"), "what was there stays"

    asyncio.run(scenario())


def test_what_came_of_an_answer_is_no_part_of_the_conversation_that_is_begun_meanwhile(tmp_path):
    engine = FakeEngine(max_prefill_length=128, prefill_chunk=128, pace=threading.Semaphore(3), cache_length=256)

    async def scenario():
        async with opened(tmp_path, engine) as (_, tab):
            await tab.write("A")
            await tab.press("Enter")
            await tab.until(f"{ARTICLES}.length === 2 && {ARTICLES}[1][1].length >= 3")
            await tab.value("document.getElementById('new').click()")
            await tab.until(IDLE)
            engine.pace.release(999)
            await tab.value(setting("max_tokens", 2))
            await tab.write("k")
            await tab.press("Enter")
            await tab.until(f"{IDLE} && {ARTICLES}.length === 2")
            assert await tab.value(ARTICLES) == [["user", "k"], ["assistant", "lm"]]
            assert [call for call in engine.log if call.startswith("prefill")][-1].endswith(" <u>k")

    asyncio.run(scenario())


def test_errors_and_tokens_and_text_that_looks_like_a_page(tmp_path):
    (tmp_path / "tokens").write_text("secret\n")
    security = SecurityConfig(auth_token_file=tmp_path / "tokens")

    async def scenario():
        async with opened(tmp_path, security=security) as (_, tab):
            await tab.until("document.getElementById('served').textContent.includes('token')")
            await tab.write("<b>a")
            await tab.press("Enter")
            await tab.until(f"{IDLE} && {ARTICLES}.length === 2")
            (_, asked), (kind, message) = await tab.value(ARTICLES)
            assert (asked, kind) == ("<b>a", "error")
            assert "token" in message
            await tab.value(setting("token", "secret"))
            await tab.value("document.getElementById('token').dispatchEvent(new Event('change'))")
            await tab.until("document.getElementById('served').textContent.startsWith('fake')")
            await tab.value(setting("max_tokens", 3))
            await tab.write("<b>a")
            await tab.press("Enter")
            await tab.until(f"{IDLE} && {ARTICLES}.length === 4")
            assert (await tab.value(ARTICLES))[3] == ["assistant", "bcd"]
            assert await tab.value("document.querySelectorAll('article b').length") == 0

    asyncio.run(scenario())


def test_everything_has_a_name_and_both_schemes_can_be_read(tmp_path):
    """Names of what takes input, as screen readers tell them; a contrast of 4.5 between text and ground."""
    contrast = """(() => {
      const numbers = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const light = color => numbers(color).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      return [['body', 'body'], ['#served', 'header'], ['#send', '#send'], ['#hint', 'body']].map(([text, ground]) => {
        const style = of => getComputedStyle(document.querySelector(of));
        const [a, b] = [light(style(text).color), light(style(ground).backgroundColor)].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
      });
    })()"""

    async def scenario():
        async with opened(tmp_path) as (_, tab):
            nodes = (await tab.send("Accessibility.getFullAXTree"))["nodes"]
            takers = [n for n in nodes if n.get("role", {}).get("value") in ("textbox", "button", "spinbutton", "log")]
            assert len(takers) >= 4
            assert all(node["name"]["value"] for node in takers)
            for scheme in ("light", "dark"):
                features = [{"name": "prefers-color-scheme", "value": scheme}]
                await tab.send("Emulation.setEmulatedMedia", features=features)
                assert min(await tab.value(contrast)) >= 4.5, scheme

    asyncio.run(scenario())
