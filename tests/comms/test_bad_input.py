"""Every way to fail at the comms listener: the documented status, a sentence in JSON, and an orderly connection."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import trio

from osqbox.comms import protocol
from osqbox.comms.bodies import EVENTS_MAX
from osqbox.comms.intake import Intake
from osqbox.settings import CommsSettings

from ._door import Door, read_answer, run_door


async def exchanged(door: Door, *pieces: bytes) -> tuple[int, dict[str, str], Any]:
    """What a connection is answered on which these bytes are written; then it must end or go on, but not hang."""
    stream = await door.raw()
    try:
        for piece in pieces:
            await stream.send_all(piece)
        status, headers, body = await read_answer(stream)
        told = json.loads(body)
        assert set(told) == {"message", "code"}, told
        assert headers["content-type"] == "application/json"
        return status, headers, told
    finally:
        await trio.aclose_forcefully(stream)


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", "")).encode()


def test_unknown_paths_are_404_and_wrong_methods_405_with_allow(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        for path in ("/nope", "/api/v2/login", "/api/v1/api/v1/login", "/login/x", "/%6cogin", "/api/v1x"):
            assert "/api/v1/" in (await door.ask("GET", path, 404)).json()["message"]
        for method, path, allowed in (
            ("GET", "/login", "POST"),
            ("DELETE", "/commands", "GET"),
            ("HEAD", "/commands", "GET"),
            ("POST", "/configuration", "GET, HEAD"),
            ("PUT", "/upgrade?file_name=x", "GET, HEAD"),
            ("OPTIONS", "/events/stateless", "POST"),
            ("BREW", "/", "GET, HEAD"),
        ):
            assert (await door.ask(method, path, 405)).headers["allow"] == allowed
        assert (await door.local_ask("POST", "/login", 404)).status_code == 404
        assert (await door.local_ask("DELETE", "/commands", 405)).headers["allow"] == "POST"

    run_door(tmp_path, test)


def test_a_body_that_says_it_is_too_large_is_413_before_it_is_read(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        for path, limit in (("/events/stateful", protocol.EVENTS_BYTES), ("/login", protocol.SMALL_BYTES)):
            status, headers, told = await exchanged(door, head("POST", path, f"Content-Length: {limit + 1}"))
            assert (status, headers["connection"]) == (413, "close")
            assert str(limit) in told["message"]

    run_door(tmp_path, test)


def test_a_client_that_sends_a_body_that_is_too_large_can_read_the_413(tmp_path: Path) -> None:
    """It is not reset while it sends: with Content-Length and in chunks."""

    async def test(door: Door) -> None:
        size = protocol.SMALL_BYTES * 4
        body = b"x" * size
        chunk = b"%x\r\n%b\r\n" % (size, body)
        for pieces in (
            (head("POST", "/login", f"Content-Length: {size}"), body),
            (head("POST", "/login", "Transfer-Encoding: chunked"), chunk, b"0\r\n\r\n"),
        ):
            assert (await exchanged(door, *pieces))[0] == 413
        await door.ask("POST", "/login", 413, content=body)

    run_door(tmp_path, test)


def test_gzip_is_unpacked_within_a_bound(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        bomb = gzip.compress(bytes(protocol.DECODED_BYTES + 1), 9)
        assert len(bomb) < 100_000
        packed = {"Content-Encoding": "gzip"}
        good = gzip.compress(b'{"message": "a"}')
        for body, status, said in (
            (bomb, 413, "after gunzip"),
            (b"not gzip", 400, "gzip"),
            (good[:-5], 400, "breaks off"),
            (good + b"trailing", 400, "gzip"),
        ):
            answered = await known.ask("POST", "/events/stateless", status, content=body, headers=packed)
            assert said in answered.json()["message"]
        await known.ask("POST", "/events/stateless", 202, content=good + gzip.compress(b"\n"), headers=packed)
        other = await known.ask("POST", "/events/stateless", 415, content=good, headers={"Content-Encoding": "br"})
        assert other.headers["accept-encoding"] == "gzip"

    run_door(tmp_path, test)


def test_the_content_type_is_not_looked_at(tmp_path: Path) -> None:
    """The C++ agent sends NDJSON as application/json."""

    async def test(door: Door) -> None:
        known = await door.agent()
        for kind in ("application/json", "text/plain", "x/y; charset=z", "application/x-www-form-urlencoded"):
            headers = {"Content-Type": kind}
            await known.ask("POST", "/events/stateless", 202, content=b'{"a": 1}', headers=headers)

    run_door(tmp_path, test)


def test_a_path_that_is_too_long_is_414_and_a_head_that_is_too_large_431(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        await door.ask("GET", "/configuration?x=" + "y" * protocol.TARGET_BYTES, 414)
        assert (await exchanged(door, b"GET /" + b"x" * 100_000))[0] == 414
        assert (await exchanged(door, head("GET", "/", *[f"X-{n}: {'y' * 1000}" for n in range(100)])))[0] == 431

    run_door(tmp_path, test)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /login HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST /login HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\xff: y\r\n\r\n", 400),
    ],
)
def test_what_is_not_http_is_answered_as_everything_else(tmp_path: Path, data: bytes, status: int) -> None:
    async def test(door: Door) -> None:
        found, headers, _ = await exchanged(door, data)
        assert (found, headers["connection"]) == (status, "close")
        assert ("allow" in headers) is (status == 405)

    run_door(tmp_path, test)


def test_a_head_or_body_that_stays_away_is_408(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        assert (await exchanged(door, b"POST /login HTTP/1.1\r\nHost: x\r\n"))[0] == 408
        assert (await exchanged(door, head("POST", "/login", "Content-Length: 10"), b"{"))[0] == 408

    run_door(tmp_path, test, header_timeout_s=0.1, body_timeout_s=0.1)


def test_too_many_large_bodies_at_once_are_503_with_retry_after(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        size = 60_000
        status, headers, _ = await exchanged(door, head("POST", "/login", f"Content-Length: {size}"), b"x" * size)
        assert (status, headers["retry-after"]) == (503, "5")

    run_door(tmp_path, test, inflight_body_bytes=10_000)


def test_an_error_of_ours_is_500_without_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(door: Door) -> None:
        async def fail(*_args: object, **_named: object) -> None:
            raise RuntimeError("secret detail")

        known = await door.agent()
        monkeypatch.setattr(type(door.comms.login), "login", fail)
        assert "secret" not in (await door.ask("POST", "/login", 500, json={"uuid": "x", "password": "y"})).text
        await known.ask("GET", "/configuration", 200)

    run_door(tmp_path, test)


def test_a_full_queue_of_events_is_503_with_retry_after(tmp_path: Path) -> None:
    """The engine is away; what was accepted stays, what was refused is not."""

    async def test(door: Door) -> None:
        known = await door.agent()
        door.comms.intake = Intake(door.comms.engine, events_max=3, agent_share=1.0)  # nobody empties it
        await known.ask("POST", "/events/stateless", 202, json=[{"n": 1}, {"n": 2}])
        await known.ask("POST", "/events/stateless", 503, json=[{"n": 3}, {"n": 4}])
        await known.ask("POST", "/events/stateless", 202, json=[{"n": 3}])
        counted = door.comms.intake.statistics()
        assert (counted.accepted, counted.waiting, counted.refused) == (3, 3, 1)
        await known.ask("POST", "/vulnerability/scan", 503, json={"type": "packagelist"})

    settings = CommsSettings(token_algorithm="ES256", engine_socket=tmp_path / "nobody.sock")
    run_door(tmp_path, test, settings=settings)


def test_bad_events_say_their_line(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        good = b'{"message": "a"}\n'
        for path in ("/events/stateless", "/events/stateful"):
            for body, said in (
                (good * 6 + b"{oops}\n", "line 7"),
                (good * 2 + b"[1]\n", "line 3"),
                (b"", "got nothing"),
                (b'{"a": "\xff"}', "UTF-8"),
                (b"[" * 1000 + b"]" * 1000, "levels"),
            ):
                assert said in (await known.ask("POST", path, 400, content=body)).json()["message"]
            many = b"[" + b"{}," * EVENTS_MAX + b"{}]"
            await known.ask("POST", path, 413, content=many)

    run_door(tmp_path, test)


def test_odd_queries_and_headers_are_400(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        for path in (
            "/commands?wait=soon",
            "/commands?wait=-1",
            "/configuration?a=1&a=2",
            "/configuration?" + "&".join(f"a{n}=1" for n in range(100)),
            "/configuration?a=%ff",
            "/upgrade",
            "/upgrade?file_name=",
        ):
            await known.ask("GET", path, 400)
        await known.ask("POST", "/events/stateful", 400, json={"a": 1}, headers={"Idempotency-Key": "x" * 1000})

    run_door(tmp_path, test)


def test_an_error_in_order_keeps_the_connection(tmp_path: Path) -> None:
    """404, 401, 400 and 405 on one connection, then a good request."""

    async def test(door: Door) -> None:
        known = await door.agent()
        await door.ask("GET", "/nope", 404)
        await door.ask("GET", "/configuration", 401)
        await door.ask("POST", "/login", 400, content=b"{")
        await door.ask("GET", "/login", 405)
        await known.ask("GET", "/commands?wait=0", 408)
        await known.ask("GET", "/configuration", 200)
        assert door.listener.statistics().accepted == 1

    run_door(tmp_path, test)


def test_every_answer_is_counted_by_operation_and_status(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        await known.ask("GET", "/commands?wait=0", 408)
        await door.ask("GET", "/nope", 404)
        await known.ask("POST", "/events/stateless", 202, json={})
        requests = door.comms.statistics()["requests"]
        assert requests["commands"]["by_status"] == {"408": 1}
        assert requests["unknown"]["by_status"] == {"404": 1}
        assert requests["stateless"]["by_status"] == {"202": 1}
        assert requests["stateless"]["max_s"] >= requests["stateless"]["mean_s"] > 0

    run_door(tmp_path, test)
