"""The comms listener over real sockets: both dialects, and what each request is answered."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from osqbox.comms import routes
from osqbox.comms.messages import AgentStatus
from osqbox.settings import CommsSettings

from ._door import KEY, SECRET, Door, client_tls, read_answer, run_door

G1 = {"User-Agent": "WazuhXDR/5.0.0 (Endpoint; x86_64; Linux)", "Accept": "application/json"}


def lines(*values: Any) -> bytes:
    return b"\n".join(json.dumps(value).encode() for value in values)


def g1_agent(uuid: str) -> dict[str, Any]:
    return {"agent": {"id": uuid, "name": "x", "groups": ["elsewhere"], "host": {"hostname": "h"}}}


# logging in


@pytest.mark.parametrize("prefix", ["", "/api/v1"])
def test_a_login_in_each_dialect_gives_a_token_that_works(tmp_path: Path, prefix: str) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        for path, body in (
            ("/login", {"uuid": known.uuid, "password": KEY}),
            ("/login", {"UUID": known.uuid, "key": KEY}),
            ("/authentication", {"uuid": known.uuid, "key": KEY}),
        ):
            told = (await door.ask("POST", f"{prefix}{path}", 200, json=body)).json()
            assert set(told) == ({"token"} if path == "/authentication" else {"token", "token_type", "expires_in"})
            headers = {"Authorization": f"Bearer {told['token']}"}
            await door.ask("GET", f"{prefix}/configuration", 200, headers=headers)
        assert told["token"].count(".") == 2

    run_door(tmp_path, test)


def test_the_words_of_a_refused_login_are_those_that_the_c_agent_looks_for(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        wrong = await door.ask("POST", "/authentication", 401, json={"uuid": known.uuid, "key": "x" * 32})
        assert wrong.json()["message"] == "Invalid key"
        nobody = await door.ask("POST", "/authentication", 403, json={"uuid": "nobody", "key": KEY})
        assert nobody.json()["message"] == "Agent does not exist"

    run_door(tmp_path, test)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"uuid": 1, "password": "x"}', b'{"uuid": "x"}', b'{"uuid":"x","password":""}', b"\xff"],
)
def test_a_login_without_its_two_words_is_400_and_quotes_nothing(tmp_path: Path, body: bytes) -> None:
    async def test(door: Door) -> None:
        answered = await door.ask("POST", "/login", 400, content=body)
        assert "uuid" in answered.json()["message"]

    run_door(tmp_path, test)


def test_an_agent_enrolls_itself_with_a_tenants_secret_and_logs_in(tmp_path: Path) -> None:
    """As the C++ agent does with --enroll-url; the token is good for nothing else."""

    async def test(door: Door) -> None:
        basic = {"Authorization": "Basic " + base64.b64encode(f"anybody:{SECRET}".encode()).decode()}
        permit = (await door.ask("POST", "/security/user/authenticate", 200, headers=basic)).json()["data"]["token"]
        uuid = "019391a0-0000-7000-8000-000000000001"
        body = {
            "id": uuid,
            "name": "one",
            "key": KEY,
            "type": "Endpoint",
            "version": "5.0.0",
            "host": {"hostname": "h"},
        }
        bearer = {"Authorization": f"Bearer {permit}"}
        assert (await door.ask("POST", "/agents", 201, headers=bearer, json=body)).content == b""
        assert (await door.ask("POST", "/agents", 409, headers=bearer, json=body)).json()["code"] == 1708
        await door.ask("GET", "/configuration", 401, headers=bearer)
        await door.ask("POST", "/login", 200, json={"uuid": uuid, "password": KEY})
        known = await door.agent()
        await known.ask("POST", "/agents", 403, json=body)
        refused = await door.ask("POST", "/security/user/authenticate", 401, headers=known.headers)
        assert refused.headers["www-authenticate"].startswith("Basic")

    run_door(tmp_path, test)


# who asks


def test_a_bad_token_is_401_for_the_spike_and_403_for_g1(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        head, payload, signature = known.token.split(".")
        none = base64.urlsafe_b64encode(b'{"alg":"none","kid":"x","typ":"JWT"}').rstrip(b"=").decode()
        for token in (
            f"{none}.{payload}.",
            f"{head}.{payload}.",
            f"{head}.{payload}.{signature[:-4]}AAAA",
            "x",
            "x" * 9000,
        ):
            headers = {"Authorization": f"Bearer {token}"}
            spike = await door.ask("GET", "/configuration", 401, headers=headers)
            assert spike.headers["www-authenticate"].startswith("Bearer")
            assert spike.json()["code"] == 2706
            g1 = await door.ask("GET", "/commands", 403, headers={**headers, **G1})
            assert (g1.json()["code"], "www-authenticate" in g1.headers) == (2706, False)
        for headers in ({}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer"}):
            await door.ask("POST", "/events/stateless", 401, headers=headers, json={"a": 1})

    run_door(tmp_path, test)


def test_an_expired_token_says_so(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        agent = await door.comms.indexer.agents.find(known.uuid)
        assert agent is not None
        old = door.comms.tokens.issue(agent, door.comms.clock.now() - 1000)
        answered = await door.ask("GET", "/configuration", 401, headers={"Authorization": f"Bearer {old}"})
        assert answered.json()["code"] == 2707

    run_door(tmp_path, test)


def test_a_body_or_query_that_names_another_agent_is_400_and_does_nothing(tmp_path: Path) -> None:
    """Not 403, which sends the C++ agent to log in again."""

    async def test(door: Door) -> None:
        known, other = await door.agent(), await door.agent()
        for path in ("/events/stateless", "/events/stateful"):
            for body in (
                lines({"module": "fim", "id": "1", "agent": {"id": other.uuid}, "data": {"a": 1}}),
                lines({"module": "fim", "id": "1", "uuid": other.uuid, "data": {"a": 1}}),
                lines({"module": "fim", "id": "1", "agent": {"id": known.uuid, "uuid": other.uuid}, "data": {"a": 1}}),
                lines({"module": "fim", "id": "1", "agent.id": other.uuid, "data": {"a": 1}}),
                lines(g1_agent(other.uuid), {"module": "fim", "id": "1", "operation": "create"}, {"a": 1}),
            ):
                assert other.uuid in (await known.ask("POST", path, 400, content=body)).json()["message"]
        await known.ask("GET", f"/commands?uuid={other.uuid}", 400)
        assert (await door.comms.indexer.states.search())[0] == []
        assert door.comms.intake.statistics().accepted == 0

    run_door(tmp_path, test)


# events


def test_who_says_it_is_the_c_agent_has_its_body_read_as_that_agents(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        agent = {"User-Agent": G1["User-Agent"]}
        for path in ("/events/stateless", "/events/stateful"):
            for body in (lines(g1_agent(known.uuid)), lines({"module": "fim", "id": "1", "data": {}})):
                await known.ask("POST", path, 400, content=body, headers=agent)

    run_door(tmp_path, test)


def test_stateless_events_are_answered_on_receipt_and_stored(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        spike = await known.ask("POST", "/events/stateless", 202, json={"events": [{"message": "a"}, {"message": "b"}]})
        assert spike.json() == {"message": "Event received", "events": 2}
        body = lines(g1_agent(known.uuid), {"module": "logcollector", "collector": "file"}, {"message": "c"})
        g1 = await known.ask("POST", "/events/stateless", 204, content=body, headers=G1)
        assert g1.content == b""
        packed = gzip.compress(lines({"message": "d"}))
        await known.ask("POST", "/events/stateless", 202, content=packed, headers={"Content-Encoding": "gzip"})
        await door.comms.intake.drain(5)
        found = [event.data["message"] for _, event in await door.comms.events.search(agent=known.uuid)]
        assert found == ["d", "c", "b", "a"]

    run_door(tmp_path, test)


def test_stateful_events_are_answered_one_by_one_and_once(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        good = {"module": "inventory", "collector": "packages", "id": "p", "data": {"name": "bash"}}
        bad = {"module": "inventory", "collector": "nonsense", "id": "q", "data": {}}
        answered = (await known.ask("POST", "/events/stateful", 200, json=[good, bad])).json()
        assert [result["status"] for result in answered["results"]] == [201, 400]
        assert answered["errors"] is True
        again = (await known.ask("POST", "/events/stateful", 200, json=[good, bad])).json()
        assert again == answered
        body = lines(g1_agent(known.uuid), {"module": "fim", "id": "f", "operation": "create"}, {"path": "/etc"})
        g1 = (await known.ask("POST", "/events/stateful", 200, content=body, headers=G1)).json()
        assert set(g1) == {"results"}
        documents, _ = await door.comms.indexer.states.search(agent=known.uuid)
        assert sorted((each.index, each.id, each.version) for each in documents) == [
            ("wazuh-states-fim", "f", 1),
            ("wazuh-states-inventory-packages", "p", 1),
        ]

    run_door(tmp_path, test)


# commands


def test_a_stream_gets_a_command_and_its_result_ends_it(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        async with known.listening() as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert stream.headers["cache-control"] == "no-cache, no-store"
            assert "content-length" not in stream.headers
            document = await door.publish(known.uuid, "restart")
            kind, seq, data = await stream.next()
            assert (kind, data["id"], data["document_id"], data["action"]["name"]) == (
                "command",
                document,
                document,
                "restart",
            )
            report = {"module": "command", "id": document, "data": {"result": {"code": 0, "message": "done"}}}
            await known.ask("POST", "/events/stateful", 200, json=report)
        found = await door.comms.indexer.commands.find(document)
        assert found is not None
        assert (found.status, found.result and found.result.message, str(found.seq)) == ("success", "done", seq)

    run_door(tmp_path, test)


def test_a_stream_goes_on_behind_its_last_event_id_and_is_told_of_an_unknown_one(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        ids = [await door.publish(known.uuid) for _ in range(3)]
        async with known.listening() as stream:
            seqs = [(await stream.next())[1] for _ in ids]
        async with known.listening(**{"Last-Event-ID": seqs[0] or ""}) as stream:
            assert [(await stream.next())[2]["id"] for _ in ids[1:]] == ids[1:]
        async with known.listening(**{"Last-Event-ID": "999999"}) as stream:
            assert (await stream.next())[0] == "reset"
            assert [(await stream.next())[2]["id"] for _ in ids] == ids

    run_door(tmp_path, test)


def test_a_newer_stream_says_goodbye_to_the_older(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        async with known.listening() as older, known.listening() as newer:
            kind, _, data = await older.next()
            assert (kind, data["reason"]) == ("bye", "replaced")
            assert (await older.next())[0] == "end"
            document = await door.publish(known.uuid)
            assert (await newer.next())[2]["id"] == document

    run_door(tmp_path, test)


def test_a_revoked_agent_loses_its_stream_and_its_token_at_once(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        async with known.listening() as stream:
            await door.comms.indexer.agents.change(known.uuid, actor="test", status=AgentStatus.REVOKED)
            assert (await stream.next())[2]["reason"] == "revoked"
        await known.ask("GET", "/configuration", 401)

    run_door(tmp_path, test)


def test_a_stopping_box_says_goodbye(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        async with known.listening() as stream:
            door.comms.hub.stop()
            assert (await stream.next())[2]["reason"] == "box_stopping"
            assert (await stream.next())[0] == "end"

    run_door(tmp_path, test)


def test_a_poll_answers_what_waits_then_408_and_delivers_once(tmp_path: Path) -> None:
    """g1: Accept names JSON, or ?wait= is there; nothing is 408, because 204 counts as success."""

    async def test(door: Door) -> None:
        known = await door.agent()
        document = await door.publish(known.uuid)
        first = (await known.ask("GET", "/api/v1/commands?wait=5", 200)).json()
        assert [each["document_id"] for each in first["commands"]] == [document]
        assert None not in first["commands"][0].values()
        nothing = await known.ask("GET", "/commands?wait=0", 408, headers=G1)
        assert nothing.json()["message"] == "Request exceeded the processing time limit"
        found = await door.comms.indexer.commands.find(document)
        assert found is not None
        assert (found.status, found.answered, found.deliveries) == ("sent", True, 1)

    run_door(tmp_path, test)


def test_a_poll_that_keeps_its_place_gets_again_what_it_has_not_taken(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        documents = [await door.publish(known.uuid) for _ in range(3)]

        async def ask(place: object) -> tuple[list[str], int]:
            found = (await known.ask("GET", f"/commands?wait=0&last_event_id={place}", 200)).json()
            return [each["document_id"] for each in found["commands"]], found["last_event_id"]

        given, place = await ask(0)
        assert given == documents
        assert await ask(0) == (documents, place)  # the agent was killed before it kept them
        assert await ask("nonsense") == (documents, place)
        await known.ask("GET", f"/commands?wait=0&last_event_id={place}", 408)
        documents.append(await door.publish(known.uuid))
        assert (await ask(place))[0] == documents[3:]

    run_door(tmp_path, test)


def test_a_held_poll_is_answered_the_moment_there_is_a_command(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        ids: list[str] = []
        async with trio.open_nursery() as nursery:

            async def poll() -> None:
                answered = await known.ask("GET", "/commands", 200, headers=G1)
                ids.extend(each["document_id"] for each in answered.json()["commands"])

            nursery.start_soon(poll)
            while not door.comms.hub.statistics().polls:
                await trio.sleep(0.005)
            document = await door.publish(known.uuid)
        assert ids == [document]

    run_door(tmp_path, test)


@pytest.mark.parametrize("accept", ["text/event-stream", "*/*", "application/json, text/event-stream", ""])
def test_everything_else_gets_the_stream(tmp_path: Path, accept: str) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        async with known.listening(Accept=accept) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")

    run_door(tmp_path, test)


# WebSocket


async def websocket(door: Door, known: Any, *lines: str, path: str = "/commands") -> tuple[Any, int, Any]:
    """The connection, the status of the handshake and its headers."""
    stream = await door.raw()
    head = [
        f"GET {path} HTTP/1.1", "Host: localhost", "Connection: Upgrade", "Upgrade: websocket",
        "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        *([f"Authorization: Bearer {known.token}"] if known else []), *lines,
    ]  # fmt: skip
    await stream.send_all(("\r\n".join(head) + "\r\n\r\n").encode())
    status, headers, body = await read_answer(stream)
    return stream, status, body if status != 101 else headers


async def next_frame(stream: Any) -> tuple[int, bytes]:
    """Opcode and payload of a short frame from the server."""

    async def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = await stream.receive_some(count - len(data))
            assert piece
            data += piece
        return data

    first, length = await exactly(2)
    if length == 126:
        length = int.from_bytes(await exactly(2), "big")
    return first & 15, await exactly(length)


@pytest.mark.parametrize("subprotocol", [True, False])
def test_a_websocket_gets_commands_as_frames(tmp_path: Path, subprotocol: bool) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        offered = ["Sec-WebSocket-Protocol: commands.v1"] if subprotocol else []
        stream, status, headers = await websocket(door, known, *offered, path="/api/v1/commands")
        assert status == 101
        assert headers.get("sec-websocket-protocol") == ("commands.v1" if subprotocol else None)
        document = await door.publish(known.uuid)
        opcode, payload = await next_frame(stream)
        frame = json.loads(payload)
        assert (opcode, frame["event"], frame["data"]["id"]) == (1, "command", document)
        door.comms.hub.stop()
        assert json.loads((await next_frame(stream))[1])["data"]["reason"] == "box_stopping"
        opcode, payload = await next_frame(stream)
        assert (opcode, int.from_bytes(payload[:2], "big")) == (8, 1001)
        await trio.aclose_forcefully(stream)

    run_door(tmp_path, test)


def test_a_websocket_that_speaks_is_closed_with_1008(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        stream, status, _ = await websocket(door, known)
        assert status == 101
        await stream.send_all(b"\x81\x82\0\0\0\0hi")
        opcode, payload = await next_frame(stream)
        assert (opcode, int.from_bytes(payload[:2], "big")) == (8, 1008)
        await trio.aclose_forcefully(stream)

    run_door(tmp_path, test)


def test_a_websocket_is_pinged(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        stream, status, _ = await websocket(door, known)
        assert status == 101
        assert (await next_frame(stream))[0] == 9
        await trio.aclose_forcefully(stream)

    run_door(tmp_path, test, websocket_ping_s=0.05)


def test_a_refused_handshake_is_json(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        for agent, lines, path, expected in (
            (None, [], "/commands", 401),
            (known, [], "/events/stateless", 404),
            (known, ["Sec-WebSocket-Protocol: mqtt"], "/commands", 400),
        ):
            stream, status, body = await websocket(door, agent, *lines, path=path)
            assert status == expected
            assert set(json.loads(body)) == {"message", "code"}
            await trio.aclose_forcefully(stream)

    run_door(tmp_path, test)


# configuration

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in ("ab", "bc", "cd", "de")
)


def test_configuration_is_that_of_the_agents_groups_with_an_etag(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        put = "/configuration?group=web"
        await door.local_ask("PUT", "/configuration", 200, content="log: {level: 1, to: [a]}\n")
        web = await door.local_ask("PUT", put, 200, content="log: {level: 2}\nweb: true\n")
        assert (web.json()["version"], web.json()["groups"]) == (1, ["web"])
        known = await door.agent(groups=("default", "web"))
        first = await known.ask("GET", "/configuration", 200)
        told = first.json()
        assert told["configuration"] == {"log": {"level": 2, "to": ["a"]}, "web": True}
        assert told["groups"] == ["default", "web"]
        assert [file["configuration"] for file in told["files"]][1] == "log: {level: 2}\nweb: true\n"
        etag = {"If-None-Match": first.headers["etag"]}
        assert first.headers["etag"] == f'"{told["hash"]}"'
        assert (await known.ask("GET", "/configuration", 304, headers=etag)).content == b""
        await door.local_ask("PUT", put, 200, content="log: {level: 3}\n")
        assert (await known.ask("GET", "/configuration", 200, headers=etag)).json()["version"] == 3

    run_door(tmp_path, test)


def test_an_old_text_again_has_its_new_version(tmp_path: Path) -> None:
    """Also where it was put together before, for the same groups."""

    async def test(door: Door) -> None:
        known = await door.agent()
        for version, text in enumerate(("a: 1\n", "a: 2\n", "a: 1\n"), 1):
            await door.local_ask("PUT", "/configuration", 200, content=text)
            assert (await known.ask("GET", "/configuration", 200)).json()["version"] == version

    run_door(tmp_path, test)


def test_configurations_that_are_kept_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "CACHE_BYTES", 5000)

    async def test(door: Door) -> None:
        known = await door.agent()
        for number in range(8):
            await door.local_ask("PUT", "/configuration", 200, content=f"a: {number}\n")
            await known.ask("GET", "/configuration", 200)
            kept = door.comms.api._configurations
            assert sum(len(each.body) + routes.CACHED_BYTES for each in kept.values()) <= 5000
            assert kept

    run_door(tmp_path, test)


def test_a_changed_configuration_tells_its_agents_to_fetch_it_once(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known, other = await door.agent(), await door.agent(tenant="other")
        for text in ("a: 1\n", "a: 1\n"):
            await door.local_ask("PUT", "/configuration", 200, content=text)
        commands = await door.comms.indexer.commands.page()
        assert [(each.agent, each.action.name) for each in commands] == [(known.uuid, "fetch-config")]
        assert other.uuid not in {each.agent for each in commands}

    run_door(tmp_path, test)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "line 2"),
        ("- a\n", "mapping"),
        ("a: !!binary aGk=\n", "JSON knows"),
        ("a: .inf\n", "finite"),
        (BOMB, "aliases"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_400_with_the_place_and_changes_nothing(tmp_path: Path, text: str, said: str) -> None:
    async def test(door: Door) -> None:
        await door.local_ask("PUT", "/configuration", 200, content="a: 1\n")
        assert said in (await door.local_ask("PUT", "/configuration", 400, content=text)).json()["message"]
        assert (await door.local_ask("GET", "/configuration", 200)).json()["configuration"] == {"a": 1}

    run_door(tmp_path, test)


def test_a_configuration_is_changed_only_from_the_version_that_is_named(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        await door.local_ask("PUT", "/configuration", 200, content="a: 1\n", headers={"If-Match": '"0"'})
        await door.local_ask("PUT", "/configuration", 409, content="a: 2\n", headers={"If-Match": '"0"'})
        await door.local_ask("PUT", "/configuration", 400, content="a: 2\n", headers={"If-Match": "soon"})
        await door.local_ask("PUT", "/configuration", 200, content="a: 2\n", headers={"If-Match": "1"})

    run_door(tmp_path, test)


def test_g1_fetches_one_file_for_each_of_its_own_groups(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        await door.local_ask("PUT", "/configuration?group=web", 200, content="# as given\nweb: 1\n")
        known, plain = await door.agent(groups=("web",)), await door.agent()
        found = await known.ask("GET", "/files?file_name=web.yml", 200, headers=G1)
        assert found.text == "# as given\nweb: 1\n"
        assert "web.yml" in found.headers["content-disposition"]
        await plain.ask("GET", "/files?file_name=web.yml", 404, headers=G1)
        assert (await plain.ask("GET", "/files?file_name=default.yml", 200, headers=G1)).text == "{}\n"

    run_door(tmp_path, test)


# publishers


def test_publishers_have_their_own_socket_and_agents_have_none(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        body = {"command": "restart", "uuids": "all"}
        for headers in ({}, known.headers):
            for method, path in (("POST", "/commands"), ("PUT", "/configuration"), ("POST", "/api/v1/commands")):
                refused = await door.ask(method, path, 403, headers=headers, json=body)
                assert "never for agents" in refused.json()["message"]
        await known.ask("GET", "/configuration?group=default", 403)
        await door.local_ask("POST", "/commands", 403, headers=known.headers, json=body)
        assert await door.comms.indexer.commands.page() == []

    run_door(tmp_path, test)


def test_each_shape_of_a_publication_is_taken_on_the_socket(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        operators = {"agents": [known.uuid], "action": {"name": "restart"}}
        spikes = {"command": "restart", "UUIDs": [known.uuid]}
        g1 = {"commands": [{"target": {"type": "agent", "id": known.uuid}, "action": {"name": "restart"}}]}
        for body in (operators, spikes):
            told = (await door.local_ask("POST", "/api/v1/commands", 202, json=body)).json()
            assert (told["message"], [each["agent"] for each in told["commands"]]) == ("Command received", [known.uuid])
        told = (await door.local_ask("POST", "/api/v1/commands", 200, json=g1)).json()
        assert [each["status"] for each in told["commands"]] == ["pending"]

    run_door(tmp_path, test)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"command": "format-disk", "uuids": "all"}, 400, "restart"),
        ({"command": "restart", "uuids": ["nobody"]}, 404, "nobody"),
        ({"command": "upgrade", "uuids": "all"}, 400, "file_name"),
        ({"command": "restart"}, 400, "uuids"),
        ({"action": {"name": "restart"}, "groups": ["none"]}, 404, "none"),
    ],
)
def test_a_publication_that_makes_no_sense_says_what_was_expected(
    tmp_path: Path, body: Any, status: int, said: str
) -> None:
    async def test(door: Door) -> None:
        await door.agent()
        assert said in (await door.local_ask("POST", "/commands", status, json=body)).json()["message"]
        assert await door.comms.indexer.commands.page() == []

    run_door(tmp_path, test)


def test_a_publication_reaches_only_its_tenant(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        mine, other = await door.agent(), await door.agent(tenant="other")
        body = {"command": "restart", "uuids": "all"}
        told = (await door.local_ask("POST", "/commands?tenant=other", 202, json=body)).json()
        assert [each["agent"] for each in told["commands"]] == [other.uuid]
        await door.local_ask("POST", "/commands?tenant=nobody", 404, json=body)
        await door.local_ask("POST", "/commands", 404, json={"command": "restart", "uuids": [other.uuid]})
        assert await door.comms.indexer.commands.page(agent=mine.uuid) == []

    run_door(tmp_path, test)


# transports


def test_http2_gets_the_same_answers(tmp_path: Path) -> None:
    """Several requests and a stream on one connection."""

    async def test(door: Door) -> None:
        known = await door.agent()
        async with httpx.AsyncClient(verify=client_tls(), http2=True, base_url=door.url, trust_env=False) as client:
            told: list[httpx.Response] = []

            async def listen() -> None:
                told.append(await client.get("/commands", headers=known.headers))

            assert (await client.get("/nope", headers=known.headers)).status_code == 404
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                while not door.comms.hub.statistics().streams:
                    await trio.sleep(0.005)
                event = {"id": "x", "data": {"a": 1}}
                answered = await client.post("/events/stateful", headers=known.headers, json=event)
                assert answered.json()["results"][0]["status"] == 201
                document = await door.publish(known.uuid)
                while door.comms.hub.statistics().delivered < 1:
                    await trio.sleep(0.005)
                door.comms.hub.stop()
            assert told[0].http_version == "HTTP/2"
            assert f'"document_id":"{document}"' in told[0].text
            assert "event: bye" in told[0].text
        assert door.listener.statistics().accepted == 1

    run_door(tmp_path, test)


def test_an_agent_that_vanishes_leaves_no_seat(tmp_path: Path) -> None:
    """Half-open streams: the connection is gone, and with it the stream."""

    async def test(door: Door) -> None:
        known = await door.agent()
        stream = await door.raw()
        await stream.send_all(
            f"GET /commands HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {known.token}\r\n\r\n".encode()
        )
        while not door.comms.hub.statistics().streams:
            await trio.sleep(0.005)
        await trio.aclose_forcefully(stream)
        while door.comms.hub.statistics().streams:
            await trio.sleep(0.005)

    run_door(tmp_path, test)


def test_a_box_that_restarts_knows_its_agents_and_their_tokens(tmp_path: Path) -> None:
    tokens: list[Any] = []

    async def before(door: Door) -> None:
        known = await door.agent()
        tokens.append((known.uuid, known.headers, await door.publish(known.uuid)))

    async def after(door: Door) -> None:
        uuid, headers, document = tokens[0]
        polled = (await door.ask("GET", "/commands?wait=1", 200, headers=headers)).json()
        assert [each["document_id"] for each in polled["commands"]] == [document]
        await door.ask("POST", "/login", 200, json={"uuid": uuid, "password": KEY})

    run_door(tmp_path, before)
    run_door(tmp_path, after)


def test_rs256_is_the_default(tmp_path: Path) -> None:
    async def test(door: Door) -> None:
        known = await door.agent()
        head = json.loads(base64.urlsafe_b64decode(known.token.split(".")[0] + "=="))
        assert head["alg"] == "RS256"
        await known.ask("GET", "/configuration", 200)

    run_door(tmp_path, test, settings=CommsSettings())
