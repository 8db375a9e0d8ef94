"""Living boxes and their data directories: found while they live, swept when they are dead."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from osqbox import running
from osqbox.errors import AddressInUse, BadSetup
from osqbox.running import Registration, boxes, ephemeral_data_dir, locked_data_dir, write_private

BOX = """
import signal, sys, time
from pathlib import Path
from osqbox import running
with running.ephemeral_data_dir() as data, running.locked_data_dir(data):
    (data / "osqbox.db").write_text("x")
    registration = running.Registration(data, time.time())
    registration.update("ready", {"operator": "http://127.0.0.1:1", "token": "t"})
    print(data, flush=True)
    signal.pause()
"""


@pytest.fixture(autouse=True)
def _own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("OSQBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process with an ephemeral box, and its data directory."""
    process = subprocess.Popen([sys.executable, "-c", BOX], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    data = Path(process.stdout.readline().strip())
    yield process, data
    process.kill()
    process.communicate(timeout=10)


def test_a_living_box_is_found_and_a_closed_one_is_not(tmp_path: Path) -> None:
    registration = Registration(tmp_path / "data", 123.5)
    (found,) = boxes()
    assert (found.pid, found.state, found.data, found.started_at, found.ready) == (
        os.getpid(), "starting", tmp_path / "data", 123.5, None,
    )  # fmt: skip
    registration.update("ready", {"operator": "http://127.0.0.1:8080"})
    assert boxes()[0].ready == {"operator": "http://127.0.0.1:8080"}
    assert boxes(tmp_path / "data") == boxes()
    assert boxes(tmp_path / "elsewhere") == []
    registration.close()
    assert boxes() == []
    assert list(running.runtime_dir().iterdir()) == []


def test_the_newest_box_comes_first(tmp_path: Path) -> None:
    made = [Registration(tmp_path / name, at) for name, at in (("a", 1.0), ("c", 3.0), ("b", 2.0))]
    assert [box.started_at for box in boxes()] == [3.0, 2.0, 1.0]
    for registration in made:
        registration.close()


def test_what_is_registered_is_private(tmp_path: Path) -> None:
    """The ready object holds the operator token."""
    registration = Registration(tmp_path / "data", 1.0)
    registration.update("ready", {"token": "secret"})
    directory = running.runtime_dir()
    assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    registration.close()


def test_a_new_entry_is_never_taken_for_a_dead_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may look, and sweep, in the moment before it is locked."""
    lock, looked = running._lock, []

    def look_before(file: IO[str], *how: int) -> bool:
        if not looked:
            looked.append(True)
            boxes()
        return lock(file, *how)

    monkeypatch.setattr(running, "_lock", look_before)
    registration = Registration(tmp_path / "data", 1.0)
    assert looked
    assert [box.pid for box in boxes()] == [os.getpid()]
    registration.close()


def test_a_killed_box_is_swept(other: tuple[subprocess.Popen[str], Path]) -> None:
    """Its entry goes with the next look, its ephemeral data with the next ephemeral box; a living one's stay."""
    process, data = other
    assert [box.pid for box in boxes()] == [process.pid]
    with ephemeral_data_dir():
        assert (data / "osqbox.db").exists()
    process.kill()
    process.wait(10)
    assert data.exists()
    assert boxes() == []
    assert list(running.runtime_dir().iterdir()) == []
    with ephemeral_data_dir() as mine:
        assert not data.exists()
        assert list(mine.parent.glob("*data-*")) == [mine]
    assert not mine.exists()


def test_an_ephemeral_box_that_ends_leaves_nothing(other: tuple[subprocess.Popen[str], Path]) -> None:
    process, data = other
    process.send_signal(signal.SIGINT)
    process.wait(10)
    assert not data.exists()


def test_an_unreadable_entry_is_passed_over(tmp_path: Path) -> None:
    registration = Registration(tmp_path / "data", 1.0)
    (entry,) = running.runtime_dir().glob("box-*.json")
    for text in ("", "{}", "[]", '"x"', "null", "\xff"):
        entry.write_text(text, encoding="latin-1")
        assert boxes() == []
    registration.close()


def test_a_data_directory_has_one_box(tmp_path: Path, other: tuple[subprocess.Popen[str], Path]) -> None:
    """The refusal names the other process and what to type."""
    process, data = other
    with (
        pytest.raises(AddressInUse, match=rf"pid {process.pid} at http://127.0.0.1:1") as caught,
        locked_data_dir(data),
    ):
        pass
    assert "osqbox stop" in str(caught.value.hint)
    process.kill()
    process.wait(10)
    with locked_data_dir(data):
        pass


def test_a_data_directory_is_locked_within_one_process_too(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with locked_data_dir(data), pytest.raises(AddressInUse, match="another process"), locked_data_dir(data):
        pass
    with locked_data_dir(tmp_path / "data"):
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


def test_a_data_directory_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with (
        pytest.raises(BadSetup, match="cannot write to the data directory") as caught,
        locked_data_dir(tmp_path / "data"),
    ):
        pass
    assert "--data" in str(caught.value.hint)


def test_a_child_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Jobs outlive the box; the lock must not."""
    with locked_data_dir(tmp_path / "data"):
        child = subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); input()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False,
        )  # fmt: skip
    try:
        assert child.stdout is not None
        child.stdout.readline()
        with locked_data_dir(tmp_path / "data"):
            pass
    finally:
        child.kill()
        child.communicate(timeout=10)


def test_somebody_elses_temporary_directory_is_not_used(tmp_path: Path) -> None:
    """A link planted under the name of ours is refused."""
    (tmp_path / "planted").mkdir()
    (tmp_path / "tmp" / f"osqbox-{os.getuid()}").symlink_to(tmp_path / "planted")
    with pytest.raises(BadSetup, match="somebody else"), ephemeral_data_dir():
        pass


def test_a_private_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, json.dumps({"token": "t"}))
    assert json.loads(path.read_text()) == {"token": "t"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.glob("*ready*")] == ["ready.json"]
