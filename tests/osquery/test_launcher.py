"""Launcher's JSON-RPC: its own odd envelopes, the same core behind them, and errors as its go-kit client takes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.errors import Refused
from osqbox.osquery import campaigns, configs, jsonrpc, logs, nodes
from osqbox.osquery.amalgamate import Source
from osqbox.osquery.campaigns import Order
from osqbox.osquery.logs import LogFilter
from osqbox.osquery.nodes import Selector

Run = Callable[..., None]

SECRET = "a-secret-that-nobody-may-see"
DETAILS = {
    "os_version": "10.13.6", "os_build_id": "17G65", "os_platform": "darwin", "os_platform_like": "darwin",
    "os_name": "Mac OS X", "hostname": "mac-1", "hardware_vendor": "Apple Inc.", "hardware_model": "MacBookPro14,3",
    "hardware_serial": "C02", "hardware_uuid": "hw-mac-1", "osquery_version": "3.3.2", "launcher_version": "0.11.11",
    "goos": "darwin", "goarch": "amd64",
}  # fmt: skip


def call(method: str, number: int = 0, **params: Any) -> dict[str, Any]:
    """As go-kit 0.9's client writes it: the version is an empty string."""
    return {"jsonrpc": "", "method": method, "params": params, "id": number}


def enrollment(name: str = "launcher-uuid", **members: Any) -> dict[str, Any]:
    params = {"enroll_secret": SECRET, "host_identifier": name, "EnrollmentDetails": DETAILS, **members}
    return call("RequestEnrollment", **params)


class GoKit:
    """How Launcher takes an answer: the status never counts, an ``error`` member is a broken transport."""

    @staticmethod
    def takes(answer: dict[str, Any]) -> dict[str, Any]:
        assert "error" not in answer, answer
        result = answer["result"]
        assert isinstance(result, dict)
        for lethal in ("err", "error_code", "disable_device"):
            assert lethal not in {name.lower() for name in result}
        return result


async def tell(api: Any, body: Any, **more: Any) -> dict[str, Any]:
    answer: dict[str, Any] = await api.tell("/", body, **more)
    return answer


async def enroll(api: Any, **members: Any) -> str:
    key: str = GoKit.takes(await tell(api, enrollment(**members)))["node_key"]
    assert key
    return key


def test_a_whole_conversation_over_tls(served: Run) -> None:
    """Enrolled, configured, asked, logged: as Launcher does it, one connection per call."""

    async def test(server: Any) -> None:
        api = server.api
        schedule = {"up": {"query": "select 1", "interval": 9}}
        await api.do(configs.put, Source("fleet", {"schedule": schedule}), "")

        async def launcher(body: dict[str, Any]) -> dict[str, Any]:
            client = await server.connect()
            headers = {"Content-Type": "application/json; charset=utf-8", "Connection": "close"}
            answer = await client.ask("/", body, headers=headers)
            assert answer.status == 200
            assert answer.json["id"] == body["id"]
            return GoKit.takes(answer.json)

        key = (await launcher(enrollment()))["node_key"]
        config = await launcher(call("RequestConfig", 1, node_key=key))
        assert json.loads(config["config"])["schedule"]["up"]["query"] == "select 1"
        assert config["node_invalid"] is False

        order = Order("select 2", Selector(), 60.0, everyone=True)
        campaign, _ = await api.do(campaigns.start, order, lambda _: (), api.new_id)
        queries = (await launcher(call("RequestQueries", 2, node_key=key)))["Queries"]
        assert queries["queries"] == {campaign.id: "select 2"}
        results = [{"query_name": campaign.id, "status": 0, "rows": [{"2": "2"}], "stats": None, "message": ""}]
        assert (await launcher(call("PublishResults", 3, node_key=key, Results=results)))["node_invalid"] is False
        assert api.store.peek(lambda db: campaigns.get(db, campaign.id)).summary()["answered"] == 1
        assert (await launcher(call("RequestQueries", 4, node_key=key)))["Queries"] == {"queries": {}}

        line = '{"name":"up","hostIdentifier":"x","unixTime":5,"action":"added","columns":{}}'
        await launcher(call("PublishLogs", 5, node_key=key, LogType=0, Logs=[line]))
        await launcher(call("PublishLogs", 6, node_key=key, LogType=4, Logs=['{"s":"0","m":"hello"}', "plain words"]))
        found = [json.loads(raw) for raw in api.store.peek(lambda db: logs.find(db, LogFilter()))]
        assert [(each["log_type"], each["line"]) for each in found] == [
            ("result", json.loads(line)),
            ("status", {"s": "0", "m": "hello"}),
            ("status", {"message": "plain words"}),
        ]
        assert await launcher(call("CheckHealth", 7)) == {"status": 1, "node_invalid": False}

    served(test)


def test_enrollment_details_are_kept_as_osquerys_own(api: Run) -> None:
    async def test(made: Any) -> None:
        await enroll(made)
        [facts] = made.store.peek(lambda db: nodes.facts_json(db, Selector()))
        assert facts["hostname"] == "mac-1"
        assert facts["platform"] == "darwin"
        assert facts["os"] == "Mac OS X 10.13.6"
        assert facts["hardware_uuid"] == "hw-mac-1"
        assert facts["osquery_version"] == "3.3.2"
        assert facts["host_details"]["launcher_info"]["version"] == "0.11.11"

    api(test)


def test_instances_of_one_machine_are_nodes_of_their_own(api: Run) -> None:
    """Each enrolls with an identifier of its own and the same hardware."""

    async def test(made: Any) -> None:
        keys = [await enroll(made, name=name) for name in ("first", "second", "first")]
        assert len(set(keys)) == 3
        assert len(made.store.peek(lambda db: nodes.facts_json(db, Selector()))) == 2

    api(test)


@pytest.mark.parametrize("method", ["RequestConfig", "RequestQueries", "PublishLogs", "PublishResults"])
@pytest.mark.parametrize("key", ["", "unknown-key"])
def test_a_bad_key_makes_it_enroll_again(api: Run, method: str, key: str) -> None:
    async def test(made: Any) -> None:
        params: dict[str, Any] = {"LogType": 0, "Logs": []} if method == "PublishLogs" else {}
        answer = await tell(made, call(method, 9, node_key=key, **params))
        assert GoKit.takes(answer) == {"node_invalid": True}
        assert answer["id"] == 9

    api(test)


def test_a_wrong_secret_is_an_enrollment_error(api: Run) -> None:
    async def test(made: Any) -> None:
        result = GoKit.takes(await tell(made, enrollment(enroll_secret="wrong")))
        assert result["node_invalid"] is True
        assert not result.get("node_key")
        assert made.handler.refused["wrong_secret"] == 1

    api(test)


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b"[{}]", b"{}", b'{"method": 5}', b"[" * 100_000, b"\xff"])
def test_what_is_no_call_fails_as_everywhere_else(api: Run, body: bytes) -> None:
    """It may be an osqueryd whose flags miss the path."""

    async def test(made: Any) -> None:
        answer = await tell(made, body)
        assert isinstance(answer["error"], str)
        assert "result" not in answer

    api(test)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"method": "Uninstall", "params": {}, "id": 3}, -32601),
        ({"method": "RequestConfig", "id": 3}, -32602),
        ({"method": "RequestConfig", "params": [], "id": 3}, -32602),
        ({"method": "RequestConfig", "params": {"node_key": 5}, "id": 3}, -32602),
        ({"method": "RequestEnrollment", "params": {"EnrollmentDetails": 5}, "id": 3}, -32602),
    ],
)
def test_bad_calls_are_errors_that_it_retries(api: Run, body: Any, code: int) -> None:
    async def test(made: Any) -> None:
        answer = await tell(made, body)
        assert answer["error"]["code"] == code
        assert "xpected" in answer["error"]["message"]
        assert (answer["id"], "result" in answer) == (3, False)

    api(test)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("PublishLogs", {}),
        ("PublishLogs", {"LogType": "x", "Logs": []}),
        ("PublishLogs", {"LogType": 9, "Logs": []}),
        ("PublishLogs", {"LogType": 0, "Logs": [5]}),
        ("PublishResults", {"Results": [{"status": 0}]}),
        ("PublishResults", {"Results": {"a": 1}}),
    ],
)
def test_bad_params_say_what_was_expected(api: Run, method: str, params: dict[str, Any]) -> None:
    async def test(made: Any) -> None:
        answer = await tell(made, call(method, 4, node_key=await enroll(made), **params))
        assert answer["error"]["code"] == -32602
        assert "xpected" in answer["error"]["message"] or "missing" in answer["error"]["message"]
        assert answer["id"] == 4

    api(test)


def test_a_batch_sent_again_on_another_connection_is_stored_once(api: Run, kit: Any) -> None:
    async def test(made: Any) -> None:
        batch = call("PublishLogs", 5, node_key=await enroll(made), LogType=0, Logs=['{"name":"a"}'])
        for connection in ("c-1", "c-2"):
            await tell(made, batch, who=kit.peer(connection))
        assert len(made.store.peek(lambda db: logs.find(db, LogFilter()))) == 1

    api(test)


def test_options_that_are_launchers_own_are_left_out_of_the_config() -> None:
    text = b'{"options":{"distributed_plugin":"tls","logger_plugin":"tls","verbose":true},"schedule":{}}'
    assert json.loads(jsonrpc.config_text(text)) == {"options": {"verbose": True}, "schedule": {}}
    assert jsonrpc.config_text(b'{"a":1}') == '{"a":1}'


def test_a_get_of_the_root_is_an_ordinary_failure(api: Run) -> None:
    async def test(made: Any) -> None:
        answer = await made.ask("/", method="GET")
        assert answer.status == 404
        assert json.loads(answer.body)["error"]

    api(test)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["method", "params", "id"]), inner),
)


@given(ANY_JSON)
def test_any_json_is_a_call_or_refused(value: Any) -> None:
    try:
        found = jsonrpc.parse_call(json.dumps(value).encode())
        jsonrpc.check(found)
    except Refused:
        return
    assert found.method in jsonrpc.METHODS
