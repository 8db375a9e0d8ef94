"""The client core under a virtual clock: all of an agent's threads against a scripted server, no I/O at all."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osqbox.agent.client import Core, EnrollmentFailed, Failure, HostDetails, Identity, Query, Send, Sleep, Thread
from osqbox.agent.flags import Flags
from osqbox.agent.messages import Endpoints
from osqbox.agent.sql import QueryResult
from osqbox.agent.store import MemoryStore, Store
from osqbox.errors import BadUsage

START = 1_700_000_010.0
FLAGS = {
    "tls_hostname": "box:1",
    "disable_distributed": "false",
    "schedule_splay_percent": "0",
    "config_refresh": "0",
    "distributed_interval": "10",
}


@dataclass
class World:
    """Drives an agent's threads: a clock that jumps, a server that is a function, SQL that is a dictionary."""

    server: Callable[[Send], bytes | dict[str, Any] | Failure]
    flags: Mapping[str, str] = field(default_factory=dict)
    results: dict[str, QueryResult | Callable[[], QueryResult]] = field(default_factory=dict)
    store: Store = field(default_factory=MemoryStore)
    now: float = START
    seed: int = 1
    sent: list[tuple[float, Send]] = field(default_factory=list)
    events: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    asked: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = Core(
            Identity("host", "UUID", "INSTANCE", "EPHEMERAL", 7, self.now),
            Flags({**FLAGS, **self.flags}),
            Endpoints(),
            self.store,
            enroll_secret=lambda: "secret",
            rng=random.Random(self.seed),
            now=self.now,
        )

    def run(self, *threads: Thread[None], for_s: float = 0.0) -> None:
        """Run the threads side by side until each has ended or would sleep past ``for_s`` from now."""
        end = self.now + for_s
        waiting: list[list[Any]] = [[self.now, at, thread, None, ""] for at, thread in enumerate(threads)]
        while waiting:
            waiting.sort(key=lambda entry: (entry[0], entry[1]))
            entry = waiting[0]
            if entry[0] > end:
                break
            self.now = self.core.now = max(self.now, entry[0])
            self._step(entry, waiting)
        for entry in waiting:
            entry[2].close()
        self.now = self.core.now = max(self.now, end)

    def _step(self, entry: list[Any], waiting: list[list[Any]]) -> None:
        outcome, entry[4] = entry[3], ""
        try:
            command = entry[2].send(outcome)
        except StopIteration:
            waiting.remove(entry)
            command = None
        for name in self.core.wakes:
            for other in waiting:
                if other[4] == name:
                    other[0], other[3], other[4] = self.now, True, ""
        self.core.wakes.clear()
        self.events += [(self.now, kind, details) for kind, details in self.core.events]
        self.core.events.clear()
        entry[3] = None
        match command:
            case Sleep():
                entry[0], entry[3], entry[4] = self.now + command.seconds, False, command.wake
            case Send():
                self.sent.append((self.now, command))
                reply = self.server(command)
                entry[3] = json.dumps(reply).encode() if isinstance(reply, dict) else reply
            case Query():
                self.asked.append((self.now, command.sql))
                found = self.results.get(command.sql, QueryResult())
                entry[3] = found() if callable(found) else found
            case HostDetails():
                entry[3] = {"system_info": {"hostname": "host"}}

    def calls(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(send.body) for _, send in self.sent if send.call == name]

    def times(self, name: str) -> list[float]:
        return [at - START for at, send in self.sent if send.call == name]

    def kinds(self) -> list[str]:
        return [kind for _, kind, _ in self.events]

    def enroll(self) -> None:
        self.run(self.core.enroll())


def rows(*found: dict[str, Any]) -> QueryResult:
    return QueryResult(columns=tuple(found[0]) if found else (), typed_rows=list(found))


def error(message: str) -> QueryResult:
    return QueryResult(status=1, message=message)


def script(**replies: Any) -> Callable[[Send], Any]:
    """A server: per call one reply, or a list of them whose last one stays."""

    def serve(send: Send) -> Any:
        reply = replies.get(send.call, {})
        if isinstance(reply, list):
            reply = reply.pop(0) if len(reply) > 1 else reply[0]
        return reply(send) if callable(reply) else reply

    replies.setdefault("enroll", {"node_key": "key"})
    return serve


# -- enrollment --------------------------------------------------------------------------------------------------


def test_enrolling_sends_who_the_host_is() -> None:
    world = World(script())
    world.enroll()
    ((_, send),) = world.sent
    assert send.path == "/api/v1/osquery/enroll"
    assert send.node_key == ""
    assert list(world.calls("enroll")[0]) == ["enroll_secret", "host_identifier", "platform_type", "host_details"]
    assert world.calls("enroll")[0]["host_details"] == {"system_info": {"hostname": "host"}}
    assert world.core.node_key == "key"
    assert world.kinds() == ["enrolled"]


@pytest.mark.parametrize(
    ("mode", "identifier"),
    [("hostname", "host"), ("uuid", "UUID"), ("instance", "INSTANCE"), ("ephemeral", "EPHEMERAL"),
     ("specified", "mine"), ("nonsense", "host")],
)  # fmt: skip
def test_host_identifier(mode: str, identifier: str) -> None:
    world = World(script(), {"host_identifier": mode, "specified_identifier": "mine"})
    assert world.core.host_identifier == identifier


def test_a_refused_enrollment_waits_n_squared_seconds_and_gives_up() -> None:
    world = World(script(enroll={"node_invalid": True}))
    with pytest.raises(EnrollmentFailed, match="https://box:1/api/v1/osquery/enroll"):
        world.run(world.core.enroll(), for_s=10_000)
    assert world.times("enroll") == [sum(n * n for n in range(1, at + 1)) for at in range(12)]
    assert world.times("enroll")[-1] == 506
    assert "call_failed" not in world.kinds()
    status = next(details for _, kind, details in world.events if kind == "status")
    assert status["message"] == (
        "Failed enrollment request to https://box:1/api/v1/osquery/enroll "
        "(Request failed: Invalid node key) retrying..."
    )


def test_enrollment_pauses_are_bounded() -> None:
    world = World(script(enroll=[{}] * 5 + [{"node_key": "k"}]), {"tls_enroll_max_interval": "2"})
    world.run(world.core.enroll(), for_s=100)
    assert world.times("enroll") == [0, 1, 3, 5, 7, 9]


def test_zero_attempts_try_for_ever() -> None:
    world = World(script(enroll={}), {"tls_enroll_max_attempts": "0", "tls_enroll_max_interval": "1"})
    world.run(world.core.enroll(), for_s=99)
    assert len(world.times("enroll")) == 100


def test_only_one_thread_enrolls_and_the_others_use_its_key() -> None:
    world = World(script(enroll=[{}, {"node_key": "new"}]))
    world.run(world.core.first_config(), world.core.distributed(), for_s=3)
    assert len(world.times("enroll")) == 2
    assert {send.node_key for _, send in world.sent if send.call in ("config", "read")} == {"new"}


def test_an_invalid_key_is_dropped_and_the_call_repeated_with_a_new_one_a_second_later() -> None:
    world = World(script(enroll=[{"node_key": "one"}, {"node_key": "two"}], config=[{"node_invalid": True}, {}]))
    world.enroll()
    world.run(world.core.first_config(), for_s=10)
    assert [call["node_key"] for call in world.calls("config")] == ["one", "two"]
    assert world.times("config") == [0, 1]
    assert world.kinds() == ["enrolled", "node_invalid", "call_failed", "enrolled", "config"]


def test_an_error_keeps_the_key() -> None:
    world = World(script(config={"error": "later"}))
    world.enroll()
    world.run(world.core.first_config(), for_s=10)
    assert world.times("config") == [0, 1, 5]
    assert world.core.node_key == "key"


def test_a_late_answer_about_an_old_key_does_not_drop_the_new_one() -> None:
    def re_enrolled_meanwhile(_send: Send) -> Any:
        world.store.put("configurations", "nodeKey", "newer")
        return {"node_invalid": True}

    world = World(script(read=[re_enrolled_meanwhile, {}]))
    world.enroll()
    world.run(world.core.distributed(), for_s=2)
    assert [call["node_key"] for call in world.calls("read")] == ["key", "newer"]
    assert len(world.calls("enroll")) == 1


def test_disable_reenrollment_keeps_an_invalid_key() -> None:
    world = World(script(config={"node_invalid": True}), {"disable_reenrollment": "true"})
    world.enroll()
    world.run(world.core.first_config(), for_s=10)
    assert len(world.times("enroll")) == 1


# -- config ------------------------------------------------------------------------------------------------------

SCHEDULE = {"schedule": {"q": {"query": "select q", "interval": 10}}}


def test_options_take_effect_and_bad_ones_are_named() -> None:
    options = {"distributed_interval": 3, "logger_tls_period": "7", "config_refresh": 5, "nope": 1, "custom_x": "y",
               "logger_event_type": False, "schedule_splay_percent": "many"}  # fmt: skip
    world = World(script(config={"options": options}))
    world.enroll()
    world.run(world.core.first_config())
    flags = world.core.flags
    assert (flags.integer("distributed_interval"), flags.integer("logger_tls_period")) == (3, 7)
    assert flags.true("logger_event_type") is False
    assert flags.text("custom_x") == "y"
    warnings = [details["message"] for _, kind, details in world.events if kind == "status"]
    assert len(warnings) == 3
    assert warnings[0].startswith("The CLI only flag --config_refresh set via config file will be ignored")
    assert warnings[1:] == [
        "Cannot set unknown or invalid flag: nope",
        "Cannot set unknown or invalid flag: schedule_splay_percent",
    ]


def test_the_same_config_again_changes_nothing_and_other_text_changes_all() -> None:
    world = World(script(config=[SCHEDULE, SCHEDULE, {}]), {"config_refresh": "30"})
    world.enroll()
    world.run(world.core.first_config(), world.core.config_refresh(), for_s=65)
    assert world.times("config") == [0, 30, 60]
    assert world.kinds().count("config") == 2
    assert list(world.core.config.queries()) == []
    assert world.core.config_valid


def test_after_a_failure_the_config_is_asked_for_sooner() -> None:
    fails: list[Any] = [Failure("x")] * 3 + [{}]
    world = World(script(config=fails), {"config_refresh": "3600", "config_accelerated_refresh": "300"})
    world.enroll()
    world.run(world.core.config_refresh(), for_s=8000)
    assert world.times("config") == [3600, 3601, 3605, 3905, 7505]


def test_a_config_of_another_kind_wipes_the_schedule_as_osqueryd_does() -> None:
    world = World(script(config=[SCHEDULE, {"detail": "Not Found"}]), {"config_refresh": "10"})
    world.enroll()
    world.run(world.core.first_config())
    assert len(list(world.core.config.queries())) == 1
    world.run(world.core.config_refresh(), for_s=10)
    assert list(world.core.config.queries()) == []


# -- scheduler and logs ------------------------------------------------------------------------------------------


def scheduled(
    config: dict[str, Any], results: dict[str, Any], *, for_s: float, flags: Mapping[str, str] | None = None
) -> World:
    world = World(script(config=config), flags or {}, results)
    world.enroll()
    world.run(world.core.first_config())
    world.run(world.core.scheduler(), world.core.log_forwarder(), for_s=for_s)
    return world


def lines(world: World, kind: str = "result") -> list[dict[str, Any]]:
    return [line for call in world.calls("log") if call["log_type"] == kind for line in call["data"]]


def test_queries_run_on_the_seconds_their_interval_divides() -> None:
    config = {"schedule": {"a": {"query": "a", "interval": 7}, "b": {"query": "b", "interval": 10}}}
    world = scheduled(config, {}, for_s=30)
    assert [at for at, sql in world.asked if sql == "b"] == [START + n for n in (0, 10, 20, 30)]
    assert all(at % 7 == 0 for at, sql in world.asked if sql == "a")
    assert len([1 for _, sql in world.asked if sql == "a"]) == 4


def test_first_results_then_differences_with_counters() -> None:
    answers = iter([rows({"a": 1}), rows({"a": 1}), rows({"a": 2}), rows({"a": 2}, {"a": 2}), rows()])
    world = scheduled(SCHEDULE, {"select q": lambda: next(answers)}, for_s=49)
    seen = [(line["counter"], line["action"], line["columns"]["a"]) for line in lines(world)]
    assert seen == [
        (0, "added", "1"),
        (1, "removed", "1"), (1, "added", "2"),
        (2, "added", "2"),
        (3, "removed", "2"), (3, "removed", "2"),
    ]  # fmt: skip


def test_removed_false_hides_removed_rows_but_counts_on() -> None:
    config = {"schedule": {"q": {"query": "select q", "interval": 10, "removed": False}}}
    answers = iter([rows({"a": 1}), rows({"a": 2}), rows(), rows({"a": 3})])
    world = scheduled(config, {"select q": lambda: next(answers)}, for_s=39)
    assert [(line["counter"], line["columns"]["a"]) for line in lines(world)] == [(0, "1"), (1, "2"), (3, "3")]


def test_an_empty_first_run_is_seen_only_in_batch_format() -> None:
    for flags, expected in (({}, 0), ({"logger_event_type": "false"}, 1)):
        world = scheduled(SCHEDULE, {"select q": rows()}, for_s=25, flags=flags)
        assert len(lines(world)) == expected


def test_batch_format() -> None:
    answers = iter([rows({"a": 1}), rows({"a": 2}), rows({"a": 2})])
    world = scheduled(SCHEDULE, {"select q": lambda: next(answers)}, for_s=29, flags={"logger_event_type": "false"})
    assert [line["diffResults"] for line in lines(world)] == [
        {"removed": [], "added": [{"a": "1"}]},
        {"removed": [{"a": "1"}], "added": [{"a": "2"}]},
    ]


def test_snapshots_log_every_run_with_counter_0() -> None:
    config = {"schedule": {"q": {"query": "select q", "interval": 10, "snapshot": True}}}
    answers = iter([rows({"a": 1}), rows(), rows({"a": 1})])
    world = scheduled(config, {"select q": lambda: next(answers)}, for_s=29)
    assert [(line["snapshot"], line["counter"]) for line in lines(world)] == [
        ([{"a": "1"}], 0),
        ([], 0),
        ([{"a": "1"}], 0),
    ]


def test_a_new_epoch_logs_everything_again() -> None:
    config = {**SCHEDULE, "options": {"schedule_epoch": 5}}
    world = World(script(config=[SCHEDULE, config]), {"config_refresh": "15"}, {"select q": rows({"a": 1})})
    world.enroll()
    world.run(world.core.first_config())
    world.run(world.core.scheduler(), world.core.log_forwarder(), world.core.config_refresh(), for_s=29)
    assert [(line["epoch"], line["counter"]) for line in lines(world)] == [(0, 0), (5, 0)]


def test_new_sql_under_the_same_name_does_not_reset_the_counter() -> None:
    other = {"schedule": {"q": {"query": "select r", "interval": 10}}}
    results = {"select q": rows({"a": 1}), "select r": rows({"a": 2})}
    world = World(script(config=[SCHEDULE, other]), {"config_refresh": "15"}, results)
    world.enroll()
    world.run(world.core.first_config())
    world.run(world.core.scheduler(), world.core.log_forwarder(), world.core.config_refresh(), for_s=29)
    assert [(line["action"], line["counter"]) for line in lines(world)] == [("added", 0), ("removed", 1), ("added", 1)]


def test_a_failing_query_is_a_status_line_and_no_result() -> None:
    world = scheduled(SCHEDULE, {"select q": error("no such table: q")}, for_s=9)
    assert lines(world) == []
    (status,) = lines(world, "status")
    assert status["message"] == "Error executing scheduled query q: no such table: q"
    assert status["severity"] == 2


def test_decorators_load_always_and_interval() -> None:
    config = {**SCHEDULE, "decorators": {"load": ["l"], "always": ["a"], "interval": {"60": ["i"]}}}
    numbers = iter(range(100))
    results = {
        "l": rows({"load": "L", "other": "O"}, {"load": "second row"}),
        "a": lambda: rows({"run": next(numbers)}),
        "i": rows({"minute": "M"}),
        "select q": lambda: rows({"n": next(numbers)}),
    }
    world = scheduled(config, results, for_s=70)
    added = [line["decorations"] for line in lines(world) if line["action"] == "added"]
    assert added[0] == {"load": "L", "other": "O", "run": "0"}
    assert added[1] == {"load": "L", "other": "O", "run": "2"}
    assert added[-1]["minute"] == "M"


def test_packs_run_when_every_discovery_query_has_a_row_asked_once_an_hour() -> None:
    queries = {"q": {"query": "select q", "interval": 10}}
    config = {"packs": {
        "yes": {"queries": queries, "discovery": ["row"]},
        "no": {"queries": queries, "discovery": ["row", "none"]},
        "broken": {"queries": queries, "discovery": ["bad"]},
    }}  # fmt: skip
    results = {"row": rows({"a": 1}), "none": rows(), "bad": error("x"), "select q": rows({"a": 1})}
    world = scheduled(config, results, for_s=3650)
    assert {line["name"] for line in lines(world)} == {"pack_yes_q"}
    assert len([1 for _, sql in world.asked if sql == "none"]) == 2
    assert world.core.pack_active == {"main": True, "yes": True, "no": False, "broken": False} or (
        world.core.pack_active == {"yes": True, "no": False, "broken": False}
    )


def test_startup_priority_runs_first_and_at_once() -> None:
    config = {"schedule": {
        "late": {"query": "late", "interval": 3600, "startup_priority": 2},
        "soon": {"query": "soon", "interval": 3600, "startup_priority": 1},
        "never": {"query": "never", "interval": 3599},
    }}  # fmt: skip
    world = scheduled(config, {}, for_s=1)
    assert [sql for _, sql in world.asked] == ["soon", "late"]


def test_a_new_schedule_does_not_run_what_was_due_before_it_came() -> None:
    late = {"schedule": {"q": {"query": "select q", "interval": 50}}}
    world = World(script(config=[{}, late]), {"config_refresh": "95"})
    world.enroll()
    world.run(world.core.first_config())
    world.run(world.core.scheduler(), world.core.config_refresh(), for_s=150)
    assert world.asked == [(START + 140, "select q")]


def test_splay_is_remembered() -> None:
    store = MemoryStore()
    chosen = set()
    for seed in range(3):
        world = World(script(config=SCHEDULE), {"schedule_splay_percent": "50"}, store=store, seed=seed)
        world.enroll()
        world.run(world.core.first_config())
        ((_, query),) = world.core.config.queries()
        chosen.add(query.splayed_s)
    assert len(chosen) == 1


def test_results_survive_a_restart() -> None:
    store = MemoryStore()
    for counter, value in ((0, 1), (1, 2)):
        world = World(script(config=SCHEDULE), {}, {"select q": rows({"a": value})}, store)
        world.enroll()
        world.run(world.core.first_config())
        world.run(world.core.scheduler(), world.core.log_forwarder(), for_s=9)
        assert {line["counter"] for line in lines(world)} == {counter}
    assert len(world.calls("enroll")) == 0


def test_lines_that_are_refused_are_sent_again_with_growing_pauses() -> None:
    world = World(script(log=[{"error": "x"}] * 4 + [{}]))
    world.enroll()
    world.core.status(0, "a.cpp", "hello")
    world.run(world.core.log_forwarder(), for_s=300)
    assert world.times("log") == [0, 4, 20, 56, 120]
    assert {json.dumps(call["data"]) for call in world.calls("log")} == {json.dumps(world.calls("log")[0]["data"])}
    assert len(world.core.buffer) == 0


def test_results_and_statuses_are_two_posts_results_first() -> None:
    world = scheduled(SCHEDULE, {"select q": rows({"a": 1})}, for_s=5)
    assert [call["log_type"] for call in world.calls("log")] == ["result", "status"]
    assert list(world.calls("log")[0]) == ["data", "log_type", "node_key"]


def test_max_lines_bounds_a_post() -> None:
    result = rows(*({"a": n} for n in range(25)))
    world = scheduled(SCHEDULE, {"select q": result}, for_s=9, flags={"logger_tls_max_lines": "10"})
    assert [len(call["data"]) for call in world.calls("log") if call["log_type"] == "result"] == [10, 10, 5]


def test_a_line_over_the_limit_is_dropped_with_a_warning() -> None:
    world = scheduled(
        SCHEDULE, {"select q": rows({"a": "x" * 2000})}, for_s=9, flags={"logger_tls_max_linesize": "1000"}
    )
    assert lines(world) == []
    said = [line["message"] for line in lines(world, "status")]
    assert any(message.startswith("Linesize exceeds TLS logger maximum: 2") for message in said)


def test_compressed_logs_have_their_members_in_another_order() -> None:
    world = scheduled(SCHEDULE, {"select q": rows({"a": 1})}, for_s=3, flags={"logger_tls_compress": "true"})
    (send,) = [send for _, send in world.sent if send.call == "log"][:1]
    assert send.compress
    assert list(json.loads(send.body)) == ["node_key", "log_type", "data"]


# -- distributed -------------------------------------------------------------------------------------------------


def distributed(read: Any, results: dict[str, Any] | None = None, *, for_s: float = 0, **replies: Any) -> World:
    world = World(script(read=read, **replies), {}, results or {})
    world.enroll()
    world.run(world.core.distributed(), for_s=for_s)
    return world


def test_queries_are_answered_in_one_write_in_byte_order_of_their_names() -> None:
    queries = {"b": "select b", "a": "select a", "B": "bad"}
    results = {"select a": rows({"z": 1, "a": None, "d": 1.0}), "bad": error("no such table: foo")}
    world = distributed([{"queries": queries}, {}], results)
    (write,) = world.calls("write")
    assert list(write) == ["queries", "statuses", "messages", "stats", "node_key"]
    assert list(write["queries"].items()) == [("B", []), ("a", [{"z": "1", "a": "", "d": "1.0"}]), ("b", [])]
    assert write["statuses"] == {"B": 1, "a": 0, "b": 0}
    assert write["messages"] == {"B": "no such table: foo", "a": "", "b": ""}
    assert write["stats"]["a"] == {"wall_time_ms": 0, "user_time": 0, "system_time": 0, "memory": 0}


def test_nothing_to_do_writes_nothing() -> None:
    world = distributed({"queries": {}}, for_s=35)
    assert world.times("read") == [0, 10, 20, 30]
    assert world.calls("write") == []


def test_discovery_drops_queries_silently() -> None:
    read = {"queries": {"a": "select a", "b": "select b", "c": "select c"}, "discovery": {"a": "yes", "b": "no"}}
    world = distributed([read, {}], {"yes": rows({"x": 1}), "no": rows()})
    assert set(world.calls("write")[0]["queries"]) == {"a", "c"}


def test_a_discovery_error_drops_the_whole_reply() -> None:
    world = distributed(
        [{"queries": {"a": "select a"}, "discovery": {"a": "bad"}, "accelerate": 60}, {}], {"bad": error("x")}
    )
    assert world.calls("write") == []


def test_accelerate_polls_every_five_seconds_until_then_and_survives_a_restart() -> None:
    world = distributed([{"accelerate": 12}, {}], for_s=40)
    assert world.times("read") == [0, 5, 10, 15, 25, 35]
    again = World(script(), store=world.store, now=START + 3)
    again.run(again.core.distributed(), for_s=20)
    assert again.times("read") == [3, 8, 13, 23]


def test_a_negative_acceleration_ends_it() -> None:
    world = distributed([{"accelerate": 600}, {"accelerate": -1}, {}], for_s=30)
    assert world.times("read") == [0, 5, 15, 25]


def test_results_that_cannot_be_written_are_kept_and_sent_again() -> None:
    world = distributed([{"queries": {"a": "select a"}}, {}], write=[Failure("down")] * 3 + [{}], for_s=30)
    assert world.times("write") == [0, 1, 5, 15]
    assert len({json.dumps(call) for call in world.calls("write")}) == 1
    assert world.core.statistics().answers_unsent == 0


def test_a_query_that_killed_the_process_is_denylisted_for_a_day() -> None:
    world = World(script(read=[{"queries": {"q": "boom"}}, {}]))
    world.enroll()
    thread = world.core.distributed()
    step, outcome = next(thread), None
    while not (isinstance(step, Query) and step.sql == "boom"):
        outcome = b'{"queries":{"q":"boom"}}' if isinstance(step, Send) else None
        step = thread.send(outcome)
    # The process dies here: the thread never gets to clean up.
    kept = MemoryStore()
    for domain in ("configurations", "distributed", "distributed_running"):
        for key, value in world.store.scan(domain):
            kept.put(domain, key, value)
    thread.close()

    for later, status, message in ((60.0, 1, "distributed query is denylisted"), (90_000.0, 0, "")):
        after = World(script(read=[{"queries": {"again": "boom"}}, {}]), store=kept, now=START + later)
        after.run(after.core.distributed())
        (write,) = after.calls("write")
        assert (write["queries"], write["statuses"], write["messages"]) == (
            {"again": []}, {"again": status}, {"again": message},
        )  # fmt: skip
        assert bool(write["stats"]["again"]) is (status == 0)


def test_a_query_interrupted_by_a_stop_runs_after_the_restart() -> None:
    world = World(script())
    world.enroll()
    world.store.put("distributed", "q", "slow")
    thread = world.core.distributed()
    step = next(thread)
    while not isinstance(step, Query):
        step = thread.send(b"{}")
    thread.close()
    after = World(script(), {}, {"slow": rows({"a": 1})}, store=world.store)
    after.run(after.core.distributed())
    assert after.calls("write")[0]["queries"] == {"q": [{"a": "1"}]}


def test_disable_distributed_reads_nothing() -> None:
    world = World(script(), {"disable_distributed": "true"})
    world.enroll()
    world.run(world.core.distributed(), for_s=60)
    assert world.calls("read") == []


# -- hostile servers ---------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["schedule", "packs", "queries", "query", "interval", "discovery", "decorators", "options", "accelerate",
             "node_invalid", "error", "logger_tls_period", "distributed_interval", "schedule_epoch", "q", "always"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=25,
)  # fmt: skip
replies = st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()) | st.just(Failure("gone"))


@settings(max_examples=150, deadline=None)
@given(st.lists(replies, min_size=1, max_size=8))
def test_no_answer_of_a_server_ends_an_agent(answers: list[bytes | Failure]) -> None:
    number = iter(range(10**9))
    world = World(lambda send: {"node_key": "k"} if send.call == "enroll" else answers[next(number) % len(answers)])
    core = world.core
    world.run(
        core.first_config(),
        core.scheduler(),
        core.log_forwarder(),
        core.distributed(),
        core.config_refresh(),
        for_s=120,
    )
    assert core.node_key in ("k", "")


# -- flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{"nope": "1"}, {"distributed_interval": "soon"}, {"disable_distributed": "maybe"}])
def test_flags_that_osqueryd_would_not_take_are_refused(flags: dict[str, str]) -> None:
    with pytest.raises(BadUsage):
        Flags(flags)


def test_defaults_are_upstreams_values() -> None:
    flags = Flags({"config_tls_refresh": "9"})
    assert flags.integer("config_refresh") == 9
    assert flags.integer("read_max") == 50 * 1024 * 1024
    assert flags.integer("logger_tls_backoff_max") == 3600
    assert flags.text("pidfile") == "/var/run/osqueryd.pidfile"
    assert flags.text("pack_delimiter") == "_"
    found = {row["name"]: row for row in flags.rows()}
    assert found["config_refresh"]["value"] == found["config_tls_refresh"]["value"] == "9"
    assert found["config_refresh"]["default_value"] == "0"
