"""Input on its way: in order, once, at a bounded rate, and everybody is told what became of theirs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.shell_frames import DATA_BYTES, INPUT_WINDOW_BYTES, FrameError, FrameType, unseen
from osqbox.shells.keyboard import Client, Keyboard
from osqbox.shells.messages import ShellBounds

FAST = ShellBounds(input_burst_bytes=2**30)

steps = st.lists(
    st.one_of(
        st.tuples(st.just("type"), st.integers(0, 2), st.binary(min_size=1, max_size=20)),
        st.tuples(st.just("ignore"), st.integers(0, 2), st.binary(min_size=1, max_size=20)),
        st.tuples(st.sampled_from(["send", "ack", "lose"]), st.integers(0, 40), st.just(b"")),
    ),
    max_size=40,
)


@given(steps)
def test_everything_typed_arrives_once_and_in_order(steps: list[Any]) -> None:
    """Over lost connections too; and a client is never told that more arrived than did."""
    keyboard, clients = Keyboard(FAST, 0.0), [Client(), Client(), Client()]
    typed = b""
    owners: list[tuple[int, int]] = []  # of every byte typed: whose, and which of theirs
    agent = b""

    def send() -> None:
        nonlocal agent
        frame = keyboard.next(0.0)
        if frame is not None:
            agent += unseen(frame, len(agent))

    for what, number, data in steps:
        match what:
            case "type":
                owners += [(number, clients[number].received + index) for index in range(len(data))]
                keyboard.type(data, clients[number])
                typed += data
            case "ignore":
                keyboard.ignore(len(data), clients[number])
            case "send":
                send()
            case "ack":
                keyboard.arrived(min(len(agent), keyboard.acked + number))
            case "lose":
                keyboard.resume(len(agent))
        assert keyboard.acked <= keyboard.sent <= keyboard.head == len(typed)
        for index, client in enumerate(clients):
            missing = [own for owner, own in owners[keyboard.acked :] if owner == index]
            assert client.acked <= min(missing, default=client.received)
    while keyboard.sent < keyboard.head:
        send()
    keyboard.arrived(keyboard.sent)
    assert agent == typed
    assert all(client.acked == client.received for client in clients)


def test_no_more_than_a_window_is_under_way() -> None:
    keyboard = Keyboard(FAST, 0.0)
    keyboard.type(bytes(INPUT_WINDOW_BYTES + 5), Client())
    sent = 0
    while frame := keyboard.next(0.0):
        assert len(frame.payload) <= DATA_BYTES
        sent += len(frame.payload)
    assert sent == INPUT_WINDOW_BYTES
    keyboard.arrived(5)
    assert len(keyboard.next(0.0).payload) == 5  # type: ignore[union-attr]


def test_the_rate_delays_and_never_cuts() -> None:
    keyboard = Keyboard(ShellBounds(input_bytes_per_s=1000, input_burst_bytes=500), 0.0)
    keyboard.type(bytes(2000), Client())
    got, now = 0, 0.0
    while got < 2000:
        frame = keyboard.next(now)
        if frame is None:
            assert keyboard.is_rationed
            now += keyboard.ration_s
        else:
            got += len(frame.payload)
    assert now == pytest.approx(1.5)


def test_the_end_of_input_comes_after_it() -> None:
    keyboard = Keyboard(FAST, 0.0)
    keyboard.type(b"abc", Client())
    keyboard.end_of_input()
    kinds = [frame.type for frame in iter(lambda: keyboard.next(0.0), None)]
    assert kinds == [FrameType.DATA_IN, FrameType.EOF_IN]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_bracketed_paste_is_noticed_however_it_is_cut(cut: int) -> None:
    keyboard, client = Keyboard(FAST, 0.0), Client()
    begin, end = b"x\x1b[200~abc", b"def\x1b[201~y"
    for data, pasting in ((begin, True), (end, False)):
        keyboard.type(data[:cut], client)
        keyboard.type(data[cut:], client)
        assert keyboard.is_pasting is pasting


def test_what_was_never_sent_cannot_arrive() -> None:
    keyboard = Keyboard(FAST, 0.0)
    keyboard.type(b"abc", Client())
    for confirm in (keyboard.arrived, keyboard.resume):
        with pytest.raises(FrameError, match="got 1"):
            confirm(1)
