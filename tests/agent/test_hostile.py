"""Every malformed or hostile thing a server may answer: what the call comes to, and that the agent lives on."""

from __future__ import annotations

import functools
import gzip
import json
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from osqbox.agent import messages
from osqbox.agent.runner import AgentOptions, ConfigUnavailable, run_agent
from osqbox.agent.sql import source
from osqbox.agent.wire import CallFailed, Channel, Transport, client_context, fetch

TIMEOUT_S = 20
PATIENT = Transport(timeout_s=5)
Stream = trio.SSLStream[trio.SocketStream]
Script = Callable[[Stream], Awaitable[None]]


def http(body: bytes, status: str = "200 OK", *headers: str, length: int | str | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def head(*lines: str) -> bytes:
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


OK, REFUSED, FAILED = "ok", "refused", "failed"
PACKED = gzip.compress(b'{"a":1}', mtime=0)
BOMB = gzip.compress(b"x" * (9 * 1024 * 1024), mtime=0)

# What comes, what it is taken for, and the words that say so. A status never matters (utility.h).
ANSWERS: dict[str, tuple[bytes, str, str]] = {
    # -- status
    "500": (http(b"{}", "500 Internal Server Error"), OK, ""),
    "429 with Retry-After": (http(b"{}", "429 Too Many Requests", "Retry-After: garbage"), OK, ""),
    "404 page": (http(b"<html>Not Found</html>", "404 Not Found"), FAILED, "cannot parse"),
    "login page": (http(b"<!doctype html><form>", "200 OK", "Content-Type: text/html"), FAILED, "cannot parse"),
    "204 with a body": (b"HTTP/1.1 204 No Content\r\n\r\n{}", OK, ""),
    "100 first": (b"HTTP/1.1 100 Continue\r\n\r\n" + http(b"{}"), OK, ""),
    # -- body
    "empty": (http(b""), OK, ""),
    "{}": (http(b"{}"), OK, ""),
    "null": (http(b"null"), FAILED, "cannot parse"),
    "number": (http(b"12"), FAILED, "cannot parse"),
    "text": (http(b'"x"'), FAILED, "cannot parse"),
    "array": (http(b"[]"), FAILED, "cannot parse"),
    "BOM": (http(b"\xef\xbb\xbf{}"), FAILED, "cannot parse"),
    "UTF-16": (http("{}".encode("utf-16")), FAILED, "cannot parse"),
    "bad UTF-8": (http(b'{"a":"\xff"}'), FAILED, "cannot parse"),
    "lone surrogate": (http(b'{"a":"\\ud800"}'), OK, ""),
    "NaN": (http(b'{"a":NaN}'), FAILED, "cannot parse"),
    "Infinity": (http(b'{"a":-Infinity}'), FAILED, "cannot parse"),
    "huge integer": (http(b'{"a":' + b"9" * 5000 + b"}"), FAILED, "cannot parse"),
    "duplicate keys": (http(b'{"error":"first","error":"second"}'), REFUSED, "Request failed: first"),
    "deep": (http(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), FAILED, "cannot parse"),
    "rather deep": (http(b'{"a":' + b"[" * 40 + b"]" * 40 + b"}"), FAILED, "cannot parse"),
    "trailing garbage": (http(b"{} x"), FAILED, "cannot parse"),
    "two objects": (http(b"{}{}"), FAILED, "cannot parse"),
    "cut JSON": (http(b'{"a":'), FAILED, "cannot parse"),
    "single quotes": (http(b"{'a':1}"), FAILED, "cannot parse"),
    # -- refusals
    "error": (http(b'{"error":"no"}'), REFUSED, "Request failed: no"),
    "error null": (http(b'{"error":null}'), REFUSED, "Request failed: <unknown>"),
    "node_invalid": (http(b'{"node_invalid":true}'), REFUSED, "Request failed: Invalid node key"),
    "node_invalid as text": (http(b'{"node_invalid":"true"}'), OK, ""),
    # -- framing
    "length too long": (http(b"{}", length=9), FAILED, "truncated|closed"),
    "length too short": (http(b'{"a":1}', length=2), FAILED, "cannot parse"),
    "length negative": (http(b"{}", length=-1), FAILED, "Content-Length"),
    "length no number": (http(b"{}", length="many"), FAILED, "Content-Length"),
    "two lengths": (http(b"{}", "200 OK", "Content-Length: 3"), FAILED, "Content-Length"),
    "no length, end without close_notify": (head("HTTP/1.1 200 OK") + b"{}", FAILED, "truncated"),
    "chunked": (head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n", OK, ""),
    "chunked and a length": (http(b"2\r\n{}\r\n0\r\n\r\n", "200 OK", "Transfer-Encoding: chunked", length=99), OK, ""),
    "bad chunk": (head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n", FAILED, "."),
    "chunk cut": (head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + b"ff\r\n{}", FAILED, "truncated|closed"),
    "other encoding": (head("HTTP/1.1 200 OK", "Transfer-Encoding: gzip") + b"{}", FAILED, "."),
    "huge header": (head("HTTP/1.1 200 OK", "X: " + "x" * 9000, "Content-Length: 2") + b"{}", FAILED, "."),
    "many headers": (head("HTTP/1.1 200 OK", *(f"X{n}: y" for n in range(2000))), FAILED, "."),
    "bad header": (head("HTTP/1.1 200 OK", "no colon here", "Content-Length: 2") + b"{}", FAILED, "."),
    "bad status line": (b"HTTP/9.9 OK\r\n\r\n{}", FAILED, "."),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n" * 10, FAILED, "."),
    "nothing": (b"", FAILED, "truncated|closed|partial"),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-", FAILED, "truncated|closed"),
    "over 8 MiB": (http(b"x" * 100, length=2**33), FAILED, "truncated|closed"),
    "endless": (http(b" " * (8 * 1024 * 1024 + 1), length=2**33), FAILED, "body limit"),
    "gzip undeclared": (http(gzip.compress(b"{}", mtime=0)), FAILED, "cannot parse"),
    "gzip not asked for": (
        http(gzip.compress(b"{}", mtime=0), "200 OK", "Content-Encoding: gzip"),
        FAILED,
        "cannot parse",
    ),
    # -- redirects
    "redirect to itself": (http(b"", "307 Temporary", "Location: /again"), FAILED, "more than 10 redirects"),
    "redirect nowhere": (http(b"", "302 Found"), FAILED, "without a Location"),
    "redirect to http": (http(b"", "302 Found", "Location: http://localhost/"), FAILED, "cannot follow"),
    "redirect to a port": (http(b"", "302 Found", "Location: https://h:99999/"), FAILED, "cannot follow"),
    "redirect out of hand": (http(b"", "302 Found", "Location: //evil/"), FAILED, "cannot follow"),
    "redirect to a long label": (http(b"", "302 Found", f"Location: https://{'a' * 70}/"), FAILED, "cannot be sent"),
    "redirect to a dot": (http(b"", "302 Found", "Location: https://.localhost/"), FAILED, "."),
    "redirect to dots": (http(b"", "302 Found", "Location: https://a..b/"), FAILED, "."),
    "redirect in another alphabet": (http(b"", "302 Found", "Location: /\u00e9"), FAILED, "cannot be sent"),
    "redirect with a space": (http(b"", "302 Found", "Location: /a b"), FAILED, "cannot be sent"),
}


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return path


@functools.cache
def server_context(ca: trustme.CA, name: str = "localhost") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name).configure_cert(context)
    return context


async def serving(nursery: trio.Nursery, context: ssl.SSLContext, script: Script) -> int:
    """The port of a server that runs ``script`` on every connection, after the handshake."""

    async def serve(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            await tls.do_handshake()
            await script(tls)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
            pass
        finally:
            await trio.aclose_forcefully(tls)

    listeners = await nursery.start(functools.partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
    port: int = listeners[0].socket.getsockname()[1]
    return port


def raw(answer: bytes) -> Script:
    async def script(tls: Stream) -> None:
        while await tls.receive_some(65536):
            await tls.send_all(answer)
            if b"307" not in answer[:20]:
                return

    return script


def one_call(ca: trustme.CA, ca_file: Path, script: Script, transport: Transport = PATIENT) -> bytes:
    async def main() -> bytes:
        async with trio.open_nursery() as nursery:
            port = await serving(nursery, server_context(ca), script)
            channel = Channel(f"localhost:{port}", client_context(ca_file), transport)
            try:
                return await channel.post("/x", b"{}")
            finally:
                with trio.CancelScope(shield=True):
                    await channel.aclose()
                nursery.cancel_scope.cancel()
        raise AssertionError

    with unwrapped():
        return trio.run(main)


@contextmanager
def unwrapped() -> Iterator[None]:
    """The one error inside the groups that nurseries make of it."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


@pytest.mark.parametrize("name", ANSWERS)
def test_what_an_answer_is_taken_for(ca: trustme.CA, ca_file: Path, name: str) -> None:
    answer, expected, words = ANSWERS[name]
    try:
        reply = messages.read_reply(one_call(ca, ca_file, raw(answer)))
    except CallFailed as error:
        reply = messages.Reply(False, str(error))
    kind = OK if reply.ok else REFUSED if reply.message.startswith("Request failed") else FAILED
    assert (kind, reply.message) == (expected, reply.message)
    assert re.search(words, reply.message)


# -- packed replies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (PACKED, ""),
        (b"no gzip", "bad gzip body"),
        (PACKED[:-9], "truncated"),
        (BOMB, "body limit"),
        (b"", "truncated"),
    ],
    ids=["good", "no gzip", "cut", "bomb", "empty"],
)
def test_packed_replies_are_unpacked_within_bounds(ca: trustme.CA, ca_file: Path, body: bytes, words: str) -> None:
    script = raw(http(body, "200 OK", "Content-Encoding: gzip"))
    transport = Transport(timeout_s=5, accept_gzip=True)
    if not words:
        assert one_call(ca, ca_file, script, transport) == b'{"a":1}'
    else:
        with pytest.raises(CallFailed, match=words):
            one_call(ca, ca_file, script, transport)


# -- time --------------------------------------------------------------------------------------------------------


async def silent(tls: Stream) -> None:
    await trio.sleep_forever()


async def dribbling_head(tls: Stream) -> None:
    await tls.receive_some(65536)
    await tls.send_all(b"HTTP/1.1 200 OK\r\n")
    while True:
        await tls.send_all(b"X: y\r\n")
        await trio.sleep(0.02)


async def dribbling_body(tls: Stream) -> None:
    await tls.receive_some(65536)
    await tls.send_all(head("HTTP/1.1 200 OK", "Content-Length: 1000000"))
    while True:
        await tls.send_all(b" ")
        await trio.sleep(0.02)


async def endless_continue(tls: Stream) -> None:
    await tls.receive_some(65536)
    while True:
        await tls.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        await trio.sleep(0.005)


async def slow_redirects(tls: Stream) -> None:
    while await tls.receive_some(65536):
        await trio.sleep(0.1)
        await tls.send_all(http(b"", "307 Temporary", "Location: /again"))


@pytest.mark.parametrize("script", [silent, dribbling_head, dribbling_body, endless_continue, slow_redirects])
def test_a_call_ends_at_its_deadline_however_slow_the_server(ca: trustme.CA, ca_file: Path, script: Script) -> None:
    with pytest.raises(CallFailed, match=r"timeout|limit"):
        one_call(ca, ca_file, script, Transport(timeout_s=0.5))


def test_a_reset_in_the_middle_is_tried_once_more_and_no_more(ca: trustme.CA, ca_file: Path) -> None:
    connections = []

    async def reset(tls: Stream) -> None:
        connections.append(tls)
        await tls.receive_some(65536)
        await tls.send_all(head("HTTP/1.1 200 OK", "Content-Length: 10") + b"{")
        linger = struct.pack("ii", 1, 0)
        tls.transport_stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    with pytest.raises(CallFailed, match="Request error: "):
        one_call(ca, ca_file, reset)
    assert len(connections) == 2


def test_a_body_that_only_the_end_delimits_is_good_with_close_notify(ca: trustme.CA, ca_file: Path) -> None:
    async def polite(tls: Stream) -> None:
        await tls.receive_some(65536)
        await tls.send_all(head("HTTP/1.1 200 OK") + b'{"a":1}')
        # https_compatible streams leave close_notify out; this sends it.
        tls._https_compatible = False  # type: ignore[attr-defined]
        await tls.aclose()

    assert one_call(ca, ca_file, polite) == b'{"a":1}'


# -- TLS ---------------------------------------------------------------------------------------------------------


def refuse_tls10(context: ssl.SSLContext) -> None:
    context.maximum_version = ssl.TLSVersion.TLSv1_1


def weak_suite(context: ssl.SSLContext) -> None:
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("DHE-RSA-AES128-SHA256:AES128-GCM-SHA256")


def want_certificate(context: ssl.SSLContext) -> None:
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("other.example", None, "Hostname mismatch"),
        ("localhost", weak_suite, "(?i)handshake|truncated"),
        ("localhost", want_certificate, "(?i)."),
    ],
)
def test_tls_failures_are_told_in_words(
    ca: trustme.CA, ca_file: Path, name: str, change: Callable[[ssl.SSLContext], None] | None, words: str
) -> None:
    async def main() -> None:
        context = server_context.__wrapped__(ca, name)
        if change:
            change(context)
        async with trio.open_nursery() as nursery:
            port = await serving(nursery, context, raw(http(b"{}")))
            try:
                await Channel(f"localhost:{port}", client_context(ca_file), PATIENT).post("/", b"{}")
            finally:
                nursery.cancel_scope.cancel()

    with pytest.raises(CallFailed, match=words), unwrapped():
        trio.run(main)


@pytest.mark.parametrize("first", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28", b"\x00" * 50])
def test_what_is_no_tls_is_told_in_words(first: bytes) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(first)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(functools.partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
            hostname = f"localhost:{listeners[0].socket.getsockname()[1]}"
            try:
                await Channel(hostname, client_context(None), PATIENT).post("/", b"{}")
            finally:
                nursery.cancel_scope.cancel()

    with pytest.raises(CallFailed, match=r"Request error: \S+"), unwrapped():
        trio.run(main)


# -- connections as flags want them ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "connections"),
    [
        (Transport(), 1),
        (Transport(session_reuse=False), 4),
        (Transport(session_timeout_s=1e-9), 2),
        (Transport(session_timeout_s=0), 1),
    ],
)
def test_session_reuse(ca: trustme.CA, ca_file: Path, transport: Transport, connections: int) -> None:
    """Four calls; a session past its time still serves the call that notices."""
    seen = []

    async def script(tls: Stream) -> None:
        seen.append(tls)
        while await tls.receive_some(65536):
            await tls.send_all(http(b"{}"))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            port = await serving(nursery, server_context(ca), script)
            channel = Channel(f"localhost:{port}", client_context(ca_file), transport)
            for _ in range(4):
                assert await channel.post("/", b"{}") == b"{}"
            await channel.aclose()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert len(seen) == connections


def through_proxy(ca: trustme.CA, ca_file: Path, verdict: bytes) -> tuple[bytes, list[bytes]]:
    """The reply of a call through a proxy that answers CONNECT so, and what the proxy was asked."""
    asked: list[bytes] = []

    async def main() -> bytes:
        async with trio.open_nursery() as nursery:
            port = await serving(nursery, server_context(ca), raw(http(b'{"through":1}')))

            async def relay(source: trio.SocketStream, sink: trio.SocketStream) -> None:
                try:
                    async for piece in source:
                        await sink.send_all(piece)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass

            async def proxy(stream: trio.SocketStream) -> None:
                async with stream:
                    asked.append(bytes(await stream.receive_some(65536)))
                    await stream.send_all(verdict)
                    if b" 200 " in verdict:
                        async with (
                            await trio.open_tcp_stream("127.0.0.1", port) as target,
                            trio.open_nursery() as pipes,
                        ):
                            pipes.start_soon(relay, target, stream)
                            await relay(stream, target)
                            pipes.cancel_scope.cancel()

            listeners = await nursery.start(functools.partial(trio.serve_tcp, proxy, 0, host="127.0.0.1"))
            address = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
            channel = Channel(f"localhost:{port}", client_context(ca_file), Transport(timeout_s=5, proxy=address))
            try:
                return await channel.post("/", b"{}")
            finally:
                with trio.CancelScope(shield=True):
                    await channel.aclose()
                nursery.cancel_scope.cancel()
        raise AssertionError

    with unwrapped():
        return trio.run(main), asked


def test_a_proxy_is_asked_to_connect(ca: trustme.CA, ca_file: Path) -> None:
    reply, asked = through_proxy(ca, ca_file, b"HTTP/1.1 200 Connection established\r\n\r\n")
    assert reply == b'{"through":1}'
    (request,) = asked
    assert re.fullmatch(rb"CONNECT localhost:(\d+) HTTP/1.1\r\nHost: localhost:\1\r\n\r\n", request)


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "refused to connect: Proxy Authentication"),
        (b"garbage\r\n\r\n", "refused to connect"),
        (b"", "did not answer CONNECT"),
        (b"x" * 10_000, "did not answer CONNECT"),
    ],
)
def test_a_proxy_that_refuses_is_told_in_words(ca: trustme.CA, ca_file: Path, verdict: bytes, words: str) -> None:
    with pytest.raises(CallFailed, match=words):
        through_proxy(ca, ca_file, verdict)


@pytest.mark.parametrize("url", ["http://h/x", "h", "https://", "https://h:x/", "file:///etc/passwd", "https://[::1/"])
def test_only_https_urls_are_fetched(url: str) -> None:
    with pytest.raises(CallFailed, match="expected an https URL"):
        trio.run(fetch, url, client_context(None))


# -- a whole agent -----------------------------------------------------------------------------------------------


@dataclass
class Hostile:
    """Answers a kind of call with given bytes, everything else well, and counts."""

    ending: str
    answer: bytes
    seen: list[str] = field(default_factory=list)

    async def __call__(self, tls: Stream) -> None:
        waiting = b""
        while piece := await tls.receive_some(65536):
            waiting += piece
            while found := re.match(rb"POST (\S+) .*?Content-Length: (\d+)\r\n\r\n", waiting, re.DOTALL):
                if len(waiting) < found.end() + int(found[2]):
                    break
                waiting = waiting[found.end() + int(found[2]) :]
                path = found[1].decode()
                self.seen.append(path.rsplit("/", 1)[1])
                if path.endswith(self.ending):
                    await tls.send_all(self.answer)
                    if not self.answer.startswith(b"HTTP/1.1 200 OK\r\nContent-Length"):
                        return
                else:
                    await tls.send_all(http(b'{"node_key":"k"}' if path.endswith("enroll") else b"{}"))


def agent_against(
    ca: trustme.CA, ca_file: Path, hostile: Hostile, done: Callable[[], bool], **options: Any
) -> list[Any]:
    """An agent's events, from its start until ``done``."""
    events: list[Any] = []

    async def main() -> None:
        with trio.fail_after(TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                port = await serving(nursery, server_context(ca), hostile)
                given = {"enroll_secret": "s", "distributed_interval": 1, "config_refresh": 1, "logger_period": 1}
                agent = AgentOptions(f"localhost:{port}", ca_file, **{**given, "call_timeout_s": 1.0, **options})
                tables = {"osquery_info": source(lambda _context: [{"pid": 1}])}
                run = functools.partial(run_agent, agent, tables=tables, on_event=lambda *event: events.append(event))
                nursery.start_soon(run)
                while not done():
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()

    with unwrapped():
        trio.run(main)
    return events


BROKEN = (
    "array",
    "BOM",
    "bad UTF-8",
    "NaN",
    "deep",
    "length negative",
    "bad chunk",
    "not HTTP",
    "nothing",
    "login page",
)


@pytest.mark.parametrize("name", ["array", "length negative", "not HTTP", "nothing"])
def test_an_agent_keeps_its_pace_whatever_a_read_brings(ca: trustme.CA, ca_file: Path, name: str) -> None:
    """Nothing is asked twice as often because the answer was bad."""
    hostile = Hostile("/read", ANSWERS[name][0])
    flags = {"distributed_tls_max_attempts": "1", "config_tls_max_attempts": "1"}
    events = agent_against(ca, ca_file, hostile, lambda: hostile.seen.count("read") >= 3, flags=flags)
    said = [facts["message"] for kind, facts in events if kind == "status"]
    assert any(message.startswith("Error getting distributed queries: Request error: ") for message in said)
    assert not [facts for kind, facts in events if kind == "thread_failed"]
    assert hostile.seen.count("read") <= 5, "at most two exchanges for each try, one try a second"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_leaves_the_agent_without_one(ca: trustme.CA, ca_file: Path, name: str) -> None:
    hostile = Hostile("/config", ANSWERS[name][0])
    flags = {"config_tls_max_attempts": "1"}
    events = agent_against(ca, ca_file, hostile, lambda: "read" in hostile.seen, flags=flags)
    said = [facts["message"] for kind, facts in events if kind == "status"]
    assert any(message.startswith("Error getting config: Request error: ") for message in said)
    assert not [facts for kind, facts in events if kind in ("thread_failed", "config")]


def test_the_strict_rule_ends_an_agent_without_a_config(ca: trustme.CA, ca_file: Path) -> None:
    hostile = Hostile("/config", http(b"<html>"))
    flags = {"config_tls_max_attempts": "1"}
    with pytest.raises(ConfigUnavailable, match="cannot retrieve a configuration from https://localhost"):
        agent_against(ca, ca_file, hostile, lambda: False, flags=flags, strict_start=True)


ENROLLMENTS = ["{}", "empty", "null", "array", "error", "node_invalid", "nothing", "bad chunk", "login page"]


@pytest.mark.parametrize("name", [*ENROLLMENTS, "key empty", "key a number", "key null"])
def test_enrollment_without_a_key_is_a_refusal(ca: trustme.CA, ca_file: Path, name: str) -> None:
    bodies = {"key empty": b'{"node_key":""}', "key a number": b'{"node_key":7}', "key null": b'{"node_key":null}'}
    hostile = Hostile("/enroll", http(bodies[name]) if name in bodies else ANSWERS[name][0])
    with pytest.raises(Exception, match="cannot enroll at https://localhost") as caught:
        agent_against(ca, ca_file, hostile, lambda: False, flags={"tls_enroll_max_attempts": "1"})
    assert type(caught.value).__name__ == "EnrollmentFailed"
    assert set(hostile.seen) == {"enroll"}


def test_strange_work_does_a_whole_agent_no_harm(ca: trustme.CA, ca_file: Path) -> None:
    queries = {
        "attach": "attach '/tmp/x' as y", "pragma": "pragma writable_schema=1", "nested": "(" * 5000, "nul": "\x00",
        "surrogate": "select '\ud800' as x", "many": "select 1;" * 1000, "last": "select 1 as a",
    }  # fmt: skip
    hostile = Hostile("/read", http(json.dumps({"queries": queries}).encode()))
    events = agent_against(ca, ca_file, hostile, lambda: "write" in hostile.seen)
    assert not [facts for kind, facts in events if kind == "thread_failed"]
    statuses = {facts["name"]: facts["status"] for kind, facts in events if kind == "distributed"}
    assert statuses == dict.fromkeys(queries, 1) | {"last": 0, "many": 0, "surrogate": 0}
