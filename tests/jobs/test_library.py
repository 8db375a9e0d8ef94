"""`osqbox.jobs` as a library: no server, one import, a directory of one's own."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from osqbox.errors import AddressInUse
from osqbox.jobs import links, open_jobs
from osqbox.jobs.errors import Code, JobError
from osqbox.jobs.messages import Chunk, End, JobSpec, Reason, State
from osqbox.jobs.users import User, own_user

from .runner_rig import ALICE, in_trio, running, until


def test_run_and_follow(tmp_path: Path) -> None:
    async def test() -> None:
        async with open_jobs(tmp_path / "state") as jobs:
            job = await jobs.run(["sh", "-c", "echo $GREETING; pwd"], env={"GREETING": "hello"}, cwd=tmp_path)
            async with jobs.output(job.id) as events:
                seen = [event async for event in events]
            assert b"".join(event.data for event in seen if isinstance(event, Chunk)) == f"hello\n{tmp_path}\n".encode()
            assert isinstance(seen[-1], End)
            assert [each.id for each in (await jobs.list()).jobs] == [job.id]
            await jobs.delete(job.id)
            assert (await jobs.list()).jobs == ()

    in_trio(test)


def test_every_word_of_the_library(tmp_path: Path) -> None:
    async def test() -> None:
        async with open_jobs(tmp_path, stop_jobs=True) as jobs:
            job = await jobs.run(JobSpec(b"cat", open_stdin=True))
            await jobs.send_input(job.id, b"x")
            assert (await jobs.suspend(job.id)).state is State.SUSPENDED
            assert (await jobs.resume(job.id)).state is State.RUNNING
            assert (await jobs.status(job.id)).id == job.id
            await jobs.signal(job.id, 1)
            status = await jobs.wait(job.id, 5)
            assert (status.signal, status.reason) == (1, Reason.EXIT)
            other = await jobs.run(["sleep", "60"], labels={"a": "b"})
            assert [each.id for each in (await jobs.list(labels={"a": "b"})).jobs] == [other.id]
            assert (await jobs.stop(other.id)).state in (State.STOPPING, State.SIGNALED)

    in_trio(test)


def test_a_command_line_is_words_not_text(tmp_path: Path) -> None:
    async def test() -> None:
        async with open_jobs(tmp_path) as jobs:
            for bad in ("ls -la", (), b"ls"):
                with pytest.raises(ValueError, match="word by word"):
                    await jobs.run(bad)  # type: ignore[arg-type]
            with pytest.raises(JobError) as caught:
                await jobs.run([""])
            assert caught.value.code is Code.INVALID_ARGUMENT

    in_trio(test)


def test_two_programs_cannot_have_one_directory(tmp_path: Path) -> None:
    async def test() -> None:
        async with open_jobs(tmp_path):
            with pytest.raises(AddressInUse):
                async with open_jobs(tmp_path):
                    pass

    in_trio(test)


def test_files_are_private(tmp_path: Path) -> None:
    async def test() -> None:
        async with open_jobs(tmp_path / "s") as jobs:
            job = await jobs.run(["echo", "x"])
            await jobs.wait(job.id)
            for path in (tmp_path / "s").rglob("*"):
                assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path

    in_trio(test)


def test_a_path_too_long_for_a_socket_is_none_for_us(tmp_path: Path) -> None:
    async def test() -> None:
        deep = tmp_path / ("d" * 100) / ("e" * 100)
        async with open_jobs(deep, stop_jobs=False) as jobs:
            job = await jobs.run(["sleep", "60"])
        async with open_jobs(deep, stop_jobs=True) as jobs:
            assert (await jobs.status(job.id)).state is State.RUNNING

    in_trio(test)


def test_keepers_import_nothing_heavy() -> None:
    code = "import sys, osqbox.jobs.keeper.wire as w; print(sorted({'trio', 'msgspec', 'sqlite3'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "[]\n"


# the user's home


def home_of(path: Path) -> User:
    own = own_user()
    path.mkdir()
    return User(own.name, own.uid, own.gid, own.groups, str(path), own.shell)


def test_the_output_is_linked_into_the_home_and_goes_with_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = home_of(tmp_path / "home")
    monkeypatch.setattr("osqbox.jobs.users.own_user", lambda: home)
    link = tmp_path / "home" / ".osqbox" / "jobs"

    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("echo", "seen at home", link_output=True)
            await rig.ended(job)
            assert (link / job.id).read_text() == "seen at home\n"
            await until(lambda: rig.runner.statistics().running == 0)
            await rig.runner.delete(job.id, ALICE)
            assert list(link.iterdir()) == []

    in_trio(test)


def test_a_home_that_takes_no_link_does_not_harm_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = home_of(tmp_path / "home")
    (tmp_path / "home" / ".osqbox").write_text("in the way")
    monkeypatch.setattr("osqbox.jobs.users.own_user", lambda: home)

    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("echo", "x", link_output=True)
            assert (await rig.ended(job)).exit_code == 0

    in_trio(test)


def test_links_in_a_home_are_not_followed(tmp_path: Path) -> None:
    """A user must not lead a privileged server out of their home."""
    home = home_of(tmp_path / "home")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "home" / ".osqbox").symlink_to(tmp_path / "elsewhere")
    job = tmp_path / "kjob"
    job.mkdir()
    (job / "output").write_bytes(b"x")
    for put in (links.link, links.copy):
        with pytest.raises(OSError, match=r"symbolic|directory"):
            put(job, home)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_another_user_gets_a_copy_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = pwd.getpwnam("nobody")
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    tmp_path.chmod(0o755)
    user = User("nobody", nobody.pw_uid, nobody.pw_gid, (nobody.pw_gid,), str(home), "/bin/sh")
    monkeypatch.setattr("osqbox.jobs.users.lookup", lambda _: user)
    caller = type(ALICE)("default/alice", "ca-1", principals=("nobody",))

    async def test() -> None:
        async with running(tmp_path) as rig:
            job = await rig.run("id", "-un", caller=caller, link_output=True, cwd=b"/")
            assert (await rig.ended(job)).run_as == "nobody"
            copy = home / ".osqbox" / "jobs" / job.id
            await until(lambda: copy.exists() and copy.stat().st_uid == nobody.pw_uid)
            assert copy.read_text() == "nobody\n"
            assert copy.stat().st_mode & 0o777 == 0o600
            await trio.lowlevel.checkpoint()

    in_trio(test)
