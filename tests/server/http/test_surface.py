"""What tools ask for beside answers, asked as they do."""

import asyncio
import re
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from openai import NotFoundError
from slipstream.server.config import SecurityConfig, ServerConfig

from tests.fakes import FakeEngine, FakeTokenizer
from tests.server.http.serving import serving, url

UI = "https://ui.example"


class Beginning(FakeTokenizer):
    """Wants a BOS before every text."""

    bos_id, first_ids = 1, (1,)


class BeginningEngine(FakeEngine):
    def get_tokenizer(self):
        return Beginning()


@asynccontextmanager
async def asked(engine=None, **config):
    """(method, path, body, headers) -> (status, headers, JSON or None), of a server."""
    async with serving(engine, **config) as (server, _), aiohttp.ClientSession() as session:

        async def ask(method, path, body=None, **headers):
            async with session.request(method, url(server, path), json=body, headers=headers) as answer:
                told: Any = await answer.json() if await answer.text() else None
                return answer.status, answer.headers, told

        yield ask


def test_what_is_served_and_how_it_is():
    async def scenario():
        async with asked() as ask:
            for method in ("GET", "POST"):
                assert (await ask(method, "/ping"))[::2] == (200, {"status": "ready"})
            status, _, told = await ask("GET", "/version")
            assert (status, list(told)) == (200, ["version"])
            assert (await ask("GET", "/load"))[2] == {"server_load": 0}
            (card,) = (await ask("GET", "/v1/models"))[2]["data"]
            assert (card["id"], card["root"], card["max_model_len"]) == ("fake", "fake", 256)

    asyncio.run(scenario())


def test_health_needs_no_token_and_everything_else_does(tmp_path):
    (tmp_path / "tokens").write_text("secret\n")

    async def scenario():
        async with asked(security=SecurityConfig(auth_token_file=tmp_path / "tokens")) as ask:
            for path in ("/health", "/ping"):
                assert (await ask("GET", path))[0] == 200
            for path in ("/version", "/load", "/v1/models", "/tokenizer_info"):
                assert (await ask("GET", path))[0] == 401
                assert (await ask("GET", path, authorization="Bearer secret"))[0] == 200

    asyncio.run(scenario())


def test_a_model_of_several_names():
    """Answers have the first one, whichever was asked for."""

    async def scenario():
        async with serving(served_model_name=("one", "two")) as (_, client):
            cards = (await client.models.list()).data
            assert [(card.id, card.to_dict()["root"]) for card in cards] == [("one", "fake"), ("two", "fake")]
            assert (await client.models.retrieve("two")).id == "two"
            for name in ("one", "two"):
                answer = await client.completions.create(model=name, prompt="a", max_tokens=1)
                assert answer.model == "one"
            with pytest.raises(NotFoundError, match="'fake' is not served; ask for 'one' or 'two'"):
                await client.completions.create(model="fake", prompt="a")

    asyncio.run(scenario())


def test_text_to_token_ids_and_back():
    async def scenario():
        async with asked(BeginningEngine()) as ask:
            _, _, told = await ask("POST", "/tokenize", {"prompt": "ab", "model": "fake"})
            assert told == {"count": 3, "max_model_len": 256, "tokens": [1, 97, 98], "token_strs": None}
            _, _, told = await ask(
                "POST", "/tokenize", {"prompt": "ab", "add_special_tokens": False, "return_token_strs": True}
            )
            assert (told["tokens"], told["token_strs"]) == ([97, 98], ["a", "b"])
            chat = {"messages": [{"role": "user", "content": "hi"}]}
            assert bytes((await ask("POST", "/tokenize", chat))[2]["tokens"][-2:]) == b"hi"
            assert (await ask("POST", "/detokenize", {"tokens": [97, 98]}))[2] == {"prompt": "ab"}
            assert (await ask("POST", "/detokenize", {"tokens": []}))[2] == {"prompt": ""}
            _, _, told = await ask("GET", "/tokenizer_info")
            assert (told["bos_token"], told["eos_token"]) == ("\x01", "{")
            assert told["chat_template"] == "{{ messages }}"

    asyncio.run(scenario())


def test_what_the_tokenizer_is_not_asked():
    async def scenario():
        async with asked() as ask:
            for path, body, message in (
                ("/tokenize", {}, "prompt or messages must be there, and not both"),
                ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "and not both"),
                ("/tokenize", {"prompt": 3}, "prompt=3"),
                ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template='x' is not supported"),
                ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True}, "left out"),
                ("/detokenize", {}, "tokens is missing"),
                ("/detokenize", {"tokens": [256]}, "token id 256 at position 0 is outside the vocabulary"),
                ("/detokenize", {"tokens": [1] * 17}, "the prompt has 17 tokens, at most 16"),
            ):
                status, _, told = await ask("POST", path, body)
                assert status == 400
                assert message in told["error"]["message"]
            assert (await ask("POST", "/tokenize", {"prompt": "a", "model": "other"}))[0] == 404

    asyncio.run(scenario())


def test_every_path_tells_its_methods():
    async def scenario():
        async with asked() as ask:
            for path, methods in (("/v1/models", "GET, HEAD, OPTIONS"), ("/v1/completions", "OPTIONS, POST")):
                status, headers, body = await ask("OPTIONS", path)
                assert (status, headers["allow"], body) == (204, methods, None)
            assert (await ask("OPTIONS", "/nowhere"))[0] == 404
            status, headers, body = await ask("HEAD", "/v1/models")
            assert (status, body) == (200, None)
            assert int(headers["content-length"]) > 0, "as GET would have it"
            status, headers, body = await ask("HEAD", "/v1/completions")
            assert (status, headers["allow"], body) == (405, "OPTIONS, POST", None)

    asyncio.run(scenario())


def test_a_named_pages_browser_may_send_what_its_client_sends():
    """OpenAI's client in JavaScript has headers of its own, which a browser asks for first."""
    wanted = {"origin": UI, "access-control-request-method": "POST"}

    async def scenario():
        async with asked(security=SecurityConfig(allow_origin=(UI,))) as ask:
            more = {"access-control-request-headers": "Authorization, x-stainless-os, bad header, x-api-key"}
            status, headers, _ = await ask("OPTIONS", "/v1/chat/completions", **wanted, **more)
            assert (status, headers["access-control-allow-origin"]) == (204, UI)
            allowed = headers["access-control-allow-headers"].split(", ")
            assert {"authorization", "content-type", "x-stainless-os", "x-api-key"} <= set(allowed)
            assert not any(" " in name for name in allowed)
            assert (await ask("OPTIONS", "/v1/models", **wanted | {"origin": "https://other.example"}))[0] == 403

    asyncio.run(scenario())


def test_the_page_is_this_machines_unless_it_is_asked_for(monkeypatch):
    """It is one file, under a policy that lets it load nothing."""

    async def scenario():
        async with serving() as (server, _), aiohttp.ClientSession() as session:
            async with session.get(url(server, "/")) as answer:
                assert (answer.status, answer.content_type) == (200, "text/html")
                policy = answer.headers["content-security-policy"]
                assert policy.startswith("default-src 'none'; script-src 'sha256-")
                assert "http" not in policy
                text = await answer.text()
            assert not re.search(r"(src|href)=.(https?:|//|/)", text)
        for local, web, status in ((False, False, 404), (False, True, 200), (True, False, 200)):
            monkeypatch.setattr(ServerConfig, "is_local", local)
            async with (
                serving(web=web) as (server, _),
                aiohttp.ClientSession() as session,
                session.get(url(server, "/")) as answer,
            ):
                assert answer.status == status

    asyncio.run(scenario())
