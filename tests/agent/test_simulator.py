"""Hosts of Launcher's old simulator: its format read as it read it, and agents that answer from it by JSON-RPC."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from osqbox.agent import jsonrpc
from osqbox.agent.client import Failure, Send
from osqbox.agent.simulator import SimulatedEngine, SimulatedHost, load_host_types
from osqbox.errors import BadSetup

BASE = """
name: base
queries:
  - pattern: "^select 1$"
    results: [{"1": 1}]
  - pattern: "FROM System_Info"
    results:
      - {hostname: "{name}", uuid: fixed, cores: 8, empty: null}
  - pattern: broken
    error: "no such table: broken"
  - pattern: nothing
    results: []
"""
CHILD = """
name: child
parent: base
queries:
  - pattern: os_version
    results: [{platform: darwin, version: "10.9"}]
  - pattern: system_info where
    results: [{hostname: mine}]
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "child.yaml").write_text(CHILD)
    (tmp_path / "notes.txt").write_text("not a host type")
    return tmp_path


@pytest.mark.parametrize(
    ("host_type", "sql", "rows"),
    [
        ("base", "select 1", [{"1": "1"}]),
        ("base", "SELECT 1", [{"1": "1"}]),  # both sides in lower case
        ("base", "select 11", []),  # an anchor of the pattern itself
        ("base", "select x from system_info", [{"hostname": "base_7", "uuid": "fixed", "cores": "8", "empty": ""}]),
        ("base", "nothing at all", []),
        ("base", "select * from unmatched", []),
        ("child", "select 1", [{"1": "1"}]),  # the parent's
        ("child", "select * from system_info where 1", [{"hostname": "mine"}]),  # its own first
    ],
)  # fmt: skip
def test_the_first_pattern_that_fits_answers(directory: Path, host_type: str, sql: str, rows: object) -> None:
    engine = SimulatedEngine(SimulatedHost(load_host_types(directory)[host_type], 0, 7))
    result = engine.query(sql)
    assert (result.status, result.rows) == (0, rows)


def test_an_answer_may_be_an_error(directory: Path) -> None:
    result = load_host_types(directory)["child"].answer("select * from broken", 0)
    assert (result.status, result.message) == (1, "no such table: broken")


def test_hosts_of_a_type_are_machines_of_their_own(directory: Path) -> None:
    types = load_host_types(directory)
    first, second, twin = (SimulatedHost(types["child"], 0, index) for index in (0, 1, 0))
    assert first.identity == twin.identity
    assert first.identity.hostname == "child_0"
    assert (first.identity.platform, first.identity.platform_type) == ("darwin", 21)
    assert first.identity.uuid != second.identity.uuid
    clone = SimulatedHost(types["child"], 0, 1, hardware_of=0)
    assert clone.identity.uuid == first.identity.uuid
    assert clone.identity.instance_id != first.identity.instance_id


BAD = {
    "unknown parent": "name: x\nparent: missing\n",
    "circle": "name: x\nparent: x\n",
    "bad pattern": "name: x\nqueries: [{pattern: '(', results: []}]\n",
    "bad yaml": "name: [",
    "no name": "queries: []",
    "unknown member": "name: x\nanswers: []",
    "same name twice": "name: base",
    "a list": "- name: x",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_bad_file_is_named(directory: Path, text: str) -> None:
    (directory / "x.yaml").write_text(text)
    with pytest.raises(BadSetup, match=r"x\.yaml|host type|base"):
        load_host_types(directory)


def test_an_empty_or_missing_directory_is_named(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BadSetup, match=str(directory)):
            load_host_types(directory)


# -- the dialect -------------------------------------------------------------------------------------------------


def sent(dialect: jsonrpc.Dialect, call: str, body: object) -> dict[str, object]:
    found = dialect.call(Send(call, "/api/v1/osquery/x", json.dumps(body).encode(), node_key="k", compress=True))
    assert isinstance(found, Send)
    assert (found.path, found.node_key, found.compress) == ("/", "", False)
    answer: dict[str, object] = json.loads(found.body)
    return answer


def test_calls_are_written_as_go_kit_writes_them() -> None:
    dialect = jsonrpc.Dialect()
    assert sent(dialect, "config", {"node_key": "k"}) == {
        "jsonrpc": "", "method": "RequestConfig", "params": {"node_key": "k"}, "id": 0,
    }  # fmt: skip
    assert sent(dialect, "read", {"node_key": "k"})["id"] == 0
    assert sent(dialect, "config", {"node_key": "k"})["id"] == 1  # counted per method


def test_an_enrollment_in_launchers_words() -> None:
    details = {"system_info": {"hostname": "h", "uuid": "u"}, "os_version": {"platform": "darwin", "version": "10"}}
    body = {"enroll_secret": "s", "host_identifier": "i", "platform_type": "21", "host_details": details}
    params = sent(jsonrpc.Dialect(), "enroll", body)["params"]
    assert isinstance(params, dict)
    assert (params["enroll_secret"], params["host_identifier"]) == ("s", "i")
    found = params["EnrollmentDetails"]
    assert (found["hostname"], found["hardware_uuid"], found["os_platform"]) == ("h", "u", "darwin")


def test_logs_and_results_in_launchers_words() -> None:
    dialect = jsonrpc.Dialect()
    logs = sent(dialect, "log", {"node_key": "k", "log_type": "status", "data": [{"m": "x"}]})["params"]
    assert logs == {"node_key": "k", "LogType": 4, "Logs": ['{"m":"x"}']}
    body = {
        "queries": {"q": [{"a": "1"}]},
        "statuses": {"q": 1},
        "messages": {"q": "bad"},
        "stats": {"q": {}},
        "node_key": "k",
    }
    results = sent(dialect, "write", body)["params"]
    row = {"query_name": "q", "status": 1, "rows": [{"a": "1"}], "stats": {}, "message": "bad"}
    assert results == {"node_key": "k", "Results": [row]}


def test_there_are_no_carves() -> None:
    assert isinstance(jsonrpc.Dialect().call(Send("carve_start", "/c", b"{}")), Failure)


@pytest.mark.parametrize(
    ("call", "answer", "expected"),
    [
        ("enroll", {"result": {"node_key": "k", "node_invalid": False}}, {"node_key": "k"}),
        ("enroll", {"result": {"node_invalid": True}}, {"node_invalid": True}),
        ("config", {"result": {"config": '{"schedule":{}}'}}, {"schedule": {}}),
        ("config", {"result": {"config": {"schedule": {}}}}, {"error": "config: expected a string of JSON"}),
        ("read", {"result": {"Queries": {"queries": {}, "accelerate": 5}}}, {"queries": {}, "accelerate": 5}),
        ("read", {"result": {"queries": None}}, {}),
        ("log", {"result": {"message": ""}}, {}),
        ("log", {"result": {"node_invalid": True}}, {"node_invalid": True}),
        ("log", {"error": {"code": -32000, "message": "no"}}, {"error": "no"}),
        ("log", {"error": {"code": -1, "message": "no"}, "result": {"node_invalid": True}}, {"error": "no"}),
        ("log", {"result": {"err": "", "message": ""}}, {"error": "the result's err is not null"}),
        ("log", {"result": {"err": None, "message": ""}}, {}),
        ("log", {}, {"error": "the answer has no result"}),
    ],
)  # fmt: skip
def test_answers_are_read_as_launcher_reads_them(call: str, answer: object, expected: object) -> None:
    assert json.loads(jsonrpc.reply(call, json.dumps(answer).encode())) == expected


def test_an_answer_that_is_no_json_is_an_error() -> None:
    assert "error" in json.loads(jsonrpc.reply("log", b"<html>"))
