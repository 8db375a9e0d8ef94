"""Requests byte by byte, and replies read as osqueryd reads them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.agent import messages
from osqbox.agent.client.config import combined_config_hash, config_source_hash
from osqbox.agent.messages import Answer, Reply

REPLIES = [
    (b"", True, ""),
    (b"{}", True, ""),
    (b'{"detail":"Not Found"}', True, ""),
    (b'{"node_invalid":false,"node_key":"k"}', True, ""),
    (b'{"node_invalid":"true"}', True, ""),
    (b'{"node_invalid":1}', True, ""),
    (b'{"error":"no"}', False, "Request failed: no"),
    (b'{"error":null}', False, "Request failed: <unknown>"),
    (b'{"error":{"a":1}}', False, "Request failed: <unknown>"),
    (b'{"error":"no","node_invalid":true}', False, "Request failed: Invalid node key: no"),
    (b'{"node_invalid":true}', False, "Request failed: Invalid node key"),
    (b"<html>", False, "Request error: cannot parse the reply as a JSON object"),
    (b"[]", False, "Request error: cannot parse the reply as a JSON object"),
    (b'"text"', False, "Request error: cannot parse the reply as a JSON object"),
    (b"\xff\xfe", False, "Request error: cannot parse the reply as a JSON object"),
    (b"[" * 100_000, False, "Request error: cannot parse the reply as a JSON object"),
    (b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", False, "Request error: cannot parse the reply as a JSON object"),
]


@pytest.mark.parametrize(("body", "ok", "message"), REPLIES)
def test_replies(body: bytes, ok: bool, message: str) -> None:
    reply = messages.read_reply(body)
    assert (reply.ok, reply.message) == (ok, message)
    assert reply.node_invalid is (b'"node_invalid":true' in body)


def test_lone_surrogates_cannot_come_in() -> None:
    reply = messages.read_reply(b'{"a":"x\\ud800y","b":"\\ud83d\\ude00"}')
    assert reply.members == {"a": "x?y", "b": "\U0001f600"}


@given(st.binary(max_size=200))
def test_no_reply_raises(body: bytes) -> None:
    assert isinstance(messages.read_reply(body), Reply)
    assert isinstance(messages.enrolled_key(body), str)
    assert isinstance(messages.carve_session(body), str)


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"node_key":"k"}', "k"),
        (b'{"node_key":"k","node_invalid":true,"error":"x"}', "k"),
        (b'{"id":"k"}', "k"),
        (b'{"node_key":""}', ""),
        (b'{"node_key":7}', ""),
        (b'{"node_invalid":true}', ""),
        (b"", ""),
        (b"nonsense", ""),
    ],
)
def test_enrollment_is_refused_only_by_leaving_the_key_out(body: bytes, key: str) -> None:
    assert messages.enrolled_key(body) == key


def test_enroll_body_order() -> None:
    body = messages.enroll_body("s/", "h", {"os_version": {"name": "Ä"}}, secret_name="enroll_secret")
    expected = (
        '{"enroll_secret":"s/","host_identifier":"h","platform_type":"9","host_details":{"os_version":{"name":"Ä"}}}'
    )
    assert body == expected.encode()


def test_log_bodies() -> None:
    assert messages.log_body(['{"a":1}', '{"b":2}'], "result", "k") == (
        b'{"data":[{"a":1},{"b":2}],"log_type":"result","node_key":"k"}'
    )
    assert messages.compressed_log_body(['{"a":1}'], "status", "k") == (
        b'{"node_key":"k","log_type":"status","data":[{"a":1}]}'
    )


def test_write_body_as_in_the_reference() -> None:
    answers = [
        Answer("q1", '[{"col":"val"}]', 0, "", '{"wall_time_ms":1,"user_time":0,"system_time":0,"memory":0}'),
        Answer("bad", "[]", 1, "no such table: foo", "{}"),
    ]
    assert messages.write_body(answers, "k") == (
        b'{"queries":{"q1":[{"col":"val"}],"bad":[]},"statuses":{"q1":0,"bad":1},'
        b'"messages":{"q1":"","bad":"no such table: foo"},'
        b'"stats":{"q1":{"wall_time_ms":1,"user_time":0,"system_time":0,"memory":0},"bad":{}},"node_key":"k"}'
    )


@given(st.lists(st.tuples(st.text(), st.text()), max_size=5))
def test_write_body_is_json_whatever_the_names(pairs: list[tuple[str, str]]) -> None:
    body = messages.write_body([Answer(name, "[]", 1, message, "{}") for name, message in pairs], "k")
    found = json.loads(body)
    assert set(found) == {"queries", "statuses", "messages", "stats", "node_key"}


def test_carve_bodies() -> None:
    start = messages.carve_start_body(
        block_count=2, block_size=8192, carve_size=10240, carve_id="g", request_id="r", node_key="k"
    )
    assert start == (
        b'{"block_count":2,"block_size":8192,"carve_size":10240,"carve_id":"g","request_id":"r","node_key":"k"}'
    )
    block = messages.carve_block_body(block_id=0, session_id="s", request_id="r", data_base64="QQ==")
    assert block == b'{"block_id":0,"session_id":"s","request_id":"r","data":"QQ=="}'


@pytest.mark.parametrize(
    ("members", "queries", "accelerate_s"),
    [
        ({}, {}, None),
        ({"queries": {"a": "select 1", "b": "select 2"}}, {"a": "select 1", "b": "select 2"}, None),
        ({"queries": {"a": "select 1", "b": "", "c": "select 3"}, "accelerate": 60}, {"a": "select 1"}, None),
        ({"queries": [], "accelerate": 60}, {}, 60),
        ({"accelerate": "60"}, {}, None),
        ({"accelerate": True}, {}, None),
        ({"accelerate": -1}, {}, -1),
        ({"accelerate": 2**40}, {}, None),
        ({"discovery": {"a": 1}, "queries": {"a": "select 1"}}, {}, None),
        ({"discovery": "x", "queries": {"a": "select 1"}}, {"a": "select 1"}, None),
    ],
)
def test_reading_work(members: dict[str, object], queries: dict[str, str], accelerate_s: int | None) -> None:
    work = messages.read_work(members)
    assert (work.queries, work.accelerate_s) == (queries, accelerate_s)


def test_the_config_hash_vector() -> None:
    body = (
        b'{"schedule":{"tls_proc":{"query":"select * from processes","interval":1}},"node_invalid":false,"node":true}'
    )
    source = config_source_hash(messages.read_reply(body).members)
    assert source == "1c70dc4608ed9f8d8e24d23359a46e8739a93558"
    assert combined_config_hash([source]) == "23a948b13698104a4b1009facfbdf554f2bdce7e"
