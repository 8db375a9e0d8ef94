"""Who asks, what that lets them do, and which unix user a job of theirs becomes. Pure.

A certificate says who somebody is and may narrow what they can do; what a role grants stands here, and what has no
line here is refused. Whoever may not see a job gets the same answer as for a job that never was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from .errors import Code, JobError, not_found
from .messages import Caller

if TYPE_CHECKING:
    from osqbox.exchange import Peer

ROLE = "osqbox-role:"
PRINCIPAL = "osqbox-principal:"
NAME_CHARS = 256
_OURS = re.compile(r"osqbox://([^/?#@:\s]+/[^/?#@:\s]+)")
_FOREIGN = re.compile(r"(?!osqbox:)[A-Za-z][A-Za-z0-9+.-]*:\S+")
OPERATOR_NAME = "operator"
"""Owner of what comes in over the operator API; no certificate may be called that."""
OPERATOR = Caller(owner=OPERATOR_NAME, authority=OPERATOR_NAME, roles=frozenset(("admin",)))

OwnerKey = tuple[str, str]
"""Owner and authority: another CA's ``alice`` is somebody else."""


class Grants(NamedTuple):
    """What a role lets one do to one's own jobs, and to anybody's."""

    own: frozenset[str]
    any: frozenset[str]


_EVERYTHING = frozenset(("run", "see", "stop", "input", "delete"))
_NOTHING: frozenset[str] = frozenset()

DEFAULT_ROLE = "runner"
"""Of a certificate without any role."""
ROLES: Mapping[str, Grants] = MappingProxyType(
    {
        "runner": Grants(own=_EVERYTHING, any=_NOTHING),
        "viewer": Grants(own=frozenset(("see",)), any=frozenset(("see",))),
        "operator": Grants(own=_EVERYTHING, any=frozenset(("see", "stop"))),
        "admin": Grants(own=_EVERYTHING, any=_EVERYTHING),
    }
)
VERBS: Mapping[str, str] = MappingProxyType(
    {
        "run": "run",
        "status": "see",
        "list": "see",
        "wait": "see",
        "output": "see",
        "stop": "stop",
        "signal": "stop",
        "suspend": "stop",
        "resume": "stop",
        "send_input": "input",
        "delete": "delete",
    }
)
"""The grant each call of the runner needs."""
METHODS: Mapping[str, str] = MappingProxyType(
    {
        "RunProcess": "run",
        "StopProcess": "stop",
        "GetProcessStatus": "status",
        "GetProcessOutput": "output",
        "ListProcesses": "list",
        "SignalProcess": "signal",
        "WaitProcess": "wait",
        "SendInput": "send_input",
        "DeleteProcess": "delete",
    }
)
"""The call behind each method of the gRPC service."""


@dataclass(frozen=True, slots=True)
class Unix:
    """What the server's process is, and whether it can become somebody else."""

    user: str
    """Name of its own user; the number where the user has no name."""
    can_switch: bool
    """Holds CAP_SETUID and CAP_SETGID."""
    jobs_user: str | None = None
    """``--jobs-user``: whom jobs run as when the certificate names nobody."""


# who


def caller_of(peer: Peer) -> Caller:
    """Who a verified client certificate speaks for. Nothing else of a request is asked.

    Raises JobError: UNAUTHENTICATED without a usable identity, PERMISSION_DENIED for a role that is not known.
    """
    if peer.certificate_serial is None:
        raise _nobody("expected a client certificate, got none")
    roles = frozenset(_words(peer, ROLE)) or frozenset((DEFAULT_ROLE,))
    if unknown := sorted(roles - ROLES.keys()):
        raise JobError(
            Code.PERMISSION_DENIED,
            f"certificate: expected roles among {', '.join(ROLES)}, got {unknown[0]!r}; have it issued again",
            reason="UNKNOWN_ROLE",
        )
    return Caller(
        owner=_owner(peer),
        authority=peer.certificate_authority or "",
        roles=roles,
        principals=tuple(dict.fromkeys(_words(peer, PRINCIPAL))),
        serial=peer.certificate_serial,
        address=peer.address,
    )


def _owner(peer: Peer) -> str:
    """``tenant/name`` of an osqbox certificate, another issuer's URI as it is, else the one common name."""
    uri = next((uri for uri in peer.certificate_uris if not uri.startswith((ROLE, PRINCIPAL))), None)
    if uri is not None:
        if (ours := _OURS.fullmatch(_fit(uri))) is None and not _FOREIGN.fullmatch(uri):
            raise _nobody(f"certificate: expected a URI such as osqbox://default/alice, got {uri!r}")
        return uri if ours is None else ours.group(1)
    if len(peer.certificate_common_names) != 1:
        got = len(peer.certificate_common_names) or "none"
        raise _nobody(f"certificate: expected one name (a URI, or one common name), got {got}")
    name = _fit(peer.certificate_common_names[0])
    if name == OPERATOR_NAME or "/" in name:
        raise _nobody(f"certificate: the common name {name!r} could be taken for somebody else's")
    return name


def _words(peer: Peer, prefix: str) -> list[str]:
    return [_fit(uri.removeprefix(prefix)) for uri in peer.certificate_uris if uri.startswith(prefix)]


def _fit(name: str) -> str:
    """The name, if it can stand in logs and lists without pretending to be another."""
    if name and name.isprintable() and name == name.strip() and len(name) <= NAME_CHARS:
        return name
    raise _nobody(f"certificate: expected names of 1 to {NAME_CHARS} printable characters, got {name[:NAME_CHARS]!r}")


def _nobody(message: str) -> JobError:
    return JobError(Code.UNAUTHENTICATED, message, reason="NO_IDENTITY")


def tenant_of(owner: str) -> str | None:
    """The tenant in ``tenant/name``; None for the operator and for names of other CAs."""
    words = owner.split("/")
    return words[0] if len(words) == 2 and ":" not in words[0] else None


# what


def allow(caller: Caller, verb: str) -> None:
    """Raises PERMISSION_DENIED unless some role of the caller has the grant for ``verb``, at least on own jobs."""
    grant = VERBS.get(verb)
    if not any(grant in each.own or grant in each.any for each in _grants(caller)):
        raise _denied(caller, verb)


def sees(caller: Caller, owner: OwnerKey) -> bool:
    """Whether a job of ``owner`` exists at all as far as the caller can tell."""
    return may(caller, "status", owner)


def may(caller: Caller, verb: str, owner: OwnerKey) -> bool:
    grant = VERBS.get(verb)
    is_own = (caller.owner, caller.authority) == owner
    return any(grant in each.any or (is_own and grant in each.own) for each in _grants(caller))


def admit(caller: Caller, verb: str, owner: OwnerKey | None, job: str) -> None:
    """Raises PERMISSION_DENIED for what the caller may do to no job, or not to one that is only seen.

    NOT_FOUND for a job that is not there (``owner`` None) or not seen.
    """
    allow(caller, verb)
    if owner is None or not sees(caller, owner):
        raise not_found(job)
    if not may(caller, verb, owner):
        raise _denied(caller, verb)


def sees_all(caller: Caller) -> bool:
    """Whether a list shows everybody's jobs; else only the caller's own."""
    return any("see" in each.any for each in _grants(caller))


def _grants(caller: Caller) -> list[Grants]:
    return [ROLES[role] for role in caller.roles or (DEFAULT_ROLE,) if role in ROLES]


def _denied(caller: Caller, verb: str) -> JobError:
    roles = ", ".join(sorted(caller.roles)) or DEFAULT_ROLE
    return JobError(Code.PERMISSION_DENIED, f"{verb}: the roles of this certificate ({roles}) do not allow that",
                    reason="NOT_ALLOWED")  # fmt: skip


# as whom


def user_for(caller: Caller, run_as: str | None, unix: Unix) -> str:
    """The unix user a job runs as: one the certificate names, or without any, the server's choice.

    A certificate without principals gets ``--jobs-user`` or the server's own user, and nobody else; so root is
    reached only where a certificate names it, or where the server itself is root and nobody said otherwise.
    Raises PERMISSION_DENIED for a user the certificate does not name, FAILED_PRECONDITION where this server cannot
    become another user. Whether there is such a user is for `users.lookup` to say.
    """
    allowed = caller.principals or (unix.jobs_user or unix.user,)
    wanted = run_as or allowed[0]
    cannot = not unix.can_switch and wanted != unix.user
    if wanted not in allowed and not (cannot and not caller.principals):
        raise JobError(
            Code.PERMISSION_DENIED,
            f"run_as: expected a principal of the certificate ({', '.join(allowed)}), got {wanted!r}",
            reason="NOT_A_PRINCIPAL",
            field="run_as",
        )
    if cannot:
        raise JobError(
            Code.FAILED_PRECONDITION,
            f"cannot run as {wanted!r}: the server lacks CAP_SETUID and runs everything as {unix.user!r}",
            reason="CANNOT_SWITCH_USER",
            field="run_as",
        )
    return wanted
