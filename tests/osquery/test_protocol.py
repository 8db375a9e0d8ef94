"""Which request is meant: every known server's paths, secrets and keys wherever they stand, and safe answers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.errors import Refused
from osqbox.osquery.protocol import (
    SECRET_CANDIDATES,
    body_digest,
    body_secrets,
    config_response,
    failure,
    is_node_api,
    node_key_of,
    route,
    success,
    uri_secrets,
)

STD = {"enroll": "enroll", "config": "config", "log": "log"}
SLASHED = {"distributed/read": "read", "distributed/write": "write"}
JOINED = {"distributed_read": "read", "distributed_write": "write"}
PLAIN = {"read": "read", "write": "write"}
FLEET_CARVE = {"carve/begin": "carve_begin", "carve/block": "carve_block"}

DIALECTS = {
    "canonical": ("/api/v1/osquery", STD | SLASHED | FLEET_CARVE),
    "Fleet": ("/api/osquery", STD | SLASHED | FLEET_CARVE | {"yara/rule.yar": "yara"}),
    "kolide, Palantir, osquery-perf": ("/api/v1/osquery", STD | SLASHED),
    "osctrl": ("/dev-environment", STD | PLAIN | {"init": "carve_begin", "block": "carve_block"}),
    "Zentral": (
        "/public/osquery", STD | SLASHED | {"carver/start": "carve_begin", "carver/continue": "carve_block"},
    ),
    "doorman": ("", STD | SLASHED),
    "doorman v1": ("/v1", STD | SLASHED),
    "plgx": ("", STD | SLASHED | {"start_uploads": "carve_begin", "upload_blocks": "carve_block"}),
    "osquery's test server": (
        "", STD | JOINED | {"logger": "log", "carve_init": "carve_begin", "carve_block": "carve_block"},
    ),
    "goquery's mock": ("", STD | {"distributedRead": "read", "distributedWrite": "write"}),
    "sgt": (
        "",
        {"node/enroll": "enroll", "node/configure": "config", "carve/start": "carve_begin",
         "carve/continue": "carve_block"} | SLASHED,
    ),
    "windmill": ("/api", {"enroll": "enroll", "config": "config"}),
    "spasam": ("", STD | PLAIN),
    "QueryOps": ("/osquery", {"enroll": "enroll", "config": "config", "logger": "log"} | JOINED),
    "Uptycs": ("/agent", STD | JOINED),
    "anybody": ("", {"version": "version", "health": "health", "healthz": "health"}),
}  # fmt: skip
PATHS = [
    pytest.param(f"{prefix}/{tail}", operation, id=f"{name}:{tail}")
    for name, (prefix, tails) in DIALECTS.items()
    for tail, operation in tails.items()
]


@pytest.mark.parametrize(("path", "operation"), PATHS)
def test_every_dialect_is_understood(path: str, operation: str) -> None:
    assert route(path).operation == operation


@pytest.mark.parametrize(("path", "operation"), PATHS)
def test_a_prefix_changes_nothing(path: str, operation: str) -> None:
    """Nor do a trailing slash, doubled slashes, or variables with or without a question mark."""
    for target in (f"/tenant-a/x{path}", f"{path}/", path.replace("/", "//"), f"{path}?a=b", f"{path}&node_key=k"):
        assert route(target).operation == operation


@given(
    st.lists(st.text("abc/._-%~", max_size=6), max_size=4).map("/".join),
    st.sampled_from([(parameter.values[0], parameter.values[1]) for parameter in PATHS]),
)
def test_any_prefix_leads_to_the_same_operation(prefix: str, path: tuple[str, str]) -> None:
    target, operation = path
    if prefix.rstrip("/").endswith("yara"):
        return
    assert route(f"/{prefix}{target}").operation == operation


@given(st.text(st.characters(codec="latin-1"), max_size=60))
def test_no_target_is_too_strange(target: str) -> None:
    found = route(target)
    for secret in uri_secrets(target, found.variables):
        assert 0 < len(secret) <= 1024
    assert len(found.variables) <= SECRET_CANDIDATES
    assert len(uri_secrets(target, found.variables)) <= SECRET_CANDIDATES


@pytest.mark.parametrize("target", ["/", "", "/enrol", "/read/x", "/api/v1/osquery", "/carve", "/begin", "/yara", "*"])
def test_other_paths_mean_nothing(target: str) -> None:
    assert route(target).operation is None


def test_a_yara_rule_is_named_by_the_last_segment() -> None:
    assert route("/api/osquery/yara/my%20rule.yar").name == "my rule.yar"
    assert route("/yara/enroll").operation == "yara"


# secrets


@pytest.mark.parametrize("name", ["enroll_secret", "tls_enroll_override", "s"])
@pytest.mark.parametrize("secret", ["plain", "a=b", "a&b", "a?b=c&d", "=", "p%40ss", "ä"])
def test_a_secret_is_found_in_the_uri_under_any_name_unencoded(name: str, secret: str) -> None:
    """osqueryd appends it as it is: it may itself hold what separates variables."""
    for target in (f"/config?{name}={secret}", f"/config?x=1&{name}={secret}", f"/config&node_key=k&{name}={secret}"):
        assert secret in uri_secrets(target, route(target).variables)


def test_an_encoded_secret_is_found_too() -> None:
    target = "/enroll?enroll_secret=p%40ss%20word"
    assert "p@ss word" in uri_secrets(target, route(target).variables)


def test_a_path_holds_no_secrets() -> None:
    assert uri_secrets("/a=b/enroll", route("/a=b/enroll").variables) == []


def test_the_documented_name_comes_first_in_a_body() -> None:
    body = {
        "other": "second",
        "host_identifier": "no",
        "platform_type": "9",
        "node_key": "no",
        "enroll_secret": "first",
    }
    assert body_secrets(body) == ["first", "second"]


@pytest.mark.parametrize("value", ["", None, 3, ["x"], "x" * 1025])
def test_what_cannot_be_a_secret_is_no_candidate(value: object) -> None:
    assert body_secrets({"enroll_secret": value}) == []


def test_candidates_are_bounded() -> None:
    assert len(body_secrets({f"n{n}": f"v{n}" for n in range(1000)})) == SECRET_CANDIDATES


# keys


def test_a_key_is_found_in_body_header_and_uri() -> None:
    found = route("/log&node_key=k")
    assert node_key_of("k", {}, route("/log")) == "k"
    assert node_key_of(None, {"authorization": "NodeKey k"}, route("/log")) == "k"
    assert node_key_of("", {"authorization": "nodekey  k "}, route("/log")) == "k"
    assert node_key_of(None, {}, found) == "k"
    assert node_key_of("k", {"authorization": "NodeKey k"}, found) == "k"


def test_no_key_is_blank() -> None:
    assert node_key_of(None, {"authorization": "Bearer k"}, route("/log")) == ""
    assert node_key_of("", {}, route("/log?node_key=")) == ""


def test_keys_that_disagree_are_refused_and_not_repeated() -> None:
    """The key itself may be good, so the agent keeps it."""
    with pytest.raises(Refused) as caught:
        node_key_of("k-one", {"authorization": "NodeKey k-two"}, route("/log"))
    assert caught.value.reason == "key_conflict"
    assert not caught.value.node_invalid
    assert "k-" not in caught.value.message


def test_node_api_mode_is_config_by_get() -> None:
    found = route("/the-key/api/v1/osquery/config&node_key=the-key")
    assert (found.first, dict(found.variables)) == ("the-key", {"node_key": "the-key"})
    assert is_node_api("GET", found)
    assert not is_node_api("POST", found)
    assert not is_node_api("GET", route("/log"))


# answers


def test_a_success_says_so() -> None:
    assert json.loads(success(node_key="k").body) == {"node_key": "k", "node_invalid": False}


def test_a_failure_has_an_error_and_names_the_key_only_when_it_is_at_fault() -> None:
    answer = failure(Refused("why", "because", status=418))
    assert json.loads(answer.body) == {"error": "because", "reason": "why"}
    assert (answer.status, answer.content_type) == (418, "application/json")
    assert json.loads(failure(Refused("why", "because", node_invalid=True)).body)["node_invalid"] is True


def test_a_config_is_wrapped_in_node_api_mode_only() -> None:
    text = b'{"schedule":{"q":{"query":"select \'\xc3\xa9\'"}}}'
    assert config_response(text, node_api=False).body == text
    assert json.loads(config_response(text, node_api=True).body) == {"config": text.decode()}


@given(st.binary(), st.binary())
def test_a_digest_names_operation_and_body(one: bytes, other: bytes) -> None:
    assert body_digest("log", one) == body_digest("log", one)
    assert (body_digest("log", one) == body_digest("log", other)) == (one == other)
    assert body_digest("log", one) != body_digest("enroll", one)
