"""Records on their way: order, cursors, what is missing, what is refused, and sinks that fail in every way."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from osqbox.errors import BadSetup, Unsafe
from osqbox.forward import delivery
from osqbox.forward.messages import SourceName
from osqbox.forward.sinks import FileSink

from ._rig import (
    Posted,
    Said,
    add_events,
    all_sent,
    collector,
    drop_lines,
    forwarding,
    log_lines,
    open_store,
    until,
)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(25):
            await test()

    trio.run(limited)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses as short as a test wants them."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr("osqbox.forward.forwarding.FINISH_S", 20)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE_S", 0.1)


def numbered(count: int, start: int = 0) -> list[dict[str, int]]:
    return [{"n": number} for number in range(start, start + count)]


def lines_of(file: Path) -> list[Any]:
    return [json.loads(line)["line"] for line in file.read_bytes().splitlines()]


def test_what_was_there_and_what_comes(tmp_path: Path) -> None:
    """Oldest first, and new ones within a moment, each with its id, tenant and time."""

    async def test() -> None:
        async with open_store(tmp_path) as store:
            await log_lines(store, numbered(3))
            with collector() as server:
                async with forwarding(store, server.url) as opened:
                    await all_sent(opened, 3)
                    began = time.monotonic()
                    await log_lines(store, numbered(1, 3))
                    await until(lambda: len(server.taken) == 4)
                    assert time.monotonic() - began < 1
                    only = await all_sent(opened, 4)
                assert server.lines() == numbered(4)
                first = server.taken[0]
                assert (first["tenant"], first["node"], first["seq"], first["source"]) == ("acme", "n1", 1, "logs")
                assert first["at"].endswith("Z")
                assert len(set(server.ids())) == 4
                assert server.posted[0].headers["content-type"] == "application/x-ndjson"
                assert server.posted[0].headers["content-encoding"] == "gzip"
                assert server.connections == 1
                assert (only.up, only.waiting, only.lag_s, only.dropped, only.last_error) == (True, 0, 0, 0, "")

    run(test)


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    """Nothing twice after an orderly end; records stored while nothing forwarded come first."""

    async def test() -> None:
        with collector() as server:
            for round_ in range(3):
                async with open_store(tmp_path) as store:
                    await log_lines(store, numbered(5, round_ * 10))
                    async with forwarding(store, server.url) as opened:
                        await log_lines(store, numbered(5, round_ * 10 + 5))
                        await all_sent(opened, (round_ + 1) * 10)
        assert server.lines() == numbered(30)

    run(test)


def test_the_end_forwards_what_is_stored(tmp_path: Path) -> None:
    """A box that is thrown away has given everything on."""

    async def test() -> None:
        with collector() as server:
            async with open_store(tmp_path) as store, forwarding(store, server.url):
                await log_lines(store, numbered(5000))
        assert server.lines() == numbered(5000)

    run(test)


def test_the_end_does_not_wait_for_a_sink_that_is_down(tmp_path: Path) -> None:
    async def test() -> None:
        async with open_store(tmp_path) as store:
            await log_lines(store, numbered(5))
            async with forwarding(store, "http://127.0.0.1:9/in") as opened:
                await until(lambda: not opened.statistics()[0].up)
                began = time.monotonic()
            assert time.monotonic() - began < 0.5

    run(test)


def test_a_file_that_cannot_be_closed_does_not_fail_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = FileSink.close

    async def fail(sink: FileSink) -> None:
        close(sink)
        raise OSError("a disk that is full only now")

    monkeypatch.setattr(FileSink, "aclose", fail)

    async def test() -> None:
        async with open_store(tmp_path) as store, forwarding(store, f"file:{tmp_path}/out") as opened:
            await log_lines(store, numbered(3))
            await all_sent(opened, 3)

    run(test)
    assert lines_of(tmp_path / "out") == numbered(3)


def test_dropped_by_retention_is_counted(tmp_path: Path) -> None:
    """Lines that went before the sink had them; not those from before it was there."""

    async def test() -> None:
        async with open_store(tmp_path) as store:
            await log_lines(store, numbered(20))
            await drop_lines(store, 5)
            with collector() as server:
                async with forwarding(store, server.url) as opened:
                    assert (await all_sent(opened, 15)).dropped == 0
                await log_lines(store, numbered(10, 20))
                await drop_lines(store, 24)
                async with forwarding(store, server.url) as opened:
                    only = await all_sent(opened, 21)
                    assert (only.forwarded, only.dropped, only.waiting) == (21, 4, 0)
                await log_lines(store, numbered(5, 30))
                await drop_lines(store, 35)
                async with forwarding(store, server.url) as opened:
                    await until(lambda: opened.statistics()[0].dropped == 9)
            assert server.lines() == [*numbered(15, 5), *numbered(6, 24)]

    run(test)


def test_what_is_dropped_while_a_sink_is_down_shows(tmp_path: Path) -> None:
    """Not only once it is up again."""

    async def test() -> None:
        async with open_store(tmp_path) as store:
            await log_lines(store, numbered(20))
            async with forwarding(store, "http://127.0.0.1:9/in") as opened:
                await drop_lines(store, 12)
                await until(lambda: opened.statistics()[0].dropped == 12)
                assert opened.statistics()[0].waiting == 8

    run(test)


def test_every_source_and_several_sinks(tmp_path: Path) -> None:
    """Each sink has cursors of its own; a dead one holds up nobody."""

    async def test() -> None:
        async with open_store(tmp_path) as store:
            file = tmp_path / "out.ndjson"
            with collector() as server:
                places = (server.url, f"file:{file}", "http://127.0.0.1:9/dead")
                sources = (SourceName.LOGS, SourceName.EVENTS)
                async with forwarding(store, *places, sources=sources) as opened:
                    await log_lines(store, numbered(3))
                    await add_events(store, [{"e": 1}, "a text", [1]])
                    good = opened.statistics
                    await until(lambda: [each.forwarded for each in good()] == [6, 6, 0])
                    dead = good()[2]
                    assert (dead.up, dead.waiting) == (False, 6)
                    assert "cannot connect to 127.0.0.1 port 9: Connection refused" in dead.last_error
                    assert dead.lag_s > 0
            records = [json.loads(line) for line in file.read_bytes().splitlines()]
            assert [each["data"] for each in records if each["source"] == "events"] == [
                {"e": 1}, {"value": "a text"}, {"value": [1]},
            ]  # fmt: skip
            event = next(each for each in records if each["source"] == "events")
            assert (event["agent"], event["module"], event["collector"], event["event_id"]) == (
                "a1", "inventory", "ports", "e0",
            )  # fmt: skip

    run(test)


FAILURES = {
    "503": [Said(503)],
    "429 with Retry-After": [Said(429, {"Retry-After": "0"})],
    "500 again and again": [Said(500)] * 5,
    "closed without an answer": [Said(cut=True)] * 2,
    "wrong path": [Said(404, body=b"no such path")],
    "wrong token": [Said(401)],
    "moved": [Said(301, {"Location": "/elsewhere"})],
    "no HTTP length": [Said(200, {"Content-Length": "nonsense"})],
}


@pytest.mark.parametrize("how", FAILURES)
def test_failures_are_outlived(tmp_path: Path, how: str) -> None:
    """Every record arrives, in order, once the collector takes them."""

    async def test() -> None:
        answers = list(FAILURES[how])
        async with open_store(tmp_path) as store:
            with collector(lambda _: answers.pop() if answers else Said()) as server:
                async with forwarding(store, server.url) as opened:
                    await log_lines(store, numbered(10))
                    only = await all_sent(opened, 10)
                    assert only.up
                    assert only.last_error
                    assert only.last_error_at is not None
                unique = list(dict.fromkeys(server.ids()))
                assert len(unique) == 10
                assert server.lines()[-10:] == numbered(10)

    run(test)


def test_retry_after_is_kept(tmp_path: Path) -> None:
    """Nothing is sent before the time the collector asked for."""

    async def test() -> None:
        at: list[float] = []

        def script(_: Posted) -> Said:
            at.append(time.monotonic())
            return Said(503, {"Retry-After": "1"}) if len(at) == 1 else Said()

        async with open_store(tmp_path) as store:
            with collector(script) as server:
                async with forwarding(store, server.url) as opened:
                    await log_lines(store, numbered(1))
                    await until(lambda: at)
                    await log_lines(store, numbered(1, 1))
                    await all_sent(opened, 2)
            assert at[1] - at[0] >= 1

    run(test)


def test_too_large_batches_get_smaller(tmp_path: Path) -> None:
    """413 halves them; later ones are small from the start, and order is kept."""

    async def test() -> None:
        def script(posted: Posted) -> Said:
            return Said(413) if len(posted.body) > 40_000 else Said()

        async with open_store(tmp_path) as store:
            with collector(script) as server:
                async with forwarding(store, server.url) as opened:
                    await log_lines(store, [{"n": number, "x": "x" * 100} for number in range(2000)])
                    only = await all_sent(opened, 2000)
                    assert (only.set_aside, only.up) == (0, True)
            assert [line["n"] for line in server.lines()] == list(range(2000))

    run(test)


def test_one_record_that_is_too_large_is_set_aside(tmp_path: Path) -> None:
    async def test() -> None:
        def script(posted: Posted) -> Said:
            return Said(413) if len(posted.body) > 40_000 else Said()

        async with open_store(tmp_path) as store:
            with collector(script) as server:
                async with forwarding(store, server.url) as opened:
                    await log_lines(store, [*numbered(3), {"x": "x" * 50_000}, *numbered(3, 3)])
                    only = await all_sent(opened, 7)
                    assert (only.forwarded, only.set_aside, only.up) == (6, 1, True)
            assert server.lines() == numbered(6)

    run(test)


def poisoned(posted: Posted) -> Said:
    return Said(400, body=b"do not like n 7 \x1b[2J") if b'"n": 7}' in posted.body else Said()


def test_a_poisonous_record_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Counted, told with its reason, and all others arrive in order."""

    async def test() -> None:
        async with open_store(tmp_path) as store:
            with collector(poisoned) as server:
                async with forwarding(store, server.url) as opened:
                    await log_lines(store, numbered(20))
                    only = await all_sent(opened, 20)
                    assert (only.forwarded, only.set_aside, only.up) == (19, 1, True)
                    await log_lines(store, numbered(1, 20))
                    await all_sent(opened, 21)
            assert server.lines() == [line for line in numbered(21) if line["n"] != 7]
            kinds = await store.read(lambda db: db.execute("SELECT data FROM feed_events WHERE kind = "
                                                           "'forward_set_aside'").fetchall())  # fmt: skip
            assert len(kinds) == 1

    run(test)
    assert "set aside" in caplog.text
    assert "do not like n 7 ?[2J" in caplog.text


def test_a_poisonous_record_alone_waits_for_another(tmp_path: Path) -> None:
    """Whether it is the record or the collector shows only with a second one."""

    async def test() -> None:
        async with open_store(tmp_path) as store:
            with collector(poisoned) as server:
                async with forwarding(store, server.url) as opened:
                    await log_lines(store, numbered(1, 7))
                    await until(lambda: "refuses every record" in opened.statistics()[0].last_error)
                    assert opened.statistics()[0].set_aside == 0
                    await log_lines(store, numbered(1, 8))
                    only = await all_sent(opened, 2)
                    assert (only.forwarded, only.set_aside) == (1, 1)
            assert server.lines() == numbered(1, 8)

    run(test)


def test_a_collector_that_refuses_everything_loses_nothing(tmp_path: Path) -> None:
    """Set up wrongly, it gets everything once it is right."""

    async def test() -> None:
        wrong = [True]
        async with open_store(tmp_path) as store:
            with collector(lambda _: Said(400 if wrong[0] else 200)) as server:
                async with forwarding(store, server.url) as opened:
                    await log_lines(store, numbered(300))
                    await until(lambda: not opened.statistics()[0].up)
                    wrong[0] = False
                    only = await all_sent(opened, 300)
                    assert (only.forwarded, only.set_aside) == (300, 0)
            assert server.lines() == numbered(300)

    run(test)


def test_a_collector_that_hangs_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other sink goes on, statistics answer, one batch is in memory, and the end does not wait for it."""

    monkeypatch.setattr("osqbox.forward.forwarding.FINISH_S", 0.3)

    async def test() -> None:
        release = threading.Event()
        async with open_store(tmp_path) as store:
            with collector(lambda _: Said(hang=release)) as stuck, collector() as good:
                async with forwarding(store, stuck.url, good.url) as opened:
                    for batch in range(20):
                        await log_lines(store, numbered(100, batch * 100))
                    await until(lambda: len(good.taken) == 2000)
                    assert len(stuck.posted) == 1
                    assert opened.statistics()[0].waiting == 2000
                    began = time.monotonic()
                assert time.monotonic() - began < 4
                release.set()

    run(test)


def test_no_answer_in_time_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        release = threading.Event()
        hangs = [Said(hang=release)]
        async with open_store(tmp_path) as store:
            with collector(lambda _: hangs.pop() if hangs else Said()) as server:
                async with forwarding(store, server.url) as opened:
                    await log_lines(store, numbered(2))
                    only = await all_sent(opened, 2)
                    assert only.last_error == "no answer within 0.3 s"
                release.set()

    from osqbox.forward import http

    call = http.Connection.call

    async def hasty(self: Any, *words: Any, **more: Any) -> Any:
        return await call(self, *words, **more, timeout_s=0.3)

    monkeypatch.setattr(http.Connection, "call", hasty)
    run(test)


def test_a_kept_connection_that_was_closed_is_made_anew(tmp_path: Path) -> None:
    """Not a failure: servers close idle connections."""

    async def test() -> None:
        answers = [Said(200, {"Connection": "close"}), Said(), Said(cut=True), Said()]
        async with open_store(tmp_path) as store:
            with collector(lambda _: answers.pop(0) if answers else Said()) as server:
                async with forwarding(store, server.url) as opened:
                    for number in range(4):
                        await log_lines(store, numbered(1, number))
                        only = await all_sent(opened, number + 1)
                    assert only.last_error == ""
                assert server.lines() == numbered(4)
                assert server.connections == 3

    run(test)


def test_an_unpacked_body_for_who_cannot_unpack(tmp_path: Path) -> None:
    async def test() -> None:
        def script(posted: Posted) -> Said:
            return Said(415) if "content-encoding" in posted.headers else Said()

        async with open_store(tmp_path) as store:
            with collector(script) as server:
                async with forwarding(store, server.url) as opened:
                    await log_lines(store, numbered(3))
                    await all_sent(opened, 3)
                    await log_lines(store, numbered(3, 3))
                    await all_sent(opened, 6)
                assert len(server.posted) == 3

    run(test)


def test_credentials_come_from_a_file_and_are_read_again(tmp_path: Path) -> None:
    """A renewed token is taken after a refusal; the file's words are in no error."""
    secret = tmp_path / "token"

    async def test() -> None:
        def script(posted: Posted) -> Said:
            return Said() if posted.headers.get("authorization") == "Bearer right" else Said(401)

        async with open_store(tmp_path) as store:
            with collector(script) as server:
                async with forwarding(store, server.url, auth_file=secret) as opened:
                    await log_lines(store, numbered(1))
                    only = await until(lambda: next((s for s in opened.statistics() if not s.up), None))
                    assert "No such file" in only.last_error
                    secret.write_text("two words\n")
                    await until(lambda: "several words" in opened.statistics()[0].last_error)
                    secret.write_text("wrong-secret\n")
                    await until(lambda: "HTTP 401" in opened.statistics()[0].last_error)
                    assert "secret" not in opened.statistics()[0].last_error
                    secret.write_text("right\n")
                    await all_sent(opened, 1)

    run(test)


def test_a_secret_does_not_go_out_in_the_clear(tmp_path: Path) -> None:
    async def test() -> None:
        place = "http://collector.example/in"
        async with open_store(tmp_path) as store, forwarding(store, place, auth_file=tmp_path / "token"):
            raise AssertionError("it was opened")

    with pytest.RaisesGroup(pytest.RaisesExc(Unsafe, match="in the clear")):
        run(test)


@pytest.mark.parametrize("place", ["https://localhost/in"])
def test_a_ca_file_that_cannot_be_used(tmp_path: Path, place: str) -> None:
    async def test() -> None:
        async with open_store(tmp_path) as store, forwarding(store, place, ca_file=tmp_path / "none.pem"):
            raise AssertionError("it was opened")

    with pytest.RaisesGroup(pytest.RaisesExc(BadSetup, match="none.pem")):
        run(test)


def test_waiting_records_are_not_in_memory(tmp_path: Path) -> None:
    """A sink that is down reads one batch per try and keeps none."""

    async def test() -> None:
        async with open_store(tmp_path) as store:
            with collector(lambda _: Said(503)) as server:
                async with forwarding(store, server.url) as opened:
                    for _ in range(10):
                        await log_lines(store, [{"x": "x" * 1000}] * 1000)
                    await until(lambda: len(server.posted) > 2)
                    assert opened.statistics()[0].waiting == 10_000
                    assert max(len(each.body) for each in server.posted) < 2 * delivery.BATCH_BYTES
                    assert len(server.posted[-1].body) < len(server.posted[0].body)

    run(test)


def test_tls_to_a_collector_that_is_trusted_and_to_one_that_is_not(tmp_path: Path) -> None:
    """The certificate is checked, with the CA that was named; the other one never sees a record."""
    ca, stranger = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")

    def context(authority: trustme.CA, name: str) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(made)
        return made

    async def test() -> None:
        async with open_store(tmp_path) as store:
            with (
                collector(context=context(ca, "localhost")) as good,
                collector(context=context(stranger, "localhost")) as foreign,
                collector(context=context(ca, "elsewhere.example")) as misnamed,
            ):
                places = (good.url, foreign.url, misnamed.url)
                async with forwarding(store, *places, ca_file=tmp_path / "ca.pem") as opened:
                    await log_lines(store, numbered(3))
                    await until(lambda: len(good.taken) == 3)
                    await until(lambda: [each.up for each in opened.statistics()] == [True, False, False])
                    errors = [each.last_error for each in opened.statistics()]
                    assert "its certificate is not trusted: unable to get local issuer certificate" in errors[1]
                    assert "its certificate is not trusted: Hostname mismatch" in errors[2]
                assert foreign.posted == misnamed.posted == []

    run(test)
