"""``POST /api/v1/certificates`` on the agents listener: a one-time token and a CSR for a client certificate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from osqbox.attempts import Attempts
from osqbox.clock import Clock
from osqbox.errors import BadSetup, BadUsage, Refused, UserError
from osqbox.exchange import Peer, Request, Response
from osqbox.store import Store

from . import login
from .login import Token

PATH = "/api/v1/certificates"
BODY_BYTES = 32 * 1024
RETRY_AFTER = ("Retry-After", "60")


class _Ask(msgspec.Struct):
    token: str
    csr: str


class CertificateApi:
    """Implements `exchange.Handler` for one path. ``jobs`` is where the certificate is good for, such as ``host:9090``.

    ``directory`` is None where the client CA is the user's own: its key is not here, and nothing can be signed.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        directory: Path | None,
        ca: Callable[[], bytes],
        jobs: Callable[[], str | None],
        attempts: Attempts | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._directory = directory
        self._ca = ca
        self._jobs = jobs
        self._attempts = attempts or Attempts()
        self._signing = trio.CapacityLimiter(1)

    def serves(self, target: str) -> bool:
        return target.partition("?")[0].rstrip("/") == PATH

    def body_limit_bytes(self, method: str, target: str) -> int:  # noqa: ARG002 - the handler's shape
        return BODY_BYTES

    async def answer(self, request: Request) -> Response | None:
        """200 with ``certificate``, ``ca`` and ``jobs``; every refusal is a JSON object with ``error``."""
        try:
            return _json(200, await self._issue(request))
        except Refused as refused:
            return self.refuse(refused.status, refused.reason, refused.message, request.peer)
        except trio.ClosedResourceError:
            return self.refuse(503, "stopping", "the box is stopping", request.peer)

    def refuse(
        self,
        status: int,
        reason: str,
        message: str,
        peer: Peer | None,  # noqa: ARG002 - the handler's shape
        target: str | None = None,  # noqa: ARG002
    ) -> Response:
        response = _json(status, {"error": message, "reason": reason})
        if status == 429:
            response.headers = (RETRY_AFTER,)
        return response

    async def _issue(self, request: Request) -> dict[str, Any]:
        if request.method != "POST":
            raise Refused("wrong_method", f"expected POST, got {request.method[:16]}", status=405)
        address = request.peer.address
        self._attempts.admit(address, self._clock.now())
        ask = _parse(request.body)
        now = self._clock.now()
        # Known before it is used up, so that strangers give no CSR to parse, and a bad CSR costs no token.
        if self._store.peek(lambda db: login.find_token(db, ask.token, now)) is None:
            raise await self._refused(address)
        if self._jobs() is None:
            raise Refused("no_jobs", "this box runs no jobs, so there is nothing to log in to", status=503)
        csr = ask.csr.encode("utf-8", "replace")
        await self._in_thread(partial(_check, csr))
        token = await self._store.write(lambda tx: login.redeem(tx, ask.token))
        if token is None:
            raise await self._refused(address)
        return await self._signed(token, csr, address)

    async def _refused(self, address: str) -> Refused:
        if self._attempts.failed(address, self._clock.now()):
            await self._store.write(lambda tx: login.note_refused(tx, "token_refused", address))
        return Refused(
            "token_refused", "token: expected one that was not used and has not expired; ask for another", status=401
        )

    async def _signed(self, token: Token, csr: bytes, address: str) -> dict[str, Any]:
        with trio.CancelScope(shield=True):  # a client that leaves now has used its token
            try:
                cert, serial, expires_at = await self._in_thread(partial(self._sign, token, csr))
            except BadUsage as error:
                await self._unsigned(token, "revoked", address, is_usable=False)
                raise Refused("revoked", f"no certificate: {error}; ask for another token", status=403) from None
            except UserError as error:
                await self._unsigned(token, "cannot_sign", address, is_usable=True)
                raise Refused("cannot_sign", f"no certificate can be signed here: {error}", status=503) from None
            await self._store.write(lambda tx: login.note_issued(tx, token, serial, expires_at, address))
        return {"certificate": cert.decode(), "ca": self._ca().decode(), "jobs": self._jobs()}

    async def _unsigned(self, token: Token, why: str, address: str, *, is_usable: bool) -> None:
        await self._store.write(lambda tx: login.note_unsigned(tx, token, why, address, is_usable=is_usable))

    def _sign(self, token: Token, csr: bytes) -> tuple[bytes, int, float]:
        from osqbox.certs import sign_request

        order = token.order
        if self._directory is None:
            raise BadSetup("the client CA is not this box's own, so its key is not here")
        return sign_request(
            self._directory,
            csr,
            order.name,
            tenant=order.tenant,
            roles=order.roles,
            principals=order.principals,
            valid_s=order.valid_s,
            promised_at=token.created_at,
            now=self._clock.now(),
        )

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await trio.to_thread.run_sync(work, limiter=self._signing)


def _parse(body: bytes) -> _Ask:
    try:
        return msgspec.json.decode(body, type=_Ask)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Not the parser's own words: they may quote the token.
        raise Refused(
            "bad_body", 'body: expected {"token": "...", "csr": "-----BEGIN CERTIFICATE REQUEST-----..."}'
        ) from None


def _check(csr: bytes) -> None:
    from osqbox.certs import check_request

    try:
        check_request(csr)
    except BadUsage as error:
        raise Refused("bad_csr", str(error)) from None


def _json(status: int, value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), status=status)
