"""What the g1 agent does on the wire: the oddities of the C++ agent, which servers have to live with."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import trio

from osqbox.agent.comms.core import RefusedByServer
from osqbox.agent.comms.messages import Stateless, packed
from osqbox.agent.comms.options import G1, Bounds, Options
from osqbox.agent.store import MemoryStore

from .strict_server import (
    KEY,
    QUIET,
    UUID,
    Answer,
    FakeHost,
    Seen,
    StrictServer,
    agent_of,
    living,
    meeting,
    now,
    run,
    serving,
    token_until,
    told,
)

OPTIONS = Options(profile=G1, load=QUIET)


def line(text: str) -> bytes:
    return Stateless("logcollector", "file", {"event": {"original": text}}).g1()


def command(document_id: str, name: str, args: object = None) -> dict[str, object]:
    return {
        "document_id": document_id,
        "action": {"name": name, "version": "v5.0.0", "args": args},
        "status": "pending",
    }


def offering(*batches: list[dict[str, object]]):  # type: ignore[no-untyped-def]
    """Each poll gets the next batch; after the last one polls are held."""
    left = list(batches)

    async def answer(_seen: Seen) -> Answer:
        if left:
            return told(200, {"commands": left.pop(0)})
        await trio.sleep(300)
        return told(408, {"message": "nothing", "code": 408})

    return answer


def results(server: StrictServer) -> list[tuple[str, int, str]]:
    """Id, code and message of every result that was sent, in order."""
    found = []
    for seen in server.of("stateful"):
        lines = seen.lines[1:]
        for header, data in zip(lines[::2], lines[1::2], strict=True):
            assert header == {"module": "command", "id": header["id"], "operation": "update"}
            result = data["command"]["result"]
            found.append((header["id"], result["code"], result["message"]))
    return found


def test_every_request_has_its_own_connection_and_upstreams_headers() -> None:
    async def main() -> None:
        async with serving() as server, living(agent_of(server, OPTIONS)) as agent:
            await server.until(lambda: bool(server.of("commands")))
            agent.core.push("stateless", line("hello"))
            agent._settle()
            await server.until(lambda: bool(server.of("stateless")) and len(server.closed_cleanly) == 2)
        assert len({seen.connection for seen in server.seen}) == len(server.seen) == 3
        login, commands, stateless = server.of("login")[0], server.of("commands")[0], server.of("stateless")[0]
        assert [name for name, _ in login.headers] == ["Host", "User-Agent", "Accept", "Content-Type", "Content-Length"]
        assert login.header("Host") == "127.0.0.1", "Host without the port"
        assert login.header("User-Agent") == "WazuhXDR/5.0.0 (Endpoint; x86_64; Linux)"
        assert login.json == {"uuid": UUID, "key": KEY}
        assert login.target == "/api/v1/authentication"
        assert (commands.method, commands.target, commands.body) == ("GET", "/api/v1/commands", b"")
        assert [name for name, _ in commands.headers] == ["Host", "User-Agent", "Accept", "Authorization"]
        assert commands.header("Accept") == "application/json"
        assert stateless.header("Content-Type") == "application/json", "although it is NDJSON"
        assert sorted(server.closed_cleanly) == [login.connection, stateless.connection]

    run(main)


def test_line_one_is_the_agent_and_every_event_has_its_own_header() -> None:
    async def main() -> None:
        async with serving() as server, living(agent_of(server, OPTIONS)) as agent:
            agent.core.push("stateless", line("one"))
            agent.core.push("stateless", line("two"))
            agent._settle()
            await server.until(lambda: bool(server.of("stateless")))
        first, *rest = server.of("stateless")[0].lines
        assert first["agent"]["id"] == UUID
        assert first["agent"]["groups"] == ["default"]
        assert first["agent"]["host"]["os"] == {"name": "Ubuntu", "type": "Linux", "version": "22.04"}
        header = {"module": "logcollector", "collector": "file"}
        assert rest == [header, {"event": {"original": "one"}}, header, {"event": {"original": "two"}}]

    run(main)


def test_a_batch_waits_ten_seconds_or_for_its_bytes() -> None:
    async def main() -> None:
        options = replace(OPTIONS, bounds=Bounds(batch_bytes=600))
        async with serving() as server, living(agent_of(server, options)) as agent:
            await server.until(lambda: bool(server.of("commands")))
            began = trio.current_time()
            agent.core.push("stateless", line("small"))
            agent._settle()
            await server.until(lambda: len(server.of("stateless")) == 1)
            assert trio.current_time() - began == pytest.approx(10, abs=0.5)
            await trio.sleep(2)
            began = trio.current_time()
            for _ in range(10):
                agent.core.push("stateless", line("x" * 60))
            agent._settle()
            await server.until(lambda: len(server.of("stateless")) == 2)
            assert trio.current_time() - began < 0.5, "a full batch goes at once"
            assert len(server.of("stateless")[1].body) < 1200
            await trio.sleep(0.2)
            assert len(agent.core.stateless) == 6, "the rest waits for the next request"

    run(main)


@pytest.mark.parametrize(
    ("status", "wait_s"), [(204, 1), (200, 1), (408, 1), (500, 30), (503, 30), (400, 30), (429, 30), (302, 30)]
)
def test_waits_after_an_answer(status: int, wait_s: float) -> None:
    """1 s after a success and after 408, else 30 s whatever Retry-After says; never longer with every failure."""

    async def main() -> None:
        answers = {"commands": lambda _: Answer(status, b'{"commands":[]}', (("Retry-After", "7"),))}
        async with serving(answers=answers) as server, living(agent_of(server, OPTIONS)):
            await server.until(lambda: len(server.of("commands")) == 4)
        gaps = [later.at - earlier.at for earlier, later in pairwise(server.of("commands"))]
        assert gaps == pytest.approx([wait_s] * 3, abs=0.5)

    run(main)


def test_events_stay_until_2xx_and_go_again_with_what_came_meanwhile() -> None:
    async def main() -> None:
        statuses = [500, 408, 200]
        answers = {"stateless": lambda _: Answer(statuses.pop(0), b"{}")}
        async with serving(answers=answers) as server, living(agent_of(server, OPTIONS)) as agent:
            agent.core.push("stateless", line("one"))
            agent._settle()
            await server.until(lambda: len(server.of("stateless")) == 1)
            assert len(agent.core.stateless) == 1
            agent.core.push("stateless", line("two"))
            agent._settle()
            await server.until(lambda: len(server.of("stateless")) == 3)
            await trio.sleep(0.5)
            assert len(agent.core.stateless) == 0
        assert [len(seen.lines) for seen in server.of("stateless")] == [3, 5, 5]
        statistics = agent.statistics
        assert (statistics.stateless_sent, statistics.stateless_acknowledged) == (5, 2)
        assert statistics.errors == {"stateless: HTTP status 500": 1}

    run(main)


def test_an_answer_whose_connection_ends_without_close_notify_is_a_failed_request() -> None:
    """Also a 200: its events are sent again."""

    async def main() -> None:
        rude = [True]
        answers = {"stateless": lambda _: Answer(200, b"{}", rude=bool(rude and rude.pop()))}
        async with serving(answers=answers) as server, living(agent_of(server, OPTIONS)) as agent:
            agent.core.push("stateless", line("one"))
            agent._settle()
            await server.until(lambda: len(server.of("stateless")) == 2)
            first, second = server.of("stateless")
            assert second.body == first.body
            assert second.at - first.at == pytest.approx(40, abs=1), "30 s, then the batch's own wait"

    run(main)


def test_the_token_is_renewed_two_seconds_before_it_expires() -> None:
    async def main() -> None:
        async with serving(token_s=900) as server, living(agent_of(server, OPTIONS)) as agent:
            await server.until(lambda: len(server.of("login")) == 3)
            await trio.sleep(0.5)
            assert (agent.statistics.logins, agent.statistics.renewals) == (3, 2)
        gaps = [later.at - earlier.at for earlier, later in pairwise(server.of("login"))]
        assert gaps == pytest.approx([898, 898], abs=1)

    run(main)


def test_a_refused_token_makes_it_log_in_again_at_once() -> None:
    async def main() -> None:
        answers = {"commands": lambda seen: told(403, {"message": "Expired token", "code": 2707})}
        async with serving(answers=answers) as server, living(agent_of(server, OPTIONS)):
            await server.until(lambda: len(server.of("commands")) == 2)
        login, again = server.of("login")[:2]
        first, second = server.of("commands")
        assert again.at - first.at < 0.5
        assert second.at - first.at == pytest.approx(30, abs=0.5), "the stream itself waits as after any failure"
        assert login.connection != again.connection

    run(main)


@pytest.mark.parametrize(
    ("status", "message"), [(401, "Invalid key"), (403, "Agent does not exist"), (401, "Agent does not exist")]
)
def test_the_exact_messages_at_login_are_fatal(status: int, message: str) -> None:
    async def main() -> None:
        answers = {"login": lambda _: told(status, {"message": message, "code": status})}
        async with serving(answers=answers) as server:
            agent = agent_of(server, OPTIONS)
            with pytest.raises(RefusedByServer, match=message):
                await agent.run()
            assert agent.statistics.refused_agents == 1
            assert len(server.seen) == 1

    run(main)


@pytest.mark.parametrize(
    "answer",
    [
        told(401, {"message": "invalid key", "code": 401}),
        told(403, {"message": "Agent does not exist.", "code": 403}),
        told(500, {"message": "Invalid key", "code": 500}),
        told(200, {"token": "not.a.token"}),
        told(200, {"token": "e30.e30.e30"}),
        Answer(200, b"[]"),
        Answer(200, b"\xff"),
    ],
)
def test_any_other_login_that_fails_is_tried_again_after_thirty_seconds(answer: Answer) -> None:
    async def main() -> None:
        answers = {"login": lambda _: answer}
        async with serving(answers=answers) as server, living(agent_of(server, OPTIONS)):
            await server.until(lambda: len(server.of("login")) == 3)
        gaps = [later.at - earlier.at for earlier, later in pairwise(server.of("login"))]
        assert gaps == pytest.approx([30, 30], abs=0.5)
        assert not server.of("commands"), "without a token nothing is asked"

    run(main)


def test_commands_are_done_in_order_and_their_results_are_stateful_events() -> None:
    async def main() -> None:
        answers = {
            "commands": offering(
                [command("d1", "set-group", {"groups": ["web", "eu"]}), command("d2", "fetch-config", {})],
                [command("d3", "reboot"), command("d4", "set-group", {"groups": "web"}), {"document_id": "d5"}],
            ),
            "files": lambda seen: Answer(200, b"events:\n  interval: 5\n"),
        }
        async with serving(answers=answers) as server, living(agent_of(server, OPTIONS)) as agent:
            await server.until(lambda: len(results(server)) == 4)
            assert agent.core.groups == ["web", "eu"]
            await trio.sleep(1)
            assert (agent.statistics.commands_received, agent.statistics.commands_invalid) == (4, 2)
            assert agent.statistics.results_sent == 4
        assert results(server) == [
            ("d1", 0, "CentralizedConfiguration group set"),
            ("d2", 0, "CentralizedConfiguration group updated"),
            ("d3", 1, "Command is not valid"),
            ("d4", 1, "Command is not valid"),
        ]
        files = [f"/api/v1/files?file_name={group}.yml" for group in ("web", "eu", "web", "eu")]
        assert [seen.target for seen in server.of("files")] == files
        assert server.of("stateful")[-1].lines[0]["agent"]["groups"] == ["web", "eu"]

    run(main)


def test_a_command_that_comes_twice_is_a_failure_of_its_database() -> None:
    async def main() -> None:
        again = command("d1", "fetch-config", {})
        answers = {"commands": offering([again], [again]), "files": lambda seen: Answer(200, b"{}")}
        async with serving(answers=answers) as server, living(agent_of(server, OPTIONS)) as agent:
            await server.until(lambda: len(results(server)) == 2)
            assert agent.statistics.commands_duplicate == 1
        assert results(server)[0] == ("d1", 0, "CentralizedConfiguration group updated")
        assert results(server)[1] == ("d1", 1, "Agent's database failure")
        assert len(server.of("files")) == 1, "it is not done again"

    run(main)


def test_a_configuration_that_is_no_yaml_fails_the_command() -> None:
    async def main() -> None:
        answers = {
            "commands": offering([command("d1", "fetch-config", {})]),
            "files": lambda seen: Answer(200, b"a: [1, 2"),
        }
        async with serving(answers=answers) as server, living(agent_of(server, OPTIONS)):
            await server.until(lambda: len(results(server)) == 1)
        assert results(server) == [("d1", 1, "Cannot fetch the configuration of default: no YAML")]

    run(main)


def test_a_restart_is_reported_as_success_by_the_agent_that_comes_back() -> None:
    async def main() -> None:
        store = MemoryStore()
        answers = {"commands": offering([command("d1", "restart", {}), command("d2", "fetch-config", {})])}
        answers["files"] = lambda seen: Answer(200, b"{}")
        async with serving(answers=answers) as server, living(agent_of(server, OPTIONS, store=store)) as agent:
            await server.until(lambda: len(results(server)) == 2)
            assert agent.statistics.restarts == 1
        assert len(server.of("login")) == 2, "it begins again by logging in"
        assert results(server)[0] == ("d1", 0, "Agent restarted")
        assert results(server)[1] == ("d2", 0, "CentralizedConfiguration group updated"), "its queue was kept"

    run(main)


def test_what_was_being_done_when_it_stopped_is_reported_as_failed() -> None:
    async def main() -> None:
        store = MemoryStore()

        async def never(_seen: Seen) -> Answer:
            await trio.sleep_forever()
            raise AssertionError

        answers = {"commands": offering([command("d1", "fetch-config", {})]), "files": never}
        async with serving(answers=answers) as server, living(agent_of(server, OPTIONS, store=store)):
            await server.until(lambda: bool(server.of("files")))
        async with serving() as server, living(agent_of(server, OPTIONS, store=store)):
            await server.until(lambda: bool(server.of("stateful")))
        assert results(server) == [("d1", 1, "Agent stopped during execution")]

    run(main)


def test_a_full_queue_drops_what_comes() -> None:
    async def main() -> None:
        options = replace(OPTIONS, bounds=Bounds(queue_items=3))
        async with serving() as server, living(agent_of(server, options)) as agent:
            taken = [agent.core.push("stateless", line(str(number))) for number in range(5)]
            agent._settle()
            assert taken == [True, True, True, False, False]
            assert agent.statistics.events_dropped == 2
            await server.until(lambda: bool(server.of("stateless")))
        texts = re.findall(rb'"original":"(\d)"', server.of("stateless")[0].body)
        assert texts == [b"0", b"1", b"2"]

    run(main)


def test_a_poll_is_given_up_after_eleven_minutes() -> None:
    async def main() -> None:
        async def never(_seen: Seen) -> Answer:
            await trio.sleep_forever()
            raise AssertionError

        async with serving(answers={"commands": never}, token_s=90_000) as server, living(agent_of(server, OPTIONS)):
            await server.until(lambda: len(server.of("commands")) == 2)
        first, second = server.of("commands")
        assert second.at - first.at == pytest.approx(690, abs=1), "660 s, then 30 s as after any failure"

    run(main)


@pytest.mark.parametrize("body", [b"", b"[]", b"nonsense", b'{"commands": 5}', b"\xff\xfe"])
def test_an_answer_without_commands_is_an_error_and_no_end(body: bytes) -> None:
    async def main() -> None:
        async with meeting(OPTIONS, answers={"commands": lambda _: Answer(200, body)}) as (server, agent):
            await server.until(lambda: len(server.of("commands")) == 3)
            assert agent.statistics.errors["commands: a body that is not {commands: [...]}"] >= 2

    run(main)


def test_enrollment_makes_an_agent_under_its_own_id_and_key() -> None:
    async def main() -> None:
        async with serving() as server:
            agent = agent_of(server, OPTIONS, registered=False)
            await agent.enroll(UUID, KEY, "the-secret")
            assert (agent.core.uuid, agent.core.key) == (UUID, KEY)
        authenticate, agents = server.seen
        assert (authenticate.method, authenticate.target) == ("POST", "/security/user/authenticate")
        assert authenticate.header("Authorization") == "Basic YWdlbnQ6dGhlLXNlY3JldA=="
        assert (agents.method, agents.target) == ("POST", "/agents")
        assert agents.header("Authorization") == "Bearer enroll-token"
        assert {name: agents.json[name] for name in ("id", "name", "key", "type", "version")} == {
            "id": UUID,
            "name": "web-1",
            "key": KEY,
            "type": "Endpoint",
            "version": "5.0.0",
        }
        assert agents.json["host"]["hostname"] == "web-1"

    run(main)


def test_enrollment_is_tried_again_when_busy_renamed_when_taken_and_given_up_when_refused() -> None:
    async def main() -> None:
        scripted = [
            told(503, {"message": "busy", "code": 503}),
            told(409, {"message": "name is taken", "code": 1705}),
            Answer(201),
        ]
        async with serving(answers={"agents": lambda _: scripted.pop(0)}) as server:
            agent = agent_of(server, OPTIONS, registered=False)
            await agent.enroll(UUID, KEY, "secret")
            assert agent.core.about.name == f"web-1-{UUID[:8]}"
            names = [seen.json["name"] for seen in server.of("agents")]
            assert names == ["web-1", "web-1", f"web-1-{UUID[:8]}"]
        async with serving(answers={"authenticate": lambda _: told(401, {"message": "no", "code": 401})}) as server:
            agent = agent_of(server, OPTIONS, registered=False)
            with pytest.raises(RefusedByServer, match="HTTP status 401"):
                await agent.enroll(UUID, KEY, "wrong")

    run(main)


def test_a_token_that_has_expired_already_does_not_make_a_storm() -> None:
    async def main() -> None:
        answers = {"login": lambda _: told(200, {"token": token_until(now() - 60)})}
        async with serving(answers=answers) as server, living(agent_of(server, OPTIONS)):
            await trio.sleep(10)
            assert 9 <= len(server.of("login")) <= 11

    run(main)


def test_an_inventory_is_told_once_and_then_by_its_changes() -> None:
    from osqbox.agent.comms.facts import Fact
    from osqbox.agent.comms.options import Load

    async def main() -> None:
        options = replace(OPTIONS, load=Load(inventory_every_s=100, logs_every_s=0))
        host = FakeHost(
            facts=[Fact("packages", "p1", {"package": {"version": "1"}}), Fact("system", "s1", {"host": {}})]
        )
        async with serving() as server, living(agent_of(server, options, host=host)):
            await server.until(lambda: len(server.of("stateful")) == 1)
            host.facts = [Fact("packages", "p1", {"package": {"version": "2"}})]
            await server.until(lambda: len(server.of("stateful")) == 2)
            await trio.sleep(300)
            assert len(server.of("stateful")) == 2, "nothing has changed"
        first, second = (seen.lines[1:] for seen in server.of("stateful"))
        assert first[0] == {"module": "inventory", "collector": "packages", "id": "p1", "operation": "create"}
        assert first[2]["operation"] == "create"
        assert second == [
            {"module": "inventory", "collector": "packages", "id": "p1", "operation": "update"},
            {"package": {"version": "2"}},
            {"module": "inventory", "collector": "system", "id": "s1", "operation": "delete"},
        ]

    run(main)


def test_packed_values_are_one_line() -> None:
    assert packed({"a": "b\nc"}) == b'{"a":"b\\nc"}'
