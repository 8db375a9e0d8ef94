"""Sessions a server offers in its answer to get-shells, as our agent and as the Launcher of 2018 read them. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHELLS_PATH = "/api/v1/shells"
_SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,127}")
_SECRET = re.compile(r"[\x21-\x7e]{1,256}")


@dataclass(frozen=True, slots=True)
class Offer:
    session: str
    secret: str = field(repr=False)

    @property
    def path(self) -> str:
        return f"{SHELLS_PATH}/{self.session}"


def read_offers(members: Mapping[str, Any]) -> list[Offer]:
    """Entries that could not be a path or a header are left out."""
    entries = members.get("sessions")
    found = [_offer(entry) for entry in entries] if isinstance(entries, list) else []
    return [offer for offer in found if offer and _SESSION.fullmatch(offer.session) and _SECRET.fullmatch(offer.secret)]


def _offer(entry: Any) -> Offer | None:
    if not isinstance(entry, dict):
        return None
    session, secret = entry.get("session_id"), entry.get("secret")
    return Offer(session, secret) if isinstance(session, str) and isinstance(secret, str) else None


def read_offers_2018(body: bytes) -> list[Offer]:
    """``sessions`` is a list of string maps: one value that is no string, and the whole answer counts for nothing.
    Neither ``node_invalid`` nor anything else is looked at, but a non-empty ``error`` hides the sessions."""
    try:
        members = json.loads(body)
        error, sessions = members.get("error") or "", members.get("sessions") or []
        is_decoded = isinstance(error, str) and all(
            isinstance(value, str) for session in sessions for value in session.values()
        )
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []
    if error or not is_decoded:
        return []
    offers = [Offer(session.get("session_id", ""), session.get("secret", "")) for session in sessions]
    return [offer for offer in offers if _SESSION.fullmatch(offer.session) and offer.secret]
