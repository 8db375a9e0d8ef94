"""One HTTP exchange as every agent-facing handler sees it, whichever transport carried it.

The inline HTTP/1.1 path and the ASGI path (HTTP/2) both build a `Request` and write a `Response`, so a handler
is written once and cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

Write: TypeAlias = Callable[[bytes], Awaitable[None]]
"""Writes a piece of a body, which is then on its way. Raises, or is cancelled, when the client has left or stalls."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a connection, as far as the transport could prove it."""

    address: str
    """IP address, without the port; ``unix`` for a client of a unix socket."""
    connection: str
    """Unique per accepted connection, over restarts of the box too."""
    certificate_name: str | None = None
    """Identity in the verified client certificate: its first URI SAN, else its common name."""
    certificate_serial: int | None = None
    certificate_tenant: str | None = None
    """Tenant written in the certificate's URI SAN by ``osqbox certs client --tenant``."""
    certificate_uris: tuple[str, ...] = ()
    """Every URI SAN of the verified client certificate, in order: the identity, then roles and principals."""
    certificate_common_names: tuple[str, ...] = ()
    certificate_authority: str | None = None
    """Key identifier of the CA that signed it (its authority key identifier), in hexadecimal."""
    certificate_expires_at: float | None = None
    """Seconds since the epoch."""
    tls_version: str | None = None
    """Such as ``TLSv1.3``; None when the connection is in the clear."""
    unix_user: int | None = None
    """User id of a unix socket's client, as the kernel knows it."""


@dataclass(slots=True)
class Request:
    method: str
    target: str
    """Path and query exactly as sent."""
    headers: dict[str, str]
    """Names in lower case; the last of repeated headers wins."""
    body: bytes
    """As sent: a gzip body is still compressed."""
    peer: Peer
    wait_gone: Callable[[], Awaitable[None]] = field(repr=False)
    """Returns when the client has left. Only for handlers that hold a request open; cancel-safe."""


@dataclass(slots=True)
class Response:
    body: bytes
    status: int = 200
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    close: bool = False
    """Close the connection after this answer."""
    stream: Callable[[Write], Awaitable[None]] | None = field(default=None, repr=False)
    """Writes the body, one piece at a time, instead of ``body``. When it raises, the connection is cut, so that the
    client does not take what came for the whole. Cancelled when the client leaves an answer without a length."""
    length_bytes: int | None = None
    """What ``stream`` will write in all; None: nobody knows."""


class Handler(Protocol):
    """What a listener needs to answer agents."""

    def body_limit_bytes(self, method: str, target: str) -> int:
        """Largest body accepted for this request, known before a byte of it is read."""
        ...

    async def answer(self, request: Request) -> Response | None:
        """The answer; None drops the connection without one. Never raises but for cancellation."""
        ...

    def refuse(
        self, status: int, reason: str, message: str, peer: Peer | None, target: str | None = None
    ) -> Response | None:
        """The answer to something that never became a Request (bad HTTP, too large, too slow).

        None drops the connection without an answer, which some targets need.
        """
        ...
