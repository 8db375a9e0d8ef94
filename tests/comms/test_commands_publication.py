"""What publishers send, in three shapes, and what they are told when it is none of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.comms.errors import CommsError
from osqbox.comms.messages import Action, KnownCommand
from osqbox.comms.publication import (
    ARGS_BYTES,
    EXPIRY_DEFAULT_S,
    SEEDED,
    Order,
    check_known,
    parse_publication,
    read_publication,
)

RESTART = Action(name="restart", args={})


def order(**facts: Any) -> Order:
    return Order(**{"action": RESTART, **facts})


def g1(**facts: Any) -> dict[str, Any]:
    return {"commands": [{"target": {"type": "agent", "id": "a"}, "action": {"name": "restart"}, **facts}]}


SHAPES = [
    ({"agents": ["a", "b", "a"], "action": {"name": "restart"}}, order(agents=("a", "b"))),
    ({"agents": [], "groups": ["web"], "action": {"name": "restart", "version": None}}, order(groups=("web",))),
    ({"all": True, "action": {"name": "restart", "args": None}}, order(everyone=True)),
    ({"all": True, "action": {"name": "restart"}, "timeout": 9}, order(everyone=True, expires_in_s=9)),
    (
        {"agents": ["a"], "action": {"name": "x", "version": "2", "args": {"y": [1]}}, "timeout": 9, "expires_in": 1.5},
        order(agents=("a",), action=Action(name="x", version="2", args={"y": [1]}), expires_in_s=1.5),
    ),
    ({"command": "restart", "uuids": ["a"]}, order(agents=("a",))),
    ({"command": "restart", "UUID": "a"}, order(agents=("a",))),
    ({"command": "restart", "UUIDs": "all", "user": "ann", "source": "Engine"},
     order(everyone=True, user="ann", source="Engine")),
    ({"command": "x", "args": {"y": 1}, "uuids": ["a"]},
     order(agents=("a",), action=Action(name="x", args={"y": 1}))),
    ({"command": {"name": "x", "args": {"y": 1}}, "uuids": ["a"]},
     order(agents=("a",), action=Action(name="x", args={"y": 1}))),
    (g1(), order(agents=("a",))),
    (
        g1(document_id="d", order_id="o", request_id="r", source="Engine", user="u", timeout=100, status="pending",
           result=None),
        order(agents=("a",), document_id="d", request_id="r", source="Engine", user="u", expires_in_s=100),
    ),
    (g1(timeout=0, document_id=None), order(agents=("a",), expires_in_s=EXPIRY_DEFAULT_S)),
    (g1(target={"type": "group", "id": "web"}, document_id="d"), order(groups=("web",))),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), SHAPES)
def test_the_three_shapes(body: Any, expected: Order) -> None:
    assert read_publication(json.dumps(body).encode()).orders == (expected,)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[]", "body: expected an object, got a list"),
        ("{}", "body: expected a member action, command or commands, got nothing"),
        ("{", "body: expected JSON"),
        ('"\\ud800"', "body: expected JSON"),
        ("[" * 100_000, "body: expected JSON nested less deep"),
        (b"\xff{}", "body: expected JSON"),
        ({"action": {"name": "x"}}, "expected agents, groups or all: true, got nobody to tell"),
        ({"action": {"name": "x"}, "agents": [], "all": False}, "got nobody to tell"),
        ({"action": {"name": "x"}, "all": "yes"}, 'all: expected true or false, got "yes"'),
        ({"action": {"name": "x"}, "agents": "a"}, 'agents: expected a list, got "a"'),
        ({"action": {"name": "x"}, "agents": ["a", 7]}, "agents[1]: expected a text of 1 to 256 printable characters"),
        ({"action": {"name": "x"}, "agents": ["a\n"]}, "agents[0]: expected a text"),
        ({"action": {"name": "x"}, "agents": ["a"] * 100_001}, "expected 1 to 100,000 entries, got 100,001"),
        ({"action": {"name": "x"}, "agents": ["a"], "timout": 9}, "got 'timout'"),
        ({"action": {"name": "x"}, "agents": ["a"], "timeout": -1}, "timeout: expected seconds, at most 31536000"),
        ({"action": {"name": "x"}, "agents": ["a"], "timeout": True}, "timeout: expected seconds"),
        ({"action": {"name": "x"}, "agents": ["a"], "expires_in": 1e300}, "expires_in: expected seconds"),
        ({"action": "restart", "agents": ["a"]}, 'action: expected an object, got "restart"'),
        ({"action": {"name": ""}, "agents": ["a"]}, "action.name: expected a text"),
        ({"action": {"name": "x", "args": [1]}, "agents": ["a"]}, "action.args: expected an object, got a list"),
        ({"action": {"name": "x", "args": {"y": "z" * ARGS_BYTES}}, "agents": ["a"]}, "expected at most 65536 bytes"),
        ({"command": "x"}, 'expected uuids, a list or "all", got command'),
        ({"command": "x", "uuids": ["a"], "UUIDs": ["b"]}, "expected uuids"),
        ({"command": {"name": "x"}, "args": {}, "uuids": ["a"]}, "args: expected them inside of command"),
        ({"commands": []}, "commands: expected 1 to 10,000 entries, got 0"),
        ({"commands": [7]}, "commands[0]: expected an object, got 7"),
        (g1(target={"type": "server", "id": "x"}), 'commands[0].target.type: expected agent or group, got "server"'),
        (g1(target=None), "commands[0].target: expected an object, got null"),
        (g1(action=None), "commands[0].action: expected an object, got null"),
        (g1(document_id=5), "commands[0].document_id: expected a text"),
        (g1(shell="sh"), "got 'shell'"),
    ],
)
def test_what_is_wrong_is_said(body: Any, message: str) -> None:
    sent = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    with pytest.raises(CommsError) as refused:
        read_publication(sent)
    assert message in refused.value.message
    assert refused.value.status == 400
    assert len(refused.value.message) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
members = ["action", "command", "commands", "agents", "groups", "all", "uuids", "UUIDs", "timeout", "target", "name"]
bodies = st.dictionaries(st.sampled_from(members), json_values | st.fixed_dictionaries({"name": json_values}))


@given(bodies | json_values)
def test_whatever_comes_is_a_publication_or_refused_in_words(body: Any) -> None:
    try:
        orders = parse_publication(body).orders
    except CommsError:
        return
    assert all(each.agents or each.groups or each.everyone for each in orders)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Action(name="rm"), "expected one of fetch-config, restart, set-group, upgrade, versed; got 'rm'"),
        (Action(name="upgrade", args={"file": "x"}), "command upgrade: expected args with file_name, got file"),
        (Action(name="versed", version="1", args={}), "command versed: expected version '2', got '1'"),
    ],
)
def test_only_known_commands_may_be_published(action: Action, message: str) -> None:
    known = [*SEEDED, KnownCommand(name="versed", version="2")]
    with pytest.raises(CommsError) as refused:
        check_known(action, known)
    assert message in refused.value.message
    check_known(Action(name="upgrade", version="9", args={"file_name": "x"}), known)
    check_known(Action(name="versed", version="2", args={}), known)
