"""The thread that runs live queries: read them, run them, write the answers. Pure.

Upstream: osquery/distributed/distributed.cpp, plugins/distributed/tls_distributed.cpp.
"""

from __future__ import annotations

import hashlib

from osqbox.agent import logs, messages
from osqbox.agent.client.commands import Call, Failure, Query, Sleep, Thread
from osqbox.agent.client.server import Server
from osqbox.agent.client.state import RUNNING, SETTINGS, TLS, WORK, State
from osqbox.agent.messages import Answer, Reply
from osqbox.agent.sql import QueryResult

MAX_UNSENT_ANSWER_BYTES = 64 * 1024 * 1024
ACCELERATED_INTERVAL_S = 5
_ACCELERATED_UNTIL = "distributed_accelerate_checkins_expire"


class Distributed:
    __slots__ = ("_server", "_state", "answers")

    def __init__(self, state: State, server: Server) -> None:
        self._state = state
        self._server = server
        self.answers: list[Answer] = []
        """Those the server has not taken yet."""

    def run(self) -> Thread[None]:
        """DistributedRunner: read, run, write, pause."""
        while True:
            if not self._state.flags.true("disable_distributed"):
                yield from self._pull()
                yield from self._run_work()
                yield from self._write()
            yield Sleep(self._pause_s(), wake="distributed")

    def _pause_s(self) -> float:
        state = self._state
        until = float(state.store.get(SETTINGS, _ACCELERATED_UNTIL) or 0)
        interval_s = max(1, state.flags.integer("distributed_interval"))
        return min(interval_s, ACCELERATED_INTERVAL_S) if state.now < until else interval_s

    def _pull(self) -> Thread[None]:
        state = self._state
        if state.distributed_plugin != TLS:
            yield from self._pull_from_plugin()
            return
        attempts = state.flags.integer("distributed_tls_max_attempts")
        build = messages.node_body if not state.flags.true("tls_node_api") else lambda _key: b"{}"
        reply = yield from self._server.call("read", state.endpoints.read, build, attempts)
        if reply.ok:
            yield from self._accept(messages.read_work(reply.members))
        else:
            state.status(logs.WARNING, "distributed.cpp", f"Error getting distributed queries: {reply.message}")

    def _pull_from_plugin(self) -> Thread[None]:
        state = self._state
        rows: list[dict[str, str]] | Failure = yield Call(
            "distributed", state.distributed_plugin, {"action": "getQueries"}
        )
        if isinstance(rows, Failure):
            state.event("call_failed", call="read", reason=rows.message)
            state.status(logs.WARNING, "distributed.cpp", f"Error getting distributed queries: {rows.message}")
            return
        members = messages.read_config_text(rows[0].get("results", "") or "{}") if rows else {}
        if members is None:
            state.status(logs.WARNING, "distributed.cpp", "Error parsing distributed queries: not a JSON object")
        else:
            yield from self._accept(messages.read_work(members))

    def _accept(self, work: messages.Work) -> Thread[None]:
        """Keep the queries whose discovery found a row; an SQL error in a discovery drops everything."""
        state = self._state
        if work.refused:
            state.status(logs.WARNING, "distributed.cpp", work.refused)
            return
        hidden: set[str] = set()
        for name, sql in work.discovery.items():
            result: QueryResult = yield Query(sql)
            if result.status:
                message = "Distributed discovery query has an SQL error"
                state.status(logs.WARNING, "distributed.cpp", message)
                return
            if not result.typed_rows:
                hidden.add(name)
        for name, sql in work.queries.items():
            if name not in hidden:
                state.store.put(WORK, name, sql)
        if work.warning:
            state.status(logs.WARNING, "distributed.cpp", work.warning)
        if work.accelerate_s is not None:
            message = f"Accelerating distributed query checkins for {work.accelerate_s} seconds"
            state.status(logs.INFO, "distributed.cpp", message)
            until = str(int(state.now) + work.accelerate_s)
            state.store.put(SETTINGS, _ACCELERATED_UNTIL, until)

    def _run_work(self) -> Thread[None]:
        """Run what was kept, in the byte order of the names."""
        state = self._state
        for name, sql in sorted(state.store.scan(WORK), key=lambda found: found[0].encode()):
            state.store.delete(WORK, name)
            if self._denylisted(sql):
                self.answers.append(Answer(name, "[]", 1, "distributed query is denylisted", "{}"))
                continue
            says = state.status if state.flags.true("distributed_loginfo") else state.status_when_verbose
            says(logs.INFO, "distributed.cpp", f"Executing distributed query: {name}: {sql}")
            running = _sha256(sql)
            state.store.put(RUNNING, running, str(int(state.now)))
            try:
                result: QueryResult = yield Query(sql)
            except GeneratorExit:
                # A stop, not a crash: the query is innocent and runs after the restart.
                state.store.put(WORK, name, sql)
                raise
            finally:
                state.store.delete(RUNNING, running)
            self._answer(name, result)

    def _denylisted(self, sql: str) -> bool:
        """Whether the process died the last time this query ran, not too long ago."""
        state = self._state
        started = state.store.get(RUNNING, _sha256(sql))
        return started is not None and state.now - float(started) < state.flags.integer("distributed_denylist_duration")

    def _answer(self, name: str, result: QueryResult) -> None:
        state = self._state
        state.queries_run += 1
        state.warn_of(result)
        if result.status:
            message = f"Error executing distributed query: {name}: {result.message}"
            state.status(logs.ERROR, "distributed.cpp", message)
        s = result.stats
        stats = {
            "wall_time_ms": s.wall_time_ms,
            "user_time": s.user_time,
            "system_time": s.system_time,
            "memory": s.memory,
        }
        rows, stats_json = messages.compact(result.rows), messages.compact(stats)
        self.answers.append(Answer(name, rows, result.status, result.message, stats_json))
        state.event("distributed", name=name, rows=len(result.rows), status=result.status)
        self._drop_old_answers()

    def _drop_old_answers(self) -> None:
        """Answers that cannot be delivered are bounded here, where upstream keeps them all."""
        while len(self.answers) > 1 and sum(len(a.rows) for a in self.answers) > MAX_UNSENT_ANSWER_BYTES:
            dropped = self.answers.pop(0)
            message = f"Dropped the undelivered result of distributed query {dropped.name}"
            self._state.status(logs.WARNING, "distributed.cpp", message)

    def _write(self) -> Thread[None]:
        """Send every answer; what fails is kept in memory and sent again next round."""
        state = self._state
        if not self.answers:
            return
        answers = list(self.answers)
        attempts = state.flags.integer("distributed_tls_max_attempts")

        keyed = not state.flags.true("tls_node_api")

        def body(key: str) -> bytes:
            return messages.write_body(answers, key if keyed else None)

        if state.distributed_plugin == TLS:
            reply = yield from self._server.call("write", state.endpoints.write, body, attempts)
        else:
            reply = yield from self._write_to_plugin(messages.write_body(answers, None).decode())
        if reply.ok:
            self.answers = self.answers[len(answers) :]
            state.event("written", queries=[answer.name for answer in answers])
        else:
            state.status(logs.WARNING, "distributed.cpp", f"Error writing distributed results: {reply.message}")

    def _write_to_plugin(self, results: str) -> Thread[Reply]:
        request = {"action": "writeResults", "results": results}
        outcome = yield Call("distributed", self._state.distributed_plugin, request)
        return Reply(False, outcome.message) if isinstance(outcome, Failure) else Reply(True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
