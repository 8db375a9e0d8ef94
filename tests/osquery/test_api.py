"""The remote API as an agent sees it: from enrollment to the last carve block, by every path, over real TLS."""

from __future__ import annotations

import base64
import gzip
import hashlib
import itertools
import json
import logging
import random
import sqlite3
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio.testing

from osqbox import tenants
from osqbox.osquery import campaigns, carves, configs, logs, nodes, routes, yara
from osqbox.osquery.amalgamate import Source, Target
from osqbox.osquery.campaigns import Order
from osqbox.osquery.logs import LogFilter
from osqbox.osquery.nodes import Selector
from osqbox.tenants import TenantOptions

Run = Callable[..., None]

CONFIG = {"schedule": {"q": {"query": "select 1", "interval": 60}}}
FINE = {"node_invalid": False}


async def ask_all(api: Any, sql: str = "select 1", **more: Any) -> Any:
    """A campaign to every node, as the operator's API starts one."""
    order = Order(sql, more.pop("selector", Selector()), more.pop("timeout_s", 60.0), everyone=True, **more)
    campaign, asked = await api.do(campaigns.start, order, lambda _: (), api.new_id)
    api.presence.wake(asked)
    return campaign


def summary(api: Any, campaign: Any) -> dict[str, Any]:
    found: dict[str, Any] = api.store.peek(lambda db: campaigns.get(db, campaign.id)).summary()
    return found


def kept(api: Any, **which: Any) -> list[str]:
    return api.store.peek(lambda db: list(logs.export(db, LogFilter(**which))))


# the conversation

DIALECTS = {
    "canonical": ("/api/v1/osquery/", "enroll config log distributed/read distributed/write carve/begin carve/block"),
    "osctrl": ("/dev/", "enroll config log read write init block"),
    "Zentral": (
        "/public/osquery/",
        "enroll config log distributed/read distributed/write carver/start carver/continue",
    ),
    "plgx": ("/", "enroll config log distributed/read distributed/write start_uploads upload_blocks"),
    "test server": ("/", "enroll config logger distributed_read distributed_write carve_init carve_block"),
    "sgt": ("/", "node/enroll node/configure log distributed/read distributed/write carve/start carve/continue"),
    "goquery": ("/", "enroll config log distributedRead distributedWrite carve/start carve/continue"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_whole_conversation(served: Run, kit: Any, dialect: str, method: str) -> None:
    """On one keep-alive connection, in the order in which osqueryd speaks."""
    prefix, tails = DIALECTS[dialect]
    enroll, config, log, read, write, begin, block = (prefix + tail for tail in tails.split())

    async def test(server: Any) -> None:
        api, client = server.api, await server.connect()

        async def tell(path: str, **body: Any) -> Any:
            answer = await client.ask(path, body, method=method)
            assert answer.status == 200
            assert answer.headers["content-length"] == str(len(answer.body))
            assert answer.headers["content-type"] == "application/json"
            return answer.json

        await api.do(configs.put, Source("c", CONFIG), "")
        answer = await tell(enroll, **kit.host())
        assert answer["node_invalid"] is False
        key = answer["node_key"]
        assert await tell(config, node_key=key) == CONFIG
        lines = [{"name": "q", "action": "added", "columns": {"a": "1"}, "unixTime": 1}]
        assert await tell(log, data=lines, log_type="result", node_key=key) == FINE
        assert await tell(read, node_key=key) == {"queries": {}, **FINE}
        campaign = await ask_all(api)
        assert await tell(read, node_key=key) == {"queries": {campaign.id: "select 1"}, **FINE}
        answers = {"queries": {campaign.id: [{"a": "1"}]}, "statuses": {campaign.id: 0}, "messages": {campaign.id: ""}}
        assert await tell(write, **answers, stats={campaign.id: {}}, node_key=key) == FINE
        assert summary(api, campaign)["answered"] == 1
        content = b"0123456789"
        begun = await tell(
            begin, block_count=2, block_size=6, carve_size=10, carve_id="g", request_id="r", node_key=key
        )
        for number, data in ((1, content[6:]), (0, content[:6])):
            encoded = base64.b64encode(data).decode()
            assert (
                await tell(block, block_id=number, session_id=begun["session_id"], request_id="r", data=encoded) == FINE
            )
        facts = api.store.peek(lambda db: carves.get(db, "latest"))
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
        assert kept(api) == [json.dumps(lines[0])]
        assert server.listener.statistics().accepted == 1

    served(test)


def test_the_same_over_http2(served: Run, kit: Any) -> None:
    """One handler serves both: equal requests get equal answers."""

    async def test(server: Any) -> None:
        context = ssl.create_default_context(cafile=str(server.identity.ca))
        async with httpx.AsyncClient(
            http2=True, verify=context, base_url=f"https://localhost:{server.listener.port}"
        ) as client:
            answer = await client.post("/enroll", json=kit.host())
            assert answer.http_version == "HTTP/2"
            key = answer.json()["node_key"]
            assert (await client.post("/config", json={"node_key": key})).json() == {}
            refused = await client.post("/config", json={"node_key": "wrong"})
            assert (refused.status_code, refused.json()["node_invalid"]) == (401, True)
            assert refused.headers["content-length"] == str(len(refused.content))

    served(test)


def test_anybody_may_ask_for_the_version(served: Run) -> None:
    async def test(server: Any) -> None:
        client = await server.connect()
        for path in ("/version", "/api/v1/osquery/version", "/health", "/healthz"):
            answer = await client.ask(path, method="GET")
            assert (answer.status, answer.json["name"]) == (200, "osqbox")

    served(test)


# keys and secrets


def test_the_key_may_come_in_body_header_or_uri(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        assert await api.tell("/config", {"node_key": key}) == {}
        assert await api.tell("/config", {}, headers={"authorization": f"NodeKey {key}"}) == {}
        assert await api.tell(f"/config?node_key={key}", {}) == {}
        both = await api.tell("/config", {"node_key": key}, headers={"authorization": "NodeKey other"})
        assert both["reason"] == "key_conflict"
        assert "node_invalid" not in both

    api(test)


@pytest.mark.parametrize("tail", ["?enroll_secret={}", "?renamed={}", "?a=b&renamed={}"])
def test_the_secret_may_be_on_every_uri(api: Run, kit: Any, tail: str) -> None:
    """--tls_secret_always, under whatever name."""
    uri = tail.format(kit.SECRET)

    async def test(api: Any) -> None:
        answer = await api.tell(f"/enroll{uri}", kit.host(enroll_secret=""))
        key = answer["node_key"]
        assert await api.tell(f"/config{uri}", {"node_key": key}) == {}
        assert await api.tell(f"/log{uri}", {"node_key": key, "log_type": "status", "data": []}) == FINE
        assert (await api.tell(f"/distributed/read{uri}", {"node_key": key}))["queries"] == {}
        assert await api.tell(f"/distributed/write{uri}", {"node_key": key}) == FINE
        assert "session_id" in await api.tell(
            f"/carve/begin{uri}", {"node_key": key, "block_count": 1, "block_size": 9, "carve_size": 9}
        )

    api(test)


def test_a_foreign_secret_sends_the_node_to_enroll_again(api: Run, kit: Any) -> None:
    async def test(api: Any) -> None:
        await api.do(tenants.create, "acme", TenantOptions())
        await api.do(tenants.add_secret, "acme", "foreign")
        key = await api.enroll()
        answer = await api.tell("/config?enroll_secret=foreign", {"node_key": key})
        assert (answer["reason"], answer["node_invalid"]) == ("foreign_secret", True)

    api(test)


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_secrets_and_keys_are_neither_logged_nor_stored_nor_told(
    served: Run, kit: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in a log record of any level, an event, a file of the database or a refusal, also when things go wrong."""
    hidden = [kit.SECRET, "wrong-secret-typed"]

    async def test(server: Any) -> None:
        api, client = server.api, await server.connect()
        key = (await client.tell(f"/enroll?enroll_secret={kit.SECRET}", kit.host()))["node_key"]
        hidden.append(key)
        told = [
            await client.tell("/enroll?enroll_secret=wrong-secret-typed", kit.host(enroll_secret="wrong-secret-typed")),
            await client.tell(f"/config?enroll_secret={kit.SECRET}", {"node_key": key}),
            await client.tell(f"/nowhere/{key}?s={kit.SECRET}", {"node_key": key}),
            await client.tell("/config", {"node_key": [key]}),
            await client.tell("/config", b'{"node_key": "' + key.encode()),
            await client.tell("/config", {"node_key": key}, headers={"Authorization": f"NodeKey {key}x"}),
            await client.tell("/config", {"node_key": key}, headers={"Content-Encoding": "gzip"}),
        ]
        monkeypatch.setattr(nodes, "authenticate", lambda *args: 1 // 0)
        told.append(await client.tell(f"/config?enroll_secret={kit.SECRET}", {"node_key": key}))
        assert told[-1]["reason"] == "internal"
        monkeypatch.undo()
        await client.close()
        bad = await server.connect()
        await bad.stream.send_all(f"POST /x?s={kit.SECRET} HTTP/9.9\r\nkey: {key}\r\n\r\n".encode())
        await bad.stream.receive_some()
        await api.upkeep.flush()
        told += [event.data for event in api.events()]
        files = await trio.to_thread.run_sync(everything_in, tmp_path)
        for word in hidden:
            assert word not in json.dumps(told)
            assert word.encode() not in files

    with caplog.at_level(logging.DEBUG):
        served(test)
    formatted = "\n".join(logging.Formatter().format(record) for record in caplog.records)
    assert "internal error in config" in formatted
    for word in hidden:
        assert word not in formatted


def test_a_tenants_key_is_good_for_its_own_only(api: Run, kit: Any) -> None:
    """Another tenant's nodes get neither its queries nor its config, and cannot write for it."""

    async def test(api: Any) -> None:
        await api.do(tenants.create, "acme", TenantOptions())
        await api.do(tenants.add_secret, "acme", "acme-secret")
        ours, theirs = await api.enroll("a"), await api.enroll("b", enroll_secret="acme-secret")
        await api.do(configs.put, Source("c", CONFIG, target=Target(tenants=("acme",))), "")
        campaign = await ask_all(api, selector=Selector(tenant="acme"))
        assert await api.tell("/config", {"node_key": ours}) == {}
        assert await api.tell("/config", {"node_key": theirs}) == CONFIG
        assert (await api.tell("/distributed/read", {"node_key": ours}))["queries"] == {}
        body = {"queries": {campaign.id: [{"a": "forged"}]}, "statuses": {campaign.id: 0}}
        assert await api.tell("/distributed/write", {"node_key": ours, **body}) == FINE
        assert summary(api, campaign)["open"] == 1
        session = (
            await api.tell("/carve/begin", {"node_key": theirs, "block_count": 1, "block_size": 9, "carve_size": 3})
        )["session_id"]
        block = {"block_id": 0, "session_id": session, "data": base64.b64encode(b"abc").decode()}
        assert await api.ask("/carve/block", {**block, "node_key": ours}) is None
        assert await api.tell("/carve/block", {**block, "node_key": theirs}) == FINE

    api(test)


def test_delete_and_enroll_again(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        await api.do(nodes.delete, api.node().id)
        for path in ("/config", "/log", "/distributed/read", "/distributed/write"):
            answer = await api.tell(path, {"node_key": key, "log_type": "result", "data": [{}]})
            assert (answer["node_invalid"], answer["reason"]) == (True, "node_key_unknown")
            assert "error" in answer
        assert kept(api) == []
        assert await api.tell("/config", {"node_key": await api.enroll()}) == {}

    api(test)


def test_a_node_that_awaits_approval_keeps_its_key_schedule_and_logs(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        for path in ("/config", "/log", "/distributed/read"):
            answer = await api.tell(path, {"node_key": key, "log_type": "result", "data": []})
            assert answer["reason"] == "approval_pending"
            assert "node_invalid" not in answer
        await api.do(nodes.decide, api.node().id, "active")
        assert await api.tell("/config", {"node_key": key}) == {}

    api(test, options=TenantOptions(approve=True))


@pytest.mark.parametrize("blank_keys", [False, True])
def test_enrollment_by_certificate_over_tls(
    served: Run, kit: Any, client_certificate: tuple[Path, Path], blank_keys: bool
) -> None:
    """The certificate is required on every request; with it a blank key will do."""

    async def test(server: Any) -> None:
        api = server.api
        nobody, somebody = await server.connect(), await server.connect(client_certificate)
        assert (await nobody.tell("/enroll", kit.host(enroll_secret="")))["node_invalid"] is True
        key = (await somebody.tell("/enroll", kit.host(enroll_secret="")))["node_key"]
        assert (key == "") is blank_keys
        assert api.node().certificate_name == "osqbox://default/laptop-7"
        for given in {key, ""}:
            assert await somebody.tell("/config", {"node_key": given}) == {}
            answer = await nobody.tell("/config", {"node_key": given})
            assert "error" in answer
            assert ("node_invalid" in answer) is (given == "")
        begin = {"node_key": key, "block_count": 1, "block_size": 9, "carve_size": 3}
        session = (await somebody.tell("/carve/begin", begin))["session_id"]
        block = {"block_id": 0, "session_id": session, "data": base64.b64encode(b"abc").decode()}
        with pytest.raises(EOFError):
            await nobody.ask("/carve/block", block)
        assert await somebody.tell("/carve/block", block) == FINE

    served(test, options=TenantOptions(client_cert=True, blank_keys=blank_keys))


# config


def test_a_config_is_byte_stable_and_changes_with_its_sources_and_the_nodes_tags(api: Run) -> None:
    async def test(api: Any) -> None:
        await api.do(configs.put, Source("c", {"options": {"b": 1, "a": 2}, **CONFIG}), "")
        await api.do(configs.put, Source("web", {"options": {"web": 1}}, target=Target(tags=("web",))), "")
        key = await api.enroll()

        async def text() -> bytes:
            body: bytes = (await api.ask("/config", {"node_key": key})).body
            return body

        first = await text()
        assert first == await text() == b'{"options":{"a":2,"b":1},"schedule":{"q":{"interval":60,"query":"select 1"}}}'
        await api.do(nodes.set_tags, api.node().id, ["web"])
        assert json.loads(await text())["options"] == {"a": 2, "b": 1, "web": 1}
        await api.do(configs.remove, "web")
        assert await text() == first
        await api.do(configs.put, Source("c", CONFIG), "")
        assert json.loads(await text()) == CONFIG
        await api.do(configs.rollback, "c")
        assert await text() == first

    api(test)


def test_node_api_mode(api: Run) -> None:
    """--tls_node_api: config by GET with the key in the path, wrapped in a string; the others with the key behind &."""

    async def test(api: Any) -> None:
        await api.do(configs.put, Source("c", CONFIG), "")
        key = await api.enroll()
        prefix = f"/{key}/api/v1/osquery"
        for target in (f"{prefix}/config&node_key={key}", f"{prefix}/config"):
            answer = await api.tell(target, method="GET")
            assert json.loads(answer["config"]) == CONFIG
        assert (await api.tell("/wrong/config&node_key=wrong", method="GET"))["node_invalid"] is True
        log = {"node_key": key, "log_type": "status", "data": [{}]}
        assert await api.tell(f"{prefix}/log&node_key={key}", log) == FINE
        assert await api.tell(f"{prefix}/distributed/read&node_key={key}", {}) == {"queries": {}, **FINE}

    api(test)


def test_answers_are_packed_for_those_who_ask(api: Run) -> None:
    async def test(api: Any) -> None:
        await api.do(configs.put, Source("c", {"options": {f"custom_{n}": "x" * 50 for n in range(100)}}), "")
        key = await api.enroll()
        plain = await api.ask("/config", {"node_key": key})
        packed = await api.ask("/config", {"node_key": key}, headers={"accept-encoding": "gzip"})
        assert ("Content-Encoding", "gzip") in packed.headers
        assert plain.headers == ()
        assert gzip.decompress(packed.body) == plain.body
        small = await api.ask("/distributed/read", {"node_key": key}, headers={"accept-encoding": "gzip"})
        assert small.headers == ()

    api(test)


def test_a_served_config_is_told_once_per_text(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        for _ in range(3):
            await api.tell("/config", {"node_key": key})
        await api.do(configs.put, Source("c", CONFIG), "")
        text = (await api.ask("/config", {"node_key": key})).body
        told = [event.data["sha1"] for event in api.events("config_served")]
        assert told[-1] == hashlib.sha1(text).hexdigest()
        assert len(told) == 2

    api(test)


def test_equal_configs_of_many_nodes_are_kept_once(api: Run) -> None:
    async def test(api: Any) -> None:
        await api.do(configs.put, Source("c", CONFIG), "")
        texts = [(await api.ask("/config", {"node_key": await api.enroll(name)})).body for name in ("a", "b", "c")]
        assert texts[0] is texts[1] is texts[2]

    api(test)


# logs


@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_of_log_is_kept(api: Run, kit: Any, packed: bool) -> None:
    lines = [
        {"name": "q", "action": "added", "columns": {"a": "1"}},
        {"diffResults": {"removed": [], "added": [{"a": "1"}]}, "name": "q"},
        {"snapshot": [{"a": "1"}], "action": "snapshot", "name": "s"},
    ]
    status = [{"severity": 0, "filename": "x.cpp", "line": 1, "message": "é"}]

    async def test(api: Any) -> None:
        key = await api.enroll()
        for log_type, data in (("result", lines), ("status", status)):
            body: Any = {"node_key": key, "log_type": log_type, "data": data}
            headers = {"content-encoding": "gzip"} if packed else {}
            assert await api.tell("/log", kit.zipped(body) if packed else body, headers=headers) == FINE
        assert [json.loads(line) for line in kept(api, log_type="result")] == lines
        assert [json.loads(line) for line in kept(api, log_type="status")] == status

    api(test)


def test_a_batch_sent_again_on_another_connection_is_stored_once(served: Run, kit: Any) -> None:
    async def test(server: Any) -> None:
        api, client = server.api, await server.connect()
        key = (await client.tell("/enroll", kit.host()))["node_key"]
        body = {"data": [{"n": 1}, {"n": 1}], "log_type": "result", "node_key": key}
        for _ in range(2):
            assert await client.tell("/log", body) == FINE
        assert len(kept(api)) == 4
        again = await server.connect()
        packed = await again.ask("/log", kit.zipped(body), headers={"Content-Encoding": "gzip"})
        assert packed.json == FINE
        assert await again.tell("/log", body) == FINE
        assert len(kept(api)) == 4
        api.clock.at += 61
        assert await again.tell("/log", body) == FINE
        assert len(kept(api)) == 6

    served(test)


def test_bytes_of_a_host_that_are_no_utf8_do_not_stop_its_logs_or_answers(api: Run) -> None:
    async def test(api: Any) -> None:
        key = (await api.enroll()).encode()
        body = b'{"log_type":"result","data":[{"snapshot":[{"path":"caf\xe9"}]}],"node_key":"%s"}' % key
        refused = await api.tell("/log", body)
        assert "UTF-8" in refused["error"]
        assert "node_invalid" not in refused
        assert kept(api) == []
        assert await api.tell("/log", body) == FINE
        assert json.loads(kept(api)[0])["snapshot"] == [{"path": "caf�"}]
        campaign = await ask_all(api)
        body = b'{"queries":{"%s":[{"path":"caf\xe9"}]},"node_key":"%s"}' % (campaign.id.encode(), key)
        assert await api.tell("/distributed/write", body) == FINE
        assert summary(api, campaign)["answered"] == 1

    api(test)


def test_large_batches_are_parsed_beside_the_loop(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        lines = [{"name": "q", "columns": {"x": "y" * 500}} for _ in range(2000)]
        assert await api.tell("/log", {"node_key": key, "log_type": "result", "data": lines}) == FINE
        assert len(kept(api)) == 2000

    api(test)


# live queries


@pytest.mark.parametrize("status", [0, "0", None])
def test_statuses_come_as_numbers_or_text(api: Run, status: Any) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        good, bad = await ask_all(api), await ask_all(api, "select x from nothing")
        body = {
            "node_key": key,
            "queries": {good.id: [{"a": "1"}], bad.id: []},
            "statuses": {good.id: status, bad.id: "1"},
            "messages": {bad.id: "no such table: nothing"},
        }
        assert await api.tell("/distributed/write", body) == FINE
        assert (summary(api, good)["answered"], summary(api, bad)["failed"]) == (1, 1)

    api(test)


def test_what_was_read_but_not_written_is_offered_again(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        campaign = await ask_all(api, accelerate_s=60, discovery="select 1")
        for _ in range(2):
            answer = await api.tell("/distributed/read", {"node_key": key})
            assert answer == {
                "queries": {campaign.id: "select 1"}, "discovery": {campaign.id: "select 1"}, "accelerate": 60, **FINE,
            }  # fmt: skip

    api(test)


def test_a_held_read_is_woken_at_once(served: Run, kit: Any) -> None:
    """Milliseconds, not poll intervals; measured from the campaign's start to the query in the agent's hands."""

    async def test(server: Any) -> None:
        api, client = server.api, await server.connect()
        key = (await client.tell("/enroll", kit.host()))["node_key"]
        started: list[float] = []
        woken: list[float] = []

        async def read() -> None:
            answer = await client.tell("/distributed/read", {"node_key": key})
            woken.append(trio.current_time())
            assert answer["queries"]
            written = {"node_key": key, "queries": {name: [] for name in answer["queries"]}}
            assert await client.tell("/distributed/write", written) == FINE

        for _ in range(15):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                while not api.presence.statistics().reads_held:
                    await trio.sleep(0.001)
                started.append(trio.current_time())
                await ask_all(api)
        waits = sorted(end - start for start, end in zip(started, woken, strict=True))
        assert waits[len(waits) // 2] < 0.050
        assert api.presence.statistics().reads_held == 0

    served(test, read_hold_s=10)


def test_work_that_comes_while_the_read_is_on_its_way_is_not_missed(api: Run) -> None:
    """Campaigns start at every moment of a read's life; each is offered long before the hold ends."""

    async def test(api: Any) -> None:
        key = await api.enroll()
        for turn in range(60):
            async with trio.open_nursery() as nursery:

                async def start(turn: int = turn) -> None:
                    for _ in range(turn % 6):
                        await trio.lowlevel.checkpoint()
                    await ask_all(api)

                nursery.start_soon(start)
                with trio.fail_after(5):
                    answer = await api.tell("/distributed/read", {"node_key": key})
            assert answer["queries"]
            await api.tell("/distributed/write", {"node_key": key, "queries": {name: [] for name in answer["queries"]}})

    api(test, read_hold_s=11)


def test_a_hold_ends_in_time_and_never_later_than_osqueryd_waits(api: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is set to; osqueryd gives a call 16 s in all."""
    assert routes.HOLD_MAX_S <= 12
    monkeypatch.setattr(routes, "HOLD_MAX_S", 0.05)

    async def test(api: Any) -> None:
        key = await api.enroll()
        started = trio.current_time()
        assert await api.tell("/distributed/read", {"node_key": key}) == {"queries": {}, **FINE}
        assert 0.05 <= trio.current_time() - started < 5
        assert api.presence.statistics().reads_held == 0

    api(test, read_hold_s=100)


def test_at_the_stop_held_reads_are_answered_with_nothing(served: Run, kit: Any) -> None:
    async def test(server: Any) -> None:
        api = server.api
        clients = [await server.connect() for _ in range(5)]
        answers: list[Any] = []

        async def read(client: Any, name: str) -> None:
            key = (await client.tell("/enroll", kit.host(name)))["node_key"]
            answers.append(await client.tell("/distributed/read", {"node_key": key}))

        async with trio.open_nursery() as nursery:
            for number, client in enumerate(clients):
                nursery.start_soon(read, client, f"n{number}")
            while api.presence.statistics().reads_held < 5:
                await trio.sleep(0.001)
            with trio.fail_after(1):
                api.presence.stop()
                await server.listener.drain()
        assert answers == [{"queries": {}, **FINE}] * 5

    served(test, read_hold_s=10)


def test_a_client_that_leaves_frees_its_hold(served: Run, kit: Any) -> None:
    async def test(server: Any) -> None:
        api, client = server.api, await server.connect()
        key = (await client.tell("/enroll", kit.host()))["node_key"]
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises((EOFError, trio.ClosedResourceError)):
                    await client.ask("/distributed/read", {"node_key": key})

            nursery.start_soon(read)
            while not api.presence.statistics().reads_held:
                await trio.sleep(0.001)
            await client.close()
            with trio.fail_after(2):
                while api.presence.statistics().reads_held or server.listener.statistics().open_connections:
                    await trio.sleep(0.001)
        campaign = await ask_all(api)
        assert summary(api, campaign)["open"] == 1
        again = await server.connect()
        assert campaign.id in (await again.tell("/distributed/read", {"node_key": key}))["queries"]

    served(test, read_hold_s=10)


@pytest.mark.parametrize("deed", ["delete", "revoke_key", "reject"])
def test_a_node_that_is_put_out_learns_it_in_its_held_read(api: Run, deed: str) -> None:
    """It gets no more queries, and enrolls again at once instead of after the hold."""

    async def test(api: Any) -> None:
        key = await api.enroll()
        node = api.node()
        async with trio.open_nursery() as nursery:
            answers: list[Any] = []

            async def read() -> None:
                answers.append(await api.tell("/distributed/read", {"node_key": key}))

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked(0.01)
            if deed == "reject":
                await api.do(nodes.decide, node.id, "rejected")
            else:
                await api.do(getattr(nodes, deed), node.id)
            api.presence.wake([node.id])
        assert answers[0]["node_invalid"] is True
        assert "queries" not in answers[0]

    api(test, read_hold_s=10)


def test_two_connections_of_one_node_both_hold_and_both_are_woken(api: Run) -> None:
    """The old one may be dead without anybody knowing."""

    async def test(api: Any) -> None:
        key = await api.enroll()
        answers: list[Any] = []
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                answers.append(await api.tell("/distributed/read", {"node_key": key}))

            for _ in range(2):
                nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked(0.01)
            campaign = await ask_all(api)
        assert [list(answer["queries"]) for answer in answers] == [[campaign.id]] * 2

    api(test, read_hold_s=10)


@pytest.mark.parametrize("moment", ["before look 1", "after look 1", "after hold", "after look 2"])
def test_a_campaign_that_is_written_at_any_moment_of_a_read_is_offered(
    api: Run, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The writer has a thread of its own: its commit may fall between any two steps of the loop."""

    async def test(api: Any) -> None:
        key = await api.enroll()
        writing, go_on = threading.Event(), threading.Event()
        passed: list[str] = []

        def slowly(tx: Any) -> list[str]:
            writing.set()
            assert go_on.wait(10)
            order = Order("select 1", Selector(), 60.0, everyone=True)
            return campaigns.start(tx, order, lambda _: (), api.new_id)[1]

        async def start() -> None:
            api.presence.wake(await api.do(slowly))

        def at(now: str) -> None:
            passed.append(now)
            if now == moment:
                go_on.set()
                while not api.store.peek(campaigns.count_open):
                    time.sleep(0.0005)  # the loop stands still, the commit comes

        real_look, real_hold = api.handler._has_work, api.presence.hold
        looks = itertools.count(1)

        def look(node: Any) -> Any:
            number = next(looks)
            at(f"before look {number}")
            found = real_look(node)
            at(f"after look {number}")
            return found

        def hold(node_id: str) -> Any:
            woken = real_hold(node_id)
            at("after hold")
            return woken

        monkeypatch.setattr(api.handler, "_has_work", look)
        monkeypatch.setattr(api.presence, "hold", hold)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            await trio.to_thread.run_sync(writing.wait, 10)
            with trio.fail_after(5):
                answer = await api.tell("/distributed/read", {"node_key": key})
        assert len(answer["queries"]) == 1
        assert moment in passed

    api(test, read_hold_s=12)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_polls_leaves_and_enrolls_meanwhile_a_campaign_reaches_its_node(api: Run, seed: int) -> None:
    """Polls of one node at once, some abandoned; a new enrollment; more campaigns: all at every moment of each other.

    Who polls with the node's latest key gets every campaign long before the hold ends. Nobody is held while there is
    work, and a key that was replaced gets nothing.
    """
    chance = random.Random(seed)

    async def test(api: Any) -> None:
        keys = [await api.enroll()]
        node = api.node().id

        async def later(work: Callable[[], Awaitable[None]]) -> None:
            for _ in range(chance.randrange(12)):
                await trio.lowlevel.checkpoint()
            if chance.random() < 0.3:
                await trio.sleep(chance.random() / 500)
            await work()

        for _ in range(40):
            started: list[str] = []
            key, replacing = keys[-1], trio.Event()

            async def poll(key: str = key, replacing: trio.Event = replacing) -> None:
                answer = await api.tell("/distributed/read", {"node_key": key})
                assert answer.get("queries") or (replacing.is_set() and answer["node_invalid"] is True), answer

            async def leave(key: str = key) -> None:
                gone = trio.Event()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(api.ask, "/distributed/read", {"node_key": key}, gone=gone))
                    await later(trio.lowlevel.checkpoint)
                    gone.set()

            async def enroll(replacing: trio.Event = replacing) -> None:
                replacing.set()
                keys.append(await api.enroll())

            async def start(started: list[str] = started) -> None:
                started.append((await ask_all(api)).id)

            deeds = [start] * chance.randint(1, 2) + [poll] * chance.randint(1, 3) + [leave] * chance.randint(0, 2)
            deeds += [enroll] * (chance.random() < 0.4)
            chance.shuffle(deeds)
            with trio.fail_after(8):
                async with trio.open_nursery() as nursery:
                    for deed in deeds:
                        nursery.start_soon(later, deed)
                queries = (await api.tell("/distributed/read", {"node_key": keys[-1]}))["queries"]
            assert set(queries) == set(started)
            assert api.presence.statistics().reads_held == 0
            await api.tell("/distributed/write", {"node_key": keys[-1], "queries": {name: [] for name in queries}})
            assert api.node().id == node
        assert api.store.peek(campaigns.count_open) == 0

    api(test, read_hold_s=12)


def test_a_node_that_answers_twice_at_once_is_counted_once(api: Run, kit: Any) -> None:
    """Two connections, many campaigns, every pair of writes in one commit or in two."""

    async def test(api: Any) -> None:
        key = await api.enroll()
        made = [await ask_all(api) for _ in range(20)]
        assert len((await api.tell("/distributed/read", {"node_key": key}))["queries"]) == 20
        async with trio.open_nursery() as nursery:
            for number, campaign in enumerate(made):
                for copy in range(2):
                    body = {"node_key": key, "queries": {campaign.id: [{"copy": str(copy)}]}}
                    who = kit.peer(f"c-{number}-{copy}")
                    nursery.start_soon(partial(api.tell, "/distributed/write", body, who=who))
        for campaign in made:
            counted = summary(api, campaign)
            assert (counted["targets"], counted["answered"], counted["open"]) == (1, 1, 0)
            assert len(api.store.peek(lambda db, id_=campaign.id: campaigns.ended_after(db, id_, 0))) == 1
        for kind in ("target_ended", "campaign_ended", "answers_ignored"):
            assert len(api.events(kind)) == 20

    api(test)


# carves


def test_a_block_that_is_not_stored_breaks_the_connection_instead_of_an_answer(served: Run, kit: Any) -> None:
    """osqueryd takes any JSON answer to a block as accepted. The right block, sent again, then completes the file."""
    content = b"abcdefghij"

    async def test(server: Any) -> None:
        api, client = server.api, await server.connect()
        key = (await client.tell("/enroll", kit.host()))["node_key"]
        begin = {"node_key": key, "block_count": 2, "block_size": 5, "carve_size": 10, "request_id": "r"}
        session = (await client.tell("/carve/begin", begin))["session_id"]

        def block(number: int, content: bytes, **more: Any) -> dict[str, Any]:
            encoded = base64.b64encode(content).decode()
            return {"block_id": number, "session_id": session, "request_id": "r", "data": encoded, **more}

        bad = [
            b"",
            b"[]",
            block(0, b"short"[:2]),
            block(7, b"abcde"),
            block(0, b"abcde", session_id="guessed"),
            block(0, b"abcde", data="not base64!"),
            block(0, b"abcde", node_key="wrong"),
        ]
        for body in bad:
            other = await server.connect()
            with pytest.raises(EOFError):
                await other.ask("/carve/block", body)
        with pytest.raises(EOFError):
            await (await server.connect()).ask("/carve/block", b"", method="GET")
        assert api.store.peek(lambda db: carves.get(db, session))["received_blocks"] == 0
        for number in (1, 0, 1):
            assert await client.tell("/carve/block", block(number, content[number * 5 : number * 5 + 5])) == FINE
        assert api.store.peek(lambda db: carves.get(db, session))["sha256"] == hashlib.sha256(content).hexdigest()
        assert sum(api.handler.statistics()["refused"].values()) == len(bad) + 1

    served(test)


class Gate:
    """Stops the hashing of a carve after its first page, until `open`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        self.passes = 0
        real = carves.Digest.feed

        def feed(digest: carves.Digest, db: sqlite3.Connection, session: str) -> bool:
            more = real(digest, db, session)
            self.passes += not more
            self.reached.set()
            assert self._open.wait(20)
            return more

        monkeypatch.setattr(carves.Digest, "feed", feed)

    def open(self) -> None:
        self._open.set()

    async def wait(self) -> None:
        await trio.to_thread.run_sync(self.reached.wait, 20)


async def one_block_short(api: Any) -> tuple[str, dict[str, Any]]:
    """A carve but for its last block, and that."""
    begin = {"node_key": await api.enroll(), "block_count": 2, "block_size": 3, "carve_size": 6, "request_id": "r"}
    session = (await api.tell("/carve/begin", begin))["session_id"]
    body = {"session_id": session, "request_id": "r", "data": base64.b64encode(b"abc").decode()}
    assert await api.tell("/carve/block", {**body, "block_id": 0}) == FINE
    return session, {**body, "block_id": 1}


def test_others_write_while_a_carve_is_hashed_and_its_last_block_waits(
    api: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent again meanwhile, on any connection, it waits as well; the archive is hashed once."""
    gate = Gate(monkeypatch)

    async def test(api: Any) -> None:
        session, last = await one_block_short(api)
        answers: list[Any] = []

        async def send() -> None:
            answers.append(await api.tell("/carve/block", last))
            assert api.events("carve_completed")

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(send)
            await gate.wait()
            for _ in range(20):
                await api.do(lambda tx: tx.emit("written"))
            assert answers == api.events("carve_completed") == []
            gate.open()
        assert answers == [FINE] * 3
        facts = api.store.peek(lambda db: carves.get(db, session))
        assert (facts["status"], facts["sha256"]) == ("complete", hashlib.sha256(b"abcabc").hexdigest())
        assert gate.passes == len(api.events("carve_completed")) == 1

    api(test)


@pytest.mark.parametrize("deed", ["leave", "delete"])
def test_a_carve_whose_hashing_breaks_off(api: Run, monkeypatch: pytest.MonkeyPatch, deed: str) -> None:
    """Left by the client it is completed by the next who comes; deleted it stays deleted."""
    gate = Gate(monkeypatch)

    async def test(api: Any) -> None:
        session, last = await one_block_short(api)
        answers: list[Any] = []

        async def send() -> None:
            answers.append(await api.tell("/carve/block", last))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await gate.wait()
            if deed == "leave":
                nursery.cancel_scope.cancel()
            else:
                await api.do(carves.delete, session)
            gate.open()
        await api.upkeep._complete_carves()
        if deed == "leave":
            assert answers == []
            assert api.store.peek(lambda db: carves.get(db, session))["sha256"] == hashlib.sha256(b"abcabc").hexdigest()
            assert await api.tell("/carve/block", last) == FINE
        else:
            assert answers == [FINE]
            assert api.events("carve_completed") == []
            assert await api.ask("/carve/block", last) is None

    api(test)


def test_a_refused_carve_gets_no_session(api: Run) -> None:
    async def test(api: Any) -> None:
        key = await api.enroll()
        for body in (
            {"node_key": "wrong", "block_count": 1, "block_size": 1, "carve_size": 1},
            {"node_key": key, "block_count": 5, "block_size": 1, "carve_size": 1},
            {"node_key": key},
        ):
            answer = await api.tell("/carve/begin", body)
            assert "error" in answer
            assert "session_id" not in answer

    api(test)


# YARA


def test_yara_rules_by_get_and_by_key(api: Run) -> None:
    async def test(api: Any) -> None:
        await api.do(yara.put, "default", "open.yar", "rule open {}", public=True)
        await api.do(yara.put, "default", "closed.yar", "rule closed {}", public=False)
        key = await api.enroll()
        answer = await api.ask("/api/osquery/yara/open.yar", method="GET")
        assert (answer.status, answer.body, answer.content_type) == (
            200, b"rule open {}", "text/plain; charset=utf-8",
        )  # fmt: skip
        answer = await api.ask("/yara/closed.yar", {"node_key": key})
        assert answer.body == b"rule closed {}"
        for method, body in (("GET", b""), ("POST", {"node_key": "wrong"}), ("POST", {})):
            answer = await api.ask("/yara/closed.yar", body, method=method)
            assert answer.status in (401, 404)
            assert "error" in json.loads(answer.body)

    api(test)
