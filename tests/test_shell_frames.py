"""The frames both ends of a shell share: vectors that fix the bytes, and properties that fix everything else."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox import shell_frames as frames
from osqbox.shell_frames import (
    AgentHello,
    AgentWelcome,
    CloseCode,
    Error,
    Exit,
    Frame,
    FrameError,
    FrameType,
    Role,
    Size,
    ViewerHello,
    ViewerWelcome,
)

VECTORS = [
    (frames.data_out(258, b"hi\xff"), "01 00 0000000000000102 6869ff"),
    (frames.data_in(0, b"\x03"), "02 00 0000000000000000 03"),
    (frames.resize(Size(80, 24, 640, 480)), "03 00 0000000000000000 0050 0018 0280 01e0"),
    (frames.ack(2**63 - 1), "04 00 7fffffffffffffff"),
    (frames.eof_in(7), "05 00 0000000000000007"),
    (frames.exit_frame(Exit(code=7, reason="exit"), 9), "06 00 0000000000000009" + b'{"code":7,"reason":"exit"}'.hex()),
    (frames.role(Role(want="viewer")), "07 00 0000000000000000" + b'{"want":"viewer"}'.hex()),
    (frames.title("vim"), "08 00 0000000000000000 76696d"),
    (frames.ping(5), "09 00 0000000000000005"),
    (frames.pong(frames.ping(5)), "0a 00 0000000000000005"),
    (frames.error("quota", "too many"), "0b 00 0000000000000000" + b'{"code":"quota","message":"too many"}'.hex()),
    (Frame(FrameType.SNAPSHOT, 3, b"\x1bc"), "0c 00 0000000000000003 1b63"),
    (frames.reset(1, 2), "0d 00 0000000000000002 0000000000000001 0000000000000002"),
]


@pytest.mark.parametrize(
    ("frame", "encoded"), VECTORS, ids=lambda value: getattr(value, "type", None) and value.type.name
)
def test_the_bytes_are_these(frame: Frame, encoded: str) -> None:
    data = bytes.fromhex(encoded)
    assert frames.encode(frame) == data
    assert frames.decode(data) == frame


def test_every_type_has_a_vector() -> None:
    assert {frame.type for frame, _ in VECTORS} | {FrameType.HELLO} == set(FrameType)


any_frame = st.builds(
    Frame,
    st.sampled_from(FrameType),
    st.integers(0, frames.OFFSET_MAX - 4096),
    st.binary(max_size=4096),
    st.integers(0, 255),
)


@given(any_frame)
def test_a_frame_survives_the_wire(frame: Frame) -> None:
    assert frames.decode(frames.encode(frame)) == frame


@given(st.one_of(st.binary(max_size=200), st.text(max_size=50)))
def test_anything_else_is_a_frame_error_with_a_legal_close_code(message: bytes | str) -> None:
    try:
        frame = frames.decode(message)
    except FrameError as wrong:
        code = wrong.code
    else:
        assert frames.encode(frame) == message
        return
    assert code in (CloseCode.PROTOCOL_ERROR, CloseCode.UNSUPPORTED_DATA)


@given(st.sampled_from([*FrameType]), st.binary(max_size=200))
def test_payloads_are_parsed_or_refused(kind: FrameType, payload: bytes) -> None:
    frame = Frame(kind, 0, payload)
    messages = (AgentHello, AgentWelcome, ViewerHello, ViewerWelcome, Exit, Role, Error)
    readers = [frames.parse_resize, frames.parse_reset, *((lambda f, m=m: frames.parse(f, m)) for m in messages)]
    for read in readers:
        with suppress(FrameError):
            read(frame)
    frames.parse_title(frame)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("0text", CloseCode.UNSUPPORTED_DATA),
        (b"", CloseCode.PROTOCOL_ERROR),
        (b"\x01\x00", CloseCode.PROTOCOL_ERROR),
        (b"\x00" + bytes(9), CloseCode.PROTOCOL_ERROR),
        (b"\x0f" + bytes(9), CloseCode.PROTOCOL_ERROR),
        (b"\x01\x00" + b"\xff" * 8, CloseCode.PROTOCOL_ERROR),
        (b"\x01\x00\x7f" + b"\xff" * 7 + b"x", CloseCode.PROTOCOL_ERROR),
        (b"\x01" + bytes(1024), CloseCode.TOO_BIG),
    ],
)
def test_bad_messages_and_what_they_are_closed_with(message: bytes | str, code: CloseCode) -> None:
    with pytest.raises(FrameError) as refused:
        frames.decode(message, limit_bytes=1024)
    assert refused.value.code is code


def test_offsets_that_do_not_fit_are_not_sent() -> None:
    for offset in (-1, 2**63):
        with pytest.raises(FrameError):
            frames.encode(frames.ack(offset))


text = st.text(max_size=50)
offset = st.integers(0, frames.OFFSET_MAX)
cells = st.integers(0, 0xFFFF)


@given(
    st.one_of(
        st.builds(AgentHello, session=text, secret=text, resume=st.none() | text, head=offset, input=offset),
        st.builds(AgentWelcome, session=text, resume=text, wanted=offset, input=offset,
                  window_bytes=st.integers(1, 2**31), cols=cells, rows=cells, idle_s=st.none() | st.floats(0, 1e6)),
        st.builds(ViewerHello, client=text, resume=st.none() | offset, role=st.none() | text, cols=cells, rows=cells),
        st.builds(ViewerWelcome, session=text, node=text, hostname=text, role=text, offset=offset, floor=offset,
                  head=offset, window_bytes=st.integers(1, 2**31), cols=cells, rows=cells, input=offset,
                  recording=st.booleans(), state=text),
    )
)  # fmt: skip
def test_hellos_survive_the_wire(message: AgentHello | AgentWelcome | ViewerHello | ViewerWelcome) -> None:
    assert frames.parse(frames.decode(frames.encode(frames.hello(message))), type(message)) == message


def test_what_is_wrong_with_json_is_told_without_quoting_it() -> None:
    hello = Frame(FrameType.HELLO, 0, msgspec.json.encode({"session": "s", "secret": ["hunter2"]}))
    with pytest.raises(FrameError, match="secret") as refused:
        frames.parse(hello, AgentHello)
    assert "hunter2" not in str(refused.value)


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_sizes_are_clamped(cols: int, rows: int) -> None:
    size = frames.parse_resize(frames.resize(Size(cols, rows)))
    assert 1 <= size.cols <= frames.CELLS_MAX
    assert 1 <= size.rows <= frames.CELLS_MAX


@given(st.text())
def test_titles_hold_nothing_a_terminal_obeys(title: str) -> None:
    clean = frames.parse_title(frames.title(title))
    assert clean.isprintable()
    assert len(clean.encode()) <= frames.TITLE_BYTES


def test_a_title_keeps_what_is_harmless() -> None:
    assert frames.clean_title("\x1b]52;c;ZXZpbA==\x07vi\x9bm – \u202eüß\n") == "]52;c;ZXZpbA==vim – üß"


@given(st.binary(min_size=1, max_size=200), st.data())
def test_bytes_sent_twice_count_once(stream: bytes, data: st.DataObject) -> None:
    """However a stream is cut and repeated, without gaps, it arrives as it was."""
    have = b""
    while len(have) < len(stream):
        start = data.draw(st.integers(0, len(have)))
        end = data.draw(st.integers(start, len(stream)))
        have += frames.unseen(frames.data_in(start, stream[start:end]), len(have))
        have += frames.unseen(frames.data_in(len(have), stream[len(have) : len(have) + 1]), len(have))
    assert have == stream


def test_a_gap_is_refused() -> None:
    with pytest.raises(FrameError, match="expected offset 3 or less, got 4"):
        frames.unseen(frames.data_out(4, b"x"), 3)
