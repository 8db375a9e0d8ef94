"""Which box a verb talks to, and how long it waits for one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from osqbox import running
from osqbox.cli import find
from osqbox.cli.find import NoBox, find_box
from osqbox.errors import BadUsage, NotInTime, UserError


def register(tmp_path: Path, name: str, at: float, ready: dict[str, Any] | None = None) -> running.Registration:
    registration = running.Registration(tmp_path / name, at)
    if ready is not None:
        registration.update("ready", ready)
    return registration


def ready(url: str) -> dict[str, Any]:
    return {"operator": url, "token": "of-the-file"}


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "GRACE_S", 0.0)


def test_the_newest_box_is_found(tmp_path: Path) -> None:
    """One that is stopping is not."""
    ages = {"a": 1.0, "b": 3.0, "c": 2.0}
    boxes = [register(tmp_path, name, at, ready(f"http://h:{at:.0f}")) for name, at in ages.items()]
    try:
        assert find_box().client.url == "http://h:3"
        boxes[1].update("stopping", ready("http://h:3"))
        found = find_box()
        assert (found.client.url, found.client.token) == ("http://h:2", "of-the-file")
        assert found.ready == ready("http://h:2")
        assert find_box(data=tmp_path / "a").client.url == "http://h:1"
    finally:
        for each in boxes:
            each.close()


def test_options_beat_the_environment_which_beats_what_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearer to the hand, the stronger."""
    here = register(tmp_path, "a", 1.0, ready("http://h:1"))
    try:
        monkeypatch.setenv("OSQBOX_URL", "http://h:2")
        monkeypatch.setenv("OSQBOX_TOKEN", "of-the-environment")
        found = find_box()
        assert (found.client.url, found.client.token, found.pid) == ("http://h:2", "of-the-environment", None)
        assert find_box("http://h:3", "t").client.url == "http://h:3"
        assert find_box(data=tmp_path / "a").client.url == "http://h:1"
    finally:
        here.close()


def test_the_token_of_a_named_box_that_runs_here_is_known(tmp_path: Path) -> None:
    """``--url`` alone is then enough."""
    here = register(tmp_path, "a", 1.0, ready("http://h:1"))
    try:
        assert find_box("http://h:1/").client.token == "of-the-file"
        with pytest.raises(BadUsage, match="token is needed"):
            find_box("http://h:2")
    finally:
        here.close()


def test_url_and_data_contradict() -> None:
    """Better a question than a guess."""
    with pytest.raises(BadUsage, match="--url or --data"):
        find_box("http://h:1", "t", Path("x"))


def test_nobody_is_running() -> None:
    """The hint starts one; with a data directory, on that."""
    with pytest.raises(NoBox, match="no box is running") as caught:
        find_box()
    assert (caught.value.hint, caught.value.exit_code) == ("osqbox serve", 1)
    with pytest.raises(NoBox, match="on /data") as caught:
        find_box(data=Path("/data"))
    assert caught.value.hint == "osqbox serve --data /data"


def test_a_starting_box_is_waited_for(tmp_path: Path) -> None:
    """``osqbox serve & osqbox nodes`` works."""
    box = register(tmp_path, "a", 1.0)
    timer = threading.Timer(0.05, box.update, ("ready", ready("http://h:1")))
    timer.start()
    try:
        assert find_box().client.url == "http://h:1"
    finally:
        timer.join()
        box.close()


def test_a_box_may_appear_within_the_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has not registered yet when the verb starts."""
    monkeypatch.setattr(find, "GRACE_S", 10.0)
    made: list[running.Registration] = []
    timer = threading.Timer(0.05, lambda: made.append(register(tmp_path, "a", 1.0, ready("http://h:1"))))
    timer.start()
    try:
        assert find_box().client.url == "http://h:1"
    finally:
        timer.join()
        made[0].close()


def test_a_box_that_never_gets_ready(tmp_path: Path) -> None:
    """Waiting in vain has its own exit code."""
    box = register(tmp_path, "a", 1.0)
    try:
        with pytest.raises(NotInTime, match=r"not ready within 0\.05 s"):
            find_box(wait_s=0.05)
    finally:
        box.close()


def test_a_box_that_dies_while_it_starts(tmp_path: Path) -> None:
    """Said at once, not after the whole wait."""
    box = register(tmp_path, "a", 1.0)
    timer = threading.Timer(0.05, box.close)
    timer.start()
    with pytest.raises(UserError, match="ended before it was ready"):
        find_box()
    timer.join()
