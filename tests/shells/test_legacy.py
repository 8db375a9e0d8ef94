"""Launcher's text frames and GoTTY's tables."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox import shell_legacy as legacy
from osqbox.shell_frames import CELLS_MAX, Size
from osqbox.shell_legacy import AgentFrame, BrokerFrame, Gotty, InputSplitter, LegacyError

LARGEST_OUTPUT_FRAME_CHARS = 2733


def test_what_the_launcher_says() -> None:
    assert legacy.decode_agent("0secret") == (AgentFrame.AUTHENTICATE, "secret")
    assert legacy.decode_agent("3/bin/bash@host") == (AgentFrame.TITLE, "/bin/bash@host")
    assert legacy.decode_agent("1aGk=") == (AgentFrame.OUTPUT, "aGk=")
    assert legacy.decode_output("aGk=") == b"hi"
    assert legacy.decode_agent("2") == (AgentFrame.PONG, "")
    assert legacy.decode_agent('4{"a":1}') == (AgentFrame.PREFERENCES, '{"a":1}')
    assert legacy.decode_agent("5") == (AgentFrame.RECONNECT, "")


def test_what_we_say_to_it() -> None:
    assert legacy.ping() == "2"
    assert legacy.resize(Size(132, 50)) == '3{"columns": 132, "rows": 50}'
    assert InputSplitter().frames(b"ls\r") == ["1ls\r"]


def test_the_largest_output_of_a_launcher() -> None:
    assert len(legacy.output(bytes(legacy.OUTPUT_BYTES))) == LARGEST_OUTPUT_FRAME_CHARS


@given(st.binary(max_size=5000))
def test_output_survives_the_wire(data: bytes) -> None:
    kind, payload = legacy.decode_agent(legacy.output(data))
    assert kind is AgentFrame.OUTPUT
    assert legacy.decode_output(payload) == data


@given(st.text(max_size=100))
def test_agents_frames_are_read_or_refused(message: str) -> None:
    try:
        kind, payload = legacy.decode_agent(message)
        if kind is AgentFrame.OUTPUT:
            legacy.decode_output(payload)
    except LegacyError:
        return
    assert message == kind + payload


@pytest.mark.parametrize("message", ["", "9x", "é", "\x00"])
def test_unknown_types_are_refused(message: str) -> None:
    with pytest.raises(LegacyError):
        legacy.decode_agent(message)


@pytest.mark.parametrize("payload", ["a", "aGk", "aG k=", "aGk=\n", "é", "%%%%"])
def test_bad_base64_is_refused(payload: str) -> None:
    with pytest.raises(LegacyError):
        legacy.decode_output(payload)


@given(st.lists(st.binary(max_size=5000), max_size=5))
def test_input_is_cut_at_characters_and_nothing_is_lost(pieces: list[bytes]) -> None:
    """Whatever is UTF-8 arrives whole, however it comes in; a started character at the end waits."""
    splitter = InputSplitter()
    sent = [frame for piece in pieces for frame in splitter.frames(piece)]
    assert all(frame[0] == BrokerFrame.INPUT and 1 <= len(frame[1:].encode()) <= 2047 for frame in sent)
    whole = b"".join(pieces).decode("utf-8", "replace")
    arrived = "".join(frame[1:] for frame in sent)
    assert whole.startswith(arrived)
    assert set(whole[len(arrived) :]) <= {"\ufffd"}


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=3000), st.integers(1, 7))
def test_a_paste_of_text_arrives_whole(text: str, step: int) -> None:
    data, splitter = text.encode(), InputSplitter()
    frames = [frame for start in range(0, len(data), step) for frame in splitter.frames(data[start : start + step])]
    assert "".join(frame[1:] for frame in frames) == text


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(4, 10))
def test_pieces_are_never_empty_nor_too_long(text: str, limit: int) -> None:
    pieces = legacy.split_text(text, limit)
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= limit for piece in pieces)


@given(st.integers(), st.integers())
def test_resizes_are_always_good_json(cols: int, rows: int) -> None:
    kind, payload = legacy.decode_broker(legacy.resize(Size(cols, rows)))
    assert kind is BrokerFrame.RESIZE
    members = json.loads(payload)
    assert set(members) == {"columns", "rows"}
    assert all(1 <= value <= CELLS_MAX for value in members.values())
    assert legacy.decode_resize(payload) == Size(members["columns"], members["rows"])


@pytest.mark.parametrize(
    ("payload", "size"),
    [
        ('{"columns":80,"rows":24}', Size(80, 24)),
        ('{"Columns":80.9,"ROWS":24.1,"x":null}', Size(80, 24)),
        ('{"columns":1e4,"rows":-3}', Size(1000, 1)),
    ],
)
def test_resizes_as_go_reads_them(payload: str, size: Size) -> None:
    assert legacy.decode_resize(payload) == size


@pytest.mark.parametrize(
    "payload",
    ["", "{}x", "[]", "null", "3", '{"columns":"80"}', '{"columns":true}', '{"columns":1e999}', "[" * 10**5],
)
def test_resizes_that_end_a_session(payload: str) -> None:
    with pytest.raises(LegacyError):
        legacy.decode_resize(payload)


def test_what_the_agent_ignores_and_what_ends_it() -> None:
    assert legacy.decode_broker("7x") == (None, "x")
    assert legacy.decode_broker('{"Arguments":"","AuthToken":""}')[0] is None
    with pytest.raises(LegacyError):
        legacy.decode_broker("")


def test_gotty_tables() -> None:
    v1, v2 = legacy.GOTTY_V1, legacy.GOTTY_V2
    assert v2.decode("1ls\r") == v1.decode("0ls\r") == (Gotty.INPUT, "ls\r")
    assert v2.decode("2") == v1.decode("1") == (Gotty.PING, "")
    assert v2.decode('3{"columns":1,"rows":1}')[0] is v1.decode("2{}")[0] is Gotty.RESIZE
    assert v2.decode("4base64") == (Gotty.SET_ENCODING, "base64")
    assert v2.output(b"hi") == "1aGk="
    assert v1.output(b"hi") == "0aGk="
    assert (v2.encode(Gotty.PONG), v1.encode(Gotty.PONG)) == ("2", "1")
    assert (v2.encode(Gotty.TITLE, "t"), v1.encode(Gotty.TITLE, "t")) == ("3t", "2t")
    for table in (v1, v2):
        with pytest.raises(LegacyError):
            table.decode("9")
        with pytest.raises(LegacyError):
            table.decode("")
