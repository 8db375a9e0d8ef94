"""Certificates that TLS takes and we do not, written to the audit: some of them, whoever keeps coming."""

from __future__ import annotations

import logging
import sqlite3
from functools import partial

import trio

from osqbox import audit
from osqbox.exchange import Peer
from osqbox.store import Store

log = logging.getLogger(__name__)

WAITING = 64
ROWS_PER_S = 5
"""More are left to the listeners' counters: a client that tries again and again must not push out the history."""


class Refusals:
    """`note` is for `Listener.on_refused_peer`; `run` writes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sender, self._receiver = trio.open_memory_channel[tuple[str, Peer, str]](WAITING)

    def note(self, listener: str, peer: Peer, reason: str) -> None:
        """Of what finds no room, nothing is written."""
        try:
            self._sender.send_nowait((listener, peer, reason))
        except trio.WouldBlock:
            log.info("%s: refused %s from %s: %s", listener, peer.certificate_name, peer.address, reason)

    async def run(self) -> None:
        async for listener, peer, reason in self._receiver:
            write = partial(
                audit.record,
                actor=(peer.certificate_name or "").removeprefix("osqbox://"),
                action="connection.refuse",
                subject=listener,
                result=reason,
                tenant=peer.certificate_tenant,
                serial=peer.certificate_serial,
                address=peer.address,
            )
            try:
                await self._store.write(write)
            except sqlite3.Error:
                log.exception("a refused certificate could not be written to the audit")
            await trio.sleep(1 / ROWS_PER_S)
