"""Who is there: a key becomes a token once, a token becomes an agent with every request."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import trio

from osqbox import audit, tenants
from osqbox.attempts import Attempts
from osqbox.clock import Clock
from osqbox.store import Store

from .errors import CommsError, too_many_attempts
from .hashing import NOBODY, Hasher
from .messages import Agent, AgentStatus, Credentials, Json
from .registration import is_uuid, looks_like_key
from .seams import Agents
from .tokens import INVALID, Claims, Tokens, invalid

FAILURES_PER_MINUTE = 30
"""Of one address; a box behind which many agents hide has one."""
SUBJECT_CHARS = 64

UNKNOWN, WRONG_KEY = "Agent does not exist", "Invalid key"
"""To the letter: the agent ends its process when it reads one of them, and retries after anything else."""


class Login:
    """Logs agents in and recognises them afterwards."""

    def __init__(
        self,
        agents: Agents,
        tokens: Tokens,
        hasher: Hasher,
        clock: Clock,
        store: Store,
        attempts: Attempts | None = None,
    ) -> None:
        self._agents, self._tokens, self._hasher, self._clock, self._store = agents, tokens, hasher, clock, store
        self._attempts = attempts or Attempts(per_address=FAILURES_PER_MINUTE)
        self._signing = trio.CapacityLimiter(1)

    async def login(
        self, uuid: str, secret: str, *, peer: str, facts: Mapping[str, Json] | None = None
    ) -> tuple[str, Agent]:
        """A token, and the agent as it was before. ``peer`` is its address; ``facts`` go to `Agents.note_login`.

        Raises CommsError: 403 unknown or revoked, 401 wrong key, 429 an address that failed too often, 503.
        """
        found = await self._agents.credentials(uuid) if is_uuid(uuid) else None
        if not await self._is_key_right(found, secret, peer):
            raise await self._failed(uuid, peer, is_known=found is not None)
        # Hashing may have taken its time: what counts is how things are now.
        fresh = await self._agents.credentials(uuid)
        if fresh is None or found is None or fresh.key_hash != found.key_hash:
            raise await self._failed(uuid, peer, is_known=fresh is not None)
        agent = fresh.agent
        if agent.status is AgentStatus.REVOKED:
            raise await self._shut_out(agent, peer, CommsError(403, "revoked", "Agent is revoked"))
        if self._is_closed(agent.tenant):
            raise await self._shut_out(agent, peer, CommsError(403, "tenant_closed", "The agent's tenant is closed"))
        now = self._clock.now()
        await self._agents.note_login(uuid, now, facts or {})
        # In a thread, since a fleet of logins at once would hold up the loop for as long as all their signatures take.
        token = await trio.to_thread.run_sync(self._tokens.issue, agent, now, limiter=self._signing)
        return token, agent

    async def authenticate(self, authorization: str | None) -> tuple[Agent, Claims]:
        """The agent whose token is in an Authorization header. Raises CommsError 403 (2706, 2707), 503."""
        scheme, _, token = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not token:
            got = "another scheme" if scheme else "none"
            raise CommsError(403, "no_token", f"Authorization: expected Bearer and a token, got {got}", code=INVALID)
        claims = self._tokens.check(token.strip(), self._clock.now())
        agent = await self._agents.find(claims.uuid)
        if agent is None or agent.status is AgentStatus.REVOKED or agent.key_version != claims.key_version:
            raise invalid("it was revoked, or its agent no longer exists; log in again")
        if self._is_closed(agent.tenant):
            raise CommsError(403, "tenant_closed", "The agent's tenant is closed", code=INVALID)
        return agent, claims

    async def _is_key_right(self, found: Credentials | None, secret: str, peer: str) -> bool:
        """Takes as long for an agent that does not exist. Who is recognised is not held up by failing neighbours."""
        if found is not None and self._hasher.remembers(secret, found.key_hash):
            return True
        admit = partial(self._admit, peer)
        admit()
        return await self._hasher.verify(secret, NOBODY if found is None else found.key_hash, admit=admit)

    def _admit(self, peer: str) -> None:
        if not self._attempts.admits(peer, self._clock.now()):
            raise too_many_attempts()

    async def _failed(self, uuid: str, peer: str, *, is_known: bool) -> CommsError:
        """The refusal of a wrong key, after it was counted."""
        error = CommsError(401, "wrong_key", WRONG_KEY) if is_known else CommsError(403, "unknown_agent", UNKNOWN)
        if self._attempts.failed(peer, self._clock.now()):
            # Who mixes up the two fields would have its key kept for good.
            is_shown = is_known or not looks_like_key(uuid)
            await self._note(uuid[:SUBJECT_CHARS] if is_shown else f"{uuid[:4]}...", peer, error, None)
        return error

    async def _shut_out(self, agent: Agent, peer: str, error: CommsError) -> CommsError:
        """The refusal of one that knows its key, which is no guess: its neighbours do not have to wait for it."""
        if self._attempts.may_note(self._clock.now()):
            await self._note(agent.uuid, peer, error, agent.tenant)
        return error

    async def _note(self, uuid: str, peer: str, error: CommsError, tenant: str | None) -> None:
        await self._store.write(
            lambda tx: audit.record(tx, uuid, "agent.login", uuid, error.reason, tenant=tenant, address=peer)
        )

    def _is_closed(self, tenant: str) -> bool:
        return self._store.peek(partial(tenants.is_closed, name=tenant))
