"""Agents' tokens: JWTs that any box with the same signing keys can check without asking anybody.

Claims as of the Communications API: ``iss``, ``aud``, ``iat``, ``exp`` = ``iat`` + lifetime to the second, ``uuid``;
and ``key_version``, which makes a revocation or a new key end every older token. The algorithm belongs to the key that
the header's ``kid`` names and is never taken from the token. A box whose clock is behind accepts a token from up to
``skew_s`` in its future; its end is not stretched, since an agent whose token has ended merely logs in again.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from .errors import CommsError
from .keys import SigningKeys
from .messages import Agent

LIFETIME_S = 900
SKEW_S = 60
ISSUER = "wazuh"
AUDIENCE = "Wazuh Communications API"
TOKEN_MAX_CHARS = 8192
INVALID, EXPIRED = 2706, 2707

Payload = TypeVar("Payload", bound=msgspec.Struct)


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """What a token that was checked says."""

    uuid: str
    key_version: int
    issued_at: int
    """Seconds since the epoch, as the end."""
    expires_at: int


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    alg: str
    kid: str
    typ: str


class _Payload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    iss: str
    aud: str
    iat: int
    exp: int
    uuid: str
    key_version: int


class Tokens:
    """Issues and checks the tokens of one or more boxes that share ``keys`` and ``lifetime_s``."""

    def __init__(self, keys: SigningKeys, *, lifetime_s: int = LIFETIME_S, skew_s: float = SKEW_S) -> None:
        self._keys, self.lifetime_s, self.skew_s = keys, lifetime_s, skew_s

    def issue(self, agent: Agent, now: float) -> str:
        """Takes about a millisecond with RS256."""
        issued_at = int(now)
        payload = _Payload(
            iss=ISSUER,
            aud=AUDIENCE,
            iat=issued_at,
            exp=issued_at + self.lifetime_s,
            uuid=agent.uuid,
            key_version=agent.key_version,
        )
        return sign(self._keys, payload, now)

    def check(self, token: str, now: float) -> Claims:
        """Raises CommsError 403: 2706 for a token that is not ours or not in order, 2707 for one that has ended."""
        payload = verified(self._keys, token, _Payload, now)
        if (payload.iss, payload.aud) != (ISSUER, AUDIENCE):
            raise invalid("it is meant for somebody else")
        if payload.exp - payload.iat != self.lifetime_s:
            raise invalid(f"expected a lifetime of {self.lifetime_s} s, got {payload.exp - payload.iat}")
        check_time(payload.iat, payload.exp, now, self.skew_s)
        return Claims(uuid=payload.uuid, key_version=payload.key_version, issued_at=payload.iat, expires_at=payload.exp)


def sign(keys: SigningKeys, payload: msgspec.Struct, now: float) -> str:
    """A JWT over ``payload`` by the key that signs now."""
    from jwt import PyJWS

    key = keys.signer(now)
    return PyJWS().encode(msgspec.json.encode(payload), key.private, key.algorithm, headers={"kid": key.kid})


def verified(keys: SigningKeys, token: str, shape: type[Payload], now: float) -> Payload:
    """The payload of a token that one of ``keys`` has signed. Raises CommsError 403 (2706)."""
    from jwt import PyJWS, PyJWTError
    from jwt.utils import base64url_decode

    if len(token) > TOKEN_MAX_CHARS:
        raise invalid(f"expected at most {TOKEN_MAX_CHARS} characters, got {len(token)}")
    try:
        header = msgspec.json.decode(base64url_decode(token.partition(".")[0]), type=_Header)
    except (ValueError, RecursionError):
        raise invalid("expected a JWT with alg, kid and typ") from None
    if (key := keys.find(header.kid, now)) is None:
        raise invalid("no key of that kid is known here")
    try:
        signed = PyJWS().decode_complete(token, key.public, algorithms=[key.algorithm])
        return msgspec.json.decode(signed["payload"], type=shape)
    except (PyJWTError, ValueError, RecursionError):
        raise invalid("its signature or its claims are not in order") from None


def check_time(issued_at: int, expires_at: int, now: float, skew_s: float) -> None:
    """Raises CommsError 403: 2706 when issued further than ``skew_s`` in the future, 2707 when it has ended."""
    if issued_at > now + skew_s:
        raise invalid("it was issued in the future; set the clocks of the boxes")
    if now >= expires_at:
        raise CommsError(403, "expired_token", "The token has expired; log in again", code=EXPIRED)


def invalid(why: str) -> CommsError:
    return CommsError(403, "invalid_token", f"Invalid token: {why}", code=INVALID)
