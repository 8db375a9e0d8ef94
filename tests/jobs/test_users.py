"""Unix users of this machine, and what this process may become."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from osqbox.errors import BadSetup
from osqbox.jobs import users
from osqbox.jobs.access import Unix
from osqbox.jobs.errors import Code, JobError

CAPABILITIES = "Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t{:016x}\nCapBnd:\t000001ffffffffff\n"
SETUID, SETGID = 1 << 7, 1 << 6


@pytest.fixture
def holding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Pretend that the kernel says so."""

    def hold(capabilities: int) -> None:
        status = tmp_path / "status"
        status.write_text(CAPABILITIES.format(capabilities))
        monkeypatch.setattr(users, "SELF_STATUS", status)

    return hold


def test_a_user_is_found_with_home_shell_and_all_groups() -> None:
    for entry in pwd.getpwall()[:20]:
        found = users.lookup(entry.pw_name)
        assert (found.name, found.uid, found.gid, found.home) == entry[0:1] + entry[2:4] + entry[5:6]
        assert found.gid in found.groups
        assert set(found.groups) == set(os.getgrouplist(entry.pw_name, entry.pw_gid))


@pytest.mark.parametrize("name", ["no-such-user", "0", "", "root\0x", "ro ot"])
def test_an_unknown_user_is_a_failed_precondition(name: str) -> None:
    with pytest.raises(JobError) as caught:
        users.lookup(name)
    assert (caught.value.code, caught.value.reason) == (Code.FAILED_PRECONDITION, "UNKNOWN_USER")


def test_a_user_without_an_entry_is_called_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 3_999_999)
    monkeypatch.setenv("HOME", "/data")
    own = users.own_user()
    assert (own.name, own.uid, own.home) == ("3999999", 3_999_999, "/data")


def test_our_own_user_and_powers_are_told() -> None:
    assert users.own_user().uid == os.geteuid()
    status = Path("/proc/self/status").read_text()
    held = int(status.partition("CapEff:")[2].split()[0], 16)
    assert users.powers().setuid == (held & (SETUID | SETGID) == SETUID | SETGID)


@pytest.mark.parametrize(("held", "expected"), [(0, False), (SETUID, False), (SETGID, False), (SETUID | SETGID, True)])
def test_switching_takes_both_capabilities(holding: object, held: int, expected: bool) -> None:
    holding(held)  # type: ignore[operator]
    assert users.unix_facts().can_switch is expected


def test_a_jobs_user_that_cannot_be_is_refused_at_the_start(holding: object) -> None:
    with pytest.raises(BadSetup, match="expected a user of this machine, got 'no-such-user'"):
        users.unix_facts("no-such-user")
    holding(0)  # type: ignore[operator]
    with pytest.raises(BadSetup, match="lacks CAP_SETUID"):
        users.unix_facts("nobody" if users.own_user().name != "nobody" else "root")
    own = users.own_user().name
    assert users.unix_facts(own) == Unix(own, can_switch=False, jobs_user=own)


def test_the_start_line_says_what_there_is(holding: object) -> None:
    holding(SETUID | SETGID | 1 << 21)  # type: ignore[operator]
    line = users.start_line(Unix("root", can_switch=True, jobs_user="processrunner"), cgroup=False)
    assert line == "as processrunner or a principal of the certificate; setuid, no cgroup, namespaces, no nice"
