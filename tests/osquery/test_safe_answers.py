"""Every way to fail, visited: a stock osqueryd must read each answer as a failure and keep its schedule and its logs.

osqueryd ignores the HTTP status. A JSON object without `error` is a success to it: it empties the schedule (config)
or deletes the lines it sent (log). So every answer is a JSON object with a Content-Length, and every failure has a
top-level `error`; only a carve block that was not stored is refused by closing the connection without an answer.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import logging
import sqlite3
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import trio

from osqbox import tenants
from osqbox.listen import Limits
from osqbox.osquery import configs, logs, nodes
from osqbox.osquery.amalgamate import Source
from osqbox.osquery.logs import LogFilter
from osqbox.settings import Bounds
from osqbox.tenants import TenantOptions

Run = Callable[..., None]

ENDPOINTS = {
    "enroll": "/api/v1/osquery/enroll",
    "config": "/api/v1/osquery/config",
    "log": "/api/v1/osquery/log",
    "read": "/api/v1/osquery/distributed/read",
    "write": "/api/v1/osquery/distributed/write",
    "begin": "/api/v1/osquery/carve/begin",
    "block": "/api/v1/osquery/carve/block",
    "yara": "/api/v1/osquery/yara/rule.yar",
    "unknown": "/api/v1/osquery/nothing/here",
}
BOUNDS = Bounds(body_bytes=20_000, small_body_bytes=10_000, decoded_bytes=40_000)
SENSITIVE = ("Traceback", 'File "', "osqbox/", "sqlite", ".py")


@dataclass
class Osqueryd:
    """How a stock osqueryd takes an answer (osquery/remote/utility.h, serializers/json.cpp)."""

    has_key: bool = True
    has_schedule: bool = True
    has_logs: bool = True

    def takes(self, operation: str, body: bytes) -> bool:
        """Whether it takes the answer for a success."""
        try:
            answer = json.loads(body or b"{}")
        except ValueError:
            return False
        assert isinstance(answer, dict), "anything else is undefined behaviour in osqueryd"
        if answer.get("node_invalid") is True:
            self.has_key = False
            return False
        assert "node_invalid" not in answer or answer["node_invalid"] is False
        if "error" in answer:
            return False
        if operation == "config":
            self.has_schedule = bool(answer.get("schedule"))
        if operation == "log":
            self.has_logs = False
        return True


def check(operation: str, status: int, body: bytes, *hidden: str) -> dict[str, Any]:
    """What holds for the answer to anything that failed; returns it."""
    osqueryd = Osqueryd()
    if operation == "yara":
        assert status != 200
    assert osqueryd.takes(operation, body) is False
    assert osqueryd.has_schedule
    assert osqueryd.has_logs
    answer: dict[str, Any] = json.loads(body)
    assert isinstance(answer["error"], str)
    assert answer["error"]
    assert isinstance(answer["reason"], str)
    assert 400 <= status <= 599
    for word in (*SENSITIVE, *hidden):
        assert word not in body.decode()
    if operation == "enroll":
        assert answer["node_invalid"] is True
        assert not answer.get("node_key")
    return answer


# bodies that no endpoint takes

BAD_BODIES: dict[str, tuple[bytes, dict[str, str], str]] = {
    "empty": (b"", {}, "empty_body"),
    "blank": (b" \n ", {}, "empty_body"),
    "no JSON": (b"node_key=x", {}, "bad_json"),
    "half a JSON": (b'{"node_key": "x"', {}, "bad_json"),
    "two arrays": (b"[][]", {}, "wrong_type"),
    "an array": (b"[]", {}, "wrong_type"),
    "a text": (b'"x"', {}, "wrong_type"),
    "null": (b"null", {}, "wrong_type"),
    "a number": (b"1", {}, "wrong_type"),
    "deep": (b'{"a":' * 3000 + b"1" + b"}" * 3000, {}, "too_deep"),
    "gzip bomb": (gzip.compress(b" " * 1_000_000), {}, "too_large"),
    "gzip bomb, told": (gzip.compress(b" " * 1_000_000), {"content-encoding": "gzip"}, "too_large"),
    "gzip cut": (gzip.compress(b'{"node_key": "x"}')[:-9], {"content-encoding": "gzip"}, "truncated_gzip"),
    "gzip promised": (b'{"node_key": "x"}', {"content-encoding": "gzip"}, "bad_gzip"),
    "gzip broken": (b"\x1f\x8b" + b"x" * 50, {}, "bad_gzip"),
    "brotli": (b"{}", {"content-encoding": "br"}, "bad_encoding"),
}


@pytest.mark.parametrize("how", BAD_BODIES)
def test_a_body_that_is_no_message(api: Run, how: str) -> None:
    body, headers, reason = BAD_BODIES[how]

    async def test(api: Any) -> None:
        for operation, target in ENDPOINTS.items():
            if operation == "unknown" or (operation == "yara" and not body):
                continue
            answer = await api.ask(target, body, headers=headers)
            if operation == "block":
                assert answer is None
            elif how != "deep" or operation == "enroll":  # the others skip unknown members unread
                assert check(operation, answer.status, answer.body)["reason"] == reason
        assert api.handler.statistics()["refused"][reason] >= 1

    api(test, bounds=BOUNDS)


def test_a_small_message_is_small_unpacked_too(api: Run) -> None:
    """Who is not even known yet gets no more memory than its body needs."""

    async def test(api: Any) -> None:
        packed = gzip.compress(b'{"node_key": "x"' + b" " * (BOUNDS.small_body_bytes + 1) + b"}")
        for operation in ("enroll", "config", "read", "begin"):
            answer = await api.ask(ENDPOINTS[operation], packed)
            assert check(operation, answer.status, answer.body)["reason"] == "too_large"
        answer = await api.ask(ENDPOINTS["write"], packed)
        assert check("write", answer.status, answer.body)["reason"] == "node_key_unknown"

    api(test, bounds=BOUNDS)


DEEP = b"[" * 3000 + b"]" * 3000
WRONG_MEMBERS: dict[str, list[bytes]] = {
    "enroll": [
        b'{"enroll_secret": 1}', b'{"host_identifier": []}', b'{"host_details": "x"}', b'{"platform_type": {}}',
        b'{"host_details": %s}' % DEEP, b'{"host_identifier": "\xff"}', b"{}",
    ],
    "config": [b'{"node_key": 1}', b'{"node_key": {}}', b'{"node_key": "\xff"}', b'{"x": %s}' % DEEP, b"{}"],
    "log": [
        b'{"node_key":"KEY"}', b'{"node_key":"KEY","log_type":"result"}', b'{"node_key":"KEY","data":[]}',
        b'{"node_key":"KEY","log_type":"other","data":[]}', b'{"node_key":"KEY","log_type":"result","data":{}}',
        b'{"node_key":"KEY","log_type":"result","data":[1]}', b'{"node_key":"KEY","log_type":"result","data":[{},"x"]}',
        b'{"node_key":"KEY","log_type":3,"data":[]}', b'{"log_type":"result","data":[{}]}',
        b'{"node_key":"KEY","log_type":"result","data":[%s]}' % DEEP,
        b'{"node_key":"KEY","log_type":"result","data":[{"a":%s}]}' % DEEP,
    ],
    "read": [b'{"node_key": 1}', b'{"node_key": "\xff"}', b"{}"],
    "write": [
        b'{"node_key":"KEY","queries":[]}', b'{"node_key":"KEY","queries":{},"statuses":{"q":[]}}',
        b'{"node_key":"KEY","queries":{},"messages":{"q":1}}', b'{"queries":{}}',
        b'{"node_key":"KEY","queries":{"q":%s}}' % DEEP,
    ],
    "begin": [
        b'{"node_key":"KEY"}', b'{"node_key":"KEY","block_count":"x","block_size":1,"carve_size":1}',
        b'{"node_key":"KEY","block_count":9,"block_size":1,"carve_size":1}',
        b'{"node_key":"KEY","block_count":1,"block_size":1,"carve_size":1,"carve_id":1}',
        b'{"block_count":1,"block_size":1,"carve_size":1}',
    ],
    "block": [b"{}", b'{"session_id":"x","block_id":0}', b'{"session_id":"x","block_id":0,"data":"AA=="}'],
    "yara": [b'{"node_key": 1}', b'{"node_key":"KEY"}'],
}  # fmt: skip


@pytest.mark.parametrize("operation", WRONG_MEMBERS)
def test_members_that_are_missing_or_of_wrong_types(api: Run, operation: str) -> None:
    """The agent's good key does not get lost over it."""

    async def test(api: Any) -> None:
        key = await api.enroll()
        for body in (template.replace(b"KEY", key.encode()) for template in WRONG_MEMBERS[operation]):
            answer = await api.ask(ENDPOINTS[operation], body)
            if operation == "block":
                assert answer is None
                continue
            told = check(operation, answer.status, answer.body, key)
            if operation != "enroll" and key.encode() in body:
                assert "node_invalid" not in told
        assert await api.tell("/config", {"node_key": key}) == {}
        assert api.store.peek(lambda db: list(logs.export(db, LogFilter()))) == []

    api(test)


@pytest.mark.parametrize("operation", ENDPOINTS)
@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH", "OPTIONS", "TRACE", "post", "X" * 100])
def test_a_wrong_method(api: Run, operation: str, method: str) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        answer = await api.ask(ENDPOINTS[operation], {"node_key": key}, method=method)
        if operation == "block":
            assert answer is None
        else:
            told = check(operation, answer.status, answer.body, key, "X" * 50)
            assert told["reason"] in ("wrong_method", "unknown_path", "node_key_unknown", "rule_unknown")

    api(test)


@pytest.mark.parametrize(
    "target",
    ["/", "", "*", "/nothing", "/api/v1/osquery", "/enroll/x", "/..%2f..%2fetc/passwd", "/?node_key=x", "/%00"],
)
def test_an_unknown_path(api: Run, target: str) -> None:
    async def test(api: Any) -> None:
        for method in ("GET", "POST", "HEAD"):
            answer = await api.ask(target, {}, method=method)
            assert check("config", answer.status, answer.body)["reason"] == "unknown_path"
        assert api.handler.statistics()["refused"] == {"unknown_path": 3}

    api(test)


# who may not


def full(key: str) -> dict[str, Any]:
    """A body that every endpoint but enroll and block takes."""
    return {
        "node_key": key, "log_type": "result", "data": [{"a": 1}], "queries": {},
        "block_count": 1, "block_size": 9, "carve_size": 9,
    }  # fmt: skip


KEYED = ("config", "log", "read", "write", "begin")


async def refuses(
    api: Any, body: dict[str, Any], reason: str, *, node_invalid: bool, tail: str = "", **more: Any
) -> None:
    for operation in KEYED:
        answer = await api.ask(ENDPOINTS[operation] + tail, body, **more)
        told = check(operation, answer.status, answer.body, *(v for v in (body["node_key"], tail[3:]) if v))
        assert told["reason"] == reason
        assert (told.get("node_invalid") is True) is node_invalid
    assert api.handler.statistics()["refused"] == {reason: len(KEYED)}
    assert api.store.peek(lambda db: list(logs.export(db, LogFilter()))) == []


def test_an_unknown_key(api: Run) -> None:
    async def test(api: Any) -> None:
        await refuses(api, full("some-unknown-key"), "node_key_unknown", node_invalid=True)

    api(test)


def test_a_key_of_a_megabyte(api: Run) -> None:
    async def test(api: Any) -> None:
        await refuses(api, full("k" * 1_000_000), "node_key_unknown", node_invalid=True)

    api(test)


def test_a_blank_key(api: Run) -> None:
    async def test(api: Any) -> None:
        await api.enroll()
        await refuses(api, full(""), "node_key_missing", node_invalid=True)

    api(test)


def test_keys_that_disagree(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        headers = {"authorization": "NodeKey another"}
        await refuses(api, full(key), "key_conflict", node_invalid=False, headers=headers)

    api(test)


def test_another_tenants_secret(api: Run) -> None:
    async def test(api: Any) -> None:
        await api.do(tenants.create, "acme", TenantOptions())
        await api.do(tenants.add_secret, "acme", "their-secret")
        key = await api.enroll()
        await refuses(api, full(key), "foreign_secret", node_invalid=True, tail="?s=their-secret")

    api(test)


def test_a_deleted_node(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        await api.do(nodes.delete, api.node().id)
        await refuses(api, full(key), "node_key_unknown", node_invalid=True)

    api(test)


def test_a_node_that_awaits_approval(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        await refuses(api, full(key), "approval_pending", node_invalid=False)

    api(test, options=TenantOptions(approve=True))


def test_a_missing_certificate(api: Run, kit: Any) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll(who=kit.peer(certificate="c"), enroll_secret="")
        await refuses(api, full(key), "certificate_required", node_invalid=False)

    api(test, options=TenantOptions(client_cert=True))


def test_a_closed_tenant(api: Run) -> None:
    async def test(api: Any) -> None:
        await api.do(tenants.create, "acme", TenantOptions())
        await api.do(tenants.add_secret, "acme", "s")
        key = await api.enroll(enroll_secret="s")
        await api.do(tenants.close, "acme")
        await refuses(api, full(key), "tenant_closed", node_invalid=True)

    api(test)


@pytest.mark.parametrize("secret", ["a-wrong-secret", "", None, 3, "x" * 5000])
def test_a_refused_enrollment(api: Run, kit: Any, secret: Any) -> None:
    async def test(api: Any) -> None:
        for target in ("/enroll", "/enroll?enroll_secret=a-wrong-secret"):
            answer = await api.ask(target, kit.host(enroll_secret=secret))
            told = check("enroll", answer.status, answer.body, "a-wrong-secret")
            assert told["reason"] in ("wrong_secret", "secret_missing")

    api(test)


# what is our own fault


@pytest.mark.parametrize("operation", [name for name in ENDPOINTS if name != "unknown"])
@pytest.mark.parametrize("error", [RuntimeError, sqlite3.OperationalError, MemoryError, RecursionError, KeyError])
def test_an_internal_error(
    api: Run, kit: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, operation: str, error: Any
) -> None:
    """The server's log has the exception, the peer only learns that there was one."""

    async def test(api: Any) -> None:
        key = await api.enroll()
        content = base64.b64encode(b"x").decode()
        body = {**kit.host("b"), **full(key), "session_id": "s", "block_id": 0, "data": [{"a": 1}]}
        body["data"] = content if operation == "block" else [{"a": 1}]

        def broken(*_: Any) -> Any:
            raise error("the text of the exception")

        monkeypatch.setattr(api.store, "peek", broken)
        monkeypatch.setattr(api.store, "write", broken)
        answer = await api.ask(ENDPOINTS[operation], body)
        monkeypatch.undo()
        if operation == "block":
            assert answer is None
        else:
            told = check(operation, answer.status, answer.body, "the text", key, kit.SECRET, error.__name__)
            assert (told["reason"], answer.status) == ("internal", 500)
        assert api.handler.statistics()["refused"] == {"internal": 1}

    with caplog.at_level(logging.ERROR):
        api(test)
    assert "the text of the exception" in caplog.text


def test_a_config_that_cannot_be_made(api: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in the amalgamation must not empty the schedules of a fleet."""

    async def test(api: Any) -> None:
        key = await api.enroll()
        await api.do(configs.put, Source("c", {"schedule": {}}), "")
        monkeypatch.setattr(configs, "config_for", lambda *_: 1 // 0)
        answer = await api.ask("/config", {"node_key": key})
        check("config", answer.status, answer.body)
        monkeypatch.undo()
        assert await api.tell("/config", {"node_key": key}) == {"schedule": {}}

    api(test)


# what never becomes a request


def request(operation: str, headers: str = "", body: bytes = b"", method: str = "POST") -> bytes:
    return f"{method} {ENDPOINTS[operation]} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode() + body


RAW: dict[str, tuple[Callable[[str], bytes], str]] = {
    "declared too large": (lambda op: request(op, "Content-Length: 99999\r\n"), "body_too_large"),
    "chunked too large": (
        lambda op: request(op, "Transfer-Encoding: chunked\r\n", b"9000\r\n" + b"x" * 0x9000 + b"\r\n"),
        "body_too_large",
    ),
    "two lengths": (
        lambda op: request(op, "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"{}"), "bad_request",
    ),
    "no number": (lambda op: request(op, "Content-Length: two\r\n", b"{}"), "bad_request"),
    "no HTTP": (lambda op: b"\x00\x01\x02 what\r\n\r\n", "bad_request"),
    "a header too long": (lambda op: request(op, "X: " + "y" * 100_000 + "\r\n"), "header_too_large"),
    "a coding of its own": (lambda op: request(op, "Transfer-Encoding: rot13\r\n"), "transfer_encoding"),
    "a body that stops": (lambda op: request(op, "Content-Length: 100\r\n", b'{"node'), "body_timeout"),
}  # fmt: skip


async def everything(stream: Any) -> bytes:
    """What comes until the end, be it an orderly one or not."""
    received = b""
    with contextlib.suppress(trio.BrokenResourceError):
        while data := await stream.receive_some():
            received += data
    return received


@pytest.mark.parametrize("how", RAW)
def test_what_the_listener_refuses(served: Run, how: str) -> None:
    """The same promises where no handler was asked: the answer, its length, the count; blocks are dropped."""
    make, reason = RAW[how]
    unparsed = how in ("no HTTP", "a header too long", "no number", "a coding of its own")

    async def test(server: Any) -> None:
        for operation in ("config", "log", "enroll", "block"):
            client = await server.connect()
            await client.stream.send_all(make(operation))
            received = await everything(client.stream)
            if operation == "block" and not unparsed:
                assert received == b""
                continue
            head, _, body = received.partition(b"\r\n\r\n")
            lines = head.decode().lower().split("\r\n")
            assert f"content-length: {len(body)}" in lines
            assert "content-type: application/json" in lines
            told = check("config" if unparsed else operation, int(head.split()[1]), body)
            assert told["reason"] == reason
        assert server.api.handler.statistics()["refused"] == {reason: 4}
        assert server.api.handler.take_refused() == {reason: 4}

    served(test, bounds=BOUNDS, limits=Limits(body_timeout_s=0.05, linger_timeout_s=0.05))


def test_http2_keeps_the_same_promises(served: Run) -> None:
    async def test(server: Any) -> None:
        context = ssl.create_default_context(cafile=str(server.identity.ca))
        async with httpx.AsyncClient(
            http2=True, verify=context, base_url=f"https://localhost:{server.listener.port}"
        ) as client:
            for target, body, reason in (
                ("/nothing", b"{}", "unknown_path"),
                ("/config", b"", "empty_body"),
                ("/enroll", b"[]", "wrong_type"),
                ("/config", b"x" * 15_000, "body_too_large"),
            ):
                answer = await client.post(target, content=body)
                assert answer.http_version == "HTTP/2"
                assert answer.headers["content-length"] == str(len(answer.content))
                operation = "enroll" if target == "/enroll" else "config"
                assert check(operation, answer.status_code, answer.content)["reason"] == reason
        async with httpx.AsyncClient(
            http2=True, verify=context, base_url=f"https://localhost:{server.listener.port}"
        ) as client:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post("/carve/block", content=b"{}")

    served(test, bounds=BOUNDS)


def test_every_answer_over_the_wire_has_a_length(served: Run, kit: Any) -> None:
    """Good ones too, also to HEAD; one connection serves on after each refusal."""

    async def test(server: Any) -> None:
        api, client = server.api, await server.connect()
        key = (await client.tell("/enroll", kit.host()))["node_key"]
        for target, body, method in (
            ("/config", {"node_key": key}, "POST"),
            ("/config", {"node_key": "wrong"}, "POST"),
            ("/nothing", {}, "POST"),
            ("/config", b"[]", "POST"),
            ("/version", b"", "GET"),
            ("/version", b"", "HEAD"),
            ("/nothing", b"", "HEAD"),
            ("/distributed/read", {"node_key": key}, "POST"),
        ):
            answer = await client.ask(target, body, method=method)
            assert answer.headers["content-type"] == "application/json"
            if method == "HEAD":
                assert answer.body == b""
                assert int(answer.headers["content-length"]) > 0
            else:
                assert answer.headers["content-length"] == str(len(answer.body))
                assert isinstance(answer.json, dict)
        assert server.listener.statistics().accepted == 1
        await api.upkeep.flush()
        told = {event.data["reason"]: event.data["count"] for event in api.events("requests_refused")}
        assert told == {"node_key_unknown": 1, "unknown_path": 2, "wrong_type": 1}

    served(test)


def test_many_large_bodies_at_once_are_refused_as_busy(served: Run) -> None:
    """Memory for bodies is bounded over all connections; what is refused for it may be sent again."""

    async def test(server: Any) -> None:
        clients = [await server.connect() for _ in range(4)]
        answers: list[Any] = []

        async def send(client: Any) -> None:
            await client.stream.send_all(request("log", "Content-Length: 9000\r\n", b"x" * 8999))
            head, _, body = bytes(await client.stream.receive_some()).partition(b"\r\n\r\n")
            while not body:
                body = bytes(await client.stream.receive_some())
            answers.append(check("log", int(head.split()[1]), body)["reason"])

        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(send, client)
        assert "busy" in answers

    served(test, bounds=BOUNDS, limits=Limits(inflight_body_bytes=20_000, body_timeout_s=0.3, linger_timeout_s=0.1))
