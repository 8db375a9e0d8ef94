"""Who a certificate speaks for, what its roles allow, and which user a job becomes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import osqbox.jobs
from osqbox.exchange import Peer
from osqbox.jobs import access
from osqbox.jobs.access import Unix, caller_of
from osqbox.jobs.errors import Code, JobError
from osqbox.jobs.messages import Caller

PEER = Peer(
    "192.0.2.7",
    "1",
    certificate_serial=7,
    certificate_uris=("osqbox://acme/alice",),
    certificate_common_names=("alice",),
    certificate_authority="aa",
)
ALICE = Caller("acme/alice", "aa")
ALICES, BOBS, OTHER_CAS = ("acme/alice", "aa"), ("acme/bob", "aa"), ("acme/alice", "bb")


def with_roles(*roles: str) -> Caller:
    return replace(ALICE, roles=frozenset(roles))


def refusal(peer: Peer) -> tuple[Code, str]:
    with pytest.raises(JobError) as caught:
        caller_of(peer)
    return caught.value.code, caught.value.message


# who


def test_a_caller_is_what_the_certificate_says() -> None:
    uris = ("osqbox-role:viewer", "osqbox://acme/alice", "osqbox-principal:www-data", "osqbox-principal:nobody")
    expected = Caller("acme/alice", "aa", frozenset(("viewer",)), ("www-data", "nobody"), 7, "192.0.2.7")
    assert caller_of(replace(PEER, certificate_uris=uris)) == expected


@pytest.mark.parametrize(
    ("uris", "names", "owner"),
    [
        (("osqbox://default/alice",), ("somebody",), "default/alice"),
        (("osqbox://default/alice", "osqbox://default/root"), (), "default/alice"),
        (("spiffe://fleet/user/alice",), ("a", "b"), "spiffe://fleet/user/alice"),
        (("osqbox-role:viewer",), ("alice",), "alice"),
        ((), ("Alice Äpfel",), "Alice Äpfel"),
    ],
)
def test_the_owner_is_the_first_uri_else_the_common_name(
    uris: tuple[str, ...], names: tuple[str, ...], owner: str
) -> None:
    assert caller_of(replace(PEER, certificate_uris=uris, certificate_common_names=names)).owner == owner


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        ((), ()),
        ((), ("alice", "bob")),
        ((), ("",)),
        ((), ("alice\0.evil",)),
        ((), ("alice\x1b[2J",)),
        ((), ("alice\u202egro",)),
        ((), ("alice\n",)),
        ((), (" alice",)),
        ((), ("x" * 257,)),
        ((), ("default/alice",)),
        ((), ("operator",)),
        (("operator",), ("alice",)),
        (("default/alice",), ("alice",)),
        (("",), ("alice",)),
        (("osqbox://default/",), ("alice",)),
        (("osqbox:///alice",), ("alice",)),
        (("osqbox://a/b/c",), ("alice",)),
        (("osqbox:alice",), ("alice",)),
        (("osqbox://default/al\0ice",), ("alice",)),
        (("osqbox://default/alice?x",), ("alice",)),
        (("osqbox://default/alice", "osqbox-principal:"), ()),
        (("osqbox://default/alice", "osqbox-principal:ro\0ot"), ()),
        (("osqbox://default/alice", "osqbox-role:"), ()),
    ],
)
def test_a_certificate_without_one_clear_identity_is_nobody(uris: tuple[str, ...], names: tuple[str, ...]) -> None:
    code, message = refusal(replace(PEER, certificate_uris=uris, certificate_common_names=names))
    assert code is Code.UNAUTHENTICATED
    assert message.isprintable()


def test_no_certificate_is_nobody() -> None:
    assert refusal(Peer("192.0.2.7", "1"))[0] is Code.UNAUTHENTICATED


def test_an_unknown_role_is_refused_beside_a_known_one() -> None:
    uris = ("osqbox://acme/alice", "osqbox-role:runner", "osqbox-role:superuser")
    code, message = refusal(replace(PEER, certificate_uris=uris))
    assert code is Code.PERMISSION_DENIED
    assert "expected roles among runner, viewer, operator, admin, got 'superuser'" in message


def test_the_name_admin_is_no_administrator() -> None:
    peer = replace(PEER, certificate_uris=(), certificate_common_names=("admin",))
    assert caller_of(peer).roles == {"runner"}


@given(st.lists(st.text(max_size=20), max_size=4), st.lists(st.text(max_size=20), max_size=3))
def test_no_foreign_text_becomes_the_operator_or_breaks(uris: list[str], names: list[str]) -> None:
    peer = replace(PEER, certificate_uris=tuple(uris), certificate_common_names=tuple(names))
    try:
        caller = caller_of(peer)
    except JobError as error:
        assert error.message.isprintable()  # noqa: PT017 - most are refused, some are not
    else:
        assert caller.owner.isprintable()
        assert caller.owner != "operator"
        assert caller.authority == "aa"


@pytest.mark.parametrize(
    ("owner", "tenant"),
    [("acme/alice", "acme"), ("operator", None), ("alice", None), ("spiffe://x/y", None), ("urn:x/y", None)],
)
def test_the_tenant_of_an_owner(owner: str, tenant: str | None) -> None:
    assert access.tenant_of(owner) == tenant


# what


def test_every_method_of_the_service_has_a_grant() -> None:
    proto = (Path(osqbox.jobs.__file__).parent / "v1" / "jobs.proto").read_text()
    service = re.search(r"service JobService \{.*?\n\}", proto, re.DOTALL)
    assert service is not None
    methods = set(re.findall(r"\brpc (\w+)", service[0]))
    assert "RunProcess" in methods
    assert methods == access.METHODS.keys()
    assert set(access.METHODS.values()) <= access.VERBS.keys()


TABLE = {
    # role: own jobs, others' jobs
    "runner": ("run status list wait output stop signal suspend resume send_input delete", ""),
    "viewer": ("status list wait output", "status list wait output"),
    "operator": (
        "run status list wait output stop signal suspend resume send_input delete",
        "status list wait output stop signal suspend resume",
    ),
    "admin": (
        "run status list wait output stop signal suspend resume send_input delete",
        "run status list wait output stop signal suspend resume send_input delete",
    ),
    "nonsense": ("", ""),
}


@pytest.mark.parametrize("role", TABLE)
@pytest.mark.parametrize("verb", [*access.VERBS, "nonsense"])
def test_what_a_role_allows(role: str, verb: str) -> None:
    own, others = (words.split() for words in TABLE[role])
    caller = with_roles(role)
    assert access.may(caller, verb, ALICES) == (verb in own)
    assert access.may(caller, verb, BOBS) == (verb in others)
    assert access.may(caller, verb, OTHER_CAS) == (verb in others)
    if verb in own:
        access.allow(caller, verb)
        return
    with pytest.raises(JobError) as caught:
        access.allow(caller, verb)
    assert caught.value.code is Code.PERMISSION_DENIED


def test_roles_add_up_and_none_is_a_runner() -> None:
    both = with_roles("runner", "viewer")
    assert access.may(both, "stop", ALICES)
    assert access.may(both, "status", BOBS)
    assert not access.may(both, "stop", BOBS)
    assert access.sees_all(both)
    assert not access.sees_all(ALICE)
    assert access.may(ALICE, "run", ALICES)


def test_another_owners_job_is_no_job_and_a_seen_one_may_be_out_of_reach() -> None:
    def refused(caller: Caller, owner: Any) -> tuple[Code, str]:
        with pytest.raises(JobError) as caught:
            access.admit(caller, "delete", owner, "abc")
        return caught.value.code, caught.value.message

    assert refused(ALICE, BOBS) == refused(ALICE, None) == (Code.NOT_FOUND, "no job 'abc'")
    assert refused(with_roles("operator"), BOBS)[0] is Code.PERMISSION_DENIED
    access.admit(ALICE, "delete", ALICES, "abc")
    access.admit(access.OPERATOR, "delete", BOBS, "abc")


@pytest.mark.parametrize("verb", access.VERBS)
def test_without_a_grant_nothing_is_said_about_any_job(verb: str) -> None:
    for owner in (ALICES, BOBS, None):
        with pytest.raises(JobError) as caught:
            access.admit(with_roles("nonsense"), verb, owner, "abc")
        assert caught.value.code is Code.PERMISSION_DENIED


# as whom

ROOT = Unix("root", can_switch=True)
DEDICATED = Unix("root", can_switch=True, jobs_user="processrunner")
PLAIN = Unix("osq", can_switch=False)


@pytest.mark.parametrize(
    ("principals", "run_as", "unix", "expected"),
    [
        ((), None, PLAIN, "osq"),
        ((), "osq", PLAIN, "osq"),
        ((), "root", PLAIN, "CANNOT_SWITCH_USER"),
        (("alice",), None, PLAIN, "CANNOT_SWITCH_USER"),
        (("alice", "osq"), "osq", PLAIN, "osq"),
        (("alice", "osq"), "bob", PLAIN, "NOT_A_PRINCIPAL"),
        ((), None, ROOT, "root"),
        ((), "root", ROOT, "root"),
        ((), "alice", ROOT, "NOT_A_PRINCIPAL"),
        (("alice", "bob"), None, ROOT, "alice"),
        (("alice", "bob"), "bob", ROOT, "bob"),
        (("alice", "bob"), "root", ROOT, "NOT_A_PRINCIPAL"),
        (("alice", "root"), "root", ROOT, "root"),
        ((), None, DEDICATED, "processrunner"),
        ((), "root", DEDICATED, "NOT_A_PRINCIPAL"),
        (("alice",), None, DEDICATED, "alice"),
        (("alice",), "processrunner", DEDICATED, "NOT_A_PRINCIPAL"),
        (("alice",), "", ROOT, "alice"),
    ],
)
def test_whom_a_job_runs_as(principals: tuple[str, ...], run_as: str | None, unix: Unix, expected: str) -> None:
    caller = replace(ALICE, principals=principals)
    if expected.islower():
        assert access.user_for(caller, run_as, unix) == expected
        return
    with pytest.raises(JobError) as caught:
        access.user_for(caller, run_as, unix)
    assert (caught.value.reason, caught.value.field) == (expected, "run_as")
    wanted = Code.PERMISSION_DENIED if expected == "NOT_A_PRINCIPAL" else Code.FAILED_PRECONDITION
    assert caught.value.code is wanted


@pytest.mark.parametrize("role", access.ROLES)
def test_no_role_widens_the_principals(role: str) -> None:
    with pytest.raises(JobError) as caught:
        access.user_for(replace(with_roles(role), principals=("alice",)), "root", ROOT)
    assert caught.value.code is Code.PERMISSION_DENIED
