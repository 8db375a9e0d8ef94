"""The flags that change what the client core sends, when, and with which key: each under the virtual clock."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import pytest

from osqbox.agent import logs
from osqbox.agent.client import (
    SETTINGS,
    Call,
    ConfigUnavailable,
    Core,
    EnrollmentFailed,
    Failure,
    HostDetails,
    Identity,
    Query,
    Send,
    Sleep,
    Thread,
)
from osqbox.agent.flags import Flags
from osqbox.agent.messages import Endpoints
from osqbox.agent.sql import QueryResult
from osqbox.agent.store import MemoryStore, Store

START = 1_700_000_010.0


class World:
    """Drives threads of one core: a clock that jumps, and a server and plugins that are functions."""

    def __init__(self, replies: Mapping[str, Any], flags: Mapping[str, str], store: Store | None = None) -> None:
        self.replies = {"enroll": {"node_key": "key"}, **replies}
        self.secret = "secret"
        self.now = START
        self.sent: list[tuple[float, Send]] = []
        self.calls: list[Call] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.rows: dict[str, QueryResult] = {}
        given = {"tls_hostname": "box:1", "disable_distributed": "false", "schedule_splay_percent": "0", **flags}
        self.core = Core(
            Identity("host", "UUID", "INSTANCE", "EPHEMERAL", 7, self.now),
            Flags(given),
            Endpoints(),
            store or MemoryStore(),
            enroll_secret=lambda: self.secret,
            rng=random.Random(1),
            now=self.now,
        )

    def answer(self, name: str, command: Any) -> Any:
        found = self.replies.get(name, {})
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        return found(command) if callable(found) else found

    def run(self, thread: Thread[Any], for_s: float = 0.0) -> Any:
        """Until the thread ends or sleeps past ``for_s`` from now; returns what it returns."""
        end, outcome = self.now + for_s, None
        try:
            while True:
                self.core.now = self.now
                command = thread.send(outcome)
                self.events += self.core.events
                self.core.events.clear()
                self.core.wakes.clear()
                match command:
                    case Send():
                        self.sent.append((self.now - START, command))
                        reply = self.answer(command.call, command)
                        outcome = json.dumps(reply).encode() if isinstance(reply, dict) else reply
                    case Call():
                        self.calls.append(command)
                        outcome = self.answer(f"{command.registry}/{command.request.get('action', '')}", command)
                    case Query():
                        outcome = self.rows.get(command.sql, QueryResult())
                    case HostDetails():
                        outcome = {}
                    case Sleep():
                        if self.now + command.seconds > end:
                            thread.close()
                            return None
                        self.now += command.seconds
                        outcome = False
        except StopIteration as stop:
            return stop.value
        finally:
            self.events += self.core.events
            self.core.events.clear()

    def times(self, call: str) -> list[float]:
        return [at for at, send in self.sent if send.call == call]

    def said(self) -> list[str]:
        return [facts["message"] for kind, facts in self.events if kind == "status"]


# -- enrollment --------------------------------------------------------------------------------------------------


def test_enrolling_pauses_n_squared_seconds_up_to_the_longest_pause() -> None:
    world = World({"enroll": {}}, {"tls_enroll_max_attempts": "7", "tls_enroll_max_interval": "20"})
    with pytest.raises(EnrollmentFailed):
        world.run(world.core.enroll(), for_s=1e6)
    assert world.times("enroll") == [0, 1, 5, 14, 30, 50, 70]
    warnings = [message for message in world.said() if message.startswith("Failed enrollment request")]
    assert len(warnings) == 6, "the last attempt fails silently"


def test_with_the_defaults_twelve_attempts_take_506_seconds() -> None:
    world = World({"enroll": Failure("Request error: refused")}, {})
    with pytest.raises(EnrollmentFailed, match="refused"):
        world.run(world.core.enroll(), for_s=1e6)
    assert (len(world.sent), world.now - START) == (12, 506)


def test_zero_attempts_is_for_ever() -> None:
    world = World({"enroll": {}}, {"tls_enroll_max_attempts": "0"})
    world.run(world.core.enroll(), for_s=10_000)
    assert len(world.sent) > 20
    assert world.times("enroll")[-1] - world.times("enroll")[-2] == 600


def test_the_secret_is_read_for_each_attempt_and_named_by_the_override() -> None:
    world = World({"enroll": [{}, {"node_key": "k"}]}, {"tls_enroll_override": "tenant_key"})

    def rotate(_send: Send) -> dict[str, Any]:
        world.secret = "newer"
        return {}

    world.replies["enroll"] = [rotate, {"node_key": "k"}]
    world.run(world.core.enroll(), for_s=10)
    assert [json.loads(send.body)["tenant_key"] for _, send in world.sent] == ["secret", "newer"]


def test_enroll_always_asks_for_a_new_key_at_each_start() -> None:
    store = MemoryStore()
    store.put(SETTINGS, "nodeKey", "old")
    World({}, {}, store).run(World({}, {}, store).core.enroll())
    assert store.get(SETTINGS, "nodeKey") == "old"
    again = World({}, {"enroll_always": "true"}, store)
    again.run(again.core.enroll())
    assert (len(again.sent), store.get(SETTINGS, "nodeKey")) == (1, "key")


def test_without_enrollment_calls_go_out_with_a_blank_key() -> None:
    world = World({}, {"disable_enrollment": "true"})
    world.run(world.core.enroll())
    world.run(world.core.first_config())
    assert [(send.call, json.loads(send.body), send.node_key) for _, send in world.sent] == [
        ("config", {"node_key": ""}, "")
    ]


def test_without_the_tls_logger_a_refused_agent_runs_on_and_asks_again_at_each_try() -> None:
    """Each caller without a key runs a full cycle of attempts, then sends a blank one."""
    world = World({"enroll": {}, "config": {"error": "who?"}}, {"tls_enroll_max_attempts": "2"})
    world.core.logger_plugins = ("filesystem",)
    world.run(world.core.enroll(), for_s=1e4)
    world.run(world.core.first_config(), for_s=1e4)
    assert [send.call for _, send in world.sent] == ["enroll"] * 2 + ["enroll", "enroll", "config"] * 3


def test_nobody_enrolls_where_no_plugin_is_a_tls_one() -> None:
    world = World({}, {})
    world.core.config_plugin, world.core.logger_plugins = "filesystem", ("stdout",)
    world.core.distributed_plugin = "ext"
    world.run(world.core.enroll())
    assert world.sent == []


def test_disable_reenrollment_keeps_a_refused_key() -> None:
    for flag, key in (("true", "key"), ("false", "")):
        world = World(
            {"config": {"node_invalid": True}}, {"disable_reenrollment": flag, "config_tls_max_attempts": "1"}
        )
        world.run(world.core.enroll())
        world.run(world.core.first_config())
        assert world.core.node_key == key


# -- URLs --------------------------------------------------------------------------------------------------------


def test_tls_secret_always_appends_the_secret_unencoded_to_every_url() -> None:
    world = World({}, {"tls_secret_always": "true", "tls_enroll_override": "s"})
    world.secret = "a/b+c"
    world.core.endpoints = Endpoints(config="/config?x=1")
    world.run(world.core.enroll())
    world.run(world.core.first_config())
    world.run(world.core.distributed())
    paths = [send.path for _, send in world.sent]
    assert paths == [
        "/api/v1/osquery/enroll?s=a/b+c", "/config?x=1&s=a/b+c", "/api/v1/osquery/distributed/read?s=a/b+c",
    ]  # fmt: skip
    world.secret = "later"
    world.run(world.core.distributed())
    assert world.sent[-1][1].path.endswith("?s=a/b+c"), "fixed when the plugin was set up"


def test_tls_node_api_puts_the_key_into_the_path_and_takes_the_config_from_a_string() -> None:
    config = json.dumps({"schedule": {"q": {"query": "select 1", "interval": 10}}})
    replies = {"config": {"config": config}, "read": {"queries": {"q": "select 1"}}}
    world = World(replies, {"tls_node_api": "true"})
    for thread in (world.core.enroll, world.core.first_config, world.core.distributed):
        world.run(thread())
    sent = [(send.method, send.path, send.body) for _, send in world.sent if send.call != "enroll"]
    assert sent[0] == ("GET", "/key/api/v1/osquery/config&node_key=key", b"")
    assert sent[1] == ("POST", "/key/api/v1/osquery/distributed/read&node_key=key", b"{}")
    assert "node_key" not in json.loads(sent[2][2])
    assert [query.name for _, query in world.core.config.queries()] == ["q"]


# -- config ------------------------------------------------------------------------------------------------------


def test_a_config_is_asked_for_three_times_then_at_the_accelerated_interval() -> None:
    flags = {"config_refresh": "3600", "config_accelerated_refresh": "100"}
    world = World({"config": Failure("Request error: refused")}, flags)
    world.run(world.core.enroll())
    world.run(world.core.first_config(), for_s=100)
    assert world.times("config") == [0, 1, 5]
    world.replies["config"] = [Failure("no")] * 3 + [{}]
    world.run(world.core.config_refresh(), for_s=4000)
    assert world.times("config")[3:] == [105, 106, 110, 210, 3810], "then normal again"
    assert world.core.config_valid


def test_a_backup_replaces_a_config_that_cannot_be_had_at_the_start() -> None:
    store = MemoryStore()
    config = {"schedule": {"q": {"query": "select 1", "interval": 10}}}
    first = World({"config": config}, {"config_enable_backup": "true"}, store)
    first.run(first.core.enroll())
    first.run(first.core.first_config())
    for flag, names in (("true", ["q"]), ("false", [])):
        again = World({"config": Failure("down")}, {"config_enable_backup": flag}, store)
        again.run(again.core.first_config(), for_s=60)
        assert [query.name for _, query in again.core.config.queries()] == names


def test_sources_of_another_config_plugin_add_up_and_packs_are_asked_for_by_name() -> None:
    sources = {
        "/etc/b.conf": json.dumps({"schedule": {"b": {"query": "2", "interval": 5}}, "options": {"custom_x": "b"}}),
        "/etc/a.conf": '# a comment\n{"schedule": {"a": {"query": "1", "interval": 5}}, "options": {"custom_x": "a"},'
        ' "packs": {"p": "/etc/p.conf", "gone": "/no"}}',
    }

    def pack(call: Call) -> Any:
        if call.request["name"] == "gone":
            return Failure("no such file")
        return [{"p": json.dumps({"queries": {"c": {"query": "3", "interval": 5}}})}]

    world = World({"config/genConfig": [[sources]], "config/genPack": pack}, {})
    world.core.config_plugin = "filesystem"
    assert world.run(world.core.fetch_config()) is True
    assert [query.name for _, query in world.core.config.queries()] == ["a", "pack_p_c", "b"]
    assert world.core.flags.text("custom_x") == "b", "the last source wins"
    assert world.sent == []
    assert any("Error getting pack gone: no such file" in message for message in world.said())


def test_a_plugin_may_push_a_config() -> None:
    world = World({}, {"config_refresh": "0"})
    world.core.config_plugin = "ext"
    world.core.push_config("live", json.dumps({"schedule": {"q": {"query": "1", "interval": 9}}}))
    world.run(world.core.config_refresh(), for_s=1)
    assert [query.name for _, query in world.core.config.queries()] == ["q"]
    world.core.push_config("live", "not json")
    world.run(world.core.config_refresh(), for_s=1)
    assert [query.name for _, query in world.core.config.queries()] == ["q"]
    assert "Error parsing config: source live is not a JSON object" in world.said()


# -- logs --------------------------------------------------------------------------------------------------------


def test_the_log_backs_off_by_the_square_of_its_failures() -> None:
    flags = {"logger_tls_period": "10", "logger_tls_backoff_max": "100"}
    world = World({"log": {"error": "full"}}, flags)
    world.core.store.put(SETTINGS, "nodeKey", "key")
    world.core.buffer.add(logs.RESULT, "{}", START, 10)
    world.run(world.core.log_forwarder(), for_s=500)
    assert world.times("log") == [0, 10, 50, 140, 240, 340, 440]


def test_no_backoff_at_zero() -> None:
    world = World({"log": {"error": "full"}}, {"logger_tls_period": "10", "logger_tls_backoff_max": "0"})
    world.core.buffer.add(logs.RESULT, "{}", START, 10)
    world.run(world.core.log_forwarder(), for_s=45)
    assert world.times("log") == [0, 10, 20, 30, 40]


def test_results_starve_statuses() -> None:
    world = World({}, {"logger_tls_max_lines": "3", "logger_tls_period": "10"})
    for number in range(7):
        world.core.buffer.add(logs.RESULT, f'{{"n":{number}}}', START, 0)
    world.core.buffer.add(logs.STATUS, '{"status":1}', START, 0)
    world.run(world.core.log_forwarder(), for_s=29)
    bodies = [json.loads(send.body) for _, send in world.sent if send.call == "log"]
    assert [(body["log_type"], len(body["data"])) for body in bodies] == [
        ("result", 3), ("result", 3), ("result", 1), ("status", 1),
    ]  # fmt: skip


def test_over_the_limit_the_oldest_lines_of_both_kinds_go() -> None:
    buffer = logs.Buffer(MemoryStore())
    for number in range(6):
        buffer.add(logs.STATUS if number % 2 else logs.RESULT, str(number), START, 4)
    assert sorted(line for kind in buffer.batch(10).values() for line in kind.values()) == ["2", "3", "4", "5"]
    assert buffer.dropped == 2


def test_other_loggers_get_every_line_in_their_own_form() -> None:
    schedule = {
        "snap": {"query": "s", "interval": 5, "snapshot": True},
        "diff": {"query": "d", "interval": 5},
        "bad": {"query": "b", "interval": 5},
    }
    world = World({"config": {"schedule": schedule}, "logger/": [[]]}, {})
    row = QueryResult(columns=("a",), typed_rows=[{"a": 1}])
    world.rows = {"s": row, "d": row, "b": QueryResult(status=1, message="no such table: x")}
    world.core.logger_plugins = ("filesystem", "ext")
    world.run(world.core.fetch_config())
    world.run(world.core.scheduler())
    world.run(world.core.log_relay())
    assert {call.plugin for call in world.calls} == {"filesystem", "ext"}
    mine = [call.request for call in world.calls if call.plugin == "ext"]
    assert [json.loads(each["snapshot"])["action"] for each in mine if "snapshot" in each] == ["snapshot"]
    assert [json.loads(each["string"])["columns"] for each in mine if "string" in each] == [{"a": "1"}]
    statuses = [json.loads(each["log"])[0] for each in mine if each.get("status") == "true"]
    assert [(each["s"], each["h"]) for each in statuses if "no such table" in each["m"]] == [(2, "host")]
    assert len(world.core.buffer) == 0, "the tls logger is not among them"


def test_verbose_says_what_is_asked_of_whom() -> None:
    for verbose in ("true", "false"):
        world = World({"config": {"schedule": {"q": {"query": "s", "interval": 5}}}}, {"verbose": verbose})
        world.rows["s"] = QueryResult(columns=("a",), typed_rows=[{"a": 1}])
        world.run(world.core.enroll())
        world.run(world.core.first_config())
        world.run(world.core.scheduler())
        expected = {
            "TLSEnrollPlugin requesting a node enroll key from: https://box:1/api/v1/osquery/enroll",
            "TLS/HTTPS POST request to URI: https://box:1/api/v1/osquery/config",
            "Executing scheduled query q: s",
            "Found results for query: q",
        }
        assert (expected <= set(world.said())) is (verbose == "true")


def test_glog_lines_look_like_glogs() -> None:
    status = logs.Status(logs.WARNING, "tls.cpp", 196, "message")
    assert logs.glog_line(status, now=1_700_000_010.25, thread=9) == "W1114 22:13:30.250000 9 tls.cpp:196] message"


# -- distributed plugins -----------------------------------------------------------------------------------------


def test_queries_and_answers_may_go_through_a_plugin() -> None:
    work = [{"results": json.dumps({"queries": {"q": "s"}})}]
    world = World(
        {"distributed/getQueries": [work, [{"results": ""}]], "distributed/writeResults": [Failure("x"), []]}, {}
    )
    world.core.distributed_plugin = "ext"
    world.run(world.core.distributed(), for_s=60)
    writes = [json.loads(c.request["results"]) for c in world.calls if c.request["action"] == "writeResults"]
    assert [list(write) for write in writes] == [["queries", "statuses", "messages", "stats"]] * 2
    assert writes[0] == writes[1], "what was not taken is offered again"
    assert world.sent == []


# -- the schedule's denylist -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "flags", "events", "runs"),
    [
        ({}, {"disable_watchdog": "false"}, False, False),
        ({}, {"disable_watchdog": "true"}, False, True),
        ({"denylist": False}, {"disable_watchdog": "false"}, False, True),
        ({}, {"disable_watchdog": "false"}, True, True),
        ({}, {"disable_watchdog": "false", "events_enforce_denylist": "true"}, True, False),
    ],
)
def test_a_query_the_process_died_in_is_skipped_for_a_day(
    entry: dict[str, Any], flags: dict[str, str], events: bool, runs: bool
) -> None:
    config = {"schedule": {"q": {"query": "s", "interval": 60, **entry}}}
    store = MemoryStore()
    store.put(SETTINGS, "executing_query", "q")
    store.put("queries", "qevents", "1" if events else "0")
    world = World({"config": config}, flags, store)
    world.run(world.core.enroll())
    world.run(world.core.first_config())
    world.run(world.core.scheduler(), for_s=120)
    assert bool(world.core.performance["q"].executions) is runs
    world.now = START + 86_400 + 60
    world.run(world.core.scheduler(), for_s=120)
    assert world.core.performance["q"].executions > 0


def test_a_stop_in_the_middle_of_a_query_is_no_crash() -> None:
    world = World({"config": {"schedule": {"q": {"query": "s", "interval": 60}}}}, {})
    world.run(world.core.enroll())
    world.run(world.core.first_config())
    thread = world.core.scheduler()
    assert isinstance(next(thread), Sleep)
    world.core.now += 60
    assert isinstance(thread.send(False), Query)
    assert world.core.store.get(SETTINGS, "executing_query") == "q"
    thread.close()
    assert world.core.store.get(SETTINGS, "executing_query") is None


def test_the_strict_rule_has_its_own_error() -> None:
    assert "cannot retrieve a configuration from https://h/config: down" in str(
        ConfigUnavailable("https://h/config", "down")
    )


# -- answers of the wrong shape ----------------------------------------------------------------------------------

CONFIGS: list[Any] = [
    {"schedule": []},
    {"schedule": {"q": 1, "r": {"query": 7}, "s": {"query": "x", "interval": -1}}}, {"packs": {"p": 1}},
    {"packs": {"p": {"queries": [], "discovery": {"a": 1}}}}, {"options": {"config_refresh": 1, "nope": {}}},
    {"decorators": {"load": [1, "select nope"], "interval": {"7": [], "x": "y"}}}, {"yara": []},
    {"schedule": {"q" * 9000: {"query": "select 1", "interval": 10**30}}}, {"unknown": [[[]]]},
    {"schedule": {"q": {"query": "select nope from nowhere", "interval": 1}}, "options": {"schedule_splay_percent": 0}},
    {"yara": {"signature_urls": {"a": 1}, "signatures": []}}, {"views": 3, "events": None, "file_paths": "x"},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_of_the_wrong_shape_is_taken_as_far_as_it_goes(config: Any) -> None:
    world = World({"config": config}, {})
    world.run(world.core.enroll())
    assert world.run(world.core.fetch_config()) is True
    assert world.core.config_valid
    world.run(world.core.scheduler(), for_s=30)


READS: list[Any] = [
    {"queries": None}, {"queries": [1]}, {"queries": {"a": 1}}, {"queries": {"": "select 1"}},
    {"queries": {"a": "select 1"}, "discovery": []}, {"queries": {"a": "select 1"}, "discovery": {"a": None}},
    {"queries": {"a": "select 1"}, "accelerate": "60"}, {"queries": {"a": "select 1"}, "accelerate": 2**80},
    {"queries": {"a": "select 1"}, "accelerate": -5}, {"queries": {"a\ud800": "select '\ud800' as x"}},
    {"queries": {f"q{n}": "select 1" for n in range(1000)}}, {"queries": {"a": "select 1;" * 10000}},
    {"queries": {"a": "\x00", "b": "attach '/tmp/x' as y", "c": "pragma writable_schema=1", "d": "(" * 5000}},
]  # fmt: skip


@pytest.mark.parametrize("read", READS, ids=range(len(READS)))
def test_work_of_the_wrong_shape_does_no_harm(read: Any) -> None:
    """The next round comes at its time: nothing is repeated at once, nothing is left for later."""
    world = World({"read": [read, {}]}, {"distributed_interval": "10"})
    world.run(world.core.distributed(), for_s=25)
    assert world.times("read")[0] == 0
    assert world.times("read")[1] in (5, 10), "accelerated or not"
    assert len(world.times("write")) <= 1
