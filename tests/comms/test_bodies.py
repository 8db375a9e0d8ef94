"""Bodies of events: both dialects, every way to get them wrong, and the line that says where."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osqbox.comms import bodies
from osqbox.comms.bodies import Bad, RawEvent, ResultReport
from osqbox.comms.errors import CommsError
from osqbox.comms.messages import Operation, Profile, Result, StateChange

from ._events import agent, items, line_one, lines

HEADER = {"module": "logcollector", "collector": "file"}


def package(id: str, operation: str = "create", **more: Any) -> dict[str, Any]:
    return {"module": "inventory", "collector": "packages", "id": id, "operation": operation, **more}


# g1, stateless


def test_every_header_is_good_for_the_events_behind_it() -> None:
    body = lines(line_one(), HEADER, {"m": 1}, {"m": 2}, {"module": "fim"}, {"m": 3}) + b"\n"
    parsed = bodies.read_stateless(body)
    assert parsed.profile is Profile.G1
    assert parsed.claimed == ("a1",)
    assert parsed.facts["name"] == "web"
    assert parsed.events == [
        RawEvent(module="logcollector", collector="file", data={"m": 1}),
        RawEvent(module="logcollector", collector="file", data={"m": 2}),
        RawEvent(module="fim", data={"m": 3}),
    ]


def test_an_event_may_have_a_member_called_module() -> None:
    """A header holds header words only."""
    parsed = bodies.read_stateless(lines(line_one(), HEADER, {"module": "kernel", "message": "loaded"}))
    assert parsed.events[0].data == {"module": "kernel", "message": "loaded"}


def test_blank_lines_and_carriage_returns_do_not_matter_but_count() -> None:
    body = lines(line_one(), b"", HEADER, b"  ", {"m": 1}).replace(b"\n", b"\r\n") + b"\r\n\r\n"
    assert [event.data for event in bodies.read_stateless(body).events] == [{"m": 1}]
    with pytest.raises(CommsError, match=r"^line 7: expected JSON"):
        bodies.read_stateless(body + b"nonsense")


STATELESS_ERRORS = [
    (b"", "body: expected events as JSON, got nothing"),
    (b" \n ", "body: expected events as JSON, got nothing"),
    (lines(line_one(), HEADER), "body: expected at least one event, got none"),
    (lines(line_one(), {"m": 1}), 'line 2: expected a header such as {"module"'),
    (lines(line_one(), HEADER, {"m": 1}, b'{"m": 2'), "line 4: expected JSON"),
    (lines(line_one(), HEADER, {"m": 1}, b"[1]"), "line 4: expected a JSON object, got an array"),
    (lines(line_one(), HEADER, b'"text"'), "line 3: expected a JSON object, got a text"),
    (lines(line_one(), HEADER, b"null"), "line 3: expected a JSON object, got null"),
    (lines(line_one(), HEADER, b'{"m": "\xff"}'), "line 3: expected UTF-8"),
    (lines(line_one(), HEADER, b'{"m": NaN}'), "line 3: expected JSON"),
    (lines(line_one(), HEADER, b'{"m": ' + b"[" * 70 + b"]" * 70 + b"}"), "line 3: expected at most 64 levels"),
    (lines(line_one(), HEADER, b'{"m": ' + b"[" * 9000 + b"]" * 9000 + b"}"), "line 3: expected at most 64 levels"),
    (lines({"agent": {"name": "web"}}, HEADER, {"m": 1}), 'line 1: expected {"agent": {"id": ...}}'),
    (lines({"agent": {"id": 7}}, HEADER, {"m": 1}), "line 1: expected"),
    (b"hello", "line 1: expected JSON"),
    (b'{\n "m": 1,\n "n": oops\n}', "line 3: expected JSON"),
    (b'{"m": 1}\n{"m": 2}\n{"m": }', "line 3: expected JSON"),
    (b'{"m": 1}\n7', "line 2: expected a JSON object, got a number"),
    (b"7", "body: expected a JSON object, got a number"),
    (b"[1]", "event 1: expected a JSON object, got a number"),
    (b'{"events": [{"m": 1}, true]}', "event 2: expected a JSON object, got true"),
    (b"[]", "body: expected at least one event"),
    (b'{"events": []}', "body: expected at least one event"),
    (b'{"uuid": 7}', "event 1: expected the agent's uuid as a text, got a number"),
]


@pytest.mark.parametrize(("body", "message"), STATELESS_ERRORS, ids=range(len(STATELESS_ERRORS)))
def test_what_is_wrong_is_said_with_its_line(body: bytes, message: str) -> None:
    with pytest.raises(CommsError) as caught:
        bodies.read_stateless(body)
    assert caught.value.message.startswith(message)
    assert (caught.value.status, caught.value.code) in ((400, 2710), (400, 400))


def test_a_header_alone_is_g1_when_the_request_says_so() -> None:
    """One line cannot be told from an event that names its agent, but the agent's User-Agent can."""
    assert bodies.read_stateless(lines(line_one())).profile is Profile.SPIKE
    with pytest.raises(CommsError, match="at least one event"):
        bodies.read_stateless(lines(line_one()), profile=Profile.G1)


def test_bodies_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "LINES_MAX", 5)
    monkeypatch.setattr(bodies, "EVENTS_MAX", 2)
    too_large = [
        b"{}\n{}\n{}",
        json.dumps([{}] * 3).encode(),
        json.dumps({"events": [{}] * 3}).encode(),
        lines(line_one(), HEADER, {}, {}, {}),
        b"\n" * 5,
    ]
    for body in too_large[:4]:
        with pytest.raises(CommsError) as caught:
            bodies.read_stateless(body)
        assert (caught.value.status, "got 3" in caught.value.message) == (413, True)
    with pytest.raises(CommsError, match="at most 5 lines"):
        bodies.read_stateless(b"{}" + too_large[4])


# the spike


@pytest.mark.parametrize(
    "body",
    [
        b'[{"m": 1}, {"m": 2}]',
        b'{"events": [{"m": 1}, {"m": 2}]}',
        b'{"m": 1}\n{"m": 2}',
        b'\n{"m": 1}\r\n\r\n{"m": 2}\n',
        b'[\n {"m": 1},\n {"m": 2}\n]',
    ],
)
def test_the_shapes_of_several_events(body: bytes) -> None:
    parsed = bodies.read_stateless(body)
    assert parsed.profile is Profile.SPIKE
    assert [event.data for event in parsed.events] == [{"m": 1}, {"m": 2}]


def test_one_event_is_kept_as_it_was_sent() -> None:
    sent = {"module": "sshd", "collector": "journal", "id": "e1", "message": "Accepted"}
    assert bodies.read_stateless(json.dumps(sent, indent=1).encode()).events == [
        RawEvent(module="sshd", collector="journal", id="e1", data=sent)
    ]


def test_an_envelope_is_taken_off() -> None:
    sent = {"uuid": "a1", "module": "sshd", "id": "e1", "data": {"message": "Accepted"}}
    parsed = bodies.read_stateless(json.dumps(sent).encode())
    assert parsed.events == [RawEvent(module="sshd", id="e1", data={"message": "Accepted"})]
    assert parsed.claimed == ("a1",)


@pytest.mark.parametrize(
    "claim",
    [
        {"agent": "A1", "m": 1},
        {"agent": {"id": "A1"}, "m": 1},
        {"uuid": "A1", "m": 1},
        {"UUID": "A1", "m": 1},
        [{"m": 0}, {"uuid": "A1"}],
        {"uuid": "A1", "events": [{"m": 1}]},
    ],
)
def test_who_an_event_says_it_is_from_must_be_the_token(claim: Any) -> None:
    parsed = bodies.read_stateless(json.dumps(claim).encode())
    bodies.check_claims(parsed.claimed, "a1")  # UUIDs do not differ by case
    with pytest.raises(CommsError) as caught:
        bodies.check_claims(parsed.claimed, "a2")
    assert (caught.value.status, caught.value.reason) == (400, "wrong_identity")
    assert "expected the token's a2, got 'A1'" in caught.value.message


def test_g1_says_who_it_is_in_line_one() -> None:
    for read, more in ((bodies.read_stateless, (HEADER, {"m": 1})), (bodies.read_stateful, (package("p"), {"v": 1}))):
        with pytest.raises(CommsError, match="got 'a9'"):
            bodies.check_claims(read(lines(line_one("a9"), *more)).claimed, "a1")  # type: ignore[operator]


def test_nobody_is_claimed_when_nobody_is_named() -> None:
    assert bodies.read_stateless(b'[{"m": 1}, {"agent": {"name": "x"}}]').claimed == ()


# ids


def ids(body: bytes, key: str = "", uuid: str = "a1") -> list[str]:
    parsed = bodies.read_stateless(body)
    names = iter(["r1", "r2"])
    return [
        event.id for event in bodies.stored_events(parsed, agent(uuid), now=5.0, new_id=lambda: next(names), key=key)
    ]


def test_an_event_with_a_name_has_the_same_id_again() -> None:
    body = b'[{"id": "e1", "m": 1}, {"m": 2}]'
    first, second = ids(body), ids(body.replace(b": ", b":"))
    assert first == [second[0], "r1-1"]
    assert ids(b'[{"id": "e1", "m": 2}, {}]')[0] != first[0], "a name used twice for different things loses nothing"
    assert ids(body, uuid="a2")[0] != first[0], "another agent's e1 is another event"
    assert ids(lines(line_one(), {**HEADER, "id": "e1"}, {"m": 1})) == ids(
        lines(line_one(), {**HEADER, "id": "e1"}, {"m": 1})
    )


def test_under_a_key_every_event_has_the_same_id_again() -> None:
    body = b'[{"m": 1}, {"m": 1}, {"m": 2}]'
    first = ids(body, key="k1")
    assert first == ids(body, key="k1")
    assert len(set(first)) == 3, "equal events of one request are two events"
    assert not set(first) & set(ids(body, key="k2"))
    assert not set(first) & set(ids(body, key="k1", uuid="a2"))


def test_events_without_a_name_are_all_different() -> None:
    assert ids(b'[{"m": 1}, {"m": 1}]') == ["r1-0", "r1-1"]


# stateful


def test_operations_in_order() -> None:
    parsed = bodies.read_stateful(
        lines(
            line_one(),
            package("p1"),
            {"package": {"name": "vim"}},
            package("p2", "delete"),
            {"module": "fim", "id": "f1", "operation": "update"},
            {"file": {"path": "/etc/passwd"}},
            {"module": "command", "id": "c1", "operation": "update"},
            {"command": {"result": {"code": 0, "message": "done", "data": {"x": 1}}}},
        )
    )
    assert (parsed.profile, parsed.claimed) == (Profile.G1, ("a1",))
    assert parsed.items == [
        StateChange(
            index="wazuh-states-inventory-packages",
            id="p1",
            operation=Operation.CREATE,
            data={"package": {"name": "vim"}},
        ),
        StateChange(index="wazuh-states-inventory-packages", id="p2", operation=Operation.DELETE),
        StateChange(
            index="wazuh-states-fim", id="f1", operation=Operation.UPDATE, data={"file": {"path": "/etc/passwd"}}
        ),
        ResultReport(id="c1", result=Result(code=0, message="done", data={"x": 1})),
    ]


@pytest.mark.parametrize("collector", bodies.INVENTORY)
def test_every_collector_of_the_inventory_has_its_index(collector: str) -> None:
    parsed = bodies.read_stateful(lines(line_one(), {**package("p"), "collector": collector}, {"v": 1}))
    assert parsed.items[0].index == f"wazuh-states-inventory-{collector}"  # type: ignore[union-attr]


BAD_ITEMS = [
    ({**package("p"), "module": "inventroy"}, {"v": 1}, 1765, "line 2: module: expected one of command, fim"),
    ({**package("p"), "module": 7}, {"v": 1}, 1765, "line 2: module: expected one of"),
    ({**package("p"), "collector": "pakages"}, {"v": 1}, 1763, "line 2: collector: expected one of hardware"),
    ({**package("p"), "collector": None}, {"v": 1}, 1763, "line 2: collector: expected one of hardware"),
    (package("p", "upsert"), {"v": 1}, 2709, "line 2: operation: expected one of create, update, delete, got 'upsert'"),
    ({**package("p"), "id": ""}, {"v": 1}, 2709, "line 2: id: expected a text of 1 to 512 bytes, got 0 bytes"),
    ({**package("p"), "id": None}, {"v": 1}, 2709, "line 2: id: expected a text of 1 to 512 bytes, got none"),
    ({**package("p"), "id": "é" * 257}, {"v": 1}, 2709, "line 2: id: expected a text of 1 to 512 bytes, got 514 bytes"),
    (package("p"), None, 2709, "line 2: expected the data to create 'p' with, got none"),
    ({"module": "command", "id": "c", "operation": "update"}, {"v": 1}, 2709, "line 2: expected {"),
    ({"module": "command", "id": "c", "operation": "update"}, {"result": {"code": "0"}}, 2709, "line 2: expected {"),
    ({"module": "command", "id": "c", "operation": "delete"}, None, 2709, "line 2: operation: expected update"),
]


@pytest.mark.parametrize(("header", "data", "code", "message"), BAD_ITEMS, ids=range(len(BAD_ITEMS)))
def test_a_bad_item_is_one_bad_item(header: Any, data: Any, code: int, message: str) -> None:
    """The next operation is read as if nothing had been."""
    told = [header] if data is None else [header, data]
    parsed = bodies.read_stateful(lines(line_one(), *told, package("good"), {"v": 2}))
    bad, good = parsed.items
    assert isinstance(bad, Bad)
    assert (bad.code, bad.message[: len(message)]) == (code, message)
    assert good.id == "good"


STATEFUL_ERRORS = [
    (lines(line_one(), package("p"), b'{"v": '), "line 3: expected JSON"),
    (lines(line_one(), package("p"), b"[]"), "line 3: expected a JSON object, got an array"),
    (lines(line_one(), package("p"), {"v": 1}, {"v": 2}), "line 4: expected an operation's header"),
    (lines(line_one(), package("p", "delete"), {"v": 2}), "line 3: expected an operation's header"),
    (lines(line_one(), b"{}"), "line 2: expected an operation's header"),
    (b"[]", "body: expected at least one event"),
    (b"{", "body: expected JSON"),
]


@pytest.mark.parametrize(("body", "message"), STATEFUL_ERRORS, ids=range(len(STATEFUL_ERRORS)))
def test_lines_that_make_no_sense_are_refused_whole(body: bytes, message: str) -> None:
    with pytest.raises(CommsError) as caught:
        bodies.read_stateful(body)
    assert (caught.value.status, caught.value.code) == (400, 2709)
    assert caught.value.message.startswith(message)


def test_stateful_events_of_the_spike() -> None:
    events = [
        {"id": "s1", "data": {"v": 1}},
        {"id": "s2", "module": "sca", "operation": "create", "data": {"v": 2}},
        {"id": "s3", "module": "fim", "operation": "delete"},
        {"id": "c1", "module": "command", "data": {"result": {"code": 1, "message": "no"}}},
        {"id": "s4", "v": 4},
        {"v": 5},
        {"id": "s6"},
        {"id": "s7", "data": 7},
        {"id": "s8", "module": "nonsense", "data": {}},
    ]
    parsed = bodies.read_stateful(json.dumps(events).encode())
    assert parsed.profile is Profile.SPIKE
    kinds = [kind for kind, _ in items(parsed)]
    assert kinds == ["StateChange"] * 3 + ["ResultReport"] + ["StateChange"] * 2 + ["Bad"] * 3
    assert parsed.items[0] == StateChange(
        index="wazuh-states-custom", id="s1", operation=Operation.UPDATE, data={"v": 1}
    )
    assert parsed.items[3] == ResultReport(id="c1", result=Result(code=1, message="no"))
    assert parsed.items[4].data == {"v": 4}  # type: ignore[union-attr]
    assert parsed.items[5].id == bodies.read_stateful(b'{"v":5}').items[0].id, "known by its content"
    assert [item.message.split(",")[0] for item in parsed.items[6:]] == [  # type: ignore[union-attr]
        "event 7: expected the data to update 's6' with",
        "event 8: data: expected a JSON object",
        "event 9: module: expected one of command",
    ]


# any events there are

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
documents = st.dictionaries(texts, values, max_size=4).filter(
    lambda told: not told.keys() & (bodies.ENVELOPE_WORDS | {"events"})
)
# A busy machine is no failure.
patiently = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
words = st.text("abcxyz-", min_size=1, max_size=8)


@patiently
@given(st.lists(st.tuples(words, words, documents), min_size=1, max_size=8), st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
def test_what_is_written_as_g1_is_read_again(events: list[Any], newline: bytes) -> None:
    told: list[Any] = [line_one()]
    for module, collector, data in events:
        told += [{"module": module, "collector": collector}, data]
    parsed = bodies.read_stateless(lines(*told).replace(b"\n", newline))
    assert [(event.module, event.collector, event.data) for event in parsed.events] == events


@patiently
@given(st.lists(documents, min_size=1, max_size=8))
def test_what_is_written_as_the_spike_is_read_again(events: list[Any]) -> None:
    for body in (json.dumps(events).encode(), json.dumps({"events": events}).encode(), lines(*events)):
        parsed = bodies.read_stateless(body)
        assert [event.data for event in parsed.events] == events
        assert parsed.profile is Profile.SPIKE


operations = st.tuples(st.sampled_from(["create", "update", "delete"]), st.text("abc", min_size=1), documents)


@patiently
@given(st.lists(operations, min_size=1, max_size=8))
def test_operations_are_paired_with_their_own_data(told: list[Any]) -> None:
    wire: list[Any] = [line_one()]
    for operation, name, data in told:
        wire += [package(name, operation)] + ([data] if operation != "delete" else [])
    parsed = bodies.read_stateful(lines(*wire))
    read = [(item.operation, item.id, item.data) for item in parsed.items]  # type: ignore[union-attr]
    assert read == [(operation, name, None if operation == "delete" else data) for operation, name, data in told]


@patiently
@given(
    st.binary(max_size=200)
    | st.lists(
        st.sampled_from([b'{"agent":{"id":"a"}}', b'{"module":"fim","operation":"delete"}', b"{}", b"[", b"7", b""])
    ).map(b"\n".join)
)
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    statuses = set()
    for read in (bodies.read_stateless, bodies.read_stateful):
        for profile in (None, Profile.G1, Profile.SPIKE):
            try:
                read(body, profile=profile)
            except CommsError as error:
                statuses.add(error.status)
    assert statuses <= {400, 413}
