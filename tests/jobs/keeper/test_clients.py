"""Boxes at the keeper's socket: they come and go, stall and babble; the job does not notice."""

from __future__ import annotations

import base64
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from osqbox.jobs.keeper import wire


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def connect(kept: Any) -> socket.socket:
    fd = os.open(kept.directory, os.O_RDONLY)
    try:
        return wire.connect(fd)
    finally:
        os.close(fd)


def test_a_client_that_comes_back_is_told_where_things_stand(keepers: Any) -> None:
    kept = keepers.run("echo up; read line; echo $line; exit 6", stdin=True).until_output(b"up")
    kept.reconnect()
    message = kept.next()
    assert (message["status"]["state"], message["status"]["output_bytes"]) == ("running", 3)
    kept.reconnect()
    assert kept.ask("input", data=b64(b"again\n"))["ok"]
    assert kept.end()["exit_code"] == 6
    assert kept.output == b"up\nagain\n"
    with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
        connect(kept)


def test_all_clients_are_told_the_end(keepers: Any) -> None:
    kept = keepers.run("read line; exit 2", stdin=True).until_running()
    others = [connect(kept) for _ in range(5)]
    kept.ask("input", data=b64(b"\n"))
    assert kept.end()["exit_code"] == 2
    for other in others:
        other.settimeout(5)
        data = b""
        while piece := other.recv(65536):
            data += piece
        assert list(wire.Lines().feed(data))[-1]["ended"]["exit_code"] == 2
        other.close()


def test_nobody_connected_loses_nothing(keepers: Any) -> None:
    kept = keepers.run("echo up; sleep 0.3; echo done; exit 9").until_output(b"up")
    kept.sock.close()
    deadline = time.monotonic() + 10
    while (kept.directory / "socket").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert b'"exit_code":9' in (kept.directory / "status.json").read_bytes()
    assert kept.output == b"up\ndone\n"
    kept.status["ended_at"] = 1


def test_a_client_that_does_not_read_holds_up_nobody(keepers: Any) -> None:
    """Neither the job nor another client, though 20,000 calls of it want answers."""
    kept = keepers.run("echo up; read x; head -c 50000000 /dev/zero; exit 1", stdin=True).until_output(b"up")
    stalled = connect(kept)
    calls = wire.encode({"call": 1, "do": "status"}) * 20_000
    stalled.setblocking(False)
    try:
        while calls:
            calls = calls[stalled.send(calls) :]
    except BlockingIOError:
        pass
    assert calls  # its own calls wait by now
    kept.ask("input", data=b64(b"\n"))
    started = time.monotonic()
    assert kept.end()["output_bytes"] == 50_000_003
    assert time.monotonic() - started < 10
    stalled.close()


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\n",
        b"[]\n",
        b"{\n",
        b"\xff\xfe\n",
        b"x" * 200_000,
        b"[" * 90_000 + b"\n",
        b'{"call":1,"do":"input","data":"' + b"A" * 200_000,
    ],
)
def test_nonsense_costs_the_client_its_connection_and_no_more(keepers: Any, nonsense: bytes) -> None:
    kept = keepers.run("sleep 60").until_running()
    other = connect(kept)
    other.settimeout(5)
    try:
        other.sendall(nonsense)
        while other.recv(65536):
            pass
    except (ConnectionError, BrokenPipeError):
        pass
    other.close()
    assert kept.ask("status")["status"]["state"] == "running"


def test_calls_that_make_no_sense_get_an_error(keepers: Any) -> None:
    kept = keepers.run("sleep 60", stdin=True).until_running()
    for do, words in (
        ("dance", {}),
        ("stop", {"signal": "TERM"}),
        ("stop", {"grace_s": "soon"}),
        ("input", {"data": "*"}),
        ("input", {"data": b64(bytes(49 * 1024))}),
    ):
        answer = kept.ask(do, **words)
        assert (answer["error"], bool(answer["message"])) == ("INVALID", True)
    assert kept.status["state"] == "running"


def test_more_clients_than_there_is_room_for(keepers: Any) -> None:
    kept = keepers.run("sleep 60").until_running()
    others = []
    try:
        for _ in range(40):
            others.append(connect(kept))
            kept.ask("status")  # by its answer the one before was let in or turned away
    except BlockingIOError:
        pass
    assert kept.ask("status")["ok"]
    for other in others:
        other.close()
    assert kept.ask("stop", signal=9)["ok"]
    kept.end()


# input


def test_input_of_any_size_and_its_end(keepers: Any) -> None:
    """An answer comes when the pipe took the bytes: a job that does not read holds its sender back."""
    data = os.urandom(1_000_000)
    kept = keepers.run("sleep 0.2; cat", stdin=True).until_running()
    pieces = [data[at : at + wire.MAX_INPUT_BYTES] for at in range(0, len(data), wire.MAX_INPUT_BYTES)]
    for number, piece in enumerate(pieces):
        assert kept.ask("input", data=b64(piece), eof=number == len(pieces) - 1)["ok"]
    assert kept.end()["exit_code"] == 0
    assert kept.output == data


def test_a_job_that_does_not_read_holds_back_only_its_input(keepers: Any) -> None:
    kept = keepers.run("trap 'exit 3' TERM; echo up; while :; do sleep 0.02; done", stdin=True).until_output(b"up")
    for _ in range(40):
        kept.send("input", data=b64(bytes(48 * 1024)))
    refused = kept.until(lambda message: "error" in message)
    assert refused["error"] == "INPUT_QUEUE_FULL"
    assert kept.ask("status")["ok"]
    last = kept.send("stop")
    answers = {}
    while "ended" not in (message := kept.next()):
        answers[message.get("call")] = message
    assert answers[last]["ok"]
    assert any(answer.get("error") in ("NOT_RUNNING", "STDIN_CLOSED") for answer in answers.values())
    assert message["ended"]["exit_code"] == 3


def test_stdin_that_is_not_there(keepers: Any) -> None:
    kept = keepers.run("sleep 60").until_running()
    assert kept.ask("input", data=b64(b"x"))["error"] == "STDIN_NOT_OPEN"
    kept = keepers.run("exec <&-; echo closed; sleep 60", stdin=True).until_output(b"closed")
    assert kept.ask("input", data=b64(b"x"))["error"] == "STDIN_CLOSED"
    assert kept.ask("input", data="", eof=True)["error"] == "STDIN_CLOSED"


def test_half_close(keepers: Any) -> None:
    kept = keepers.run("cat; echo after; sleep 60", stdin=True).until_running()
    assert kept.ask("input", data=b64(b"all "), eof=True)["ok"]
    kept.until_output(b"all after\n")
    assert kept.ask("input", data=b64(b"late"))["error"] == "STDIN_CLOSED"
    kept.ask("stop", signal=9)
    assert kept.end()["signal"] == 9


def test_after_the_end_calls_are_refused(keepers: Any) -> None:
    """While a spared child still holds the pipes."""
    kept = keepers.run("sleep 60 & echo up", keep_leftovers=True, stdin=True).until_output(b"up")
    while kept.ask("suspend").get("error") != "NOT_RUNNING":
        kept.ask("resume")
    for do in ("signal", "resume", "input"):
        assert kept.ask(do, signal=10, data="")["error"] == "NOT_RUNNING"
    started = time.monotonic()
    assert kept.ask("stop")["ok"]  # ends what was spared
    ended = kept.end()
    assert time.monotonic() - started < 1.5
    assert (ended["exit_code"], kept.family()) == (0, set())


# time


def test_growth_is_told_soon_and_not_too_often(keepers: Any) -> None:
    kept = keepers.run("while read x; do echo $x; done", stdin=True).until_running()
    latencies = []
    for number in range(50):
        started = time.monotonic()
        kept.send("input", data=b64(b"x\n"))
        kept.until(lambda message, wanted=2 * (number + 1): message.get("grew", [0])[0] == wanted)
        latencies.append(time.monotonic() - started)
    assert statistics.median(latencies) < 0.02
    kept.ask("input", eof=True)
    kept.end()
    noisy = keepers.run(command="dd", args=["if=/dev/zero", "bs=100", "count=20000", "status=none"])
    started, messages = time.monotonic(), 0
    while "ended" not in noisy.next():
        messages += 1
    assert messages < 10 + (time.monotonic() - started) / 0.004


def test_a_flood_leaves_time_for_questions(keepers: Any) -> None:
    kept = keepers.run("cat /dev/zero", max_output_bytes=16 * 1024 * 1024).until_running()
    waits = []
    before = kept.ask("status")["status"]["output_bytes"]
    for _ in range(40):
        started = time.monotonic()
        kept.ask("status")
        waits.append(time.monotonic() - started)
        time.sleep(0.01)
    after = kept.ask("status")["status"]["output_bytes"]
    started = time.monotonic()
    kept.ask("stop", signal=9)
    kept.end()
    assert time.monotonic() - started < 1
    assert after - before > 20_000_000
    assert statistics.median(waits) < 0.05
    assert (kept.directory / "output").stat().st_blocks * 512 < 24 * 1024 * 1024


def test_the_socket_of_a_deep_directory(keepers: Any, tmp_path: Path) -> None:
    """Paths of sockets end at 108 bytes; this one is longer."""
    directory = tmp_path / ("d" * 120) / "job"
    directory.parent.mkdir()
    kept = keepers.run("sleep 60", directory=directory).until_running()
    assert len(str(directory / "socket")) > 108
    kept.reconnect()
    assert kept.ask("stop", signal=9)["ok"]
    kept.end()


def test_spawn_says_when_the_zygote_is_gone(keepers: Any, tmp_path: Path) -> None:
    ours, theirs = wire.zygote_sockets()
    theirs.close()
    fd = os.open(tmp_path, os.O_RDONLY)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        wire.spawn(ours, {"id": "x" * 32}, fd)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    os.close(fd)
    ours.close()
