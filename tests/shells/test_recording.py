"""What was printed is kept: byte for byte in the spool, as valid UTF-8 in the cast, with every gap marked."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import stat
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osqbox.shells import recording
from osqbox.shells.recording import BadRecording, Kept, Recorder, RecordingFailed, RecordingRules, read_cast

START = 1_700_000_000.25


def opened(directory: Path, now: float = START, **options) -> Recorder:
    options = {"rules": RecordingRules(reserve_bytes=0), **options}
    return Recorder.open(directory, cols=80, rows=24, now=now, shell="/bin/bash", title="web-1", **options)


def cast_lines(directory: Path) -> list[bytes]:
    return (directory / "cast").read_bytes().splitlines(keepends=True)


def events(directory: Path) -> list[recording.Event]:
    return list(read_cast(cast_lines(directory)).events)


def replayed(directory: Path) -> bytes:
    """The output as a replay with both files has it."""
    spool = (directory / "bytes").read_bytes()
    places = [event.spool for event in events(directory) if event.code == "o"]
    return b"".join(spool[place[0] : place[1]] for place in places if place)


def test_the_cast_is_asciicast_v3(tmp_path):
    """Header, intervals since the event before, and the codes, as the format's page has them."""
    with opened(tmp_path / "s") as recorder:
        recorder.output(b"\x1b[1mhi\x1b[0m\r\n", START + 1)
        recorder.resize(100, 30, START + 1.5)
        recorder.marker("alice joined\x1b]0;x\x07", START + 1.5)
        recorder.output("grüße".encode(), START + 3.000001)
        recorder.exit(7, START + 4)
    head, *lines = [json.loads(line) for line in cast_lines(tmp_path / "s")]
    assert head == {
        "version": 3,
        "term": {"cols": 80, "rows": 24, "type": "xterm-256color"},
        "timestamp": 1_700_000_000,
        "command": "/bin/bash",
        "env": {"SHELL": "/bin/bash"},
        "title": "web-1",
    }
    assert lines == [
        [1.0, "o", "\x1b[1mhi\x1b[0m\r\n"],
        [0.5, "r", "100x30"],
        [0.0, "m", "alice joined]0;x"],
        [1.500001, "o", "grüße"],
        [0.999999, "x", "7"],
    ]


def test_only_the_owner_can_read_it(tmp_path):
    with opened(tmp_path / "shells" / "s"):
        modes = [stat.S_IMODE((tmp_path / "shells" / "s" / name).stat().st_mode) for name in ("", "bytes", "cast")]
    assert modes == [0o700, 0o600, 0o600]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "bytes").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        opened(tmp_path / "s")
    assert not (tmp_path / "elsewhere").exists()


def test_everything_is_on_disk_when_the_call_returns(tmp_path):
    """Nobody has to flush or close: a killed box has lost nothing."""
    recorder = opened(tmp_path / "s")
    recorder.output(b"one", START + 1)
    assert (tmp_path / "s" / "bytes").read_bytes() == b"one"
    assert events(tmp_path / "s") == [recording.Event(1.0, "o", "one", (0, 3))]
    recorder.close()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_characters_split_anywhere_come_out_whole(tmp_path, size):
    text = "añ€😀 – ok"
    data = text.encode()
    with opened(tmp_path / "s") as recorder:
        for at in range(0, len(data), size):
            recorder.output(data[at : at + size], START + at)
    assert "".join(event.data for event in events(tmp_path / "s")) == text
    assert (tmp_path / "s" / "bytes").read_bytes() == replayed(tmp_path / "s") == data


def test_a_character_that_never_ends_is_told_at_the_exit(tmp_path):
    with opened(tmp_path / "s") as recorder:
        recorder.output(b"x\xf0\x9f", START + 1)
        recorder.exit(0, START + 2)
    assert [(event.code, event.data) for event in events(tmp_path / "s")] == [("o", "x"), ("o", "\ufffd"), ("x", "0")]
    assert replayed(tmp_path / "s") == b"x\xf0\x9f"


PIECES = st.lists(st.binary(max_size=12) | st.text(max_size=6).map(str.encode), max_size=12)


@given(pieces=PIECES, cut=st.integers(0, 12), torn=st.integers(0, 40))
def test_any_bytes_come_back_exactly_also_over_a_restart_with_a_torn_line(tmp_path_factory, pieces, cut, torn):
    """The cast is valid UTF-8, and says which bytes of the spool each event stands for."""
    directory = tmp_path_factory.mktemp("r") / "s"
    with opened(directory) as recorder:
        for number, piece in enumerate(pieces[:cut]):
            recorder.output(piece, START + number)
    whole = (directory / "cast").read_bytes()
    (directory / "cast").write_bytes(whole[: max(len(whole) - torn, 0)])
    with opened(directory, START + 100) as recorder:
        assert recorder.head == sum(map(len, pieces[:cut]))
        for number, piece in enumerate(pieces[cut:]):
            recorder.output(piece, START + 100 + number)
        recorder.exit(0, START + 200)
    data = b"".join(pieces)
    text = "".join(event.data for event in events(directory) if event.code == "o")
    assert (directory / "bytes").read_bytes() == data
    assert replayed(directory) == data
    assert text == data.decode("utf-8", "replace")


def test_time_goes_on_over_a_restart(tmp_path):
    with opened(tmp_path / "s") as recorder:
        recorder.output(b"a", START + 1)
    with opened(tmp_path / "s", START + 50) as recorder:
        recorder.output(b"b", START + 61)
    moments = [event.interval_s for event in events(tmp_path / "s")]
    assert sum(moments) == pytest.approx(61, abs=1)
    assert len(moments) == 2


def test_a_clock_set_back_gives_no_negative_interval(tmp_path):
    with opened(tmp_path / "s") as recorder:
        recorder.output(b"a", START + 10)
        recorder.output(b"b", START - 3600)
        recorder.output(b"c", START + 11)
    assert [event.interval_s for event in events(tmp_path / "s")] == [10, 0, 1]


def test_rounding_never_adds_up(tmp_path):
    with opened(tmp_path / "s") as recorder:
        for number in range(1, 10_001):
            recorder.output(b".", START + number / 3e4)
    assert sum(event.interval_s for event in events(tmp_path / "s")) == pytest.approx(10_000 / 3e4, abs=1e-5)


def test_input_is_kept_only_if_asked_and_hidden_while_nothing_is_echoed(tmp_path):
    for name, keep in (("no", False), ("yes", True)):
        with opened(tmp_path / name, keep_input=keep) as recorder:
            recorder.input(b"sudo ls\n", START)
            for key in b"secret\n":
                recorder.input(bytes([key]), START + 1, echo=False)
            recorder.input(b"q", START + 2)
    assert b"sudo" not in (tmp_path / "no" / "cast").read_bytes()
    kept = [(event.code, event.data) for event in events(tmp_path / "yes")]
    assert kept == [("i", "sudo ls\n"), ("i", "[masked]"), ("i", "q")]


class Disk:
    """Stands before `os.pwrite`: takes so many bytes, then says that it is full."""

    def __init__(self, monkeypatch, room_bytes: int) -> None:
        self.room_bytes = room_bytes
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self.pwrite)

    def pwrite(self, fd, data, offset):
        if self.room_bytes == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._pwrite(fd, memoryview(data)[: self.room_bytes], offset)
        self.room_bytes -= taken
        return taken


@pytest.mark.parametrize("room_bytes", [0, 1, 3, 6, 7, 20])
def test_a_full_disk_leaves_a_marked_gap_and_offsets_stay_true(tmp_path, monkeypatch, room_bytes):
    disk = Disk(monkeypatch, 10**9)
    with opened(tmp_path / "s") as recorder:
        recorder.output(b"before\xe2", START + 1)
        disk.room_bytes = room_bytes
        recorder.output(b"\x82\xaclost", START + 2)
        recorder.output(b"lost!!", START + 3)
        disk.room_bytes = 10**9
        recorder.output(b"after", START + 4)
        facts = recorder.facts()
        assert recorder.head == 24
    assert (facts.output_bytes, facts.lost_bytes, facts.lost_reason) == (24, 12, "disk_full")
    told = [(event.code, event.data) for event in events(tmp_path / "s")]
    assert told[0] == ("o", "before")
    assert told[-2:] == [("m", "12 bytes were not recorded: disk_full"), ("o", "after")]
    assert events(tmp_path / "s")[-1].spool == (19, 24)
    assert (tmp_path / "s" / "bytes").read_bytes()[19:] == b"after"


def test_a_strict_recording_ends_its_session_on_a_full_disk(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, 10**9)
    with opened(tmp_path / "s", rules=RecordingRules(strict=True, reserve_bytes=0)) as recorder:
        recorder.output(b"before", START + 1)
        disk.room_bytes = 2
        with pytest.raises(RecordingFailed, match="cannot go on") as failed:
            recorder.output(b"unseen", START + 2)
    assert failed.value.reason == "disk_full"
    assert replayed(tmp_path / "s") == b"before"


def test_the_disk_keeps_room_for_the_database(tmp_path):
    rules = RecordingRules(reserve_bytes=2**62)
    with opened(tmp_path / "s", rules=rules) as recorder:
        recorder.output(b"no room", START + 1)
        assert recorder.facts().lost_reason == "disk_full"
    assert (tmp_path / "s" / "bytes").read_bytes() == b""


def test_a_recording_has_a_largest_size(tmp_path):
    with opened(tmp_path / "s", rules=RecordingRules(max_bytes=10, reserve_bytes=0)) as recorder:
        for number in range(5):
            recorder.output(b"12345", START + number)
        recorder.exit(0, START + 9)
        assert recorder.facts() == recording.RecordingFacts(
            25, (tmp_path / "s" / "cast").stat().st_size, 15, "too_long"
        )
    assert replayed(tmp_path / "s") == b"1234512345"
    assert [event.data for event in events(tmp_path / "s")][-2:] == ["15 bytes were not recorded: too_long", "0"]


def test_what_was_recorded_can_be_read_while_it_goes_on(tmp_path):
    with opened(tmp_path / "s") as recorder:
        recorder.output(b"0123456789", START)
        assert [recorder.read(3, 4), recorder.read(8, 100), recorder.read(10, 1)] == [b"3456", b"89", b""]


# reading


def test_v2_has_times_since_the_start():
    cast = read_cast(
        [
            b'{"version": 2, "width": 90, "height": 30, "timestamp": 1504467315}\n',
            b'[0.25, "o", "a"]\n',
            b'[1.25, "m", ""]\n',
            b'[1.0, "o", "back"]\n',
            b'[2.0, "r", "80x24"]',
        ]
    )
    assert (cast.version, cast.cols, cast.rows) == (2, 90, 30)
    assert [(event.interval_s, event.code) for event in cast.events] == [(0.25, "o"), (1, "m"), (0, "o"), (0.75, "r")]


def test_comments_and_unknown_codes_are_passed_over_or_on():
    cast = read_cast([b'{"version":3,"term":{"cols":1,"rows":2}}\n', b"# hello\n", b"\n", b'[1, "z", "?"]\n'])
    assert [(event.code, event.spool) for event in cast.events] == [("z", None)]


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"[]", b"\xff", b'{"version":1}', b'{"version":4,"term":{"cols":1,"rows":1}}', b"[" * 100_000],
)
def test_what_is_no_recording_is_refused(line):
    with pytest.raises(BadRecording, match=r"line 1: expected the header of asciicast v2 or v3"):
        read_cast([line])


@pytest.mark.parametrize("term", ['"term":{}', '"term":[]', '"term":{"cols":"80","rows":24}', '"x":0'])
def test_a_header_without_a_size_is_refused(term):
    with pytest.raises(BadRecording, match="expected the terminal's size"):
        read_cast([b'{"version":3,%s}' % term.encode()])


@pytest.mark.parametrize(
    "line", [b"{}\n", b'["a", "o", "b"]\n', b'[1, "o"]\n', b'[1, "o", 2]\n', b'[1, "o", "\xff"]\n']
)
def test_a_damaged_line_is_named(line):
    cast = read_cast([b'{"version":3,"term":{"cols":1,"rows":2}}\n', line, b'[1, "o", "c"]\n'])
    with pytest.raises(BadRecording, match=r"line 2: expected \[time, code, text\]"):
        list(cast.events)


def test_a_line_that_a_crash_cut_off_is_the_end():
    cast = read_cast([b'{"version":3,"term":{"cols":1,"rows":2}}\n', b'[1, "o", "a"]\n', b'[1, "o", "bc'])
    assert [event.data for event in cast.events] == ["a"]


@given(garbage=st.lists(st.binary(max_size=60), max_size=6))
def test_no_file_makes_the_reader_fail_in_another_way(garbage):
    with suppress(BadRecording):
        list(read_cast([b'{"version":3,"term":{"cols":1,"rows":2}}\n', *garbage]).events)


# keeping


def test_the_oldest_go_first_when_they_no_longer_fit():
    kept = [Kept("old", 0, 1), Kept("big", 500, 60), Kept("new", 900, 50), Kept("newest", 990, 40)]
    assert recording.to_delete(kept, 1000, max_age_s=600, max_total_bytes=100) == ["old", "big"]
    assert recording.to_delete(kept, 1000, max_age_s=2000, max_total_bytes=1000) == []


def test_a_recording_is_removed_and_nothing_beside_it(tmp_path):
    with opened(tmp_path / "s") as recorder:
        recorder.output(b"x" * 10_000, START)
    assert recording.size_bytes(tmp_path / "s") >= 10_000
    (tmp_path / "s" / "note").touch()
    with pytest.raises(OSError, match=os.strerror(errno.ENOTEMPTY)):
        recording.delete(tmp_path / "s")
    (tmp_path / "s" / "note").unlink()
    recording.delete(tmp_path / "s")
    recording.delete(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert recording.size_bytes(tmp_path / "s") == 0


def test_the_digest_is_that_of_the_exact_output(tmp_path):
    data = random.Random(1).randbytes(100_000)
    with opened(tmp_path / "s") as recorder:
        recorder.output(data, START)
    assert recording.digest(tmp_path / "s") == hashlib.sha256(data).hexdigest()
