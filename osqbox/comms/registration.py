"""Letting agents in: what may be in a registration, keys, and the tokens of agents that enroll themselves."""

from __future__ import annotations

import base64
import binascii
import re
import secrets
import sqlite3
import string
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from osqbox import audit, tenants
from osqbox.attempts import Attempts
from osqbox.clock import Clock
from osqbox.store import Store, Tx

from .errors import CommsError, bad_request, conflict, not_found, too_many_attempts
from .keys import SigningKeys
from .messages import Agent, Json
from .seams import Agents
from .tokens import SKEW_S, check_time, invalid, sign, verified

if TYPE_CHECKING:
    from .hashing import Hasher

DEFAULT_GROUP = "default"
KEY_CHARS = 32
KEY_ALPHABET = string.ascii_letters + string.digits
GROUPS_MAX = 64
"""Of one agent."""
NAME_MAX_CHARS = 128
WORD_MAX_CHARS = 128
HOST_MAX_BYTES = 16 * 1024
ENROLLMENT_S = 300
"""How long an enrollment token is good for."""
ENROLLMENT = "osqbox enrollment"
"""Its audience, so that it is good for nothing else and no other token for it."""

_UUID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_GROUP = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)
_KEY = re.compile(r"[A-Za-z0-9]{32}", re.ASCII)


def looks_like_key(text: str) -> bool:
    return _KEY.fullmatch(text) is not None


def new_key() -> str:
    """What an agent logs in with: 32 alphanumerics, 190 bits."""
    return "".join(secrets.choice(KEY_ALPHABET) for _ in range(KEY_CHARS))


def key_of(given: str | None) -> str:
    """What was given, checked, or a new one. Raises CommsError 400."""
    if given is None:
        return new_key()
    check_key(given)
    return given


def new_agent(
    *,
    uuid: str,
    name: str,
    now: float,
    tenant: str = tenants.DEFAULT,
    groups: Sequence[str] = (DEFAULT_GROUP,),
    type: str = "Endpoint",
    version: str = "",
    host: Mapping[str, Json] | None = None,
) -> Agent:
    """A checked agent that has never connected. Raises CommsError 400."""
    check_uuid(uuid)
    check_name(name)
    check_groups(groups)
    for field, word in (("type", type), ("version", version)):
        _check_word(field, word)
    return Agent(
        uuid=uuid,
        tenant=tenant,
        name=name,
        type=type,
        version=version,
        groups=tuple(groups),
        host=_checked_host(host or {}),
        created_at=now,
    )


def check_tenant(db: sqlite3.Connection, name: str) -> None:
    """Raises CommsError 404 for one that there is not, 409 for a closed one."""
    found = tenants.find(db, name)
    if found is None:
        raise not_found(f"Tenant {name[:80]!r}")
    if found.closed_at is not None:
        raise conflict(f"tenant {name!r} is closed")


def is_uuid(uuid: str) -> bool:
    """Whether an agent may have it; any version of UUID, and what else people name agents by."""
    return _UUID.fullmatch(uuid) is not None


def check_uuid(uuid: str) -> None:
    if not is_uuid(uuid):
        raise bad_request(f"id: expected a UUID (1-64 of letters, digits, . _ -), got {uuid[:80]!r}")


def check_name(name: str) -> None:
    if not 0 < len(name) <= NAME_MAX_CHARS or not name.isprintable() or name != name.strip():
        raise bad_request(f"name: expected 1-{NAME_MAX_CHARS} printable characters, got {name[:80]!r}")


def check_group_name(name: str) -> None:
    """A group's name is also a file name (``<group>.yml``) and a word in a path."""
    if not _GROUP.fullmatch(name):
        raise bad_request(
            f"group: expected 1-128 of letters, digits, . _ -, not beginning with a dot, got {name[:80]!r}"
        )


def check_groups(names: Sequence[str]) -> None:
    if not 1 <= len(names) <= GROUPS_MAX:
        raise bad_request(f"groups: expected 1-{GROUPS_MAX}, got {len(names)}")
    if len(set(names)) < len(names):
        raise bad_request("groups: expected each once, got one repeated")
    for name in names:
        check_group_name(name)


def check_key(key: str) -> None:
    if not looks_like_key(key):
        raise bad_request(f"key: expected exactly {KEY_CHARS} alphanumeric characters, got {len(key)} characters")


def _check_word(field: str, word: str) -> None:
    if len(word) > WORD_MAX_CHARS or not (word.isprintable() or not word):
        raise bad_request(f"{field}: expected at most {WORD_MAX_CHARS} printable characters, got {word[:80]!r}")


def _checked_host(host: Mapping[str, Json]) -> dict[str, Any]:
    encoded = msgspec.json.encode(host)
    if len(encoded) > HOST_MAX_BYTES:
        raise bad_request(f"host: expected at most {HOST_MAX_BYTES} bytes of JSON, got {len(encoded)}")
    return msgspec.json.decode(encoded, type=dict[str, Any])


# agents that enroll themselves


class Host(msgspec.Struct, frozen=True, omit_defaults=True):
    hostname: str = ""
    architecture: str = ""
    ip: tuple[str, ...] = ()
    os: dict[str, Json] = {}


class Registration(msgspec.Struct, frozen=True):
    """The body of ``POST /agents``. Other members are ignored, as upstream does."""

    id: str
    name: str
    key: str
    type: str
    version: str
    host: Host = Host()


def agent_of(asked: Registration, tenant: str, now: float) -> Agent:
    """Raises CommsError 400."""
    check_key(asked.key)
    return new_agent(
        uuid=asked.id,
        name=asked.name,
        tenant=tenant,
        type=asked.type,
        version=asked.version,
        host=msgspec.to_builtins(asked.host),
        now=now,
    )


class _Permit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an enrollment token says."""

    aud: str
    iat: int
    exp: int
    tenant: str
    secret: str
    """Digest of the enroll secret it was given for, in hexadecimal."""


class Enrollment:
    """Agents that enroll themselves: an enroll secret becomes a short-lived token, the token a registration."""

    def __init__(
        self,
        agents: Agents,
        keys: SigningKeys,
        hasher: Hasher,
        clock: Clock,
        store: Store,
        attempts: Attempts | None = None,
    ) -> None:
        self._agents, self._keys, self._hasher, self._clock, self._store = agents, keys, hasher, clock, store
        self._attempts = attempts or Attempts()

    async def authenticate(self, authorization: str | None, *, peer: str) -> str:
        """The token for whoever brings a tenant's enroll secret as the password of HTTP Basic.

        Raises CommsError: 401 without or with an unknown secret, 403 for one that enrolls nobody now, 429.
        """
        now = self._clock.now()
        if not self._attempts.admits(peer, now):
            raise too_many_attempts()
        found = self._store.peek(partial(tenants.find_secret, candidates=[given := _password(authorization)]))
        if found is None:
            why = "expected Basic with an enroll secret as the password, got "
            why += "one that no tenant knows" if given else "none"
            await self._note_refusal(peer, "unknown_secret", now)
            raise CommsError(401, "unknown_secret", f"Authorization: {why}")
        self._store.peek(partial(_check_usable, secret=found, now=now))
        digest = tenants.digest(given).hex()
        permit = _Permit(aud=ENROLLMENT, iat=int(now), exp=int(now) + ENROLLMENT_S, tenant=found.tenant, secret=digest)
        return sign(self._keys, permit, now)

    async def enroll(self, authorization: str | None, body: bytes, *, peer: str) -> Agent:
        """Adds the agent of the body of ``POST /agents``.

        Raises CommsError: 403 for another token, 400 for the body, 409 for what is taken (1708, 1705), 503.
        """
        permit = self._permit(authorization)
        asked = _read_registration(body)
        agent = agent_of(asked, permit.tenant, self._clock.now())
        key_hash = await self._hasher.hash(asked.key)
        secret = await self._store.write(partial(_use, permit=permit))
        settle = partial(_settle, secret=secret, agent=agent, peer=peer)
        try:
            added = await self._agents.add(agent, key_hash, actor=agent.uuid)
        except CommsError as error:
            await self._store.write(partial(settle, result=error.reason))
            raise
        await self._store.write(partial(settle, result="ok"))
        return added

    def _permit(self, authorization: str | None) -> _Permit:
        scheme, _, token = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer":
            raise invalid("expected Bearer and an enrollment token")
        now = self._clock.now()
        permit = verified(self._keys, token.strip(), _Permit, now)
        if permit.aud != ENROLLMENT:
            raise invalid("it is meant for something else")
        check_time(permit.iat, permit.exp, now, SKEW_S)
        return permit

    async def _note_refusal(self, peer: str, reason: str, now: float) -> None:
        if self._attempts.failed(peer, now):
            await self._store.write(lambda tx: audit.record(tx, "", "agent.enroll", "", reason, address=peer))


def _password(authorization: str | None) -> str:
    scheme, _, given = (authorization or "").strip().partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(given, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _read_registration(body: bytes) -> Registration:
    try:
        return msgspec.json.decode(body, type=Registration)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"body: {error}") from None
    except RecursionError:
        raise bad_request("body: expected JSON nested less deep") from None


def _check_usable(db: sqlite3.Connection, secret: tenants.Secret, now: float) -> None:
    why = tenants.why_unusable(secret, now)
    if tenants.get(db, secret.tenant).closed_at is not None:
        why = "its tenant is closed"
    if why is not None:
        raise CommsError(403, "secret_unusable", f"This enroll secret enrolls nobody: {why}")


def _use(tx: Tx, permit: _Permit) -> tenants.Secret:
    """Count the enrollment; the secret may have been removed or used up since the token was given."""
    secret = tenants.find_secret_by_digest(tx.db, bytes.fromhex(permit.secret))
    if secret is None:
        raise CommsError(403, "secret_unusable", "This enroll secret enrolls nobody: it was removed")
    _check_usable(tx.db, secret, tx.now)
    tenants.use_secret(tx, secret)
    return secret


def _settle(tx: Tx, secret: tenants.Secret, agent: Agent, peer: str, result: str) -> None:
    if result != "ok":
        tenants.return_secret(tx, secret)
    audit.record(tx, agent.uuid, "agent.enroll", agent.uuid, result, tenant=agent.tenant, address=peer, name=agent.name)
