"""Our own extensions against our own manager: plugins, lifetimes, and peers that misbehave."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import stat
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from osqbox.agent.client import Call, Failure
from osqbox.agent.extension import messages, routes, sockets
from osqbox.agent.extension.calls import PluginCaller
from osqbox.agent.extension.client import ExtensionClient, call_from_thread
from osqbox.agent.extension.live import LiveTables
from osqbox.agent.extension.manager import ExtensionManagerServer, RequiredExtensionMissing
from osqbox.agent.extension.messages import ExtensionInfo, OptionInfo, Response, Row, Status
from osqbox.agent.extension.plugins import ConfigPlugin, DistributedPlugin, LoggerPlugin, Plugin, TablePlugin
from osqbox.agent.extension.registry import Items
from osqbox.agent.extension.server import ExtensionServer, RegistrationRefused
from osqbox.agent.extension.sockets import ExtensionGone, NotListening
from osqbox.agent.sql import Constraint, Context, Engine, QueryResult
from osqbox.errors import BadSetup

LIMIT_S = 20


class FakeHost:
    """An agent that knows one flag and echoes its queries."""

    def items(self) -> Items:
        return {"table": frozenset({"processes"}), "config": frozenset({"tls"})}

    def options(self) -> Mapping[str, OptionInfo]:
        return {"verbose": OptionInfo("true", "false", "bool")}

    async def query(self, sql: str) -> Response:
        if sql == "boom":
            raise RuntimeError("the engine fell over")
        return Response(rows=[{"sql": sql}])

    async def columns(self, sql: str) -> Response:
        return Response(rows=[{"sql": "TEXT"}])

    async def call(self, registry: str, item: str, request: Row) -> Response:
        return Response(rows=[{"registry": registry, "item": item, **request}])


@pytest.fixture
def path() -> Iterator[Path]:
    """Short enough for a socket, wherever pytest keeps its own directories."""
    with tempfile.TemporaryDirectory(prefix="osqbox-") as folder:
        yield Path(folder) / "osquery.em"


Events = list[tuple[str, str]]


@contextlib.asynccontextmanager
async def managing(
    path: Path, *, tables: LiveTables | None = None, events: Events | None = None, **options: Any
) -> AsyncIterator[ExtensionManagerServer]:
    manager = ExtensionManagerServer(
        path,
        FakeHost(),
        rng=random.Random(1),
        tables=tables,
        on_event=lambda name, details: (events if events is not None else []).append((name, details["name"])),
        **{"interval_s": 0.2, "timeout_s": 5.0, **options},
    )
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(manager.run)
            yield manager
            nursery.cancel_scope.cancel()


async def run_until_stopped(manager: ExtensionManagerServer, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    """Reports what cancels it."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(manager.run)
            task_status.started(scope)


async def until_gone(manager: ExtensionManagerServer) -> None:
    while manager.extensions:
        await trio.sleep(0.01)


async def numbers(context: Context) -> list[dict[str, Any]]:
    return [{"n": n, "half": n / 2, "asked": context.equal_to("n")} for n in range(3)]


def table(name: str = "numbers", **options: Any) -> TablePlugin:
    return TablePlugin(name, [("n", "INTEGER"), ("half", "DOUBLE"), ("asked", "TEXT")], numbers, **options)


async def in_thread(engine: Engine, tables: LiveTables, sql: str) -> QueryResult:
    return await trio.to_thread.run_sync(lambda: engine.query(sql, tables=tables))


# -- plugins -----------------------------------------------------------------------------------------------------


class Taken:
    """A server's side of config, logs and queries, as an instance would forward them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.statuses: list[Any] = []
        self.results: list[Any] = []

    async def config(self) -> dict[str, str]:
        return {"main": '{"schedule":{}}'}

    async def pack(self, name: str, value: str) -> str:
        return json.dumps({"queries": {}, "name": name, "value": value})

    async def line(self, line: str) -> None:
        if line == "refuse":
            raise ValueError("no such line")
        self.lines.append(line)

    async def status(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self.statuses += entries

    async def queries(self) -> str:
        return '{"queries":{"q":"select 1"}}'

    async def write(self, results: str) -> None:
        self.results.append(json.loads(results))

    def plugins(self) -> list[Plugin]:
        return [
            ConfigPlugin("ours", self.config, self.pack),
            LoggerPlugin("ours", self.line, self.status),
            DistributedPlugin("ours", self.queries, self.write),
        ]


def test_config_logs_and_queries_go_through_an_extension(path: Path) -> None:
    async def main() -> None:
        taken = Taken()
        async with managing(path) as manager, ExtensionServer("ours", taken.plugins(), path) as server:
            perform = PluginCaller(manager)
            assert await perform(Call("config", "ours", {"action": "genConfig"})) == [{"main": '{"schedule":{}}'}]
            packs = await perform(Call("config", "ours", {"action": "genPack", "name": "p", "value": "*"}))
            assert isinstance(packs, list)
            assert json.loads(packs[0]["p"]) == {"queries": {}, "name": "p", "value": "*"}
            reads = await perform(Call("distributed", "ours", {"action": "getQueries"}))
            assert reads == [{"results": '{"queries":{"q":"select 1"}}'}]
            await perform(Call("distributed", "ours", {"action": "writeResults", "results": '{"queries":{}}'}))
            for request in (
                {"string": "a", "category": "event"},
                {"snapshot": "b"},
                {"string_batch": '["c","d"]'},
                {"string": "refuse", "category": "event"},
                {"status": "true", "log": '[{"s":1,"m":"careful"}]'},
            ):
                assert await perform(Call("logger", "ours", request)) == []
            wrong = await perform(Call("config", "ours", {"action": "dance"}))
            assert wrong == Failure("Not a valid config plugin action: dance")
            assert (taken.lines, taken.results) == (["a", "b", "c", "d"], [{"queries": {}}])
            assert taken.statuses == [{"s": 1, "m": "careful"}]
            assert server.uuid in manager.extensions

    trio.run(main)


def test_statuses_are_kept_from_a_logger_that_does_not_want_them(path: Path) -> None:
    async def main() -> None:
        taken = Taken()
        async with managing(path) as manager, ExtensionServer("ours", [LoggerPlugin("l", taken.line)], path) as server:
            perform = PluginCaller(manager)
            assert await perform(Call("logger", "l", {"string": "a", "category": "event"})) == []
            calls = server.calls
            assert await perform(Call("logger", "l", {"status": "true", "log": '[{"s":1}]'})) == []
            assert server.calls == calls
            assert taken.lines == ["a"]

    trio.run(main)


def test_a_table_appears_and_disappears_with_its_extension(path: Path) -> None:
    async def main() -> None:
        engine, tables, events = Engine(), LiveTables({}), Events()
        async with managing(path, tables=tables, events=events) as manager:
            missing = await in_thread(engine, tables, "select * from numbers")
            async with ExtensionServer("ours", [table()], path):
                result = await in_thread(engine, tables, "select n, half, asked from numbers where n = 2")
                assert result.rows == [{"n": "2", "half": "1.0", "asked": "2"}]
                rows = await in_thread(engine, tables, "select extensions from osquery_info")
                assert rows.rows == []
            await until_gone(manager)
            gone = await in_thread(engine, tables, "select * from numbers")
            assert missing.message == gone.message == "no such table: numbers"
        assert events == [("extension_registered", "ours"), ("extension_deregistered", "ours")]

    trio.run(main)


def test_a_table_is_asked_once_in_a_join_and_needs_its_required_column(path: Path) -> None:
    async def main() -> None:
        asked: list[Context] = []

        async def rows(context: Context) -> list[dict[str, Any]]:
            asked.append(context)
            return [{"n": n} for n in range(50)]

        plain = TablePlugin("plain", [("n", "INTEGER")], rows)
        strict = TablePlugin("strict", [("n", "INTEGER")], rows, required=["n"])
        engine, tables = Engine(), LiveTables({})
        async with managing(path, tables=tables), ExtensionServer("ours", [plain, strict], path):
            series = "with recursive s(n) as (select 1 union all select n + 1 from s where n < 40)"
            result = await in_thread(engine, tables, f"{series} select count(*) c from plain join s using (n)")
            assert (result.rows, len(asked)) == ([{"c": "40"}], 1)
            failed = await in_thread(engine, tables, "select * from strict")
            assert (failed.status, failed.message) == (1, "constraint failed")
            assert (await in_thread(engine, tables, "select * from strict where n = 7")).rows == [{"n": "7"}]

    trio.run(main)


def test_only_indexed_columns_are_constrained_without_the_default_index(path: Path) -> None:
    async def main() -> None:
        engine, tables = Engine(), LiveTables({}, default_index=lambda: False)
        async with managing(path, tables=tables):
            for name, index, asked in (("plain", [], ""), ("indexed", ["n"], "2")):
                async with ExtensionServer(name, [table(name, index=index)], path):
                    result = await in_thread(engine, tables, f"select asked from {name} where n = 2")
                    assert result.rows == [{"asked": asked}]

    trio.run(main)


def test_queries_run_while_extensions_come_and_go(path: Path) -> None:
    """Each query sees the table whole or not at all, whichever connection of the engine it is given."""

    async def main() -> None:
        engine, tables, seen = Engine(), LiveTables({}), list[tuple[str, int]]()
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                result = engine.query("select a.n from numbers a join numbers b using (n)", tables=tables)
                seen.append((result.message, len(result.rows)))

        async with managing(path, tables=tables), trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(trio.to_thread.run_sync, ask)
            for number in range(15):
                columns = [("n", "INTEGER"), *((f"c{each}", "TEXT") for each in range(number))]
                async with ExtensionServer("ours", [TablePlugin("numbers", columns, numbers)], path):
                    served = len(seen)
                    while len(seen) < served + 8:
                        await trio.sleep(0.001)
            stop.set()
        complete = {("", 3), ("no such table: numbers", 0)}
        left = {(message, rows) for message, rows in seen if (message, rows) not in complete}
        assert complete <= set(seen)
        # A query may also be under way at the very end of its extension.
        assert all(message.startswith("Error calling table numbers of extension ours: ") for message, _ in left)

    trio.run(main)


def test_values_that_do_not_fit_their_columns_are_null(path: Path) -> None:
    async def main() -> None:
        kinds = ["INTEGER", "BIGINT", "UNSIGNED BIGINT", "DOUBLE", "BLOB", "TEXT"]
        given = [{"c0": 2**64, "c1": "x", "c2": 2**64 - 1, "c3": "x", "c4": b"\xff", "c5": "\ud800", "c6": "extra"}]

        async def rows(_context: Context) -> list[dict[str, Any]]:
            return given

        odd = TablePlugin("odd", [(f"c{number}", kind) for number, kind in enumerate(kinds)], rows)
        engine, tables = Engine(), LiveTables({})
        async with managing(path, tables=tables), ExtensionServer("ours", [odd], path):
            result = await in_thread(engine, tables, "select * from odd")
            assert result.typed_rows == [{"c0": "", "c1": "", "c2": -1, "c3": "", "c4": "\ufffd", "c5": "?"}]

    trio.run(main)


ALIASED = [
    *({"id": "column", "name": name, "type": "INTEGER", "op": op} for name, op in (("n", "0"), ("secret", "16"))),
    {"id": "columnAlias", "name": "number", "target": "n"},
    {"id": "alias", "alias": "also"},
    {"id": "attributes", "attributes": "0"},
]


def test_aliases_and_hidden_columns_of_a_table(path: Path) -> None:
    """As tables of the C++ SDK may have them."""

    async def main() -> None:
        asked: list[Context] = []

        async def answer(call: Any) -> bytes:
            if call.name != "call":
                return messages.encode_reply(call, Status().wire())
            asked.append(routes.read_context(messages.arguments(call)[2]["context"]))
            return messages.encode_reply(call, Response(rows=[{"n": "1", "secret": "2"}]).wire())

        engine, tables = Engine(), LiveTables({})
        async with managing(path, tables=tables), trio.open_nursery() as nursery:
            status = await ExtensionClient(path).register(ExtensionInfo("x"), {"table": {"t": ALIASED}})
            stop = await nursery.start(serve_until_stopped, sockets.extension_path(path, status.uuid), answer)
            assert (await in_thread(engine, tables, "select * from also")).rows == [{"n": "1"}]
            result = await in_thread(engine, tables, "select secret from t where number = 1")
            assert result.rows == [{"secret": "2"}]
            assert asked[1] == Context((Constraint("n", "=", "1"),), frozenset({"n", "secret"}))
            stop.cancel()

    trio.run(main)


def test_a_failing_table_fails_its_query_only(path: Path) -> None:
    async def main() -> None:
        async def rows(_context: Context) -> list[dict[str, Any]]:
            raise OSError("disk on fire")

        engine, tables = Engine(), LiveTables({})
        async with managing(path, tables=tables), ExtensionServer("o", [TablePlugin("t", [("n", "TEXT")], rows)], path):
            result = await in_thread(engine, tables, "select * from t")
            assert (result.status, result.message) == (1, "OSError: disk on fire")
            assert (await in_thread(engine, tables, "select 1 as one")).rows == [{"one": "1"}]

    trio.run(main)


def test_a_query_over_its_time_leaves_a_table_that_hangs(path: Path) -> None:
    async def main() -> None:
        async def rows(_context: Context) -> list[dict[str, Any]]:
            await trio.sleep_forever()
            raise AssertionError

        engine, tables = Engine(), LiveTables({})
        async with managing(path, tables=tables), ExtensionServer("o", [TablePlugin("t", [("n", "TEXT")], rows)], path):
            result = await trio.to_thread.run_sync(
                lambda: engine.query("select * from t", tables=tables, timeout_s=0.3)
            )
            assert result.message.startswith("interrupted")

    trio.run(main)


# -- registration ------------------------------------------------------------------------------------------------

COLUMN = [{"id": "column", "name": "n", "type": "TEXT", "op": "0"}]
REFUSED: list[tuple[ExtensionInfo, messages.Registry, str]] = [
    (ExtensionInfo("first"), {}, "Duplicate extension registered"),
    (ExtensionInfo("x", sdk_version="1.7.6"), {}, "Incompatible extension SDK version"),
    (ExtensionInfo("x" * 5000), {}, "Failed adding registry: name and versions exceed 4096 letters"),
    (ExtensionInfo("x"), {"dance": {}}, "Failed adding registry: Unknown registry name: dance"),
    (ExtensionInfo("x"), {"table": {"t": []}}, "Failed adding registry: Table t has 0 columns: expected 1 to 1000"),
    (ExtensionInfo("x"), {"table": {"Numbers": COLUMN}}, "Failed adding registry: Duplicate registry item exists: "),
    (ExtensionInfo("x"), {"table": {"processes": COLUMN}}, "Failed adding registry: Duplicate registry item exists: "),
    (ExtensionInfo("x"), {"config": {"tls": []}}, "Failed adding registry: Duplicate registry item exists: "),
    (ExtensionInfo("x"), {"table": {"a; drop": COLUMN}}, "Failed adding registry: Table name is no SQL identifier: "),
    (ExtensionInfo("x"), {"table": {"t": COLUMN * 2}}, "Failed adding registry: Table t has a bad or repeated column"),
    (
        ExtensionInfo("x"),
        {"table": {"t": [{"id": "column", "name": "a`b", "type": "TEXT"}]}},
        "Failed adding registry: Table t has a bad or repeated column name: 'a`b'",
    ),
]


def test_what_is_refused_and_why(path: Path) -> None:
    async def main() -> None:
        async with managing(path), ExtensionServer("first", [table()], path) as first:
            for info, plugins, reason in REFUSED:
                status = await first.manager.register(info, plugins)
                assert (status.code, status.message[: len(reason)]) == (1, reason)
            for sdk_version in ("", "0.0.0", "1.7.7", "5.0.0"):
                status = await first.manager.register(ExtensionInfo(f"x{sdk_version}", sdk_version=sdk_version), {})
                assert (status.code, status.message, 0 < status.uuid < 65536) == (0, "OK", True)
                assert await first.manager.deregister(status.uuid) == Status(0, "OK", 0)
            assert await first.manager.extensions() == {first.uuid: ExtensionInfo("first")}
            with pytest.raises(RegistrationRefused, match="Duplicate extension registered"):
                async with ExtensionServer("first", [], path):
                    pass

    trio.run(main)


def test_a_table_named_like_a_word_of_sql_harms_nobody(path: Path) -> None:
    async def main() -> None:
        engine, tables = Engine(), LiveTables({})
        async with managing(path, tables=tables), ExtensionServer("first", [table("order"), table()], path):
            assert (await in_thread(engine, tables, "select count(*) c from numbers")).rows == [{"c": "3"}]

    trio.run(main)


def test_the_manager_forwards_calls_between_extensions(path: Path) -> None:
    async def main() -> None:
        async with managing(path), ExtensionServer("first", [table()], path) as first:
            answer = await first.manager.call("table", "numbers", {"action": "columns"})
            assert [row["name"] for row in answer.rows if row["id"] == "column"] == ["n", "half", "asked"]
            core = await first.manager.call("table", "processes", {"action": "columns"})
            assert core.rows == [{"registry": "table", "item": "processes", "action": "columns"}]
            pushed = await first.manager.call("config", "anything", {"action": "update", "source": "s", "data": "{}"})
            assert pushed.rows[0]["action"] == "update"
            unknown = await first.manager.call("table", "nothing", {})
            assert unknown.status == Status(1, "Cannot call registry item: nothing")

    trio.run(main)


def test_required_extensions_are_waited_for(path: Path) -> None:
    async def main() -> None:
        async with managing(path) as manager, trio.open_nursery() as nursery:
            nursery.start_soon(manager.wait_extensions, ["ours"], 5)
            await trio.testing.wait_all_tasks_blocked()
            async with ExtensionServer("ours", [table()], path):
                await manager.wait_plugins([("table", "numbers"), ("config", "tls")], 5)
                with pytest.raises(RequiredExtensionMissing, match="Active logger plugin not found: x"):
                    await manager.wait_plugins([("logger", "x")], 0.01)

    trio.run(main)


# -- lifetimes ---------------------------------------------------------------------------------------------------


def test_the_end_of_a_manager_is_noticed(path: Path) -> None:
    """It asks for a shutdown when it stops, and is missed when it dies."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            manager = ExtensionManagerServer(path, FakeHost(), rng=random.Random(1))
            stop = await nursery.start(run_until_stopped, manager)
            async with ExtensionServer("ours", [table()], path, interval_s=60) as server:
                stop.cancel()
                assert await server.wait_ended() == "the manager asked for a shutdown"
            await until_gone(manager)
        assert list(path.parent.iterdir()) == []

    async def dies() -> None:
        async with trio.open_nursery() as nursery:
            stop = await nursery.start(serve_until_stopped, path, answer_as_manager)
            async with ExtensionServer("ours", [], path, interval_s=0.05) as server:
                stop.cancel()
                path.unlink()  # noqa: ASYNC240
                assert "No such file" in await server.wait_ended()

    trio.run(main)
    trio.run(dies)


async def serve_until_stopped(
    path: Path, answer: sockets.Answer, *, task_status: trio.TaskStatus[trio.CancelScope]
) -> None:
    async with await sockets.listen(path) as listener:
        with trio.CancelScope() as scope:
            task_status.started(scope)
            await sockets.Service(answer).serve(listener)


async def answer_as_manager(call: Any) -> bytes:
    return messages.encode_reply(call, Status(uuid=7).wire())


def test_an_extension_that_dies_is_removed(path: Path) -> None:
    async def main() -> None:
        async with managing(path, events=(events := Events())) as manager:
            client = ExtensionClient(path)
            status = await client.register(ExtensionInfo("silent"), {})
            extension = sockets.extension_path(path, status.uuid)
            async with trio.open_nursery() as nursery, await sockets.listen(extension) as listener:
                nursery.start_soon(sockets.Service(answer_as_manager).serve, listener)
                await client.call("config", "tls", {})
                await ExtensionClient(extension).ping()
                await trio.sleep(0.3)
                assert status.uuid in manager.extensions
                nursery.cancel_scope.cancel()
            await until_gone(manager)
            assert events[-1] == ("extension_gone", "silent")

    trio.run(main)


def test_an_extension_that_never_listens_is_removed(path: Path) -> None:
    async def main() -> None:
        async with managing(path, timeout_s=0.1) as manager:
            await ExtensionClient(path).register(ExtensionInfo("absent"), {"config": {"absent": []}})
            answer = await ExtensionClient(path).call("config", "absent", {"action": "genConfig"})
            assert (answer.status.code, "cannot connect" in answer.status.message) == (1, True)
            await until_gone(manager)

    trio.run(main)


def test_a_busy_extension_that_serves_one_connection_at_a_time_is_not_taken_for_dead(path: Path) -> None:
    async def main() -> None:
        async with managing(path, ping_timeout_s=0.1) as manager:
            client = ExtensionClient(path)
            status = await client.register(ExtensionInfo("slow"), {"config": {"slow": []}})
            release = threading.Event()
            async with trio.open_nursery() as nursery:
                extension = sockets.extension_path(path, status.uuid)
                nursery.start_soon(trio.to_thread.run_sync, serve_one_at_a_time, extension, release)
                answers: list[Response] = []

                async def ask() -> None:
                    answers.append(await manager.call("config", "slow", {"action": "genConfig"}))

                nursery.start_soon(ask)
                await trio.sleep(0.7)  # several intervals and ping deadlines
                assert status.uuid in manager.extensions
                release.set()
            assert answers[0].rows == [{"done": "1"}]

    trio.run(main)


def serve_one_at_a_time(path: Path, release: threading.Event) -> None:
    """As Thrift's TSimpleServer: a call takes until ``release``, and nobody else is served meanwhile."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        answered = False
        while not answered:
            connection, _ = listener.accept()
            with connection:
                decoder = messages.requests()
                while data := connection.recv(65536):
                    for call in decoder.feed(data):
                        result: Any = Status().wire()
                        if call.name == "call":
                            answered = release.wait(LIMIT_S)
                            result = Response(rows=[{"done": "1"}]).wire()
                        connection.sendall(messages.encode_reply(call, result))


# -- the socket --------------------------------------------------------------------------------------------------


def test_the_socket_replaces_what_is_there_and_leaves_the_rest(path: Path) -> None:
    async def main() -> None:
        path.touch()  # noqa: ASYNC240 - as the Python package's SpawnInstance leaves it
        kept = [path.with_name("osquery.em.notes"), path.with_name("osquery.em.7")]
        for file in kept:
            file.write_text("mine")
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(f"{path}.123")
        async with managing(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600  # noqa: ASYNC240
            assert (await ExtensionClient(path).ping()).message == "pong"
            assert not path.with_name("osquery.em.123").exists()
        assert sorted(path.parent.iterdir()) == sorted(kept)

    trio.run(main)


def test_a_successors_socket_is_left_to_it(path: Path) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            ended = trio.Event()

            async def run_first(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
                await run_until_stopped(
                    ExtensionManagerServer(path, FakeHost(), rng=random.Random(1)), task_status=task_status
                )
                ended.set()

            stop = await nursery.start(run_first)
            async with managing(path):
                stop.cancel()
                await ended.wait()
                assert (await ExtensionClient(path).ping()).message == "pong"

    trio.run(main)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 98, "expected at most 97: "), ("no/such/osquery.em", "is no directory"), (".", "cannot listen on")],
)
def test_a_path_that_cannot_be_is_explained(path: Path, name: str, reason: str) -> None:
    async def main() -> None:
        await ExtensionManagerServer(path.parent / name, FakeHost(), rng=random.Random(1)).run()

    with pytest.raises(BadSetup, match=reason) as caught:
        trio.run(main)
    assert caught.value.hint


def test_calls_may_share_a_connection(path: Path) -> None:
    async def main() -> None:
        async with managing(path) as manager, ExtensionClient(path) as client:
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(client.ping)
            assert manager.statistics().connections == 1
            assert manager.statistics().calls == 20

    trio.run(main)


def test_nobody_there_is_said_so(path: Path) -> None:
    async def main() -> None:
        with pytest.raises(NotListening, match="No such file"):
            await ExtensionClient(path).ping()
        with pytest.raises(NotListening):
            await ExtensionClient(path).wait_listening(0.05)

    trio.run(main)
    with pytest.raises(NotListening):
        call_from_thread(path, "table", "t", {}, checkpoint=lambda: None)


# -- bad peers ---------------------------------------------------------------------------------------------------


def test_hostile_bytes_end_their_connection_and_nothing_else(path: Path) -> None:
    async def main() -> None:
        rng = random.Random(5)
        async with managing(path) as manager, ExtensionClient(path) as bystander:
            for number in range(50):
                async with await trio.open_unix_socket(str(path)) as stream:
                    await stream.send_all(b"GET / HTTP/1.1\r\n\r\n" if number == 0 else rng.randbytes(64))
                    assert await stream.receive_some() == b""
            assert manager.statistics().dropped == 50
            assert (await bystander.ping()).message == "pong"

    trio.run(main)


def test_a_host_that_fails_fails_its_call_only(path: Path) -> None:
    async def main() -> None:
        async with managing(path):
            client = ExtensionClient(path)
            with pytest.raises(messages.UnknownMethod, match="RuntimeError: the engine fell over"):
                await client.query("boom")
            assert (await client.query("fine")).rows == [{"sql": "fine"}]
            assert (await client.columns("fine")).rows == [{"sql": "TEXT"}]
            assert await client.options() == {"verbose": OptionInfo("true", "false", "bool")}

    trio.run(main)


def test_a_message_that_never_ends_is_not_waited_for(path: Path) -> None:
    async def main() -> None:
        service = sockets.Service(answer_as_manager, message_timeout_s=0.1)
        async with trio.open_nursery() as nursery, await sockets.listen(path) as listener:
            nursery.start_soon(service.serve, listener)
            with trio.fail_after(LIMIT_S):
                async with await trio.open_unix_socket(str(path)) as stream:
                    await stream.send_all(messages.encode_call("ping")[:-1])
                    assert await stream.receive_some() == b""
                assert service.dropped == 1
                async with ExtensionClient(path) as idle:
                    await idle.ping()
                    await trio.sleep(0.3)  # between messages there is no hurry
                    await idle.ping()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_connections_are_bounded(path: Path) -> None:
    async def main() -> None:
        async with managing(path) as manager, contextlib.AsyncExitStack() as stack:
            for _ in range(sockets.MAX_CONNECTIONS):
                await stack.enter_async_context(client := ExtensionClient(path))
                await client.ping()
            with pytest.raises(ExtensionGone):
                await ExtensionClient(path).ping()
            await client.ping()
            assert manager.statistics().connections == sockets.MAX_CONNECTIONS

    trio.run(main)


BAD_REPLIES: list[tuple[bytes, str]] = [
    (b"", "without a reply"),
    (b"HTTP/1.1 200 OK\r\n\r\n", "strict binary"),
    (messages.encode_reply(messages.requests().feed(messages.encode_call("ping"))[0], Status().wire())[:20], "without"),
    (messages.encode_call("ping"), "expected the reply"),
]


@pytest.mark.parametrize(("reply", "reason"), BAD_REPLIES)
def test_a_peer_that_answers_nonsense_is_gone(path: Path, reply: bytes, reason: str) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(reply)

    async def main() -> None:
        async with trio.open_nursery() as nursery, await sockets.listen(path) as listener:
            nursery.start_soon(trio.serve_listeners, answer, [listener])
            with pytest.raises(ExtensionGone, match=reason):
                await ExtensionClient(path, timeout_s=LIMIT_S).ping()
            with pytest.raises(ExtensionGone):
                await trio.to_thread.run_sync(
                    lambda: call_from_thread(path, "table", "t", {}, checkpoint=lambda: None, timeout_s=LIMIT_S)
                )
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_peer_that_is_silent_is_given_up(path: Path) -> None:
    async def main() -> None:
        async with await sockets.listen(path):
            with pytest.raises(ExtensionGone, match="did not answer within"):
                await ExtensionClient(path, timeout_s=0.05).ping()
            with pytest.raises(ExtensionGone, match="no answer in time"):
                await trio.to_thread.run_sync(
                    lambda: call_from_thread(path, "table", "t", {}, checkpoint=lambda: None, timeout_s=0.05)
                )

    trio.run(main)


def test_a_block_that_fails_raises_its_own_error(path: Path) -> None:
    async def main() -> None:
        async with managing(path) as manager:
            with pytest.raises(KeyError, match="mine"):
                async with ExtensionServer("ours", [], path):
                    raise KeyError("mine")
            assert not manager.extensions

    trio.run(main)
