"""google-jetstream 0.2.2, its only release (May 2024), and its last source, on today's packages: every shim, and why it
is there.

`importing()` goes around every import of jetstream. It changes nothing that outlives the block but JetStream itself;
JAX, seqio and the root logger are as they were. The others change a module of JetStream that they are given.
"""

import importlib
import importlib.metadata
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import jax
import numpy as np

from ..errors import RefusedError

log = logging.getLogger(__name__)

PACKAGE, RELEASE = "google-jetstream", "0.2.2"
INSTALL = f"pip install '.[jetstream-lean]' && pip install --no-deps {PACKAGE}=={RELEASE}"

_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")


def is_last_source(engine_api: Any) -> bool:
    """Whether this `jetstream.engine.engine_api` is the last source's, which has no version of its own, rather than
    0.2.2's.

    Raises RefusedError when it is neither.
    """
    if "bulk_insert" in engine_api.Engine.__abstractmethods__:
        return True
    check_installed()
    return False


def check_installed() -> None:
    """Raises RefusedError when google-jetstream is not there, or is another version."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != RELEASE:
        raise RefusedError(
            f"JetStream's orchestrator needs {PACKAGE} {RELEASE} or its last source, found {found or 'none'}; install "
            f"it with two commands: {INSTALL} (never `jetstream` or `jetstream-pt`: they are other people's packages)"
        )


@contextmanager
def importing() -> Iterator[None]:
    """Around every import of jetstream.

    Raises RefusedError when it, or a package that it needs, is not installed.

    - `jetstream.engine.token_utils` imports seqio, and with it TensorFlow (20 s, gigabytes), for one class that reads
      SentencePiece files; our engine brings its own tokenizer. While it is imported a stand-in answers for seqio; who
      then asks for that class after all gets the real one, if seqio is installed.
    - `jetstream.core.orchestrator` sets the root logger to DEBUG and gives it a handler on stdout: every log line of
      every library, several a decode step, on the stream that we print addresses and JSON on. Both are undone.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    stand_ins = {} if "seqio" in sys.modules else _seqio()
    sys.modules.update(stand_ins)
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "jetstream":
            check_installed()
        raise RefusedError(f"{PACKAGE} needs the package {error.name!r}; install what it needs: {INSTALL}") from error
    finally:
        for name in stand_ins:
            del sys.modules[name]
        root.setLevel(level)
        root.handlers[:] = handlers


def _seqio() -> dict[str, ModuleType]:
    seqio, vocabularies = ModuleType("seqio"), ModuleType("seqio.vocabularies")

    class Vocabulary:
        """The base of JetStream's mock vocabulary, which asks nothing of it."""

    def sentence_piece_vocabulary(*args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("seqio.vocabularies").SentencePieceVocabulary(*args, **kwargs)

    setattr(vocabularies, "Vocabulary", Vocabulary)  # noqa: B010 (a plain assignment is a type error)
    setattr(vocabularies, "SentencePieceVocabulary", sentence_piece_vocabulary)  # noqa: B010
    return {"seqio": seqio, "seqio.vocabularies": vocabularies}


def delete_prefixes(orchestrator: Any) -> None:
    """`orchestrator.delete_pytree`, which frees an inserted prefix, calls `jax.tree_map`, which JAX has removed: the
    generate thread would raise at the first insert. Takes the module; JAX itself is not touched."""

    def delete_pytree(tree: Any) -> None:
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, jax.Array):
                leaf.delete()

    orchestrator.delete_pytree = delete_pytree


def pad_lists(token_utils: Any) -> None:
    """`token_utils.pad_tokens` gets token lists as lists and, unless it puts a BOS before them, asks for their shape: a
    request with token ids and a session_cache raised in the prefill thread, so any client could end the server. Takes
    the module."""
    pad_tokens = token_utils.pad_tokens

    def pad_any_tokens(tokens: Any, *args: Any, **kwargs: Any) -> Any:
        return pad_tokens(np.asarray(tokens, np.int32), *args, **kwargs)

    token_utils.pad_tokens = pad_any_tokens


def join_bytes(token_utils: Any) -> None:
    """A character may span tokens, and the orchestrator decodes one token at a time: it holds back a token whose text
    is `<0xE2>` until the character is whole. That is SentencePiece, where such a token is one byte. In byte-level BPE
    (Llama 3, SmolLM2, Qwen) it has several, so `<0xF0><0x9F>` has to count as well. Takes the module."""

    def is_byte_token(text: str) -> bool:
        return _BYTES.fullmatch(text) is not None

    def text_tokens_to_str(texts: Iterable[str]) -> str:
        parts = [as_bytes(text) if is_byte_token(text) else text.encode() for text in texts]
        return b"".join(parts).decode(errors="replace")

    def as_bytes(text: str) -> bytes:
        return bytes.fromhex(text.replace("<0x", "").replace(">", ""))

    token_utils.is_byte_token, token_utils.text_tokens_to_str = is_byte_token, text_tokens_to_str


@contextmanager
def failures_to(orchestrator: Any, on_failure: Callable[[str], object]) -> Iterator[None]:
    """A thread of the Driver that raises sends SIGKILL to its own process: nothing is closed, nobody is told why.
    Drivers made in this block log the traceback and call `on_failure(reason)` instead. Takes the module."""

    class Thread(threading.Thread):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                log.exception("JetStream's thread %s failed", self.name)
                on_failure(f"JetStream's thread {self.name} failed: {type(error).__name__}: {error}")

    original = orchestrator.JetThread
    orchestrator.JetThread = Thread
    try:
        yield
    finally:
        orchestrator.JetThread = original


@contextmanager
def listening_on(server_lib: Any, host: str) -> Iterator[None]:
    """JetStreamServer listens on `[::]`, every interface, whatever it is told; servers made in this block on `host`
    (an IPv6 address in brackets). Takes the module."""
    original = server_lib._HOST
    server_lib._HOST = host
    try:
        yield
    finally:
        server_lib._HOST = original
